"""How amlaunch's own Python processes are started, and what keeps them from outliving their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT_VARIABLE = "AMLAUNCH_PARENT_PID"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def python_command(module: str, python: str | None = None, *, any_version: bool = False) -> list[str]:
    """The argv that runs ``module`` without the current folder on ``sys.path``.

    Our packages have plain names (``trainer``, ``launcher``); a user's own
    ``trainer.py`` in the folder they work in must not take their place.
    ``-P`` does that from Python 3.11 on; before, and where ``python`` may be of
    ``any_version``, the path entry is dropped by hand.
    """
    python = python or sys.executable
    if sys.version_info >= (3, 11) and not any_version:
        return [python, "-P", "-u", "-m", module]
    start = f"import sys, runpy; sys.path.pop(0); sys.argv[0] = {module!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [python, "-u", "-c", start]


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, where the parent asked for that.

    The parent sets ``AMLAUNCH_PARENT_PID`` to its own pid. A rank whose driver
    was killed would otherwise train on unseen and collide with its successor.
    Linux only; elsewhere, and in a container with its own pids, a no-op.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)
