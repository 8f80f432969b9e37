"""How a rank ends: which errors are said in one line, by whom, and with which exit code.

Standard library only, for it guards the imports of torch too.
"""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from amlaunch.recipes.errors import BAD_INPUT, FAILED, INTERRUPTED, BadInput
from amlaunch.trainer.process.rank_environment import rank_of


class TrainingFailed(Exception):
    """Training cannot go on, and the message says why; all ranks raise it together. Exit code 1."""


class LocalBadInput(BadInput):
    """Bad input that only this rank has seen, and so must name itself."""


def run_guarded(work: Callable[[], int]) -> int:
    """The exit code of ``work``; errors are said on stderr, once for all ranks where all have the same."""
    rank = rank_of(os.environ)
    try:
        return work()
    except BadInput as error:
        if rank == 0 or isinstance(error, LocalBadInput):
            print_error(f"error: {error}")
        return BAD_INPUT
    except TrainingFailed as error:
        if rank == 0:
            print_error(f"error: {error}")
        return FAILED
    except KeyboardInterrupt:  # a second Ctrl-C, or one while nothing is trained
        return INTERRUPTED
    except Exception:
        print_error(f"rank {rank} on {platform.node()} failed:\n{traceback.format_exc()}")
        return FAILED


def print_error(text: str) -> None:
    """A line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def exit_process(code: int) -> NoReturn:
    """End the process without torch's own clean-up, which has nothing left to save.

    After an error it can wait forever for ranks that are gone; after a clean
    end it aborts now and then ("terminate called without an active exception",
    1 of 25 runs of two gloo ranks, torch 2.13): a finished rank that exits -6.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
