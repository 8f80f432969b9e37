"""Errors of the launcher: Slurm's own, and a collector that reports the errors of several checks together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.section_checks import raise_problems

NO_ANSWER_MESSAGES = (
    "timed out",
    "timeout",
    "Zero Bytes",
    "connect",
    "contact",
    "unexpected message",
    "try again",
    "configuration source",
    "fetch config",
    "DNS SRV",
)
"""Parts of the messages of Slurm commands that did not reach the controller, or had no answer from it."""


class SlurmError(Exception):
    """A Slurm command failed or did not answer in time; ``message`` is its own, of one or several lines."""

    def __init__(self, command: str, message: str):
        super().__init__(f"{command}: {_one_line(command, message)}")
        self.command = command
        self.message = message

    @property
    def report(self) -> str:
        """The error in one line, for the user."""
        return str(self)


class SlurmNotInstalled(SlurmError):
    """This machine does not have a Slurm command."""

    def __init__(self, command: str):
        super().__init__(command, "not found; run amlaunch on a machine of the cluster, such as a login node")


class SlurmUnreachable(SlurmError):
    """A Slurm command did not reach the controller, or had no answer from it."""

    @property
    def report(self) -> str:
        """The error in one line, and what to do about it."""
        return f"Slurm did not answer ({self}). Check it with: amlaunch doctor"


class SlurmTimeout(SlurmUnreachable):
    """A Slurm command did not answer in time."""

    def __init__(self, command: str, seconds: float):
        super().__init__(command, f"no answer in {seconds:.0f} s")


def command_error(command: str, message: str) -> SlurmError:
    """Return the error for a command that failed with ``message``."""
    return SlurmUnreachable(command, message) if is_no_answer(message) else SlurmError(command, message)


def is_no_answer(message: str) -> bool:
    """Return True if a command's message says that it had no answer from the controller.

    Only the last line counts. A site's own text may come before it ("please contact support").
    """
    outcome = _last_line(message).lower()
    return any(text.lower() in outcome for text in NO_ANSWER_MESSAGES)


def _last_line(message: str) -> str:
    """Return the last line of a message, which names the outcome."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _one_line(command: str, message: str) -> str:
    """Return the outcome in a message without the command's own name."""
    return _last_line(message).removeprefix(f"{command}: ").removeprefix("error: ")


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
            self.add([error.report])

    def add(self, lines: Iterable[str]) -> None:
        """Add further errors, one line each."""
        self.errors += lines

    def raise_if_any(self) -> None:
        """Raise one BadInput with all errors, each once, if there are any."""
        raise_problems(self.errors)
