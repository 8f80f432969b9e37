"""Start an image and read what it says of itself (containers/image_probe.py), then judge it. What is seen is written beside the image."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from amlaunch import containers
from amlaunch.containers.image_probe import MARK
from amlaunch.containers.images import credentials
from amlaunch.containers.images.image_facts import DRIVERS, of_check
from amlaunch.containers.runtimes import catalog
from amlaunch.containers.runtimes.environment import of_runtime
from amlaunch.containers.runtimes.launch import Image, Launch, Mount
from amlaunch.containers.runtimes.slurm_oci import BUNDLE
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.findings import BAD, OK, WARN, Finding
from amlaunch.launcher.images.tools import ToolFailed
from amlaunch.launcher.planning.partitions import choose_partition
from amlaunch.launcher.planning.stage_container import Available
from amlaunch.launcher.runs.packages import PYTHONS, canonical, too_old
from amlaunch.launcher.slurm import client
from amlaunch.launcher.specs.cluster_profile import Cluster
from amlaunch.launcher.specs.machine import this_machine, who
from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.files import write_private
from amlaunch.recipes.python_process import end_with_parent

PROBE = Path(containers.__file__).with_name("image_probe.py")
INSIDE = (
    "torch",
    "numpy",
    "safetensors",
    "pyyaml",
    "tiktoken",
    "pyarrow",
    "datasets",
    "transformers",
    "wandb",
    "tensorboard",
)
"""What recipes may need inside; pyyaml alone is copied for every run."""
MIN_SHM = 1 << 30
"""Docker's own 64 MB are too little for data loaders and NCCL (https://docs.nvidia.com/deeplearning/frameworks/user-guide)."""
CHECK_MINUTES = 15
CHECK_MEMORY = "4G"
"""Of the job, where the profile does not say: torch alone takes more than many sites give to a CPU."""
PULL_SECONDS = 3600


@dataclass(frozen=True)
class Start:
    """What starts the probe."""

    runtime: str
    launch: Launch
    srun: tuple[str, ...] = ()
    """srun with its own options, where a node of a cluster is looked at."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run first on that node."""
    runtime_env: tuple[str, ...] = ()
    """Variables that the site leaves the runtime with."""


def site_of(cluster: Cluster) -> Available:
    """What a profile says of containers."""
    return Available((), True, cluster.profile.container, cluster.lines, cluster.source, cluster.profile.images)


def choose_runtime(image: catalog.Reference, given: str | None, cluster: Cluster) -> str:
    """The site's runtime for an image. Raises BadInput with those that could start it."""
    if given:
        return _known(given, f"--runtime {given}")
    own = cluster.profile.container.runtime
    if own not in ("auto", "none"):
        return _known(own, f"{cluster.at(('container', 'runtime'))} {own}")
    pyxis = ["pyxis"] if cluster.profile.executor == "slurm" and "container-image" in client.step_options() else []
    found = catalog.choose(image, [*pyxis, *catalog.installed()])
    if found is None:
        able = ", ".join(catalog.able(image))
        there = ", ".join([*pyxis, *catalog.installed()]) or "none"
        raise BadInput(
            f"nothing here can start {image.name}: {able} could, the runtimes here are: {there}; --cluster NAME looks at a node instead"
        )
    return found


def _known(runtime: str, where: str) -> str:
    known = [name for name in catalog.RUNTIMES if name != "none"]
    if runtime not in known:
        raise BadInput(f"{where}: no such runtime; {did_you_mean(runtime, known)}")
    return runtime


def plan_start(
    image: catalog.Reference, runtime: str, mounts: Sequence[Mount], cluster: Cluster, gpus: int | None
) -> Start:
    """The command, as data, with the mounts and options that the site's runs have, too. Raises BadInput."""
    on_slurm = cluster.profile.executor == "slurm"
    if runtime in catalog.OF_SRUN and not on_slurm:
        raise BadInput(f"{runtime} starts images in jobs of Slurm alone: --cluster NAME says where")
    has_gpus = bool(gpus) or (not on_slurm and bool(this_machine().gpus))
    wanted = Image(
        image,
        tuple(mounts),
        passed=("CUDA_VISIBLE_DEVICES",),
        gpus=has_gpus,
        on_slurm=on_slurm,
        options=tuple(cluster.profile.container.options),
    )
    command = ["python3", "-c", PROBE.read_text(), *(mount.target for mount in mounts)]
    try:
        launch = catalog.launch(runtime, wanted, command)
    except (ValueError, catalog.CannotLaunch) as error:
        raise BadInput(str(error)) from None
    return Start(
        runtime,
        launch,
        tuple(_srun(cluster, launch, gpus)) if on_slurm else (),
        () if launch.srun else tuple(cluster.profile.setup),
        tuple(cluster.profile.container.runtime_env),
    )


def _srun(cluster: Cluster, launch: Launch, gpus: int | None) -> Iterator[str]:
    """A job of one task, where the profile sends training. Raises BadInput and SlurmError."""
    stage = cluster.profile.stage("train")
    partition = choose_partition(client.partitions(), cluster, "train", gpus or 0)
    if (gpus or 0) > partition.gpus:
        raise BadInput(f"--gpus {gpus}: a node of partition {partition.name} has {partition.gpus}")
    yield from (
        "srun",
        "--nodes=1",
        "--ntasks=1",
        f"--time={CHECK_MINUTES}",
        "--job-name=amlaunch-image-check",
        "--mpi=none",
        *cluster.profile.srun,
    )
    for name, value in (
        ("partition", partition.name),
        ("mem", stage.mem or CHECK_MEMORY),
        ("account", stage.account),
        ("qos", stage.qos),
    ):
        if value:
            yield f"--{name}={value}"
    if gpus:
        kind = f"{cluster.profile.gpu_type}:" if cluster.profile.gpu_type else ""
        yield f"--gres=gpu:{kind}{gpus}"
    yield from launch.srun


def carry_out(start: Start, reference: str, folder: Path, meter: Any) -> dict[str, Any]:
    """Start the image, and what the probe said. Raises ToolFailed with the last words where it said nothing.

    ``folder``: where nodes see, too, what is written for this start.
    """
    with ExitStack() as held:
        if start.launch.bundle is not None:
            start = replace(start, srun=tuple(_bundle(start.launch.bundle, folder, held, start.srun)))
        return _carry_out(start, reference, meter)


def _bundle(bundle: Mapping[str, Any], folder: Path, held: ExitStack, srun: Sequence[str]) -> Iterator[str]:
    """srun's flags with the folder of a bundle that is there until ``held`` ends."""
    folder.mkdir(parents=True, exist_ok=True)
    made = held.enter_context(tempfile.TemporaryDirectory(prefix=".bundle-", dir=folder))
    Path(made, "rootfs").mkdir()
    write_private(Path(made, "config.json"), bundle)
    yield from (flag.replace(BUNDLE, made) for flag in srun)


def _carry_out(start: Start, reference: str, meter: Any) -> dict[str, Any]:
    env = {**who(), **of_runtime(os.environ, start.runtime_env), **start.launch.env}
    if not start.srun:
        for command in start.launch.prepare:
            code, _, said = _run(command, env, PULL_SECONDS, f"{start.runtime} brings the image", meter)
            if code:
                raise _failure(start.runtime, reference, said)
    code, out, said = _run(
        _command(start), env, CHECK_MINUTES * 60, f"{start.runtime} starts the image", meter, stdin=start.launch.stdin
    )
    line = next((line for line in out.splitlines() if line.startswith(MARK)), None)
    if line is None:
        raise _failure(
            start.runtime, reference, f"{said}\n{out}" if code else "the image started, and its python3 said nothing"
        )
    found: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return found


def _command(start: Start) -> list[str]:
    """On a node, what brings the image there and what starts it are one task."""
    if not start.srun:
        return list(start.launch.argv)
    lines = [*start.setup, *(shlex.join(command) for command in start.launch.prepare)]
    if not lines:
        return [*start.srun, *start.launch.argv]
    return [*start.srun, "bash", "-c", "\n".join(["set -e", *lines, f"exec {shlex.join(start.launch.argv)}"])]


def _run(
    command: Sequence[str], env: Mapping[str, str], seconds: float, title: str, meter: Any, *, stdin: bool = False
) -> tuple[int, str, str]:
    """``(exit code, stdout, stderr)``. Raises ToolFailed where the program is missing or takes too long."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, meter(title, 0) as show:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=dict(env),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            raise ToolFailed(f"{command[0]}: {error.strerror}") from None
        try:
            ends = time.monotonic() + seconds
            while process.poll() is None:
                show(0)
                if time.monotonic() > ends:
                    waits = "; srun may still wait for a node (squeue --me says why)" if command[0] == "srun" else ""
                    raise ToolFailed(f"{title}: no end after {wording.duration(seconds)}{waits}")
                time.sleep(0.1)
        finally:
            _end(process)
        return process.returncode, _text(out), _text(err)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The runtime and all that it started."""
    if process.stdin:
        process.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _failure(runtime: str, reference: str, said: str) -> ToolFailed:
    lines = [line for line in credentials.without_secrets(said).splitlines() if line.strip()]
    text = "\n".join(lines)
    meaning = credentials.explain("enroot" if runtime == "pyxis" else runtime, reference, text, os.environ)
    if "python3" in text and ("not found" in text or "no such file" in text.lower()):
        meaning = (
            f"{reference} has no python3 in its search path; a training image brings Python 3.10 or newer and torch"
        )
    last = "\n".join(lines[-6:]) or "no word"
    return ToolFailed(f"{meaning}\n{runtime} said: {last}" if meaning else f"{runtime} could not start it: {last}")


def record(image: str, digest: str, runtime: str, seen: Mapping[str, Any]) -> dict[str, Any]:
    """What is written beside the image."""
    return {"date": time.strftime("%Y-%m-%d"), "image": image, "digest": digest, "runtime": runtime, **seen}


# --- verdicts -------------------------------------------------------------------------------------------


def findings(image: str, seen: Mapping[str, Any], gpus_asked: bool) -> Iterator[Finding]:
    """What a probe's words mean."""
    yield _python(seen)
    yield from _torch(image, seen)
    yield from _gpus(seen, gpus_asked)
    yield _machine(seen)
    yield from _memory(seen)
    for mount in seen.get("mounts") or []:
        yield _mount(mount)
    yield from _packages(image, seen)


def _python(seen: Mapping[str, Any]) -> Finding:
    version = str(seen.get("python", ""))
    text = f"{version} ({seen.get('executable')}), {seen.get('system') or 'of unknown origin'}"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < PYTHONS[0]:
        return Finding("Python", BAD, text, "amlaunch needs Python 3.10 or newer: take a newer image")
    newest = ".".join(map(str, PYTHONS[-1]))
    return (
        Finding("Python", WARN, text, f"amlaunch is tested with 3.10 to {newest}")
        if numbers > PYTHONS[-1]
        else Finding("Python", OK, text)
    )


def _torch(image: str, seen: Mapping[str, Any]) -> Iterator[Finding]:
    torch = seen.get("torch") or {}
    if "error" in torch:
        yield Finding(
            "torch",
            BAD,
            str(torch["error"]),
            "training needs it: take an image with PyTorch, such as nvcr.io/nvidia/pytorch",
        )
        return
    old = too_old("torch", str(torch.get("version", "")))
    yield Finding(
        "torch",
        BAD if old else OK,
        str(torch.get("version")),
        f"amlaunch needs {old}: take a newer image" if old else "",
    )
    if torch.get("cuda"):
        parts = [
            f"CUDA {torch['cuda']}",
            f"NCCL {torch.get('nccl') or torch.get('nccl_error', 'missing')}",
            f"cuDNN {cudnn_version(torch.get('cudnn'))}",
        ]
        yield Finding("CUDA", OK, ", ".join(parts))
    elif torch.get("hip"):
        yield Finding("ROCm", WARN, f"HIP {torch['hip']}", "amlaunch is made for NVIDIA's GPUs")
    else:
        yield Finding(
            "CUDA",
            WARN,
            "this torch is built for the CPU alone",
            "fine for tests; training on GPUs needs another image",
        )


def cudnn_version(number: Any) -> str:
    """``91002`` is 9.10.2, ``8902`` is 8.9.2 (cudnn_version.h)."""
    if not isinstance(number, int):
        return "missing"
    major, rest = (number // 10000, number % 10000) if number >= 90000 else (number // 1000, number % 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _gpus(seen: Mapping[str, Any], asked: bool) -> Iterator[Finding]:
    torch, driver, devices = seen.get("torch") or {}, seen.get("driver") or {}, seen.get("devices") or []
    cuda = torch.get("cuda")
    if driver.get("version"):
        problem = driver_problem(str(driver["version"]), str(cuda or ""), bool(torch.get("available")))
        more = f", up to CUDA {driver['cuda']}" if driver.get("cuda") else ""
        yield Finding("driver", BAD if problem else OK, f"{driver['version']}{more}", problem)
    gpus = torch.get("gpus") or []
    broken = [gpu for gpu in gpus if not gpu["works"]]
    names = ", ".join(dict.fromkeys(str(gpu["name"]) for gpu in gpus))
    if broken:
        yield Finding(
            "GPUs",
            BAD,
            f"{len(gpus)} x {names}; {len(broken)} do not work: {broken[0]['problem']}",
            "torch in this image may not be built for them",
        )
    elif gpus:
        yield Finding("GPUs", OK, f"{len(gpus)} x {names}")
    elif cuda and (devices or driver.get("version")):
        yield Finding(
            "GPUs",
            BAD,
            "the machine has GPUs, and torch in the image sees none",
            "the runtime must hand them in: nvidia-container-toolkit, or --nv, or CDI (docs/containers.md)",
        )
    else:
        yield Finding(
            "GPUs",
            WARN if asked else OK,
            f"none on {seen.get('host', 'this machine')}",
            "--cluster NAME --gpus 1 looks at a node that has them" if asked or cuda else "",
        )


def driver_problem(version: str, cuda: str, available: bool) -> str:
    """What to do where a driver is too old for an image's CUDA; empty: it is not, or torch works all the same (forward compatibility)."""
    major = cuda.split(".")[0]
    if available or not major.isdigit() or int(major) not in DRIVERS:
        return ""
    have = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    need = DRIVERS[int(major)]
    if have >= need:
        return ""
    older = max((one for one, least in DRIVERS.items() if have >= least), default=None)
    choice = f"take an image with CUDA {older}" if older else "take an older image"
    return f"CUDA {cuda} needs driver {need[0]}.{need[1]} or newer: {choice}, or have the driver updated"


def _machine(seen: Mapping[str, Any]) -> Finding:
    machine = str(seen.get("architecture"))
    if machine != platform.machine():
        return Finding(
            "machine", WARN, f"{machine}; this one is {platform.machine()}", "fine where the nodes are of that kind"
        )
    return Finding("machine", OK, f"{machine}, {seen.get('host')}, Linux {seen.get('kernel')}")


def _memory(seen: Mapping[str, Any]) -> Iterator[Finding]:
    size, limits = seen.get("shm_bytes"), seen.get("limits") or {}
    if isinstance(size, int):
        small = size < MIN_SHM
        yield Finding(
            "/dev/shm",
            WARN if small else OK,
            wording.size(size),
            "data loaders and NCCL want more: the host's (--ipc=host)" if small else "",
        )
    if seen.get("infiniband") and limits.get("memlock") is not None:
        yield Finding(
            "memlock",
            WARN,
            wording.size(limits["memlock"]),
            "InfiniBand wants it unlimited: ulimit -l on the node, --ulimit memlock=-1",
        )


def _mount(mount: Mapping[str, Any]) -> Finding:
    path, problem = str(mount.get("path")), str(mount.get("problem") or "")
    if not mount.get("there"):
        return Finding("mount", BAD, f"{path} is not there")
    if mount.get("writable"):
        free = f", {wording.size(mount['free_bytes'])} free" if mount.get("free_bytes") is not None else ""
        return Finding("mount", OK, f"{path} can be written{free}")
    return Finding(
        "mount",
        WARN,
        f"{path} cannot be written{f': {problem}' if problem else ''}",
        "fine for data that are only read",
    )


def _packages(image: str, seen: Mapping[str, Any]) -> Iterator[Finding]:
    facts = of_check(image, seen)
    there = [f"{name} {facts.version(name)}" for name in INSIDE if facts.has(name)]
    missing = [name for name in INSIDE if not facts.has(name)]
    yield Finding("packages", OK, ", ".join(there) or "none that recipes need")
    if missing:
        advice = "what is pure Python is copied for each run; submit tells what is missed"
        yield Finding("", OK, f"not in it: {', '.join(missing)}", advice)


def said(image: str, names: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """A record in which a user vouches for packages. Raises BadInput."""
    listed = sorted({canonical(name) for name in names.replace(",", " ").split()})
    if not listed:
        raise BadInput("--has: which packages? --has tiktoken,datasets")
    known = before.get("said")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "image": image,
        **before,
        "said": sorted({*listed, *(known if isinstance(known, list) else [])}),
    }


def as_json(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """For ``--json``."""
    return [dataclasses.asdict(one) for one in found]
