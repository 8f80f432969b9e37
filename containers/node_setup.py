"""Prepare a node for containers: ``python -m amlaunch.containers.node_setup JSON`` runs once on each node of a job.

It checks what only the node knows (runtime, image, mounts, free space, driver, processor) and reports a problem in one
line that names the node and the fix. Then it brings the image to the node, once for all tasks. Standard library only,
for whatever Python the node has.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from amlaunch.containers import disk_space
from amlaunch.containers.images.reference import parse
from amlaunch.containers.runtimes.catalog import PROGRAMS, SRUN_RUNTIMES
from amlaunch.containers.runtimes.environment import runtime_variables
from amlaunch.containers.start_failures import FAILURES_BY_KIND, UNKNOWN_FAILURE, StartFailure, advice, failure_of

PROGRESS_SECONDS = 60.0
"""Interval between lines about a command that takes long."""
GRACE_SECONDS = 5.0
"""Time between the request to end and the kill."""
SHOWN_SECONDS = 2.0
"""Commands that take longer are reported when they end."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Requests to end; Slurm sends SIGUSR1 to its steps, too."""
# From linux/prctl.h.
PR_SET_PDEATHSIG = 1
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le"}
"""The kernel's names of processors, and those that images use."""
USE_COMPATIBILITY_LIBRARIES = ("pyxis", "enroot", "docker")
"""Runtimes whose libnvidia-container uses an image's CUDA compatibility libraries, and reports a driver that is too old
even for them."""


def start(arguments: Sequence[str]) -> int:
    """Run :func:`main` as a process group of its own, in the environment that the runtime will have.

    So it looks where the runtime looks, and everything that it started ends with it.
    """
    spec = json.loads(arguments[0])
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    for number in STOP_SIGNALS:
        signal.signal(number, _end_group)
    if spec.get("parent"):
        _signal_when_parent_ends(signal.SIGTERM)
        # The parent may have ended before that call.
        if os.getppid() != spec["parent"]:
            return 1
    # srun's own runtimes are not started from here.
    if spec["runtime"] not in SRUN_RUNTIMES:
        passed = {name: os.environ[name] for name in spec["passed"] if name in os.environ}
        env = {**passed, **runtime_variables(os.environ)}
        os.environ.clear()
        os.environ.update(env)
    return main(arguments)


def _end_group(number: int, _: Any) -> None:
    """End the process group, so that no orphaned fetch runs beside the next attempt's fetch."""
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            os.waitpid(-1, os.WNOHANG)
            time.sleep(0.05)
    # Ends this process, too.
    os.killpg(0, signal.SIGKILL)


def _signal_when_parent_ends(number: int) -> None:
    """Ask the kernel to send this process a signal when its parent ends, if Python can."""
    with suppress(ImportError, OSError, AttributeError):
        # Missing in some minimal Pythons.
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def main(arguments: Sequence[str]) -> int:
    """Check the node and bring the image there.

    Returns 0 if containers can start here. Otherwise returns 1, with the reason in the last line and in a file for the
    driver.
    """
    spec = json.loads(arguments[0])
    for kind, problem in check(spec):
        return refuse(spec, FAILURES_BY_KIND[kind], problem)
    output = prepare(spec)
    if output is None:
        return 0
    failed = failure_of(output)
    if failed:
        return refuse(spec, *failed)
    lines = [line for line in output.splitlines() if line.strip()]
    return refuse(spec, UNKNOWN_FAILURE, lines[-1] if lines else "")


def refuse(spec: Mapping[str, Any], failure: StartFailure, problem: str) -> int:
    """Print the reason, and write it to a file for the driver, because other output may cut the line."""
    details = f": {problem}" if problem else ""
    remedy = advice(failure, spec["runtime"], spec["image"])
    reason = f"{host()}: {failure.kind} ({spec['image']}){details}; {remedy}"
    print(reason, file=sys.stderr, flush=True)
    verdict = {
        "kind": failure.kind,
        "host": host(),
        "again": failure.restart,
        "elsewhere": failure.avoid_host,
        "reason": reason,
    }
    # A node may not see the folder; the driver then reports that it could not be checked.
    with suppress(OSError):
        temporary = Path(spec["verdicts"], f".{host()}.tmp")
        temporary.write_text(json.dumps(verdict))
        temporary.replace(temporary.with_name(f"{host()}.json"))
    return 1


def verdict_of(folder: Path) -> dict[str, Any] | None:
    """Return the verdict that a node left in ``folder`` when it refused; None if none did."""
    for file in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError):
            return dict(json.loads(file.read_text()))
    return None


def host() -> str:
    """Return this node's name, as Slurm knows it."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def check(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield ``(kind of failure, problem)`` for everything that can be seen before the runtime starts."""
    program = PROGRAMS[spec["runtime"]]
    if not shutil.which(program):
        yield "no runtime", f"{program} is not installed, or not in PATH"
    image = spec.get("path")
    if image and not os.path.exists(image):
        yield "no such image", f"{image} does not exist on this node"
    elif image and not os.access(image, os.R_OK):
        yield "no such image", f"{os.environ.get('USER', os.getuid())} has no permission to read {image}"
    for source in spec["mounts"]:
        if not os.path.exists(source):
            yield "mount failed", f"{source} does not exist on this node"
    yield from _check_architecture(spec)
    yield from _check_driver(spec)
    yield from _check_space(spec)


def _check_architecture(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    available = spec.get("architectures") or [spec.get("architecture")]
    architecture = ARCHITECTURES.get(platform.machine(), platform.machine())
    if available != [None] and architecture not in available:
        yield "wrong architecture", f"the image is for {' and '.join(available)}, the node is {architecture}"


def _check_driver(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Compare the driver with ``cuda``, the version of the image's libraries, if it is known."""
    image_cuda = re.match(r"(\d+)\.(\d+)", str(spec.get("cuda") or ""))
    is_handled = spec.get("entrypoint") or spec["runtime"] in USE_COMPATIBILITY_LIBRARIES
    if not image_cuda or not spec.get("gpus") or is_handled:
        return
    try:
        output = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    driver_cuda = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", output)
    # Within a major version every driver serves (CUDA's minor version compatibility).
    if driver_cuda and int(driver_cuda[1]) < int(image_cuda[1]):
        supported = f"{driver_cuda[1]}.{driver_cuda[2]}"
        yield "driver too old", f"the image has CUDA {image_cuda[0]}, the driver supports CUDA {supported} at most"


def _check_space(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Check the folders that the runtime unpacks the image in, if this job has to bring it here."""
    if not spec.get("prepare"):
        return
    image = parse(spec["path"] or spec["image"])
    for shortage in disk_space.node_shortages(spec["runtime"], image, spec.get("bytes"), os.environ):
        yield (
            "no space for the image",
            f"{shortage.folder} has {shortage.free / 1e9:.1f} GB free, and the image needs at least "
            f"{shortage.needed / 1e9:.1f} GB there",
        )


def prepare(spec: Mapping[str, Any]) -> str | None:
    """Run the commands that bring the image here, one job at a time on this node.

    Returns None, or the output of the command that failed.
    """
    commands = spec.get("prepare") or []
    if not commands:
        return None
    lock = private_folder() / f"{hashlib.sha256(spec['image'].encode()).hexdigest()[:16]}.lock"
    with open(lock, "w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        for command in commands:
            output = _run(command, f"{host()}: preparing {spec['image']} with {spec['runtime']}")
            if output is not None:
                return output
    return None


def private_folder() -> Path:
    """Return a folder on this node that only this user can write; their jobs share it unless its name is taken."""
    folder = Path(tempfile.gettempdir(), f"amlaunch-node-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="amlaunch-node-"))
    return folder


def _run(command: Sequence[str], title: str) -> str | None:
    """Run a command, with a line now and then if it takes long; return its output if it fails, else None."""
    started = reported = time.monotonic()
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: _signal_when_parent_ends(signal.SIGKILL),
        )
        while process.poll() is None:
            time.sleep(0.05)
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                print(f"{title} ({reported - started:.0f} s so far)", flush=True)
        file.seek(0)
        output = file.read()
    seconds = time.monotonic() - started
    if process.returncode:
        print(output, file=sys.stderr, flush=True)
        return output or f"exit code {process.returncode}"
    if seconds > SHOWN_SECONDS:
        print(f"{title}: took {seconds:.0f} s", flush=True)
    return None


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
