"""What went wrong outside the recipe."""

from __future__ import annotations


class Failure(Exception):
    """A machine, a disk or a network let us down; the message says what, and the same command may succeed later.

    Unlike :class:`amlaunch.recipes.errors.BadInput`, worth a retry: exit code 1, without a traceback.
    """


def what_the_disk_says(error: OSError) -> str:
    """An error of the system in words, with its file."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
