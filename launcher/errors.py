"""Errors of the launcher: Slurm's own, and a collector that reports the problems of several checks together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.section_checks import raise_problems


class SlurmError(Exception):
    """A command of Slurm failed, is missing, or did not answer in time; the message is its own."""

    def __init__(self, command: str, message: str):
        super().__init__(f"{command}: {message}")
        self.command = command
        self.message = message


class ErrorCollector:
    """Collects the lines of every BadInput; :meth:`refuse` raises them together."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Takes over what is raised inside, and goes on. A silent Slurm is raised unless something is wrong already."""
        try:
            yield
        except BadInput as error:
            self.add(str(error).splitlines())
        except SlurmError as error:
            if not self.found:
                raise
            self.add([str(error)])

    def add(self, lines: Iterable[str]) -> None:
        """Note further problems, a line each."""
        self.found += lines

    def refuse(self) -> None:
        """Raises BadInput with all of them, each once, if there are any."""
        raise_problems(self.found)
