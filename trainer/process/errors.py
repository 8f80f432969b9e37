"""Exit codes and error output of one rank.

Uses only the standard library, because it also guards the imports of torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

from amlaunch.recipes.errors import BAD_INPUT, FAILED, INTERRUPTED, BadInput
from amlaunch.recipes.version import OLDEST_TORCH, is_torch_too_old
from amlaunch.trainer.process.rank_environment import rank_of


class TrainingFailed(Exception):
    """Training cannot continue and the message says why; all ranks raise it together. Exit code 1."""


class LocalBadInput(BadInput):
    """Bad input that only this rank has seen, so this rank must report it itself."""


class LocalTrainingFailed(TrainingFailed):
    """A failure that only this rank has seen, so this rank must report it itself. Exit code 1."""


def run_guarded(work: Callable[[], int]) -> int:
    """Run ``work`` and return its exit code, or print its error and return the error's exit code.

    Rank 0 alone prints an error that all ranks have.
    """
    rank = rank_of(os.environ)
    try:
        check_torch_release()
        return work()
    except BadInput as error:
        if rank == 0 or isinstance(error, LocalBadInput):
            print_error(f"error: {error}")
        return BAD_INPUT
    except TrainingFailed as error:
        if rank == 0 or isinstance(error, LocalTrainingFailed):
            print_error(f"error: {error}")
        return FAILED
    except KeyboardInterrupt:
        # A second Ctrl-C, or one outside the training loop.
        return INTERRUPTED
    except Exception:
        print_error(f"rank {rank} on {platform.node()} failed:\n{traceback.format_exc()}")
        return FAILED


def check_torch_release() -> None:
    """Raise BadInput if the installed torch is older than amlaunch supports; reads its metadata only."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return
    if is_torch_too_old(version):
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BadInput(
            f"{sys.executable} on {platform.node()} has torch {version}, but amlaunch needs torch {oldest} or newer; "
            "use a newer image (docs/containers.md lists them) or install a newer torch"
        )


def print_error(text: str) -> None:
    """Print ``text`` on stderr and flush it."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send stdout to stderr in this context, including what libraries print, to keep stdout for one report.

    Gloo of torch 2.8 prints a line for each group from C++.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def exit_process(code: int) -> NoReturn:
    """End the process without torch's own clean-up, which has nothing left to save.

    After an error the clean-up can wait forever for dead ranks. After a clean end it sometimes aborts ("terminate
    called without an active exception", 1 of 25 runs of two gloo ranks, torch 2.13), and a finished rank exits with -6.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
