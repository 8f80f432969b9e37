"""Start amlaunch's own Python processes, and end them with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from contextlib import suppress

PARENT_VARIABLE = "AMLAUNCH_PARENT_PID"
STDIN_VARIABLE = "AMLAUNCH_LIVES_ON_STDIN"
PR_SET_PDEATHSIG = 1
"""prctl(2), ``linux/prctl.h``."""

RUN_MODULE = (
    "import sys, runpy; sys.path[:1] == [''] and sys.path.pop(0); sys.argv[0] = {module!r}; "
    "runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)


def python_command(module: str, python: str | None = None, *, any_version: bool = False) -> list[str]:
    """Return the argv that runs ``module`` without the current folder on ``sys.path``.

    A user's own ``numpy.py`` in the folder they work in must not shadow the package.
    Python 3.11 and later have ``-P`` for that. For earlier versions, and if ``python`` may be of ``any_version``,
    the command removes the path entry itself (unless PYTHONSAFEPATH did: then the first entry is the run's code).
    """
    python = python or sys.executable
    if sys.version_info >= (3, 11) and not any_version:
        return [python, "-P", "-u", "-m", module]
    return [python, "-u", "-c", RUN_MODULE.format(module=module)]


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, if the parent asked for it.

    The parent asks by setting ``AMLAUNCH_PARENT_PID`` to its own pid: a rank that outlives its driver would train on
    unseen and collide with its successor. In a container that a daemon started, our parent is not the driver; there
    the driver holds our standard input open (``AMLAUNCH_LIVES_ON_STDIN``). Does nothing outside Linux, and in a
    container with a pid namespace.
    """
    if os.environ.pop(STDIN_VARIABLE, None):
        exit_when_stdin_closes()
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    kill_when_parent_dies()
    # The parent may have died before the call above.
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def kill_when_parent_dies() -> None:
    """Have the kernel kill this process when its parent dies; usable as ``preexec_fn``. Does nothing outside Linux."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def exit_when_stdin_closes() -> None:
    """End this process as soon as its standard input closes: then nobody waits for it any more."""
    handle = os.dup(0)
    # Children must not read from it.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def wait() -> None:
        with suppress(OSError):
            while os.read(handle, 1024):
                pass
        # The first process of a container ignores signals that it sends to itself.
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=wait, name="amlaunch-stdin", daemon=True).start()
