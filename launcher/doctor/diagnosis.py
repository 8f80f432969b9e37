"""What ``amlaunch doctor`` makes of what it read (amlaunch.launcher.doctor.probe): verdicts on the machine, the site, a profile, GPUs."""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from amlaunch.launcher.checks.files_and_disk import MIN_FREE_INODES
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.findings import BAD, OK, WARN, Finding
from amlaunch.launcher.doctor.probe import Folder, Host, Place, SlurmSite
from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.planning.partitions import choose_partition
from amlaunch.launcher.runs.snapshot import package_root
from amlaunch.launcher.slurm import sbatch
from amlaunch.launcher.slurm.sbatch import Array, option_problems
from amlaunch.launcher.specs.cluster_profile import STAGES, Cluster, ClusterProfile
from amlaunch.launcher.specs.plan import Needs, Stage
from amlaunch.recipes.errors import BadInput, did_you_mean

SCARCE_BYTES = 10 * 10**9
"""Of free space for runs: less holds hardly one checkpoint of a larger model."""
OLDEST_SLURM = (20, 2)
"""Which ``squeue --me`` came with."""
SHORT_MEMORY_SECONDS = 60
"""squeue must know an ended job for longer than we ask in between."""
CPUS_A_RANK = 4


# --- the machine and its folders


def host_findings(host: Host) -> Iterator[Finding]:
    """What this machine has."""
    models = ", ".join(dict.fromkeys(host.gpu_models))
    runtimes = ", ".join(host.runtimes) or "none in the search path; recipes without a container section need none"
    yield Finding("host", OK, f"{host.name}: {host.cpus} CPUs, {host.memory_bytes / 2**30:.0f} GiB of memory")
    yield Finding("GPUs", OK, f"{len(host.gpus)}{f' x {models}' if models else ''}" if host.gpus else "none here")
    yield Finding("Python", OK, f"{host.python_version}, {host.python}")
    if host.torch:
        yield Finding("torch", OK, "can be imported by this Python")
    else:
        advice = "pip install 'amlaunch[train]', or name a Python that has it in a cluster's profile (python: PATH)"
        yield Finding("torch", WARN, "this Python has no torch, which training needs", advice)
    yield Finding("containers", OK, runtimes)


def folder_findings(folders: Iterable[Folder], on_cluster: bool) -> Iterator[Finding]:
    """What the folders are like; only the one for runs can be bad."""
    for folder in folders:
        kind = f"{folder.file_system or 'unknown type'}{' (network)' if folder.network else ''}"
        parts = [folder.path, kind, f"{folder.free_bytes / 1e9:,.0f} GB free"]
        if folder.problem or not folder.writable:
            parts.append(folder.problem or "not writable")
        verdict, advice = _runs_verdict(folder, on_cluster) if folder.use == "runs" else (OK, "")
        elsewhere = "; AMLAUNCH_RUNS=DIR, --runs DIR or the profile's runs puts runs elsewhere" if advice else ""
        yield Finding(folder.use, verdict, ", ".join(parts), advice + elsewhere)


def _runs_verdict(folder: Folder, on_cluster: bool) -> tuple[str, str]:
    if folder.problem:
        return BAD, "files cannot be made and locked there"
    if on_cluster and folder.file_system in ("tmpfs", "ramfs"):
        return BAD, "that is this machine's memory, which no node sees"
    if folder.free_bytes < SCARCE_BYTES:
        return WARN, "room for hardly a checkpoint"
    if folder.free_files is not None and folder.free_files < MIN_FREE_INODES:
        return WARN, f"only {folder.free_files} more files can be made there"
    if on_cluster and not folder.network:
        return WARN, "fine if all nodes see it under the same path (--gpu tries)"
    return OK, ""


# --- Slurm


def site_findings(site: SlurmSite) -> Iterator[Finding]:
    """What the cluster offers."""
    yield _version_finding(site)
    yield from _partition_findings(site.partitions)
    yield from _accounting_findings(site)
    if site.max_array_size < 2:
        text = f"MaxArraySize is {site.max_array_size}: job arrays are off, and every stage is one"
        yield Finding("arrays", BAD, text, "ask the site to raise MaxArraySize")
    else:
        yield Finding("arrays", OK, f"up to {site.max_array_size:,} elements in one; a larger stage becomes several")
    asked = "" if site.requeue else " (off by default here; amlaunch asks for it)"
    yield Finding("requeue", OK, f"jobs can go back into the queue{asked}")
    yield _preemption_finding(site)
    yield Finding("time limit", OK, f"jobs are killed {site.kill_wait_s} s after it (KillWait); amlaunch saves before")
    ways = ["pyxis (srun --container-image)"] * site.pyxis + [f"Slurm's own ({site.oci})"] * bool(site.oci)
    yield Finding("containers", OK, ", ".join(ways) or "Slurm itself starts none (neither pyxis nor oci.conf)")


def _version_finding(site: SlurmSite) -> Finding:
    numbers = tuple(int(number) for number in re.findall(r"\d+", site.version)[:2])
    text = f"{site.version}{f', cluster {site.cluster}' if site.cluster else ''}"
    if numbers < OLDEST_SLURM:
        return Finding("version", BAD, text, f"amlaunch needs Slurm {OLDEST_SLURM[0]}.{OLDEST_SLURM[1]:02} or newer")
    return Finding("version", OK, text)


def _partition_findings(places: Sequence[Place]) -> Iterator[Finding]:
    default = next((place.name for place in places if place.default), None)
    if not any(place.works for place in places):
        text = f"none of {len(places)} is up with nodes that work"
        yield Finding("partitions", BAD, text, "sinfo -R says why nodes are down; ask the site")
        return
    if default:
        yield Finding("partitions", OK, f"{len(places)}, default {default}")
    else:
        yield Finding("partitions", WARN, f"{len(places)}, default none", "name one in the profile: partition: NAME")
    for place in places:
        if not place.works:
            why = f"has {place.nodes} nodes, all down or drained" if place.up else "is not up"
            advice = f"sinfo -R -p {place.name} says why; use another one meanwhile"
            yield Finding("partitions", WARN, f"{place.name} {why}", advice)
    gpus = [f"{place.name} ({place.gpus_each} a node)" for place in places if place.gpus]
    if gpus:
        yield Finding("GPUs", OK, ", ".join(gpus))
    else:
        advice = "if nodes have some, their GRES is not configured: ask the site"
        yield Finding("GPUs", WARN, "no partition has GPUs", advice)


def _accounting_findings(site: SlurmSite) -> Iterator[Finding]:
    answers = f"sacct does not answer ({site.sacct_problem})" if site.sacct_problem else "sacct answers"
    keeps = f"for {wording.duration(site.min_job_age_s)}" if site.min_job_age_s else "for ever"
    text = f"{answers}; squeue keeps ended jobs {keeps}"
    if site.sacct_problem and 0 < site.min_job_age_s < SHORT_MEMORY_SECONDS:
        advice = "status then goes by the run directory alone; ask the site for accounting, or for a longer MinJobAge"
        yield Finding("accounting", WARN, text, advice)
    else:
        yield Finding("accounting", OK, text)
    if site.accounts:
        default = f", default {site.default_account}" if site.default_account else ""
        yield Finding("accounts", OK, f"{', '.join(site.accounts)}{default}; QOS {', '.join(site.qos) or 'none'}")
    elif not site.needs_account:
        yield Finding("accounts", OK, "none needed")
    elif site.sacct_problem:
        yield Finding("accounts", WARN, "jobs need an account; which are yours cannot be asked now", "try again later")
    else:
        advice = "ask the site to add you to one (sacctmgr add user)"
        yield Finding("accounts", BAD, "jobs need an account, and you have none", advice)
    yield from (Finding("limits", OK, limit) for limit in site.limits)


def _preemption_finding(site: SlurmSite) -> Finding:
    if site.preempt_type == "preempt/qos":
        return Finding("preemption", OK, "by QOS: sacctmgr show qos format=Name,Preempt,PreemptMode says whose jobs")
    pushed = [place for place in site.partitions if place.preempt != "OFF"]
    text = ", ".join(f"{place.name} ({place.preempt}, {place.grace_seconds} s grace)" for place in pushed) or "none"
    if any("CANCEL" in place.preempt for place in pushed):
        advice = "a cancelled job does not come back by itself: amlaunch retry RUN goes on from the last checkpoint"
        return Finding("preemption", WARN, text, advice)
    return Finding("preemption", OK, text)


# --- a profile


def profile_findings(cluster: Cluster, site: SlurmSite | None, runs: Path) -> Iterator[Finding]:
    """What of a profile holds on this site; sbatch has the last word."""
    profile = cluster.profile
    if profile.executor == "local":
        yield Finding("executor", OK, "local: everything runs on this machine")
        return
    if profile.python:
        yield _python_finding(profile.python)
    if profile.shared_roots and not any(runs.is_relative_to(Path(root).expanduser()) for root in profile.shared_roots):
        text = f"{runs} is not below a shared folder ({', '.join(profile.shared_roots)})"
        yield Finding("runs", BAD, text, "change runs, or shared_roots")
    for name in profile.pass_env:
        if name not in os.environ:
            yield Finding("pass_env", WARN, f"{name} is not set in this shell", f"export {name}=… before you submit")
    if site is None:
        return
    unknown = list(option_problems(cluster))
    for problem in unknown:
        yield Finding("sbatch", BAD, _without(cluster, problem), "correct the profile's sbatch section")
    if unknown:
        return
    yield from _account_findings(profile, site)
    jobs: dict[Finding, list[str]] = {}
    for stage in STAGES:  # those whose jobs are alike share a line
        jobs.setdefault(_job_finding(cluster, site.partitions, stage, runs), []).append(stage)
    for finding, stages in jobs.items():
        yield dataclasses.replace(finding, text=f"{', '.join(stages)}: {finding.text}")


def _without(cluster: Cluster, problem: object) -> str:
    """The message without the profile's file, which the title names, and without its line: several stages may share it."""
    return re.sub(rf"^{re.escape(cluster.source)}(:\d+)?:\s*", "", str(problem))


def _python_finding(python: str) -> Finding:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    try:
        subprocess.run([python, "-c", code], capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        advice = "fine if the nodes have it, or setup brings it; --gpu tries"
        return Finding("python", WARN, f"{python} with torch is not on this machine", advice)
    return Finding("python", OK, f"{python} has torch")


def _account_findings(profile: ClusterProfile, site: SlurmSite) -> Iterator[Finding]:
    stages = [profile.stage(stage) for stage in STAGES]
    for key, known in (("account", site.accounts), ("qos", site.qos)):
        for given in dict.fromkeys(getattr(own, key) for own in stages):
            if given and known and given not in known:
                yield Finding(key, BAD, f"{given} is not yours", did_you_mean(given, known))


def smallest_job(cluster: Cluster, places: Sequence[Place], name: str) -> Stage:
    """A stage without elements, whose job is one process; for training, one for each GPU of a node. Raises BadInput."""
    training, own = name == "train", cluster.profile.stage(name)
    part = choose_partition(places, cluster, name, int(training))
    gpus = (cluster.profile.gpus_per_node or part.gpus) if training else 0
    tasks = max(1, gpus)
    cpus = own.cpus or max(tasks, min(gpus * CPUS_A_RANK, part.cpus))
    return Stage(name, [], [], Needs(1, gpus, tasks, cpus, own.mem, own.time), part.name)


def _job_finding(cluster: Cluster, places: Sequence[Place], name: str, runs: Path) -> Finding:
    """What sbatch says to the smallest job of a stage."""
    try:
        stage = smallest_job(cluster, places, name)
    except BadInput as error:
        return Finding("jobs", BAD, _without(cluster, error), "correct the profile's partition")
    gpus = stage.needs.gpus_per_node
    where = f"partition {stage.partition}{f' with {gpus} GPUs' if gpus else ''}"
    array = Array(stage, ("0",), runs / "doctor" / "try", "amlaunch-doctor")
    try:
        sbatch.test_only(sbatch.script(array, cluster.profile, runs, package_root(), "doctor"))
    except SlurmError as error:
        text = f"sbatch refuses {where}: {'; '.join(error.message.splitlines())}"
        advice = (
            "change what the profile has of partition, account, qos, gpu_type or sbatch options; "
            "sinfo and sacctmgr show assoc user=$USER say what there is"
        )
        return Finding("jobs", BAD, text, advice)
    if name == "train" and not gpus:
        advice = "stages: {train: {partition: NAME}} names a partition that has some"
        return Finding("jobs", WARN, f"sbatch takes {where}, but training gets no GPUs", advice)
    return Finding("jobs", OK, f"sbatch takes {where}")


# --- GPUs

FLOORS = {
    "H100": {"gemm_tflops": 500.0, "copy_gb_s": 2000.0, "bus_gb_s": 250.0},
    "H200": {"gemm_tflops": 500.0, "copy_gb_s": 3200.0, "bus_gb_s": 250.0},
    "A100": {"gemm_tflops": 200.0, "copy_gb_s": 1200.0, "bus_gb_s": 180.0},
}
"""What a healthy device does at least, in a node whose GPUs are joined by NVLink; well below what good ones reach."""
OTHER_MODELS = re.compile(r"\b(PCIE|NVL|MIG)\b", re.IGNORECASE)
"""Cards of the same name with less power and no NVLink, and parts of a card."""
SIBLING_SHARE = 0.9
SICK = (
    "look at nvidia-smi -q -d PERFORMANCE,TEMPERATURE,ECC,ROW_REMAPPER there; keep jobs off the node "
    "(sbatch: {exclude: NODE} in the profile) and tell the site"
)


def floors_of(device: str) -> dict[str, float]:
    """The floors for a device with this name; none where we know none (``GH200`` is no ``H200``)."""
    if OTHER_MODELS.search(device):
        return {}
    return next((floors for name, floors in FLOORS.items() if re.search(rf"\b{name}\b", device)), {})


def gpu_findings(found: Mapping[str, Any]) -> Iterator[Finding]:
    """The verdict on what ``amlaunch.trainer.tools.gpu_check`` measured."""
    gpus = found["gpus"]
    node, device = gpus[0]["host"], gpus[0]["device"]
    floors = floors_of(device)
    if found["cuda"]:
        known = "" if floors else "; no floor is known for it"
        software = f"torch {found['torch']}, CUDA {found['cuda_version']}, NCCL {found['nccl']}"
        yield Finding("device", OK, f"{node}: {len(gpus)} x {device}{known}; {software}")
        yield from _floor_findings("matrices", gpus, "gemm_tflops", "TFLOP/s", floors)
        yield from _floor_findings("copies", gpus, "copy_gb_s", "GB/s", floors)
        yield _memory_finding(gpus)
    else:
        text = f"{node}: no CUDA device: CPU figures, no floor applies (torch {found['torch']})"
        advice = "where GPUs should be: is torch a build for the CPU (its version ends in +cpu), does nvidia-smi work?"
        yield Finding("device", WARN, text, advice)
    if found["all_reduce"]:
        over = f"{len(gpus)} {'GPUs' if found['cuda'] else 'processes (gloo)'} on {node}"
        yield _reduce_finding(found["all_reduce"], over, floors.get("bus_gb_s", 0.0))


def _floor_findings(
    name: str, gpus: Sequence[Mapping[str, Any]], key: str, unit: str, floors: Mapping[str, float]
) -> Iterator[Finding]:
    """Who is below the floor, and who falls behind the others."""
    node, floor, middle = gpus[0]["host"], floors.get(key, 0.0), statistics.median(gpu[key] for gpu in gpus)
    low = [gpu for gpu in gpus if gpu[key] < floor]
    slow = [gpu for gpu in gpus if floor <= gpu[key] < SIBLING_SHARE * middle]
    if low:
        yield Finding(name, BAD, f"{_each(low, key)} {unit} on {node}, below the floor of {floor:,.0f}", SICK)
    if slow:
        text = f"{_each(slow, key)} {unit} on {node}, over 10 % below the median of its siblings, {middle:,.0f}"
        yield Finding(name, WARN, text, f"training goes at the pace of the slowest; {SICK}")
    if not low and not slow:
        least = min(gpu[key] for gpu in gpus)
        yield Finding(name, OK, f"{least:,.0f} {unit} or more{_floor_words(floor)}")


def _each(gpus: Iterable[Mapping[str, Any]], key: str) -> str:
    return ", ".join(f"GPU {gpu['rank']}: {gpu[key]:,.0f}" for gpu in gpus)


def _floor_words(floor: float) -> str:
    return f" (floor {floor:,.0f})" if floor else ""


def _memory_finding(gpus: Sequence[Mapping[str, Any]]) -> Finding:
    taken = [
        f"GPU {gpu['rank']}: {(gpu['memory_total_bytes'] - gpu['memory_free_bytes']) / 2**30:.0f} GiB"
        for gpu in gpus
        if gpu["memory_free_bytes"] < SIBLING_SHARE * gpu["memory_total_bytes"]
    ]
    if taken:
        advice = "nvidia-smi names the processes; another job's, or what a dead one left behind"
        return Finding("memory", WARN, f"in use before we came: {', '.join(taken)}", advice)
    least = min(gpu["memory_free_bytes"] for gpu in gpus)
    return Finding("memory", OK, f"{least / 2**30:.1f} GiB free or more")


def _reduce_finding(reduced: Mapping[str, Any], over: str, floor: float) -> Finding:
    text = f"{reduced['bus_gb_s']:,.3g} GB/s bus bandwidth over {over}"
    if not reduced["right"]:
        advice = "do not train there: NCCL_P2P_DISABLE=1 tells whether NVLink is to blame; tell the site"
        return Finding("all-reduce", BAD, f"{text}, and the sum was WRONG", advice)
    if reduced["bus_gb_s"] < floor:
        advice = (
            "nvidia-smi topo -m and nvidia-smi nvlink --status show the links, NCCL_DEBUG=INFO what NCCL takes; "
            "a node without NVLink stays below"
        )
        return Finding("all-reduce", BAD, f"{text}, below the floor of {floor:,.0f}", advice)
    return Finding("all-reduce", OK, f"{text}{_floor_words(floor)}")
