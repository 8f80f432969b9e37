"""What ``amlaunch doctor`` reads: facts about this machine, its folders and its Slurm. What they mean: amlaunch.launcher.doctor.diagnosis."""

from __future__ import annotations

import dataclasses
import fcntl
import getpass
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from amlaunch.launcher.checks.files_and_disk import file_system
from amlaunch.launcher.display import wording
from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.slurm import client
from amlaunch.launcher.slurm.client import Partition, oci_configuration
from amlaunch.launcher.specs.machine import this_machine

RUNTIMES = ("enroot", "apptainer", "singularity", "docker", "podman", "ch-run")
"""Container runtimes by the name of their command; ch-run is Charliecloud's."""
SHARED_CANDIDATES = ("/shared", "/scratch", "/lustre", "/fsx", "/work")
"""Where sites like to mount what all nodes see."""
NETWORK_FILE_SYSTEMS = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "pvfs2", "glusterfs", "juicefs", "daos", "afs", "cifs",
)  # fmt: skip
"""Which other machines can see, too; with FUSE the type is ``fuse.NAME``."""


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
    torch: bool
    runtimes: Mapping[str, str]
    """Container runtimes in the search path, and where."""


def read_host() -> Host:
    """What this machine has; no driver is asked and nothing heavy is imported."""
    machine = this_machine()
    found = {name: shutil.which(name) for name in RUNTIMES}
    return Host(
        name=platform.node(),
        cpus=machine.cpus,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=machine.gpus,
        gpu_models=gpu_models(Path("/proc/driver/nvidia/gpus")),
        python=sys.executable,
        python_version=platform.python_version(),
        torch=importlib.util.find_spec("torch") is not None,
        runtimes={name: path for name, path in found.items() if path},
    )


def gpu_models(folder: Path) -> tuple[str, ...]:
    """The models of all GPUs, as NVIDIA's kernel module lists them."""
    texts = [path.read_text(errors="replace") for path in sorted(folder.glob("*/information"))]
    return tuple(model for text in texts for model in re.findall(r"^Model:\s*(.*\S)", text, re.MULTILINE))


@dataclass(frozen=True)
class Folder:
    """A folder that runs could be in."""

    path: str
    use: str
    """runs, home, or candidate: one of the usual places of shared file systems."""
    file_system: str
    network: bool
    """Whether it is of a type that other machines see."""
    free_bytes: int
    free_files: int | None
    """Inodes that are left; None: without limit."""
    writable: bool
    problem: str = ""
    """Why a locked file cannot be made in it; only the folder for runs is tried."""


def read_folders(runs: Path) -> list[Folder]:
    """The folder for runs, the home, and the usual shared ones that exist: the user's own part, where there is one."""
    wanted = {Path.home(): "home"}
    for root in map(Path, SHARED_CANDIDATES):
        own = root / getpass.getuser()
        wanted.setdefault(own if own.is_dir() else root, "candidate")
    wanted.pop(runs, None)
    return [read_folder(runs, "runs"), *(read_folder(path, use) for path, use in wanted.items() if path.is_dir())]


def read_folder(path: Path, use: str) -> Folder:
    """One folder; of one that is not there yet, the folder that it would be made in."""
    there = next(part for part in (path, *path.parents) if part.is_dir())
    kind, space = file_system(there), os.statvfs(there)
    return Folder(
        path=str(path),
        use=use,
        file_system=kind,
        network=kind.removeprefix("fuse.") in NETWORK_FILE_SYSTEMS,
        free_bytes=space.f_bavail * space.f_frsize,
        free_files=space.f_favail if space.f_files else None,
        writable=os.access(there, os.W_OK | os.X_OK),
        problem=probe(there) if use == "runs" else "",
    )


def probe(folder: Path) -> str:
    """Why a file cannot be made and locked in ``folder``; empty where it can."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".amlaunch-probe-") as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror or str(error)
    return ""


@dataclass(frozen=True)
class Place(Partition):
    """A partition, with what the controller alone says of it."""

    usable: int = 0
    """Nodes that are neither down nor drained."""
    preempt: str = "OFF"
    """What happens to jobs that those of another partition push out: OFF, REQUEUE, CANCEL or SUSPEND."""
    grace_seconds: int = 0
    accounts: str = "ALL"
    """The accounts that may use it."""

    @property
    def works(self) -> bool:
        """Whether a job could start in it."""
        return self.up and self.usable > 0

    @property
    def limit(self) -> str:
        """Its time limit: ``none``, ``3 days``, ``4:30:00``."""
        if self.minutes is None:
            return "none"
        days, rest = divmod(self.minutes, 1440)
        return wording.duration(self.minutes * 60) if rest or not days else f"{days} day{'s' * (days > 1)}"

    @property
    def gpus_each(self) -> str:
        """The GPUs of a node: ``8 x h100``; empty where it has none."""
        return f"{self.gpus}{f' x {self.gpu_type}' if self.gpu_type else ''}" if self.gpus else ""

    def open_to(self, accounts: Iterable[str]) -> bool:
        """Whether one of ``accounts`` may use it."""
        return self.accounts == "ALL" or not set(self.accounts.split(",")).isdisjoint(accounts)


@dataclass(frozen=True)
class SlurmSite:
    """A Slurm cluster as this user sees it."""

    version: str
    cluster: str = ""
    partitions: tuple[Place, ...] = ()
    max_array_size: int = 1001
    min_job_age_s: int = 300
    """How long squeue knows a job that has ended; 0: for ever."""
    kill_wait_s: int = 30
    """From a job's time limit to its end."""
    requeue: bool = True
    preempt_type: str = "preempt/none"
    needs_account: bool = False
    sacct_problem: str = ""
    """What sacct said instead of answering."""
    accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] = ()
    default_account: str = ""
    limits: tuple[str, ...] = ()
    pyxis: bool = False
    oci: str = ""
    """Slurm's own configuration of containers, where there is one."""


def read_site() -> SlurmSite:
    """Ask Slurm, once for each thing. Raises SlurmError where the controller is silent; accounting may be."""
    version, settings = client.version(), client.config()
    preempt_type = settings.get("PreemptType", "preempt/none")
    places = tuple(read_places(preempt_type))
    if not places:
        raise SlurmError("sinfo", "there is no partition that you may see")
    accounts, qos, default = client.associations() or (set(), set(), "")
    return SlurmSite(
        version=version,
        cluster=settings.get("ClusterName", ""),
        partitions=places,
        max_array_size=client.max_array_size(),
        min_job_age_s=_seconds(settings.get("MinJobAge", "300")),
        kill_wait_s=_seconds(settings.get("KillWait", "30")),
        requeue=settings.get("JobRequeue", "1") == "1",
        preempt_type=preempt_type,
        needs_account="associations" in settings.get("AccountingStorageEnforce", ""),
        sacct_problem=_sacct_problem(),
        accounts=tuple(sorted(accounts)),
        qos=tuple(sorted(qos)),
        default_account=default,
        limits=_limits(),
        pyxis="container-image" in client.step_options(),
        oci=oci_configuration(settings.get("SLURM_CONF", "")),
    )


def _seconds(setting: str) -> int:
    """``3600 sec``."""
    return int(setting.split()[0])


def read_places(preempt_type: str) -> Iterator[Place]:
    """All partitions. Raises SlurmError."""
    usable, rules = client.usable_nodes(), client.partition_rules()
    for part in client.partitions():
        own = rules.get(part.name, {})
        by_partition = preempt_type == "preempt/partition_prio"
        pushed = by_partition and any(_pushes_out(other, own) for other in rules.values())
        yield Place(
            **dataclasses.asdict(part),
            usable=usable.get(part.name, part.nodes),
            preempt=own.get("PreemptMode", "OFF") if pushed else "OFF",
            grace_seconds=int(own.get("GraceTime", "0")),
            accounts=own.get("AllowAccounts", "ALL"),
        )


def _pushes_out(other: Mapping[str, str], own: Mapping[str, str]) -> bool:
    """Whether another partition shares nodes and comes first; a PreemptMode alone means nothing, all have one."""
    first = int(other.get("PriorityTier", "1")) > int(own.get("PriorityTier", "1"))
    return first and not client.host_names(other.get("Nodes", "")).isdisjoint(client.host_names(own.get("Nodes", "")))


def _sacct_problem() -> str:
    try:
        client.sacct(["1"])
    except SlurmError as error:
        return error.message.splitlines()[-1]
    return ""


def _limits() -> tuple[str, ...]:
    try:
        return tuple(client.limits())
    except SlurmError:  # accounting's silence is told once already
        return ()
