"""Judge the facts that :mod:`amlaunch.launcher.doctor.probe` read: the machine, the site, a profile, GPUs."""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from amlaunch.launcher.checks.files_and_disk import MEMORY_FILE_SYSTEMS, MIN_FREE_INODES
from amlaunch.launcher.checks.torch_version import range_verdict
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.findings import BAD, OK, WARN, Finding
from amlaunch.launcher.doctor.probe import Folder, Host, SitePartition, SlurmSite
from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.planning.partitions import choose_partition
from amlaunch.launcher.runs.snapshot import package_root
from amlaunch.launcher.slurm import sbatch
from amlaunch.launcher.slurm.sbatch import Array, option_problems
from amlaunch.launcher.specs.cluster_profile import STAGES, Cluster, ClusterProfile
from amlaunch.launcher.specs.plan import Needs, Stage
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.suggestions import did_you_mean
from amlaunch.recipes.version import is_torch_too_old

LOW_FREE_BYTES = 10 * 10**9
"""Less free space than this barely holds one checkpoint of a larger model."""
MIN_SLURM_VERSION = (20, 2)
"""The first version with ``squeue --me``."""
MIN_JOB_AGE_SECONDS = 60
"""squeue must remember an ended job for longer than amlaunch waits between two calls."""
CPUS_PER_RANK = 4


# --- the machine and its folders


def host_findings(host: Host) -> Iterator[Finding]:
    """Describe this machine."""
    models = ", ".join(dict.fromkeys(host.gpu_models))
    gpus = f"{len(host.gpus)}{f' x {models}' if models else ''}" if host.gpus else "none on this machine"
    runtimes = ", ".join(host.runtimes) or "none in the search path; recipes without a container section need none"

    yield Finding("host", OK, f"{host.name}: {host.cpus} CPUs, {host.memory_bytes / 2**30:.0f} GiB of memory")
    yield Finding("GPUs", OK, gpus)
    yield Finding("Python", OK, f"{host.python_version}, {host.python}")
    if host.torch:
        severity = WARN if is_torch_too_old(host.torch) else OK
        yield Finding("torch", severity, f"{host.torch} ({range_verdict(host.torch)})")
    else:
        advice = "run pip install 'amlaunch[train]', or set python in a cluster profile to a Python with torch"
        yield Finding("torch", WARN, "this Python has no torch, which training needs", advice)
    yield Finding("containers", OK, runtimes)


def folder_findings(folders: Iterable[Folder], on_cluster: bool) -> Iterator[Finding]:
    """Judge the folders; only the one for runs can be bad."""
    for folder in folders:
        kind = f"{folder.file_system or 'unknown type'}{' (network)' if folder.network else ''}"
        facts = [folder.path, kind, f"{folder.free_bytes / 1e9:,.0f} GB free"]
        if folder.problem or not folder.writable:
            facts.append(folder.problem or "not writable")

        verdict, problem = _runs_verdict(folder, on_cluster) if folder.use == "runs" else (OK, "")
        remedy = "to use another folder, set AMLAUNCH_RUNS=DIR, --runs DIR or runs in the profile"
        yield Finding(folder.use, verdict, ", ".join(facts), f"{problem}; {remedy}" if problem else "")


def _runs_verdict(folder: Folder, on_cluster: bool) -> tuple[str, str]:
    """Return the verdict on the folder for runs, and its problem."""
    if folder.problem:
        return BAD, "files cannot be created and locked there"
    if on_cluster and folder.file_system in MEMORY_FILE_SYSTEMS:
        return BAD, "it is in this machine's memory, which nodes cannot see"
    if folder.free_bytes < LOW_FREE_BYTES:
        return WARN, "there is barely space for one checkpoint"
    if folder.free_files is not None and folder.free_files < MIN_FREE_INODES:
        return WARN, f"only {folder.free_files} more files fit (inodes)"
    if on_cluster and not folder.network:
        return WARN, "this works only if all nodes see the folder under the same path (doctor --gpu tests it)"
    return OK, ""


# --- Slurm


def site_findings(site: SlurmSite) -> Iterator[Finding]:
    """Judge the cluster."""
    yield _version_finding(site)
    yield from _partition_findings(site.partitions)
    yield from _accounting_findings(site)
    yield _array_finding(site)
    default = "" if site.requeue else " (off by default here; amlaunch enables it for its jobs)"
    yield Finding("requeue", OK, f"jobs can be requeued{default}")
    yield _preemption_finding(site)
    yield Finding(
        "time limit",
        OK,
        f"jobs are killed {site.kill_wait_s} s after the limit (KillWait); amlaunch saves before the limit",
    )
    yield _container_finding(site)


def _version_finding(site: SlurmSite) -> Finding:
    version = tuple(int(number) for number in re.findall(r"\d+", site.version)[:2])
    text = f"{site.version}{f', cluster {site.cluster}' if site.cluster else ''}"
    if version < MIN_SLURM_VERSION:
        major, minor = MIN_SLURM_VERSION
        return Finding("version", BAD, text, f"amlaunch needs Slurm {major}.{minor:02} or newer")
    return Finding("version", OK, text)


def _partition_findings(partitions: Sequence[SitePartition]) -> Iterator[Finding]:
    if not any(partition.works for partition in partitions):
        text = f"none of {len(partitions)} is up with working nodes"
        yield Finding("partitions", BAD, text, "run sinfo -R to see why nodes are down; ask your administrator")
        return

    default = next((partition.name for partition in partitions if partition.default), None)
    if default:
        yield Finding("partitions", OK, f"{len(partitions)}, default {default}")
    else:
        advice = "name one in the profile: partition: NAME"
        yield Finding("partitions", WARN, f"{len(partitions)}, no default", advice)

    for partition in partitions:
        if not partition.works:
            problem = f"has {partition.nodes} nodes, all down or drained" if partition.up else "is not up"
            advice = f"run sinfo -R -p {partition.name} to see why; use another partition until then"
            yield Finding("partitions", WARN, f"{partition.name} {problem}", advice)

    with_gpus = [f"{partition.name} ({partition.gpu_summary} per node)" for partition in partitions if partition.gpus]
    if with_gpus:
        yield Finding("GPUs", OK, ", ".join(with_gpus))
    else:
        advice = "if nodes have GPUs, their GRES is not configured: ask your administrator"
        yield Finding("GPUs", WARN, "no partition has GPUs", advice)


def _accounting_findings(site: SlurmSite) -> Iterator[Finding]:
    yield _sacct_finding(site)
    yield _account_finding(site)
    yield from (Finding("limits", OK, limit) for limit in site.limits)


def _sacct_finding(site: SlurmSite) -> Finding:
    sacct = f"sacct does not answer ({site.sacct_problem})" if site.sacct_problem else "sacct answers"
    age = f"for {wording.duration(site.min_job_age_s)}" if site.min_job_age_s else "forever"
    text = f"{sacct}; squeue remembers ended jobs {age}"
    if site.sacct_problem and 0 < site.min_job_age_s < MIN_JOB_AGE_SECONDS:
        advice = (
            "status can then rely only on the run directory; "
            "ask your administrator for accounting or a longer MinJobAge"
        )
        return Finding("accounting", WARN, text, advice)
    return Finding("accounting", OK, text)


def _account_finding(site: SlurmSite) -> Finding:
    if site.accounts:
        default = f", default {site.default_account}" if site.default_account else ""
        return Finding("accounts", OK, f"{', '.join(site.accounts)}{default}; QOS {', '.join(site.qos) or 'none'}")
    if not site.needs_account:
        return Finding("accounts", OK, "none needed")
    if site.sacct_problem:
        text = "jobs need an account, but accounting does not answer, so yours are unknown"
        return Finding("accounts", WARN, text, "try again later")
    advice = "ask your administrator to add you to one (sacctmgr add user)"
    return Finding("accounts", BAD, "jobs need an account, and you have none", advice)


def _array_finding(site: SlurmSite) -> Finding:
    if site.max_array_size < 2:
        text = f"MaxArraySize is {site.max_array_size}: job arrays are disabled, and every stage needs one"
        return Finding("arrays", BAD, text, "ask your administrator to raise MaxArraySize")
    text = f"up to {site.max_array_size:,} elements each; larger stages are split into several arrays"
    return Finding("arrays", OK, text)


def _preemption_finding(site: SlurmSite) -> Finding:
    if site.preempt_type == "preempt/qos":
        command = "sacctmgr show qos format=Name,Preempt,PreemptMode"
        return Finding("preemption", OK, f"by QOS; run {command} to see which jobs")

    preempted = [partition for partition in site.partitions if partition.preempt != "OFF"]
    names = [f"{partition.name} ({partition.preempt}, {partition.grace_seconds} s grace)" for partition in preempted]
    text = ", ".join(names) or "none"
    if any("CANCEL" in partition.preempt for partition in preempted):
        advice = "preempted jobs are cancelled, not requeued; amlaunch retry RUN continues from the last checkpoint"
        return Finding("preemption", WARN, text, advice)
    return Finding("preemption", OK, text)


def _container_finding(site: SlurmSite) -> Finding:
    runtimes = ["pyxis (srun --container-image)"] if site.pyxis else []
    if site.oci:
        runtimes.append(f"Slurm's own ({site.oci})")
    return Finding("containers", OK, ", ".join(runtimes) or "none started by Slurm itself (no pyxis, no oci.conf)")


# --- a profile


def profile_findings(cluster: Cluster, site: SlurmSite | None, runs: Path) -> Iterator[Finding]:
    """Judge a profile on this site; ``sbatch --test-only`` decides what Slurm accepts."""
    profile = cluster.profile
    if profile.executor == "local":
        yield Finding("executor", OK, "local: everything runs on this machine")
        return

    if profile.python:
        yield _python_finding(profile.python)
    if profile.shared_roots and not any(runs.is_relative_to(Path(root).expanduser()) for root in profile.shared_roots):
        text = f"{runs} is not below shared_roots ({', '.join(profile.shared_roots)})"
        yield Finding("runs", BAD, text, "change runs or shared_roots")
    for name in profile.pass_env:
        if name not in os.environ:
            yield Finding("pass_env", WARN, f"{name} is not set in this shell", f"export {name}=… before you submit")
    if site is None:
        return

    bad_options = list(option_problems(cluster))
    if bad_options:
        for problem in bad_options:
            yield Finding("sbatch", BAD, _without_source(cluster, problem), "correct the profile's sbatch section")
        return
    yield from _association_findings(profile, site)
    yield from _job_findings(cluster, site.partitions, runs)


def _without_source(cluster: Cluster, problem: object) -> str:
    """Remove the profile's file and line from a message: the title names the file, and stages may share the message."""
    return re.sub(rf"^{re.escape(cluster.source)}(:\d+)?:\s*", "", str(problem))


def _python_finding(python: str) -> Finding:
    code = "import importlib.metadata; print(importlib.metadata.version('torch'))"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, timeout=60, check=True, text=True)
    except (OSError, subprocess.SubprocessError):
        advice = "this works if the nodes have it, or if setup provides it (doctor --gpu tests it)"
        return Finding("python", WARN, f"no {python} with torch on this machine", advice)
    version = answer.stdout.strip()
    severity = WARN if is_torch_too_old(version) else OK
    return Finding("python", severity, f"{python} has torch {version} ({range_verdict(version)})")


def _association_findings(profile: ClusterProfile, site: SlurmSite) -> Iterator[Finding]:
    settings = [profile.stage(stage) for stage in STAGES]
    for key, label, available in (("account", "accounts", site.accounts), ("qos", "QOS", site.qos)):
        for value in dict.fromkeys(getattr(setting, key) for setting in settings):
            if value and available and value not in available:
                yield Finding(key, BAD, f"{value} is not one of your {label}", did_you_mean(value, available))


def smallest_job(cluster: Cluster, partitions: Sequence[SitePartition], name: str) -> Stage:
    """Return a stage without elements whose job is as small as possible.

    One process; for training, one for each GPU of a node. Raises BadInput.
    """
    is_training, settings = name == "train", cluster.profile.stage(name)
    partition = choose_partition(partitions, cluster, name, int(is_training))
    gpus = (cluster.profile.gpus_per_node or partition.gpus) if is_training else 0
    tasks = max(1, gpus)
    cpus = settings.cpus or max(tasks, min(gpus * CPUS_PER_RANK, partition.cpus))
    return Stage(name, [], [], Needs(1, gpus, tasks, cpus, settings.mem, settings.time), partition.name)


def _job_findings(cluster: Cluster, partitions: Sequence[SitePartition], runs: Path) -> Iterator[Finding]:
    """Test the smallest job of each stage; stages with the same result share a line."""
    stages_by_finding: dict[Finding, list[str]] = {}
    for stage in STAGES:
        stages_by_finding.setdefault(_job_finding(cluster, partitions, stage, runs), []).append(stage)
    for finding, stages in stages_by_finding.items():
        yield dataclasses.replace(finding, text=f"{', '.join(stages)}: {finding.text}")


def _job_finding(cluster: Cluster, partitions: Sequence[SitePartition], name: str, runs: Path) -> Finding:
    """Ask sbatch whether it accepts the smallest job of a stage."""
    try:
        stage = smallest_job(cluster, partitions, name)
    except BadInput as error:
        return Finding("jobs", BAD, _without_source(cluster, error), "correct partition in the profile")

    gpus = stage.needs.gpus_per_node
    target = f"partition {stage.partition}{f' with {gpus} GPUs' if gpus else ''}"
    array = Array(stage, ("0",), runs / "doctor" / "try", "amlaunch-doctor")
    try:
        script = sbatch.script(array, cluster.profile, runs, package_root(), "doctor")
        reason = sbatch.reason_to_wait(script, stage.partition)
    except SlurmError as error:
        text = f"sbatch refuses {target}: {'; '.join(error.message.splitlines())}"
        advice = (
            "change partition, account, qos, gpu_type or the sbatch options in the profile; "
            "sinfo and sacctmgr show assoc user=$USER list what is available"
        )
        return Finding("jobs", BAD, text, advice)

    if name == "train" and not gpus:
        advice = "name a partition with GPUs in the profile: stages: {train: {partition: NAME}}"
        return Finding("jobs", WARN, f"sbatch accepts {target}, but training gets no GPUs", advice)
    if reason:
        return Finding("jobs", WARN, f"sbatch queues {target}, but cannot start it now: {reason}")
    return Finding("jobs", OK, f"sbatch accepts {target}")


# --- GPUs

FLOORS = {
    "H100": {"gemm_tflops": 500.0, "copy_gb_s": 2000.0, "bus_gb_s": 250.0},
    "H200": {"gemm_tflops": 500.0, "copy_gb_s": 3200.0, "bus_gb_s": 250.0},
    "A100": {"gemm_tflops": 200.0, "copy_gb_s": 1200.0, "bus_gb_s": 180.0},
}
"""The least that a healthy GPU reaches in a node whose GPUs are connected by NVLink; good ones reach much more."""
OTHER_MODELS = re.compile(r"\b(PCIE|NVL|MIG)\b", re.IGNORECASE)
"""Cards of the same name with less power and no NVLink, and slices of a card: the floors do not apply."""
MIN_SHARE_OF_MEDIAN = 0.9
MIN_FREE_MEMORY_SHARE = 0.9
BAD_GPU_ADVICE = (
    "run nvidia-smi -q -d PERFORMANCE,TEMPERATURE,ECC,ROW_REMAPPER there; exclude the node "
    "(sbatch: {exclude: NODE} in the profile) and tell your administrator"
)


def floors_of(device: str) -> dict[str, float]:
    """Return the floors for a device by its name; empty if none are known (``GH200`` is not ``H200``)."""
    if OTHER_MODELS.search(device):
        return {}
    return next((floors for name, floors in FLOORS.items() if re.search(rf"\b{name}\b", device)), {})


def gpu_findings(measured: Mapping[str, Any]) -> Iterator[Finding]:
    """Judge what ``amlaunch.trainer.tools.gpu_check`` measured on one node."""
    gpus = measured["gpus"]
    node, device = gpus[0]["host"], gpus[0]["device"]
    floors = floors_of(device)

    if measured["cuda"]:
        note = "" if floors else "; no floor is known for it"
        software = f"torch {measured['torch']}, CUDA {measured['cuda_version']}, NCCL {measured['nccl']}"
        yield Finding("device", OK, f"{node}: {len(gpus)} x {device}{note}; {software}")
        yield from _floor_findings("matrices", gpus, "gemm_tflops", "TFLOP/s", floors)
        yield from _floor_findings("copies", gpus, "copy_gb_s", "GB/s", floors)
        yield _memory_finding(gpus)
    else:
        text = f"{node}: no CUDA device, so these are CPU figures and no floor applies (torch {measured['torch']})"
        advice = (
            "if there should be GPUs: check that torch is not a CPU build (version ends in +cpu) and run nvidia-smi"
        )
        yield Finding("device", WARN, text, advice)

    if measured["all_reduce"]:
        ranks = f"{len(gpus)} {'GPUs' if measured['cuda'] else 'processes (gloo)'} on {node}"
        yield _all_reduce_finding(measured["all_reduce"], ranks, floors.get("bus_gb_s", 0.0))


def _floor_findings(
    name: str, gpus: Sequence[Mapping[str, Any]], key: str, unit: str, floors: Mapping[str, float]
) -> Iterator[Finding]:
    """Report the GPUs below the floor, and those well below the median."""
    node, floor = gpus[0]["host"], floors.get(key, 0.0)
    median = statistics.median(gpu[key] for gpu in gpus)
    below_floor = [gpu for gpu in gpus if gpu[key] < floor]
    slow = [gpu for gpu in gpus if floor <= gpu[key] < MIN_SHARE_OF_MEDIAN * median]

    if below_floor:
        text = f"{_values(below_floor, key)} {unit} on {node}, below the floor of {floor:,.0f}"
        yield Finding(name, BAD, text, BAD_GPU_ADVICE)
    if slow:
        text = f"{_values(slow, key)} {unit} on {node}, more than 10 % below the median of {median:,.0f}"
        yield Finding(name, WARN, text, f"the slowest GPU sets the pace of training; {BAD_GPU_ADVICE}")
    if not below_floor and not slow:
        lowest = min(gpu[key] for gpu in gpus)
        yield Finding(name, OK, f"{lowest:,.0f} {unit} or more{_floor_text(floor)}")


def _values(gpus: Iterable[Mapping[str, Any]], key: str) -> str:
    return ", ".join(f"GPU {gpu['rank']}: {gpu[key]:,.0f}" for gpu in gpus)


def _floor_text(floor: float) -> str:
    return f" (floor {floor:,.0f})" if floor else ""


def _memory_finding(gpus: Sequence[Mapping[str, Any]]) -> Finding:
    in_use = [
        f"GPU {gpu['rank']}: {(gpu['memory_total_bytes'] - gpu['memory_free_bytes']) / 2**30:.0f} GiB"
        for gpu in gpus
        if gpu["memory_free_bytes"] < MIN_FREE_MEMORY_SHARE * gpu["memory_total_bytes"]
    ]
    if in_use:
        advice = "run nvidia-smi to see the processes: they belong to another job, or are left over from a dead one"
        return Finding("memory", WARN, f"in use before the check: {', '.join(in_use)}", advice)
    lowest = min(gpu["memory_free_bytes"] for gpu in gpus)
    return Finding("memory", OK, f"{lowest / 2**30:.1f} GiB free or more")


def _all_reduce_finding(all_reduce: Mapping[str, Any], ranks: str, floor: float) -> Finding:
    bandwidth = all_reduce["bus_gb_s"]
    text = f"{bandwidth:,.3g} GB/s bus bandwidth over {ranks}"
    if not all_reduce["right"]:
        advice = (
            "do not train on this node; set NCCL_P2P_DISABLE=1 to see whether NVLink is the cause, "
            "and tell your administrator"
        )
        return Finding("all-reduce", BAD, f"{text}, and the sum was WRONG", advice)
    if bandwidth < floor:
        advice = (
            "run nvidia-smi topo -m and nvidia-smi nvlink --status to see the links, and set NCCL_DEBUG=INFO "
            "to see which of them NCCL uses; a node without NVLink cannot reach the floor"
        )
        return Finding("all-reduce", BAD, f"{text}, below the floor of {floor:,.0f}", advice)
    return Finding("all-reduce", OK, f"{text}{_floor_text(floor)}")
