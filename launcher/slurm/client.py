"""All calls of Slurm commands: one function for each question, typed answers, and one kind of error.

Delimited output formats are used instead of ``--json``, whose structure differs between versions of Slurm and which old
versions do not have.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from amlaunch.launcher.errors import SlurmError, SlurmNotInstalled, SlurmTimeout, command_error

TIMEOUT_SECONDS = 30.0
"""Time limit of one call; a busy controller answers late."""
KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""Variables that select the cluster; they stay when the variables of an enclosing job are removed."""
JOB_VARIABLE_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "PMI_", "PMIX_", "PMI2_")
"""Prefixes of variables inside an allocation; a job submitted from there would take them for its own."""
SLURM_CONF_PATHS = (
    "/etc/slurm/slurm.conf",
    "/run/slurm/conf/slurm.conf",
    "/etc/slurm-llnl/slurm.conf",
    "/usr/local/etc/slurm.conf",
)
"""Paths of slurm.conf for packages, configless nodes, and builds from source."""
FORMAT_VARIABLE_PREFIXES = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SACCTMGR_")
"""Prefixes of variables with a user's own defaults for Slurm commands."""
RENDEZVOUS_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables of a rendezvous that torchrun or an enclosing job has left behind."""

WAITING_STATES = frozenset(
    ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
)
"""States of a job that has no processes yet (squeue(1), JOB STATE CODES)."""
ACTIVE_STATES = WAITING_STATES | {
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
}
"""States of a job that has not ended."""


@dataclass(frozen=True)
class JobInfo:
    """A job or a task of an array, as squeue or sacct reports it."""

    id: str
    """``123_4`` for a task of an array."""
    state: str
    """Slurm's name of the state: ``PENDING``."""
    reason: str = ""
    start: str = ""
    """The time of the start, or its estimate for a pending job: local time ``2026-11-24T18:00:00``."""
    nodes: str = ""
    exit_code: str = ""
    """sacct only: ``code:signal``."""
    comment: str = ""
    submitted: str = ""
    """squeue only: the time of submission, in local time."""

    @property
    def submitted_at(self) -> float:
        """Return :attr:`submitted` in Unix seconds; 0 if it is unknown."""
        try:
            return time.mktime(time.strptime(self.submitted, "%Y-%m-%dT%H:%M:%S"))
        except ValueError:
            return 0.0

    @property
    def active(self) -> bool:
        """Return True if the job has not ended."""
        return self.state in ACTIVE_STATES

    @property
    def waiting(self) -> bool:
        """Return True if the job has no processes yet."""
        return self.state in WAITING_STATES


@dataclass(frozen=True)
class Partition:
    """A partition: the resources of its nodes, and its limits."""

    name: str
    default: bool
    up: bool
    minutes: int | None
    """The longest time limit; None: unlimited."""
    nodes: int
    cpus: int
    """CPUs of the node with the most GPUs, or else the most CPUs."""
    mem_mb: int
    """Memory of that node."""
    gpus: int
    """GPUs of that node."""
    gpu_type: str = ""
    most_cpus: int = 0
    """The most CPUs that any of its nodes has."""
    most_mem_mb: int = 0
    """The most memory that any of its nodes has."""


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` without the variables of an enclosing allocation or launcher.

    See :data:`JOB_VARIABLE_PREFIXES` and :data:`RENDEZVOUS_VARIABLES`.
    """
    return {
        name: value
        for name, value in environ.items()
        if name in KEPT_VARIABLES or not (name.startswith(JOB_VARIABLE_PREFIXES) or name in RENDEZVOUS_VARIABLES)
    }


def plain_environment() -> dict[str, str]:
    """Return our environment without defaults for Slurm commands, which could hide jobs or change formats."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FORMAT_VARIABLE_PREFIXES)}
    return {**kept, "SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0"}


def call(*argv: str, timeout: float = TIMEOUT_SECONDS, env: Mapping[str, str] | None = None) -> str:
    """Return the standard output of a Slurm command. Raises SlurmError."""
    # Imported here because the status of a run that never was on a cluster does not need it.
    import subprocess

    try:
        process = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=dict(plain_environment() if env is None else env),
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise SlurmNotInstalled(argv[0]) from None
    except subprocess.TimeoutExpired:
        raise SlurmTimeout(argv[0], timeout) from None
    if process.returncode:
        message = (process.stderr or process.stdout).strip()
        raise command_error(argv[0], message or f"exit code {process.returncode}")
    return process.stdout


def available() -> bool:
    """Return True if this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def squeue() -> dict[str, JobInfo]:
    """Return all jobs of this user that Slurm still knows, ended ones included, by ID. Raises SlurmError."""
    text = call("squeue", "--me", "-a", "-h", "-r", "-t", "all", "-o", "%i|%T|%r|%S|%N|%V|%k")
    jobs = {}
    for line in text.splitlines():
        fields = line.split("|", 6)
        if len(fields) != 7:
            continue
        job, state, reason, start, nodes, submitted, comment = (_known(field.strip()) for field in fields)
        jobs[job] = JobInfo(job, state, reason, start, nodes, comment=comment, submitted=submitted)
    return jobs


def sacct(ids: Sequence[str]) -> dict[str, JobInfo]:
    """Return accounting's record of jobs or complete arrays, by ID. Raises SlurmError, also without accounting."""
    # Without -S, sacct looks no further back than midnight if no job is named; -j alone has no such limit.
    text = call("sacct", "-X", "-n", "-P", "-j", ",".join(ids), "-o", "JobID,State,Reason,Start,NodeList,ExitCode")
    jobs = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != 6:
            continue
        job, state, reason, start, nodes, code = fields
        # Such as "CANCELLED by 1000".
        state_name = state.split(" ")[0]
        for task in _array_tasks(job):
            jobs[task] = JobInfo(task, state_name, _known(reason), _known(start), _known(nodes), code)
    return jobs


def _known(text: str) -> str:
    return "" if text in ("N/A", "(null)", "None", "Unknown", "None assigned", "None assigned ") else text


def _array_tasks(job: str) -> list[str]:
    """Return the tasks of sacct's ``12_[0-3,7%2]``, which stands for tasks that never started."""
    match = re.fullmatch(r"(\d+)_\[([\d,\-]+)(?:%\d+)?\]", job)
    if not match:
        return [job]
    return [f"{match[1]}_{index}" for index in expand_ranges(match[2])]


def expand_ranges(text: str) -> list[int]:
    """Return ``0-2,7`` as ``[0, 1, 2, 7]``."""
    numbers: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        numbers += range(int(low), int(high or low) + 1)
    return numbers


def compress_ranges(numbers: Iterable[int]) -> str:
    """Return the inverse of :func:`expand_ranges`, for ``--array``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in parts)


def scancel(ids: Sequence[str], signal: str | None = None) -> None:
    """Cancel jobs, arrays or array tasks, or send them ``signal``; ended ones are ignored. Raises SlurmError."""
    # The length of an argument list is limited.
    for start in range(0, len(ids), 500):
        call("scancel", "-Q", *([f"--signal={signal}"] if signal else []), *ids[start : start + 500])


def requeue(job: str) -> None:
    """Put a running job back into the queue: exactly this task, never its array. Raises SlurmError."""
    call("scontrol", "requeue", job)


def exclude(job: str, nodes: str) -> None:
    """Exclude ``nodes`` (separated by commas) from the start of a pending job. Raises SlurmError."""
    call("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}")


def may_be_requeued(job: str) -> bool:
    """Return True if a running job (``12_3``) was not cancelled and may be requeued. Raises SlurmError.

    While a job ends, Slurm reports COMPLETING both after a cancellation and after the time limit; the times tell them
    apart.
    """
    facts = dict(re.findall(r"(\w+)=(\S*)", call("scontrol", "show", "job", job)))
    if facts.get("JobState") == "COMPLETING":
        run_time, limit = duration_seconds(facts.get("RunTime", "")), duration_seconds(facts.get("TimeLimit", ""))
        return run_time is not None and limit is not None and run_time >= limit
    return facts.get("JobState") != "CANCELLED"


@cache
def config() -> Mapping[str, str]:
    """Return ``scontrol show config`` as a mapping. Raises SlurmError."""
    pairs = (line.split("=", 1) for line in call("scontrol", "show", "config").splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def configured_name() -> str:
    """Return the ClusterName in this machine's slurm.conf without asking Slurm; empty if no file can be read."""
    for path in filter(None, (os.environ.get("SLURM_CONF"), *SLURM_CONF_PATHS)):
        with suppress(OSError):
            text = Path(path).read_text(errors="replace")
            match = re.search(r"^\s*ClusterName\s*=\s*(\S+)", text, re.MULTILINE | re.IGNORECASE)
            if match:
                return match[1]
    return ""


def cluster_name() -> str:
    """Return the ClusterName of the current cluster. Raises SlurmError."""
    return config().get("ClusterName", "")


def max_array_size() -> int:
    """Return the largest size of an array (its highest index is one less). Raises SlurmError."""
    return int(config().get("MaxArraySize", "1001"))


def partitions() -> list[Partition]:
    """Return all partitions that this user can see. Raises SlurmError."""
    text = call("sinfo", "-a", "-h", "-e", "-o", "%P|%a|%l|%D|%c|%m|%G")
    by_name: dict[str, Partition] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) == 7:
            part = _partition(fields)
            known = by_name.get(part.name)
            by_name[part.name] = _merge_partitions(known, part) if known else part
    return list(by_name.values())


def partition_rules() -> dict[str, Mapping[str, str]]:
    """Return ``scontrol show partition`` by name: AllowAccounts, PreemptMode, PriorityTier etc. Raises SlurmError."""
    lines = call("scontrol", "--all", "--oneliner", "show", "partition").splitlines()
    rules = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
    return {rule["PartitionName"]: rule for rule in rules if "PartitionName" in rule}


def _partition(fields: Sequence[str]) -> Partition:
    name, up, limit, nodes, cpus, mem, gres = (field.strip() for field in fields)
    gpus, kind = parse_gres(gres)
    return Partition(
        name.rstrip("*"),
        name.endswith("*"),
        up == "up",
        limit_minutes(limit),
        int(nodes),
        _number(cpus),
        _number(mem),
        gpus,
        kind,
        _number(cpus),
        _number(mem),
    )


def _merge_partitions(first: Partition, second: Partition) -> Partition:
    """Merge two kinds of nodes in one partition: the better one counts (more GPUs, then more CPUs)."""
    best = max(first, second, key=lambda part: (part.gpus, part.cpus))
    return replace(
        best,
        nodes=first.nodes + second.nodes,
        most_cpus=max(first.most_cpus, second.most_cpus),
        most_mem_mb=max(first.most_mem_mb, second.most_mem_mb),
    )


def _number(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0


def parse_gres(gres: str) -> tuple[int, str]:
    """Return ``(count, type)`` of the GPUs in a GRES list: ``gpu:h100:8(S:0-1),tmpfs:1T``."""
    count, kind = 0, ""
    # The brackets name sockets or indices.
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *details = part.strip().split(":")
        if name != "gpu":
            continue
        has_count = bool(details) and details[-1].isdigit()
        has_type = len(details) > 1 or (bool(details) and not has_count)
        count += int(details[-1]) if has_count else 1
        kind = kind or (details[0] if has_type else "")
    return count, kind


def duration_seconds(text: str) -> int | None:
    """Return Slurm's ``[days-][hours:]minutes:seconds`` in seconds; None for ``infinite`` and anything else."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds


def limit_minutes(limit: str) -> int | None:
    """Return a time limit in minutes, rounded down; None for ``infinite``."""
    seconds = duration_seconds(limit)
    return None if seconds is None else seconds // 60


def associations() -> tuple[set[str], set[str], str] | None:
    """Return ``(accounts, QOS, default account)`` of this user; None if accounting does not answer."""
    import getpass

    show = ("sacctmgr", "-n", "-P", "show")
    try:
        user = getpass.getuser()
        text = call(*show, "assoc", f"user={user}", "format=Account,QOS,DefaultQOS", timeout=10)
        default = call(*show, "user", user, "format=DefaultAccount", timeout=10).strip()
    except (SlurmError, KeyError, OSError):
        return None
    rows = [line.split("|") for line in text.splitlines() if line]
    accounts = {row[0] for row in rows if row[0]}
    qos = {name for row in rows if len(row) > 1 for name in row[1].split(",") if name}
    return (accounts, qos, default.splitlines()[0] if default else "") if accounts else None


def version() -> str:
    """Return the version of this machine's Slurm commands: ``22.05.8``. Raises SlurmError."""
    return (call("sbatch", "--version").split() or [""])[-1]


USABLE_STATES = {"idle", "mixed", "allocated", "completing", "planned", "reserved", "maint", "perfctrs"}
"""States of nodes that are neither down, drained, failing nor unknown."""


def usable_nodes() -> dict[str, int]:
    """Return the number of nodes of each partition that can take jobs, now or once others end. Raises SlurmError."""
    counts: dict[str, int] = {}
    for line in call("sinfo", "-a", "-h", "-o", "%R|%T|%D").splitlines():
        name, state, nodes = (field.strip() for field in f"{line}||".split("|")[:3])
        # A suffix tells more, such as ~ for a node that is powered up when needed; * is a node that does not respond.
        is_usable = state.rstrip("~#!%$@^-+") in USABLE_STATES
        counts[name] = counts.get(name, 0) + (_number(nodes) if is_usable else 0)
    return counts


def host_names(text: str) -> set[str]:
    """Return the hosts of ``gpu[1-2,5],login``; an item with several brackets stays as it is."""
    names: set[str] = set()
    for item in re.findall(r"[^,\[\]]+(?:\[[^\]]*\][^,\[\]]*)*", text):
        match = re.fullmatch(r"([^\[\]]+)\[([\d,\-]+)\]", item)
        names |= {f"{match[1]}{number}" for number in expand_ranges(match[2])} if match else {item}
    return names


def ordered_hosts(text: str) -> list[str]:
    """Return the hosts of a node list in Slurm's order (``scontrol show hostnames``). Raises SlurmError."""
    return call("scontrol", "show", "hostnames", text).split() if text else []


def step_options() -> frozenset[str]:
    """Return the long names of all options of this site's srun, plugins included. Raises SlurmError."""
    return frozenset(re.findall(r"--([a-z][a-z-]+)", call("srun", "--help")))


def limits() -> list[str]:
    """Return this user's limits in accounting: ``account lab: MaxJobs 10``, ``qos high: MaxWall 10:00``.

    Raises SlurmError.
    """
    import getpass

    show = ("sacctmgr", "-n", "-P", "show")
    keys = ("MaxWall", "MaxTRES", "MaxJobs", "MaxSubmit", "GrpTRES")
    format_option = f"format=Account,QOS,{','.join(keys)}"
    associations_text = call(*show, "assoc", f"user={getpass.getuser()}", format_option, timeout=10)
    rows = [line.split("|") for line in associations_text.splitlines() if line]
    user_qos = {name for row in rows for name in row[1].split(",")}
    lines = [f"account {row[0]}: {_set_limits(keys, row[2:])}" for row in rows if any(row[2:])]

    keys = ("MaxWall", "MaxTRESPU", "MaxJobsPU", "MaxSubmitPU", "GrpTRES")
    for line in call(*show, "qos", f"format=Name,{','.join(keys)}", timeout=10).splitlines():
        name, *values = line.split("|")
        if name in user_qos and any(values):
            lines.append(f"qos {name}: {_set_limits(keys, values)}")
    return list(dict.fromkeys(lines))


def _set_limits(keys: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=False) if value)


def oci_configuration(slurm_conf: str) -> str:
    """Return the path of oci.conf, which is always beside slurm.conf; empty if there is none."""
    path = Path(slurm_conf).with_name("oci.conf") if slurm_conf else None
    return str(path) if path and path.is_file() else ""
