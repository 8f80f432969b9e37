"""Errors that the recipe did not cause."""

from __future__ import annotations


class ExternalFailure(Exception):
    """A machine, a disk or a network failed; the message says how, and the same command may succeed later.

    Unlike :class:`amlaunch.recipes.errors.BadInput` it is worth a retry: exit code 1, without a traceback.
    """


def describe_os_error(error: OSError) -> str:
    """Return the operating system's message for ``error``, preceded by the file it concerns."""
    prefix = f"{error.filename}: " if error.filename else ""
    return f"{prefix}{error.strerror or error}"
