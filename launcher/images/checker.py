"""Start an image and read what it contains (containers/image_probe.py); :mod:`probe_findings` judges the result."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amlaunch import containers
from amlaunch.containers import start_failures
from amlaunch.containers.image_probe import MARK
from amlaunch.containers.images import credentials
from amlaunch.containers.runtimes import catalog
from amlaunch.containers.runtimes.environment import runtime_variables
from amlaunch.containers.runtimes.launch import ContainerSpec, Launch, Mount
from amlaunch.containers.runtimes.slurm_oci import BUNDLE
from amlaunch.launcher.display import wording
from amlaunch.launcher.images.tools import ToolFailed, content_of
from amlaunch.launcher.planning.container_plan import SiteRuntimes
from amlaunch.launcher.planning.partitions import choose_partition
from amlaunch.launcher.runs.packages import canonical_name
from amlaunch.launcher.slurm import client
from amlaunch.launcher.specs.cluster_profile import Cluster
from amlaunch.launcher.specs.machine import this_machine, user_variables
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import write_private
from amlaunch.recipes.python_process import kill_when_parent_dies
from amlaunch.recipes.suggestions import did_you_mean

PROBE = Path(containers.__file__).with_name("image_probe.py")
CHECK_MINUTES = 15
DEFAULT_CHECK_MEM = "4G"
"""Memory of the job if the profile sets none: importing torch alone takes more than many sites' default per CPU."""
PULL_TIMEOUT_SECONDS = 3600
STOP_TIMEOUT_SECONDS = 10
MAX_OUTPUT_LINES = 6
"""Lines of a runtime's output that an error quotes."""


@dataclass(frozen=True)
class ProbeStart:
    """The start of the probe in an image."""

    runtime: str
    launch: Launch
    srun: tuple[str, ...] = ()
    """srun with its options, to check on a node of a cluster; empty for this machine."""
    setup: tuple[str, ...] = ()
    """Shell lines that run first on that node."""
    runtime_env: tuple[str, ...] = ()
    """Names of more variables that the site passes to the runtime."""


def container_site(cluster: Cluster) -> SiteRuntimes:
    """Return a profile's settings for containers."""
    return SiteRuntimes((), True, cluster.profile.container, cluster.lines, cluster.source, cluster.profile.images)


def choose_runtime(image: catalog.Reference, requested: str | None, cluster: Cluster) -> str:
    """Choose the runtime for an image: the requested one, the profile's, or one that is installed. Raises BadInput."""
    if requested:
        return _check_runtime(requested, f"--runtime {requested}")
    profile_runtime = cluster.profile.container.runtime
    if profile_runtime not in ("auto", "none"):
        return _check_runtime(profile_runtime, f"{cluster.at(('container', 'runtime'))} {profile_runtime}")

    has_pyxis = cluster.profile.executor == "slurm" and "container-image" in client.step_options()
    available = [*(["pyxis"] if has_pyxis else []), *catalog.installed()]
    runtime = catalog.choose(image, available)
    if runtime is None:
        raise BadInput(
            f"no runtime on this machine can start {image.name} (installed: {', '.join(available) or 'none'}). "
            f"Install one of {', '.join(catalog.runtimes_for(image))}, or check on a node with --cluster NAME"
        )
    return runtime


def _check_runtime(runtime: str, where: str) -> str:
    known = [name for name in catalog.RUNTIMES if name != "none"]
    if runtime not in known:
        raise BadInput(f"{where}: unknown runtime; {did_you_mean(runtime, known)}")
    return runtime


def plan_start(
    image: catalog.Reference, runtime: str, mounts: Sequence[Mount], cluster: Cluster, gpus: int | None
) -> ProbeStart:
    """Return how to start the probe, with the same mounts and options as the site's runs. Raises BadInput."""
    on_slurm = cluster.profile.executor == "slurm"
    if runtime in catalog.SRUN_RUNTIMES and not on_slurm:
        raise BadInput(f"{runtime} starts images only in Slurm jobs; name a cluster with --cluster NAME")
    has_gpus = bool(gpus) or (not on_slurm and bool(this_machine().gpus))
    spec = ContainerSpec(
        image,
        tuple(mounts),
        passed=("CUDA_VISIBLE_DEVICES",),
        gpus=has_gpus,
        on_slurm=on_slurm,
        options=tuple(cluster.profile.container.options),
    )
    command = ["python3", "-c", PROBE.read_text(), *(mount.target for mount in mounts)]
    try:
        launch = catalog.launch(runtime, spec, command)
    except (ValueError, catalog.CannotLaunch) as error:
        raise BadInput(str(error)) from None
    return ProbeStart(
        runtime,
        launch,
        tuple(_srun_command(cluster, launch, gpus)) if on_slurm else (),
        () if launch.srun else tuple(cluster.profile.setup),
        tuple(cluster.profile.container.runtime_env),
    )


def _srun_command(cluster: Cluster, launch: Launch, gpus: int | None) -> Iterator[str]:
    """Yield srun with options for one task in the partition of the train stage. Raises BadInput and SlurmError."""
    stage = cluster.profile.stage("train")
    partition = choose_partition(client.partitions(), cluster, "train", gpus or 0)
    if (gpus or 0) > partition.gpus:
        available = f"{partition.gpus} GPU{'s' * (partition.gpus != 1)} each"
        raise BadInput(f"--gpus {gpus}: nodes of partition {partition.name} have {available}")
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
        ("mem", stage.mem or DEFAULT_CHECK_MEM),
        ("account", stage.account),
        ("qos", stage.qos),
    ):
        if value:
            yield f"--{name}={value}"
    if gpus:
        gpu_type = f"{cluster.profile.gpu_type}:" if cluster.profile.gpu_type else ""
        yield f"--gres=gpu:{gpu_type}{gpus}"
    yield from launch.srun


def run_probe(start: ProbeStart, reference: str, folder: Path, meter: Any) -> dict[str, Any]:
    """Start the image and return the probe's report. Raises ToolFailed with the end of the output if there is none.

    ``folder``: a folder that nodes see, for files that this start needs.
    """
    with ExitStack() as stack:
        if start.launch.bundle is not None:
            bundle = _write_bundle(start.launch.bundle, folder, stack)
            start = replace(start, srun=tuple(flag.replace(BUNDLE, bundle) for flag in start.srun))
        return _start_and_read(start, reference, meter)


def _write_bundle(bundle: Mapping[str, Any], folder: Path, stack: ExitStack) -> str:
    """Write an OCI bundle and return its folder, which ``stack`` removes."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle_folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".bundle-", dir=folder))
    Path(bundle_folder, "rootfs").mkdir()
    write_private(Path(bundle_folder, "config.json"), bundle)
    return bundle_folder


def _start_and_read(start: ProbeStart, reference: str, meter: Any) -> dict[str, Any]:
    env = {**user_variables(), **runtime_variables(os.environ, start.runtime_env), **start.launch.env}
    if not start.srun:
        for command in start.launch.prepare:
            title = f"{start.runtime} fetches the image"
            code, _, errors = _run(command, env, PULL_TIMEOUT_SECONDS, title, meter)
            if code:
                raise _failure(start.runtime, reference, errors)

    title = f"{start.runtime} starts the image"
    code, output, errors = _run(_command(start), env, CHECK_MINUTES * 60, title, meter, stdin=start.launch.stdin)
    line = next((line for line in output.splitlines() if line.startswith(MARK)), None)
    if line is None:
        text = f"{errors}\n{output}" if code else "the image started, but its python3 printed nothing"
        raise _failure(start.runtime, reference, text)
    report: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return report


def _command(start: ProbeStart) -> list[str]:
    """Return the command; on a node, one task both brings the image there and starts it."""
    if not start.srun:
        return list(start.launch.argv)
    lines = [*start.setup, *(shlex.join(command) for command in start.launch.prepare)]
    if not lines:
        return [*start.srun, *start.launch.argv]
    return [*start.srun, "bash", "-c", "\n".join(["set -e", *lines, f"exec {shlex.join(start.launch.argv)}"])]


def _run(
    command: Sequence[str], env: Mapping[str, str], seconds: float, title: str, meter: Any, *, stdin: bool = False
) -> tuple[int, str, str]:
    """Return ``(exit code, stdout, stderr)``. Raises ToolFailed if the program is missing or takes too long."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, meter(title, 0) as show:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=dict(env),
                start_new_session=True,
                preexec_fn=kill_when_parent_dies,
            )
        except OSError as error:
            raise ToolFailed(f"{command[0]}: {error.strerror}") from None
        try:
            deadline = time.monotonic() + seconds
            while process.poll() is None:
                show(0)
                if time.monotonic() > deadline:
                    hint = "; srun may be waiting for a node (see squeue --me)" if command[0] == "srun" else ""
                    raise ToolFailed(f"{title}: not finished after {wording.duration(seconds)}{hint}")
                time.sleep(0.1)
        finally:
            _end_group(process)
        return process.returncode, content_of(out), content_of(err)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the runtime and everything that it started."""
    if process.stdin:
        process.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_SECONDS)


def _failure(runtime: str, reference: str, output: str) -> ToolFailed:
    lines = [line for line in credentials.redact(output).splitlines() if line.strip()]
    text = "\n".join(lines)
    tool = "enroot" if runtime == "pyxis" else runtime
    explanation = credentials.explain_failure(tool, reference, text, os.environ)
    if "python3" in text and ("not found" in text or "no such file" in text.lower()):
        explanation = f"{reference} has no python3 in its PATH. Use an image with Python 3.10 or newer and torch"
    failed = start_failures.failure_of(text)
    if failed and not explanation:
        failure, line = failed
        explanation = f"{reference}: {failure.kind}: {line}. {start_failures.advice(failure, runtime, reference)}"
    end = "\n".join(lines[-MAX_OUTPUT_LINES:]) or "no output"
    if explanation:
        return ToolFailed(f"{explanation}\n{runtime} printed: {end}")
    return ToolFailed(f"{runtime} could not start {reference}: {end}")


# --- records --------------------------------------------------------------------------------------------


def probe_record(image: str, digest: str, runtime: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record to write beside the image."""
    return {"date": time.strftime("%Y-%m-%d"), "image": image, "digest": digest, "runtime": runtime, **report}


def vouched_record(image: str, names: str, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with packages that the user vouches for, added to an earlier record. Raises BadInput."""
    packages = {canonical_name(name) for name in names.replace(",", " ").split()}
    if not packages:
        raise BadInput("--has needs package names, for example --has tiktoken,datasets")
    vouched = earlier.get("said")
    known = vouched if isinstance(vouched, list) else []
    return {"date": time.strftime("%Y-%m-%d"), "image": image, **earlier, "said": sorted({*packages, *known})}
