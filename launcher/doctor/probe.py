"""Read facts about this machine, its folders and its Slurm.

:mod:`amlaunch.launcher.doctor.diagnosis` judges them.
"""

from __future__ import annotations

import dataclasses
import getpass
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from amlaunch.launcher.checks.files_and_disk import file_system, nearest_folder, write_probe
from amlaunch.launcher.checks.torch_version import installed_torch
from amlaunch.launcher.display import wording
from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.slurm import client
from amlaunch.launcher.slurm.client import Partition, oci_configuration
from amlaunch.launcher.specs.machine import this_machine

RUNTIME_COMMANDS = ("enroot", "apptainer", "singularity", "docker", "podman", "ch-run")
"""Container runtimes by the name of their command; ch-run is Charliecloud's."""
SHARED_CANDIDATES = ("/shared", "/scratch", "/lustre", "/fsx", "/work")
"""Usual mount points of shared file systems."""
NETWORK_FILE_SYSTEMS = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "wekafs",
    "panfs",
    "pvfs2",
    "glusterfs",
    "juicefs",
    "daos",
    "afs",
    "cifs",
)
"""Types that other machines can see, too; with FUSE the type is ``fuse.NAME``."""
MINUTES_PER_DAY = 1440


# --- the machine


@dataclass(frozen=True)
class Host:
    """This machine."""

    name: str
    cpus: int
    memory_bytes: int
    gpus: tuple[str, ...]
    gpu_models: tuple[str, ...]
    python: str
    python_version: str
    torch: str
    """Version of this Python's torch; empty if it has none."""
    runtimes: Mapping[str, str]
    """Paths of the container runtimes in the search path, by command."""


def read_host() -> Host:
    """Read facts about this machine, without asking a driver or importing anything heavy."""
    machine = this_machine()
    runtimes = {name: shutil.which(name) for name in RUNTIME_COMMANDS}
    return Host(
        name=platform.node(),
        cpus=machine.cpus,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=machine.gpus,
        gpu_models=gpu_models(Path("/proc/driver/nvidia/gpus")),
        python=sys.executable,
        python_version=platform.python_version(),
        torch=installed_torch(),
        runtimes={name: path for name, path in runtimes.items() if path},
    )


def gpu_models(folder: Path) -> tuple[str, ...]:
    """Return the models of all GPUs, as NVIDIA's kernel module lists them in ``folder``."""
    texts = [path.read_text(errors="replace") for path in sorted(folder.glob("*/information"))]
    return tuple(model for text in texts for model in re.findall(r"^Model:\s*(.*\S)", text, re.MULTILINE))


# --- folders


@dataclass(frozen=True)
class Folder:
    """A folder that runs could be written to."""

    path: str
    use: str
    """``runs``, ``home``, or ``candidate``: a usual mount point of shared file systems."""
    file_system: str
    network: bool
    """True if other machines can see this type of file system."""
    free_bytes: int
    free_files: int | None
    """Free inodes; None: no limit."""
    writable: bool
    problem: str = ""
    """The error of writing and locking a file; tried only in the folder for runs."""


def read_folders(runs: Path) -> list[Folder]:
    """Read the folder for runs, the home folder and the usual shared folders that exist.

    In a shared folder the user's own subfolder is taken if there is one.
    """
    uses = {Path.home(): "home"}
    for root in map(Path, SHARED_CANDIDATES):
        user_folder = root / getpass.getuser()
        uses.setdefault(user_folder if user_folder.is_dir() else root, "candidate")
    uses.pop(runs, None)
    return [read_folder(runs, "runs"), *(read_folder(path, use) for path, use in uses.items() if path.is_dir())]


def read_folder(path: Path, use: str) -> Folder:
    """Read one folder; if it does not exist, the folder that it would be created in."""
    folder = nearest_folder(path)
    kind, space = file_system(folder), os.statvfs(folder)
    return Folder(
        path=str(path),
        use=use,
        file_system=kind,
        network=kind.removeprefix("fuse.") in NETWORK_FILE_SYSTEMS,
        free_bytes=space.f_bavail * space.f_frsize,
        free_files=space.f_favail if space.f_files else None,
        writable=os.access(folder, os.W_OK | os.X_OK),
        problem=_write_problem(folder) if use == "runs" else "",
    )


def _write_problem(folder: Path) -> str:
    """Return why a file cannot be written and locked in ``folder``; empty if it can."""
    try:
        write_probe(folder)
    except OSError as error:
        return error.strerror or str(error)
    return ""


# --- Slurm


@dataclass(frozen=True)
class SitePartition(Partition):
    """A partition with what only the controller knows about it."""

    usable: int = 0
    """Nodes that are neither down nor drained."""
    preempt: str = "OFF"
    """The fate of jobs preempted by another partition's jobs: OFF, REQUEUE, CANCEL or SUSPEND."""
    grace_seconds: int = 0
    accounts: str = "ALL"
    """The accounts that may use the partition."""

    @property
    def works(self) -> bool:
        """Return True if a job could start in the partition."""
        return self.up and self.usable > 0

    @property
    def limit(self) -> str:
        """Format the time limit: ``none``, ``3 days``, ``4:30:00``."""
        if self.minutes is None:
            return "none"
        days, rest = divmod(self.minutes, MINUTES_PER_DAY)
        if rest or not days:
            return wording.duration(self.minutes * 60)
        return f"{days} day{'s' * (days > 1)}"

    @property
    def gpu_summary(self) -> str:
        """Format the GPUs of a node: ``8 x h100``; empty if it has none."""
        if not self.gpus:
            return ""
        return f"{self.gpus}{f' x {self.gpu_type}' if self.gpu_type else ''}"

    def open_to(self, accounts: Iterable[str]) -> bool:
        """Return True if one of ``accounts`` may use the partition."""
        return self.accounts == "ALL" or not set(self.accounts.split(",")).isdisjoint(accounts)


@dataclass(frozen=True)
class SlurmSite:
    """A Slurm cluster as this user sees it."""

    version: str
    cluster: str = ""
    partitions: tuple[SitePartition, ...] = ()
    max_array_size: int = 1001
    min_job_age_s: int = 300
    """Seconds for which squeue knows an ended job; 0: forever."""
    kill_wait_s: int = 30
    """Seconds between a job's time limit and its end."""
    requeue: bool = True
    preempt_type: str = "preempt/none"
    needs_account: bool = False
    sacct_problem: str = ""
    """The error message of sacct; empty if it answers."""
    accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] = ()
    default_account: str = ""
    limits: tuple[str, ...] = ()
    pyxis: bool = False
    oci: str = ""
    """The path of oci.conf, Slurm's own container configuration; empty if there is none."""


def read_site() -> SlurmSite:
    """Read facts about the cluster, with one call to Slurm for each.

    Raises SlurmError if the controller does not answer; accounting may be silent.
    """
    version, settings = client.version(), client.config()
    preempt_type = settings.get("PreemptType", "preempt/none")
    partitions = tuple(read_partitions(preempt_type))
    if not partitions:
        raise SlurmError("sinfo", "no partition is visible to you")

    accounts, qos, default_account = client.associations() or (set(), set(), "")
    return SlurmSite(
        version=version,
        cluster=settings.get("ClusterName", ""),
        partitions=partitions,
        max_array_size=client.max_array_size(),
        min_job_age_s=_seconds(settings.get("MinJobAge", "300")),
        kill_wait_s=_seconds(settings.get("KillWait", "30")),
        requeue=settings.get("JobRequeue", "1") == "1",
        preempt_type=preempt_type,
        needs_account="associations" in settings.get("AccountingStorageEnforce", ""),
        sacct_problem=_sacct_problem(),
        accounts=tuple(sorted(accounts)),
        qos=tuple(sorted(qos)),
        default_account=default_account,
        limits=_limits(),
        pyxis="container-image" in client.step_options(),
        oci=oci_configuration(settings.get("SLURM_CONF", "")),
    )


def _seconds(setting: str) -> int:
    """Parse a setting such as ``3600 sec``."""
    return int(setting.split()[0])


def read_partitions(preempt_type: str) -> Iterator[SitePartition]:
    """Read all partitions. Raises SlurmError."""
    usable, rules_by_name = client.usable_nodes(), client.partition_rules()
    for partition in client.partitions():
        rules = rules_by_name.get(partition.name, {})

        # Every partition has a PreemptMode; it matters only where another partition takes precedence.
        by_partition = preempt_type == "preempt/partition_prio"
        preemptible = by_partition and any(_preempts(other, rules) for other in rules_by_name.values())
        yield SitePartition(
            **dataclasses.asdict(partition),
            usable=usable.get(partition.name, partition.nodes),
            preempt=rules.get("PreemptMode", "OFF") if preemptible else "OFF",
            grace_seconds=int(rules.get("GraceTime", "0")),
            accounts=rules.get("AllowAccounts", "ALL"),
        )


def _preempts(other: Mapping[str, str], rules: Mapping[str, str]) -> bool:
    """Return True if the other partition shares nodes with this one and has a higher priority tier."""
    if int(other.get("PriorityTier", "1")) <= int(rules.get("PriorityTier", "1")):
        return False
    other_nodes, nodes = client.host_names(other.get("Nodes", "")), client.host_names(rules.get("Nodes", ""))
    return not other_nodes.isdisjoint(nodes)


def _sacct_problem() -> str:
    try:
        client.sacct(["1"])
    except SlurmError as error:
        return error.message.splitlines()[-1]
    return ""


def _limits() -> tuple[str, ...]:
    try:
        return tuple(client.limits())
    except SlurmError:
        # A silent accounting service is reported once, by _sacct_problem.
        return ()
