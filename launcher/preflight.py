"""What can be known before anything is submitted: the cluster fits, the disk has room, what the jobs need is there."""

from __future__ import annotations

import errno
import fcntl
import netrc
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher import describe, slurm
from launcher.cluster import Cluster, Profile
from launcher.plan import Plan, Stage
from launcher.sbatch import check_options
from launcher.slurm import Partition
from recipes.errors import BadInput, did_you_mean
from recipes.loader import Loaded
from recipes.rundir import RunDir
from recipes.schema import TOKENIZERS

LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "zfs")
"""Of which no other node sees anything, unless they are exported."""
PROBE_BYTES = 1 << 20
MIN_INODES = 10_000
LITTLE_MEGA = 1000
"""Python with torch alone takes about 400."""
STATE_BYTES = 16
"""Of a parameter in a checkpoint: float32 weights and AdamW's two moments, with the manifest and some room."""


def check_cluster(loaded: Loaded, plan: Plan, cluster: Cluster, stages: Sequence[Stage]) -> None:
    """Everything about Slurm that has a name: options, partitions, account, QOS, sizes, times. Raises BadInput with all of it."""
    check_options(cluster.profile, cluster.source)
    known = {part.name: part for part in slurm.partitions()}
    rules = slurm.partition_rules()
    problems = [problem for stage in stages for problem in _stage_problems(loaded, stage, known, rules, cluster)]
    if not problems:
        problems += _association_problems(cluster, stages, rules)
    if problems:
        raise BadInput("\n".join(dict.fromkeys(problems)))


Rules = Mapping[str, Mapping[str, str]]


def _stage_problems(loaded: Loaded, stage: Stage, known: dict[str, Partition], rules: Rules, cluster: Cluster) -> Iterable[str]:
    part = known.get(stage.partition or "")
    needs, key = stage.needs, f"{loaded.path}: resources.{stage.name}"
    if part is None:
        yield f"{cluster.source}: partition {stage.partition!r} does not exist here; {did_you_mean(stage.partition or '', known)}"
        return
    if not part.up:
        yield f"partition {part.name} is not up; choose another one for stage {stage.name} (stages.{stage.name}.partition)"
    if needs.nodes > part.nodes:
        yield f"{key}.nodes is {needs.nodes}, partition {part.name} has {part.nodes}"
    if needs.gpus_per_node > part.gpus:
        yield f"{key}.gpus_per_node is {needs.gpus_per_node}, a node of partition {part.name} has {part.gpus}; partitions with GPUs: {_with_gpus(known)}"
    if needs.cpus > part.cpus:
        yield f"{key}.cpus is {needs.cpus}, a node of partition {part.name} has {part.cpus}"
    if needs.mem and part.mem_mb and _mega(needs.mem) > part.mem_mb:
        yield f"{key}.mem is {needs.mem}, a node of partition {part.name} has {part.mem_mb} MB"
    minutes = needs.time_minutes or slurm.minutes_of(rules.get(part.name, {}).get("DefaultTime", ""))
    if minutes is not None:
        yield from _time_problems(key, minutes, part, cluster.profile)


def _time_problems(key: str, minutes: int, part: Partition, profile: Profile) -> Iterable[str]:
    if part.minutes is not None and minutes > part.minutes:
        yield f"{key}.time is {describe.duration(minutes * 60)}, partition {part.name} allows {describe.duration(part.minutes * 60)}"
    if minutes * 60 <= profile.signal_seconds + 60:
        yield (
            f"{key}.time is {minutes} min, and a job is told to save {profile.signal_seconds} s before its end: nothing is left to work in; "
            "give it more time, or lower the profile's signal_seconds"
        )


def _with_gpus(known: dict[str, Partition]) -> str:
    return ", ".join(f"{part.name} ({part.gpus})" for part in known.values() if part.gpus) or "none"


def _mega(text: str) -> int:
    """``64G`` in megabytes (Slurm's default unit)."""
    units = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "M")
    if text.upper().endswith("B"):
        return _mega(text[:-1])
    return int(float(number) * units[unit]) if number.replace(".", "", 1).isdigit() else 0


def _association_problems(cluster: Cluster, stages: Sequence[Stage], rules: Rules) -> Iterable[str]:
    found = slurm.associations()
    if found is None:
        return  # accounting cannot be asked; sbatch has the last word
    accounts, qos, default = found
    for stage in stages:
        own = cluster.profile.stage(stage.name)
        if own.account and own.account not in accounts:
            yield f"{cluster.source}: account {own.account!r} is not yours; {did_you_mean(own.account, accounts)}"
        if own.qos and qos and own.qos not in qos:
            yield f"{cluster.source}: qos {own.qos!r} is not yours; {did_you_mean(own.qos, qos)}"
        allowed = rules.get(stage.partition or "", {}).get("AllowAccounts", "ALL")
        if allowed != "ALL" and (own.account or default) not in allowed.split(","):
            yield f"partition {stage.partition} is for the accounts {allowed} alone, yours is {own.account or default}; choose another one for stage {stage.name}"


def memory_notes(stages: Sequence[Stage]) -> list[str]:
    """Said where nobody gives a stage its memory and the site's own default is too small for anything. Raises SlurmError."""
    default = slurm.config().get("DefMemPerCPU", "")
    if not default.isdigit():
        return []
    small = [(stage, int(default) * max(stage.needs.cpus, stage.needs.tasks_per_node)) for stage in stages if not stage.needs.mem]
    return [
        f"stage {stage.name} asks for no memory, and Slurm gives it {mega} MB; resources.{stage.name}.mem, or mem in the profile, asks for more"
        for stage, mega in small
        if mega < LITTLE_MEGA
    ]


def check_disk(loaded: Loaded, plan: Plan, runs: Path, profile: Profile) -> list[str]:
    """That the run directory and the data can be written, with room and inodes; remarks. Raises BadInput."""
    made = RunDir(runs / plan.run_id).root.is_dir()  # what is there has its room already
    wanted = [(runs, 0 if made else checkpoint_bytes(loaded))]
    if plan.data:
        wanted.append((Path(plan.data).parent, 0 if Path(plan.data).is_dir() else data_bytes(loaded)))
    needed: dict[int, int] = {}
    for folder, size in wanted:
        there = _nearest(folder)
        _check_writable(there, folder)
        device = there.stat().st_dev
        needed[device] = needed.get(device, 0) + size  # both may be on one file system
        free = shutil.disk_usage(there).free
        if needed[device] > free:
            raise BadInput(f"{folder}: the run will need about {_giga(needed[device])} GB, {_giga(free)} GB are free; --runs DIR puts runs elsewhere")
        inodes = os.statvfs(there)
        if inodes.f_files and inodes.f_favail < MIN_INODES:
            raise BadInput(f"{folder}: only {inodes.f_favail} more files can be made there (inodes); --runs DIR puts runs elsewhere")
    return _visibility(runs, profile)


def _giga(size: float) -> str:
    return f"{size / 1e9:.1f}"


def data_bytes(loaded: Loaded) -> int:
    """What the shards will take: two bytes a token (four for a vocabulary beyond 65,536)."""
    section = loaded.recipe.preprocess
    if section is None:
        return 0
    return (2 if TOKENIZERS.get(section.tokenizer, 0) <= 1 << 16 else 4) * (section.max_tokens or 0)


def checkpoint_bytes(loaded: Loaded) -> int:
    """What the checkpoints of all elements will take; 0 where the model's size is not known here."""
    return STATE_BYTES * parameters(loaded.recipe.model) * (loaded.recipe.checkpoint.max_recent_checkpoints + 1) * len(loaded.elements())


def parameters(model: dict[str, Any]) -> int:
    """About how many parameters a transformer of these sizes has: embeddings and 12 x width x width a layer; 0: unknown."""
    config = model.get("config")
    sizes = {**model, **(config if isinstance(config, dict) else {})}

    def size(*names: str) -> int:
        return next((sizes[name] for name in names if isinstance(sizes.get(name), int)), 0)

    width, layers = size("n_embd", "hidden_size"), size("n_layer", "num_hidden_layers")
    return size("vocab_size") * width + 12 * layers * width * width


def _nearest(folder: Path) -> Path:
    """The deepest part of a path that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _check_writable(there: Path, folder: Path) -> None:
    """A real file of some size: quotas show in no other way."""
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".amlaunch-probe-") as probe:
            probe.write(os.urandom(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
            fcntl.flock(probe, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise BadInput(f"{folder}: its file system has no locks (flock), which keep two jobs from one element; a Lustre client is mounted with -o flock") from None
        raise BadInput(f"{folder}: cannot be written: {error.strerror}; --runs DIR puts runs elsewhere") from None


def _visibility(runs: Path, profile: Profile) -> list[str]:
    if profile.shared_roots:
        if not any(runs.is_relative_to(Path(root).expanduser()) for root in profile.shared_roots):
            raise BadInput(f"{runs}: not below a folder that all nodes see ({', '.join(profile.shared_roots)}); --runs DIR puts runs elsewhere")
        return []
    kind = file_system(_nearest(runs))
    if kind in ("tmpfs", "ramfs"):
        raise BadInput(f"{runs}: lies in this machine's memory ({kind}), which no node sees; --runs DIR puts runs elsewhere")
    if kind in LOCAL_FILE_SYSTEMS:
        return [f"{runs} is on a disk of this machine ({kind}); the nodes must see it under the same path (say so in the profile: shared_roots)"]
    return []


def file_system(path: Path) -> str:
    """The type of the file system that holds ``path``, as /proc/mounts names it."""
    best = ("", "")
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, mount, kind = line.split(" ")[:3]
        mount = mount.replace("\\040", " ")
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def check_needs(loaded: Loaded) -> None:
    """What jobs would miss only once they run: an image that is a file, W&B's key. Raises BadInput."""
    container = loaded.recipe.container
    image = container.image if container else None
    if image and image.startswith(("/", "./", "~")) and not Path(image).expanduser().exists():
        raise BadInput(f"{loaded.path}: container.image: there is no file {image}")
    wandb = loaded.recipe.wandb
    mode = (wandb or {}).get("mode") or os.environ.get("WANDB_MODE", "online")
    if wandb is not None and mode == "online" and not has_wandb_key():
        raise BadInput(
            f"{loaded.path}: wandb is on, and there is no key: export WANDB_API_KEY=…, or run `wandb login` once; "
            "--wandb.mode offline keeps it on disk, --wandb null turns it off"
        )


def has_wandb_key() -> bool:
    """Whether W&B will find its key: in the environment, or where ``wandb login`` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
