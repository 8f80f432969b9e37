"""How amlaunch's own Python processes are started, and what keeps them from outliving their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from contextlib import suppress

PARENT_VARIABLE = "AMLAUNCH_PARENT_PID"
STDIN_VARIABLE = "AMLAUNCH_LIVES_ON_STDIN"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def python_command(module: str, python: str | None = None, *, any_version: bool = False) -> list[str]:
    """The argv that runs ``module`` without the current folder on ``sys.path``.

    Our packages have plain names (``trainer``, ``launcher``); a user's own
    ``trainer.py`` in the folder they work in must not take their place.
    ``-P`` does that from Python 3.11 on; before, and where ``python`` may be of
    ``any_version``, the path entry is dropped by hand (where PYTHONSAFEPATH has
    not kept it away already: then the first one is the run's code).
    """
    python = python or sys.executable
    if sys.version_info >= (3, 11) and not any_version:
        return [python, "-P", "-u", "-m", module]
    start = f"import sys, runpy; sys.path[:1] == [''] and sys.path.pop(0); sys.argv[0] = {module!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [python, "-u", "-c", start]


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, where the parent asked for that.

    The parent sets ``AMLAUNCH_PARENT_PID`` to its own pid. A rank whose driver
    was killed would otherwise train on unseen and collide with its successor.
    In a container that a daemon started there is no such parent: what started it
    holds our standard input open instead (``AMLAUNCH_LIVES_ON_STDIN``). Linux only; elsewhere, and in a container with its own pids, a no-op.
    """
    if os.environ.pop(STDIN_VARIABLE, None):
        die_with_stdin()
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    end_with_parent()
    if os.getppid() != int(parent):  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (of a child: ``preexec_fn``). A no-op elsewhere than on Linux."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def die_with_stdin() -> None:
    """End this process when its standard input does: nobody waits for it any more."""
    handle = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # children are not to read from it

    def wait() -> None:
        with suppress(OSError):
            while os.read(handle, 1024):
                pass
        os._exit(128 + signal.SIGKILL)  # a signal to oneself would mean nothing to the first process of a container

    threading.Thread(target=wait, name="amlaunch-stdin", daemon=True).start()
