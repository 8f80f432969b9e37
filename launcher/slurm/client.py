"""The only code that calls Slurm: one function a question, typed answers, one kind of error.

Delimited output formats are used instead of ``--json``, whose shape differs
between Slurm's versions and which old ones do not have.
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

from amlaunch.launcher.errors import SlurmError

TIMEOUT_SECONDS = 30.0
"""Of one call; a controller that is busy answers late, not never."""
KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""Say which cluster to talk to, and so stay when the variables of an enclosing job are taken out."""
INHERITED = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "PMI_", "PMIX_", "PMI2_")
"""What a shell inside an allocation has: a job submitted from there would take it for its own."""
CONFIGURATIONS = (
    "/etc/slurm/slurm.conf",
    "/run/slurm/conf/slurm.conf",
    "/etc/slurm-llnl/slurm.conf",
    "/usr/local/etc/slurm.conf",
)
"""Where packages, configless nodes and builds from source have it."""
FORMATS = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SACCTMGR_")
RENDEZVOUS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Left behind by torchrun, or by a job that we are started from."""

ACTIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD",
    "SPECIAL_EXIT", "SIGNALING", "STAGE_OUT", "STOPPED", "RESV_DEL_HOLD",
}  # fmt: skip
"""States of a job that has not ended (squeue(1), JOB STATE CODES)."""
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
"""Of these, the states of a job that has no processes yet."""


@dataclass(frozen=True)
class JobInfo:
    """One job, or one task of an array, as squeue or sacct tells."""

    id: str
    """``123_4`` for a task of an array."""
    state: str
    """Slurm's word, such as PENDING."""
    reason: str = ""
    start: str = ""
    """When it started, or Slurm's estimate for one that waits: local time ``2026-11-24T18:00:00``."""
    nodes: str = ""
    exit_code: str = ""
    """sacct only: ``code:signal``."""
    comment: str = ""
    submitted: str = ""
    """squeue only: when, in local time."""

    @property
    def submitted_at(self) -> float:
        """:attr:`submitted` in Unix seconds; 0 where it is not known."""
        try:
            return time.mktime(time.strptime(self.submitted, "%Y-%m-%dT%H:%M:%S"))
        except ValueError:
            return 0.0

    @property
    def active(self) -> bool:
        """Whether it has not ended."""
        return self.state in ACTIVE

    @property
    def waiting(self) -> bool:
        """Whether it has no processes yet."""
        return self.state in WAITING


@dataclass(frozen=True)
class Partition:
    """One partition: what its nodes have, and what it allows."""

    name: str
    default: bool
    up: bool
    minutes: int | None
    """Longest time limit; None: none."""
    nodes: int
    cpus: int
    """Of the node that has most GPUs, or else most CPUs."""
    mem_mb: int
    """Of the same node."""
    gpus: int
    """Of the same node."""
    gpu_type: str = ""
    most_cpus: int = 0
    """Of any of its nodes."""
    most_mem_mb: int = 0
    """Of any of its nodes."""


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without what an enclosing allocation or launcher left: see :data:`INHERITED` and :data:`RENDEZVOUS`."""
    return {
        name: value
        for name, value in environ.items()
        if name in KEPT_VARIABLES or not (name.startswith(INHERITED) or name in RENDEZVOUS)
    }


def plain_environment() -> dict[str, str]:
    """Ours, without a user's own defaults for Slurm's commands: a filter or a format of his would hide jobs from us."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(FORMATS)}
    return {**mine, "SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0"}


def call(*argv: str, timeout: float = TIMEOUT_SECONDS, env: Mapping[str, str] | None = None) -> str:
    """Standard output of a command of Slurm. Raises SlurmError."""
    import subprocess  # here: status of a run that never was on a cluster needs none of it

    found = env if env is not None else plain_environment()
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=dict(found),
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise SlurmError(argv[0], "not found: is this a machine of the cluster?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(argv[0], f"no answer in {timeout:.0f} s") from None
    if done.returncode:
        raise SlurmError(argv[0], (done.stderr or done.stdout).strip() or f"exit code {done.returncode}")
    return done.stdout


def available() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def squeue() -> dict[str, JobInfo]:
    """All jobs of this user that Slurm still knows, ended ones included, by id. Raises SlurmError."""
    text = call("squeue", "--me", "-a", "-h", "-r", "-t", "all", "-o", "%i|%T|%r|%S|%N|%V|%k")
    jobs = {}
    for line in text.splitlines():
        fields = line.split("|", 6)
        if len(fields) == 7:
            job, state, reason, start, nodes, submitted, comment = (field.strip() for field in fields)
            jobs[job] = JobInfo(
                job,
                state,
                _known(reason),
                _known(start),
                _known(nodes),
                comment=_known(comment),
                submitted=_known(submitted),
            )
    return jobs


def sacct(ids: Sequence[str]) -> dict[str, JobInfo]:
    """What accounting knows of the jobs (or whole arrays) ``ids``, by id. Raises SlurmError, also where there is none."""
    # Without -S, sacct looks no further back than midnight when no job is named; -j alone has no such limit.
    text = call("sacct", "-X", "-n", "-P", "-j", ",".join(ids), "-o", "JobID,State,Reason,Start,NodeList,ExitCode")
    jobs = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) == 6:
            job, state, reason, start, nodes, code = fields
            word = state.split(" ")[0]  # CANCELLED by 1000
            for name in _array_tasks(job):
                jobs[name] = JobInfo(name, word, _known(reason), _known(start), _known(nodes), code)
    return jobs


def _known(text: str) -> str:
    return "" if text in ("N/A", "(null)", "None", "Unknown", "None assigned", "None assigned ") else text


def _array_tasks(job: str) -> list[str]:
    """The tasks that sacct's ``12_[0-3,7%2]`` (a part that never started) stands for."""
    match = re.fullmatch(r"(\d+)_\[([\d,\-]+)(?:%\d+)?\]", job)
    if not match:
        return [job]
    return [f"{match[1]}_{index}" for index in expand_ranges(match[2])]


def expand_ranges(text: str) -> list[int]:
    """``0-2,7`` as ``[0, 1, 2, 7]``."""
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def compress_ranges(numbers: Iterable[int]) -> str:
    """The inverse of :func:`expand_ranges`, for ``--array``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in parts)


def scancel(ids: Sequence[str], signal: str | None = None) -> None:
    """Cancel jobs, arrays or tasks of arrays (or send them ``signal``); ended ones do not matter. Raises SlurmError."""
    for start in range(0, len(ids), 500):  # an argument list has an end
        call("scancel", "-Q", *([f"--signal={signal}"] if signal else []), *ids[start : start + 500])


def requeue(job: str) -> None:
    """Put a running job back into the queue: exactly this task, never its array. Raises SlurmError."""
    call("scontrol", "requeue", job)


def exclude(job: str, nodes: str) -> None:
    """Have a job that waits start on none of ``nodes`` (a list with commas). Raises SlurmError."""
    call("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}")


def may_be_requeued(job: str) -> bool:
    """Whether a running job (a task of an array: ``12_3``) is one that may go on later. Raises SlurmError.

    One that somebody cancelled may not; while it ends, Slurm calls it COMPLETING, as it does one that ran into its time
    limit: those are told apart by their times.
    """
    facts = dict(re.findall(r"(\w+)=(\S*)", call("scontrol", "show", "job", job)))
    if facts.get("JobState") == "COMPLETING":
        ran, limit = seconds_of(facts.get("RunTime", "")), seconds_of(facts.get("TimeLimit", ""))
        return ran is not None and limit is not None and ran >= limit
    return facts.get("JobState") != "CANCELLED"


@cache
def config() -> Mapping[str, str]:
    """``scontrol show config`` as a mapping. Raises SlurmError."""
    pairs = (line.split("=", 1) for line in call("scontrol", "show", "config").splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def configured_name() -> str:
    """The ClusterName in this machine's own slurm.conf, without asking anybody; empty where there is none to read."""
    for path in (os.environ.get("SLURM_CONF"), *CONFIGURATIONS):
        with suppress(OSError):
            match = re.search(
                r"^\s*ClusterName\s*=\s*(\S+)",
                Path(path or "").read_text(errors="replace"),
                re.MULTILINE | re.IGNORECASE,
            )
            if match:
                return match[1]
    return ""


def cluster_name() -> str:
    """What Slurm calls the cluster that is asked (``ClusterName``). Raises SlurmError."""
    return config().get("ClusterName", "")


def max_array_size() -> int:
    """Most elements of one array (its highest index is one less). Raises SlurmError."""
    return int(config().get("MaxArraySize", "1001"))


def partitions() -> list[Partition]:
    """All partitions that this user sees. Raises SlurmError."""
    text = call("sinfo", "-a", "-h", "-e", "-o", "%P|%a|%l|%D|%c|%m|%G")
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) == 7:
            one = _partition(fields)
            found[one.name] = _together(found[one.name], one) if one.name in found else one
    return list(found.values())


def partition_rules() -> dict[str, Mapping[str, str]]:
    """``scontrol show partition`` by name: AllowAccounts, PreemptMode, PriorityTier and the like. Raises SlurmError."""
    lines = call("scontrol", "--all", "--oneliner", "show", "partition").splitlines()
    rules = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
    return {one["PartitionName"]: one for one in rules if "PartitionName" in one}


def _partition(fields: Sequence[str]) -> Partition:
    name, up, limit, nodes, cpus, mem, gres = (field.strip() for field in fields)
    gpus, kind = gpus_of(gres)
    return Partition(
        name.rstrip("*"),
        name.endswith("*"),
        up == "up",
        minutes_of(limit),
        int(nodes),
        _number(cpus),
        _number(mem),
        gpus,
        kind,
        _number(cpus),
        _number(mem),
    )


def _together(one: Partition, other: Partition) -> Partition:
    """Of two kinds of nodes in one partition, the better one: more GPUs, then more CPUs."""
    best = max(one, other, key=lambda part: (part.gpus, part.cpus))
    most = {name: max(getattr(one, name), getattr(other, name)) for name in ("most_cpus", "most_mem_mb")}
    return replace(best, nodes=one.nodes + other.nodes, **most)


def _number(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0


def gpus_of(gres: str) -> tuple[int, str]:
    """``(count, type)`` of the GPUs in a GRES list: ``gpu:h100:8(S:0-1),tmpfs:1T``."""
    count, kind = 0, ""
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):  # the brackets name sockets or indices
        name, *rest = part.strip().split(":")
        if name == "gpu":
            count += int(rest[-1]) if rest and rest[-1].isdigit() else 1
            kind = kind or (rest[0] if rest and (len(rest) > 1 or not rest[0].isdigit()) else "")
    return count, kind


def seconds_of(text: str) -> int | None:
    """Slurm's ``[days-][hours:]minutes:seconds`` in seconds; None for ``infinite`` and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds


def minutes_of(limit: str) -> int | None:
    """A time limit as whole minutes; None for ``infinite``."""
    seconds = seconds_of(limit)
    return None if seconds is None else seconds // 60


def associations() -> tuple[set[str], set[str], str] | None:
    """``(accounts, QOS, default account)`` of this user; None where accounting cannot be asked."""
    import getpass

    try:
        text = call(
            "sacctmgr",
            "-n",
            "-P",
            "show",
            "assoc",
            f"user={getpass.getuser()}",
            "format=Account,QOS,DefaultQOS",
            timeout=10,
        )
        default = call(
            "sacctmgr", "-n", "-P", "show", "user", getpass.getuser(), "format=DefaultAccount", timeout=10
        ).strip()
    except (SlurmError, KeyError, OSError):
        return None
    rows = [line.split("|") for line in text.splitlines() if line]
    accounts = {row[0] for row in rows if row[0]}
    qos = {name for row in rows if len(row) > 1 for name in row[1].split(",") if name}
    return (accounts, qos, default.splitlines()[0] if default else "") if accounts else None


def version() -> str:
    """The version of this machine's Slurm commands: ``22.05.8``. Raises SlurmError."""
    return (call("sbatch", "--version").split() or [""])[-1]


def usable_nodes() -> dict[str, int]:
    """Nodes of each partition that work or could: neither down nor drained. Raises SlurmError."""
    found: dict[str, int] = {}
    for line in call("sinfo", "-a", "-h", "-o", "%R|%F").splitlines():  # %F: allocated/idle/other/total
        name, _, counts = line.partition("|")
        if re.fullmatch(r"\d+/\d+/\d+/\d+", counts.strip()):
            allocated, idle, _, _ = map(int, counts.split("/"))
            found[name.strip()] = found.get(name.strip(), 0) + allocated + idle
    return found


def host_names(text: str) -> set[str]:
    """``gpu[1-2,5],login`` as single names; one with several brackets stays as it is."""
    found: set[str] = set()
    for word in re.findall(r"[^,\[\]]+(?:\[[^\]]*\][^,\[\]]*)*", text):
        match = re.fullmatch(r"([^\[\]]+)\[([\d,\-]+)\]", word)
        found |= {f"{match[1]}{number}" for number in expand_ranges(match[2])} if match else {word}
    return found


def ordered_hosts(text: str) -> list[str]:
    """A list of nodes as single names, in Slurm's own order (``scontrol show hostnames``). Raises SlurmError."""
    return call("scontrol", "show", "hostnames", text).split() if text else []


def step_options() -> frozenset[str]:
    """The long names of all options that this site's srun knows, those of plugins included. Raises SlurmError."""
    return frozenset(re.findall(r"--([a-z][a-z-]+)", call("srun", "--help")))


def limits() -> list[str]:
    """What accounting limits this user to: ``account lab: MaxJobs 10``, ``qos high: MaxWall 10:00``. Raises SlurmError."""
    import getpass

    keys = ("MaxWall", "MaxTRES", "MaxJobs", "MaxSubmit", "GrpTRES")
    show = ("sacctmgr", "-n", "-P", "show")
    assoc = call(*show, "assoc", f"user={getpass.getuser()}", f"format=Account,QOS,{','.join(keys)}", timeout=10)
    rows = [line.split("|") for line in assoc.splitlines() if line]
    mine = {name for row in rows for name in row[1].split(",")}
    found = [f"account {row[0]}: {_given(keys, row[2:])}" for row in rows if any(row[2:])]
    keys = ("MaxWall", "MaxTRESPU", "MaxJobsPU", "MaxSubmitPU", "GrpTRES")
    for line in call(*show, "qos", f"format=Name,{','.join(keys)}", timeout=10).splitlines():
        name, *values = line.split("|")
        if name in mine and any(values):
            found.append(f"qos {name}: {_given(keys, values)}")
    return list(dict.fromkeys(found))


def _given(keys: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=False) if value)


def oci_configuration(slurm_conf: str) -> str:
    """oci.conf always lies beside slurm.conf."""
    path = Path(slurm_conf).with_name("oci.conf") if slurm_conf else None
    return str(path) if path and path.is_file() else ""
