"""Errors of the launcher: Slurm's own, and a collector that reports the errors of several checks together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.section_checks import raise_problems


class SlurmError(Exception):
    """A Slurm command failed or did not answer in time; ``message`` is its own."""

    def __init__(self, command: str, message: str):
        super().__init__(f"{command}: {message}")
        self.command = command
        self.message = message


class SlurmNotInstalled(SlurmError):
    """This machine does not have a Slurm command."""

    def __init__(self, command: str):
        super().__init__(command, "not found; run amlaunch on a machine of the cluster, such as a login node")


class SlurmTimeout(SlurmError):
    """A Slurm command did not answer in time."""

    def __init__(self, command: str, seconds: float):
        super().__init__(command, f"no answer in {seconds:.0f} s")


class ErrorCollector:
    """Collects the lines of several BadInput; :meth:`raise_if_any` raises them together."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect a BadInput raised inside and continue. A SlurmError is raised unless there are errors already."""
        try:
            yield
        except BadInput as error:
            self.add(str(error).splitlines())
        except SlurmError as error:
            if not self.errors:
                raise
            self.add([str(error)])

    def add(self, lines: Iterable[str]) -> None:
        """Add further errors, one line each."""
        self.errors += lines

    def raise_if_any(self) -> None:
        """Raise one BadInput with all errors, each once, if there are any."""
        raise_problems(self.errors)
