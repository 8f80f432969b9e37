"""``python -m amlaunch.containers.node_setup JSON``: the first seconds of a job, once on each of its nodes, before any container starts.

What only a node knows is looked at here, and said in one line that names the
node and the fix: whether the runtime is there, the image, what is mounted, room,
the GPU's driver, the processor. Then the image is brought there, once for all
tasks. Standard library only, with whatever Python the node has.
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
from amlaunch.containers.runtimes.catalog import OF_SRUN, PROGRAMS
from amlaunch.containers.runtimes.docker import tag_of
from amlaunch.containers.runtimes.environment import of_runtime
from amlaunch.containers.start_failures import FAILURES, UNKNOWN, Failure, advice, failure_of

SILENT_SECONDS = 60.0
GRACE_SECONDS = 5.0
"""For what is told to end, before it is killed."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""How we are told to end: Slurm's steps by SIGUSR1, too."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le"}
"""The kernel's words, and those of images."""
BRINGS_OLDER_DRIVERS_ALONG = ("pyxis", "enroot", "docker")
"""Their libnvidia-container uses the image's compatibility libraries by itself, and says "unsatisfied condition" where that is not enough."""
KINDS = {failure.kind: failure for failure in FAILURES}


def start(arguments: Sequence[str]) -> int:
    """:func:`main` in a process of its own, with the environment of whatever starts the containers: it looks where they look, and ends with all that it began."""
    spec = json.loads(arguments[0])
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    for number in STOPS:
        signal.signal(number, _end)
    if spec.get("parent"):
        _when_parent_ends(signal.SIGTERM)
        if os.getppid() != spec["parent"]:  # it ended before the call above
            return 1
    if spec["runtime"] not in OF_SRUN:  # of those nothing is started here
        kept = {**{name: os.environ[name] for name in spec["passed"] if name in os.environ}, **of_runtime(os.environ)}
        os.environ.clear()
        os.environ.update(kept)
    return main(arguments)


def _end(number: int, _: Any) -> None:
    """End our process group: what fetches an image would go on for nobody, beside the next that fetches it."""
    for one in STOPS:
        signal.signal(one, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    ends = time.monotonic() + GRACE_SECONDS
    with suppress(ChildProcessError):
        while time.monotonic() < ends:
            os.waitpid(-1, os.WNOHANG)
            time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)  # and so ourselves


def _when_parent_ends(number: int) -> None:
    """Have the kernel send us a signal then, where Python can ask for it."""
    with suppress(ImportError, OSError, AttributeError):
        import ctypes  # a small Python of a node may have none

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def main(arguments: Sequence[str]) -> int:
    """0: containers can start here; 1 otherwise, with the reason in the last line, and in a file for the driver."""
    spec = json.loads(arguments[0])
    for kind, words in check(spec):
        return refuse(spec, KINDS[kind], words)
    said = prepare(spec)
    if said is None:
        return 0
    found = failure_of(said)
    failure, line = found or (UNKNOWN, next(reversed([line for line in said.splitlines() if line.strip()] or [""])))
    return refuse(spec, failure, line)


def refuse(spec: Mapping[str, Any], failure: Failure, words: str) -> int:
    """A line for people, and a file for the driver: srun and the tasks of other nodes write into the midst of lines."""
    reason = f"{host()}: {failure.kind} ({spec['image']}){': ' + words if words else ''}; {advice(failure, spec['runtime'], spec['image'])}"
    print(reason, file=sys.stderr, flush=True)
    verdict = {
        "kind": failure.kind,
        "host": host(),
        "again": failure.again,
        "elsewhere": failure.elsewhere,
        "reason": reason,
    }
    with suppress(OSError):  # a node that does not see the folder: the driver says that it was not looked at
        half = Path(spec["verdicts"], f".{host()}.tmp")
        half.write_text(json.dumps(verdict))
        half.replace(half.with_name(f"{host()}.json"))
    return 1


def verdict_of(folder: Path) -> dict[str, Any] | None:
    """The verdict of a node that refused, of those that left one in ``folder``; None where none did."""
    for file in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError):
            return dict(json.loads(file.read_text()))
    return None


def host() -> str:
    """This node, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def check(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """``(kind of failure, what is wrong)`` of what can be seen before anything is started."""
    program = PROGRAMS[spec["runtime"]]
    if not shutil.which(program):
        yield "no runtime", f"{program} is not installed (or not in PATH)"
    image = spec.get("path")
    if image and not os.path.exists(image):
        yield "no such image", f"there is no {image} here"
    elif image and not os.access(image, os.R_OK):
        yield "no such image", f"{image} cannot be read by {os.environ.get('USER', os.getuid())}"
    for source in spec["mounts"]:
        if not os.path.exists(source):
            yield "mount", f"there is no {source} to mount"
    wanted, mine = (
        spec.get("architectures") or [spec.get("architecture")],
        ARCHITECTURES.get(platform.machine(), platform.machine()),
    )
    if wanted != [None] and mine not in wanted:
        yield "wrong architecture", f"the image is for {' and '.join(wanted)}, the node is {mine}"
    yield from _driver(spec)
    yield from _space(spec)


def _driver(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """``cuda``: the newest CUDA that the image's libraries are of, where it is known."""
    wanted = re.match(r"(\d+)\.(\d+)", str(spec.get("cuda") or ""))
    if not wanted or not spec.get("gpus") or spec.get("entrypoint") or spec["runtime"] in BRINGS_OLDER_DRIVERS_ALONG:
        return
    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    has = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", said)
    # Within a major version any driver of it will do (CUDA's minor version compatibility).
    if has and int(has[1]) < int(wanted[1]):
        yield "driver too old", f"the image has CUDA {wanted[0]}, the driver knows CUDA {has[1]}.{has[2]} at most"


def _space(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where the image has to be brought here first: the folders that the runtime writes to. pyxis brings it at each start."""
    if not spec.get("prepare") and spec["runtime"] != "pyxis":
        return
    image = parse(spec["path"] or spec["image"])
    if disk_space.has(spec["runtime"], tag_of(image)):
        return
    look = disk_space.at_start(spec["runtime"], image, spec.get("bytes"), os.environ)
    for lack in disk_space.lacks(look.phases):
        doubt = look.doubt or ("" if lack.certain else "unless its files compress less than most")
        words = f"the disk of {lack.folders} has {lack.free / 1e9:.1f} GB free, and {lack.what} will take about {lack.size / 1e9:.1f} GB there"
        if not doubt:
            yield "no space for the image", words
        else:
            print(f"{host()}: {words}, {doubt}", flush=True)


def prepare(spec: Mapping[str, Any]) -> str | None:
    """Run the commands that bring the image here, one job at a time on this node; what they said where one failed."""
    commands = spec.get("prepare") or []
    if not commands:
        return None
    with open(private_folder() / f"{hashlib.sha256(spec['image'].encode()).hexdigest()[:16]}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for command in commands:
            said = _run(command, f"{host()}: bringing {spec['image']} here with {spec['runtime']}")
            if said is not None:
                return said
    return None


def private_folder() -> Path:
    """A folder of this node that is ours alone: the same for all of our jobs, unless somebody else took its name."""
    folder = Path(tempfile.gettempdir(), f"amlaunch-node-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="amlaunch-node-"))
    return folder


def _run(command: Sequence[str], what: str) -> str | None:
    """A command's own words where it fails; a line now and then while it takes long."""
    began = spoke = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: _when_parent_ends(signal.SIGKILL),
        )
        while process.poll() is None:
            time.sleep(0.05)
            if time.monotonic() - spoke > SILENT_SECONDS:
                spoke = time.monotonic()
                print(f"{what} ({spoke - began:.0f} s so far)", flush=True)
        output.seek(0)
        said = output.read()
    if process.returncode:
        print(said, file=sys.stderr, flush=True)
    elif time.monotonic() - began > 2:
        print(f"{what}: took {time.monotonic() - began:.0f} s", flush=True)
    return said or f"exit code {process.returncode}" if process.returncode else None


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
