"""In which image a stage's command runs: each runtime turns a command into an argv, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from containers import none
from containers.image import Image

__all__ = ["RUNTIMES", "Image", "launch"]

RUNTIMES: dict[str, Callable[[Image, Sequence[str]], tuple[list[str], dict[str, str]]]] = {"none": none.launch}
"""One module a runtime."""


def launch(runtime: str, image: Image, command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """``(argv, extra environment)`` that runs ``command`` in ``image`` with ``runtime``.

    Raises ValueError for a runtime that is not known.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown container runtime {runtime!r}; known: {', '.join(RUNTIMES)}")
    return RUNTIMES[runtime](image, command)
