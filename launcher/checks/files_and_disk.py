"""What can be known before anything is submitted, without Slurm: the disk has room, what the jobs need is there. With it: amlaunch.launcher.checks.slurm_limits, amlaunch.launcher.checks.containers."""

from __future__ import annotations

import errno
import fcntl
import netrc
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from amlaunch.containers.runtimes.catalog import BadReference, parse
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.specs.cluster_profile import STAGES, Cluster, ClusterProfile
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.schema import TOKENIZERS
from amlaunch.recipes.format.yaml_reader import KeyPath
from amlaunch.recipes.run_layout import RunDir

LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "zfs")
"""Of which no other node sees anything, unless they are exported."""
RUNS_ELSEWHERE = "--runs DIR puts runs elsewhere"
PROBE_BYTES = 1 << 20
MIN_INODES = 10_000
STATE_BYTES = 16
"""Of a parameter in a checkpoint: float32 weights and AdamW's two moments, with the manifest and some room."""


class Written(NamedTuple):
    """A folder that a run writes to."""

    folder: Path
    size: int
    """Bytes that it will take; what is there already has its room."""
    other: str
    """What puts it elsewhere."""


def check_disk(loaded: LoadedRecipe, plan: Plan, runs: Path, profile: ClusterProfile) -> list[str]:
    """That the run directory and the data can be written, with room and inodes; remarks. Raises BadInput with all that is wrong."""
    problems = ErrorCollector()
    needed: dict[int, int] = {}
    wanted = written(loaded, plan, runs)
    for one in wanted:
        with problems.collected():
            _check_visible(one, profile)
            there = _nearest(one.folder)
            _check_is_folder(there, one)
            _check_writable(there, one)
            device = there.stat().st_dev
            needed[device] = needed.get(device, 0) + one.size  # several may be on one file system
            _check_room(there, one, needed[device])
    problems.refuse()
    return _local_disks([*(one.folder for one in wanted), Path(plan.cwd), *_read_folders(loaded)], profile)


def written(loaded: LoadedRecipe, plan: Plan, runs: Path) -> list[Written]:
    """The folders that a run writes to."""
    made = RunDir(runs / plan.run_id).root.is_dir()
    elsewhere = loaded.recipe.checkpoint.checkpoint_dir
    size = 0 if made else checkpoint_bytes(loaded)
    found = [Written(runs, 0 if elsewhere else size, RUNS_ELSEWHERE)]
    if elsewhere:
        found.append(
            Written(
                Path(plan.cwd, os.path.expanduser(elsewhere)), size, "checkpoint.checkpoint_dir names another folder"
            )
        )
    if plan.data:
        other = (
            "preprocess.output_dir names another folder"
            if loaded.recipe.preprocess and loaded.recipe.preprocess.output_dir
            else RUNS_ELSEWHERE
        )
        found.append(Written(Path(plan.data).parent, 0 if Path(plan.data).is_dir() else data_bytes(loaded), other))
    return found


def _check_is_folder(there: Path, wanted: Written) -> None:
    """Nothing but folders on the way, and a name that sbatch can be given."""
    file = next(
        (
            path
            for path in (wanted.folder, *wanted.folder.parents)
            if path.is_relative_to(there) and path != there and path.exists()
        ),
        None,
    )
    if file:
        raise BadInput(f"{file}: is not a folder; {wanted.other}")
    if len(str(wanted.folder).splitlines()) > 1:
        raise BadInput(f"{str(wanted.folder)!r}: a path with a line break cannot be given to sbatch; {wanted.other}")


def _check_room(there: Path, wanted: Written, needed: int) -> None:
    free = shutil.disk_usage(there).free
    if needed > free:
        raise BadInput(
            f"{wanted.folder}: the run will need about {_giga(needed)} GB, {_giga(free)} GB are free; {wanted.other}"
        )
    inodes = os.statvfs(there)
    if inodes.f_files and inodes.f_favail < MIN_INODES:
        raise BadInput(f"{wanted.folder}: only {inodes.f_favail} more files can be made there (inodes); {wanted.other}")


def _read_folders(loaded: LoadedRecipe) -> Iterator[Path]:
    """Where the recipe's own text is read from."""
    section = loaded.recipe.preprocess
    given = section.data_files if section else None
    for pattern in [given] if isinstance(given, str) else given or []:
        yield Path(os.path.expanduser(re.split(r"[*?\[]", pattern)[0])).absolute()


def _giga(size: float) -> str:
    return f"{size / 1e9:.1f}"


def data_bytes(loaded: LoadedRecipe) -> int:
    """What the shards will take: two bytes a token (four for a vocabulary beyond 65,536)."""
    section = loaded.recipe.preprocess
    if section is None:
        return 0
    return (2 if TOKENIZERS.get(section.tokenizer, 0) <= 1 << 16 else 4) * (section.max_tokens or 0)


def checkpoint_bytes(loaded: LoadedRecipe) -> int:
    """What the checkpoints of all elements will take; 0 where the model's size is not known here."""
    recipe, section = loaded.recipe, loaded.recipe.checkpoint
    best = section.keep_best and recipe.validation_dataset is not None
    kept = section.max_recent_checkpoints + 1 + best  # and the one that is being written
    return STATE_BYTES * parameters(recipe.model) * kept * len(loaded.elements()) if section.enabled else 0


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


def _check_writable(there: Path, wanted: Written) -> None:
    """A real file of some size: quotas show in no other way."""
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".amlaunch-probe-") as probe:
            probe.write(os.urandom(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
            fcntl.flock(probe, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise BadInput(
                f"{wanted.folder}: its file system has no locks (flock), which keep two jobs from one element; a Lustre client is mounted with -o flock"
            ) from None
        raise BadInput(f"{wanted.folder}: cannot be written: {error.strerror}; {wanted.other}") from None


def _check_visible(wanted: Written, profile: ClusterProfile) -> None:
    """Raises BadInput where no other node can see a folder."""
    if profile.shared_roots and not is_shared(wanted.folder, profile):
        raise BadInput(
            f"{wanted.folder}: not below a folder that all nodes see ({', '.join(profile.shared_roots)}); {wanted.other}"
        )
    kind = file_system(_nearest(wanted.folder))
    if not profile.shared_roots and kind in ("tmpfs", "ramfs"):
        raise BadInput(f"{wanted.folder}: lies in this machine's memory ({kind}), which no node sees; {wanted.other}")


def is_shared(path: Path, profile: ClusterProfile) -> bool:
    """Whether a path is below one of the profile's ``shared_roots``, itself or where its links lead."""
    roots = [Path(root).expanduser() for root in profile.shared_roots]
    return any(path.is_relative_to(root) or path.resolve().is_relative_to(root.resolve()) for root in roots)


def _local_disks(folders: Iterable[Path], profile: ClusterProfile) -> list[str]:
    found = {folder: file_system(_nearest(folder)) for folder in folders if not is_shared(folder, profile)}
    mine = {folder: kind for folder, kind in found.items() if kind in LOCAL_FILE_SYSTEMS}
    if not mine:
        return []
    top = [folder for folder in mine if not any(folder != other and folder.is_relative_to(other) for other in mine)]
    are = "are on disks" if top[1:] else "is on a disk"
    return [
        f"{', '.join(map(str, top))} {are} of this machine ({', '.join(sorted(set(mine.values())))}); the nodes must see the same path{'s' * bool(top[1:])} (say so in the profile: shared_roots)"
    ]


def check_python(cluster: Cluster) -> list[str]:
    """The Python of the profile, as far as it can be seen from here; remarks. Raises BadInput."""
    given = cluster.profile.python
    if given is None:
        return _own_python(cluster.profile)
    path = Path(given).expanduser().absolute()
    where = cluster.at(("python",))
    if os.sep not in given or (os.access(path, os.X_OK) and path.is_file()):
        return []  # a bare name is looked for on the node, after setup
    if path.exists():
        raise BadInput(f"{where}: {given} is not a program")
    if is_shared(path, cluster.profile) or file_system(_nearest(path)) not in (*LOCAL_FILE_SYSTEMS, ""):
        raise BadInput(
            f"{where}: there is no {given}, here or on the nodes, which see the same folder {_nearest(path)}"
        )
    return [f"{where}: {given} is not on this machine; on a node that does not have it either, jobs end at once"]


def _own_python(profile: ClusterProfile) -> list[str]:
    """An environment on a disk of this machine is seldom on the nodes; a system's Python is, as a rule."""
    here = Path(sys.prefix)
    if sys.prefix == sys.base_prefix or is_shared(here, profile) or file_system(here) not in LOCAL_FILE_SYSTEMS:
        return []
    return [
        f"jobs run with the Python that submits, of {here}, on a disk of this machine; the nodes must see the same path (python in the profile names another)"
    ]


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


def check_needs(loaded: LoadedRecipe) -> None:
    """What jobs would miss only once they run: an image that is a file, W&B's key. Raises BadInput with all of it."""
    problems = ErrorCollector()
    problems.add(image_problems(loaded))
    if (
        loaded.recipe.wandb is not None
        and is_online(loaded)
        and not has_wandb_key()
        and not brings(loaded, "WANDB_API_KEY")
    ):
        where = loaded.lines.get(("wandb",), loaded.path)
        more = "--wandb.mode offline keeps it on disk, --wandb null turns it off"
        problems.add(
            [f"{where}: wandb is on, and there is no key: export WANDB_API_KEY=…, or run `wandb login` once; {more}"]
        )
    problems.refuse()


def image_problems(loaded: LoadedRecipe) -> Iterator[str]:
    """Images that are files, and are not there, or archives of something else."""
    section = loaded.recipe.container
    given: dict[KeyPath, str | None] = (
        {("image",): section.image, **{("stages", stage): getattr(section.stages, stage) for stage in STAGES}}
        if section
        else {}
    )
    for key, image in given.items():
        if not image or image == "none":
            continue
        where = f"{loaded.lines.get(('container', *key), loaded.path)}: container.{'.'.join(key)}"
        try:
            found = parse(image)
        except BadReference as error:
            yield f"{where}: {error}"
            continue
        if found.path is not None and not found.path.exists():
            yield f"{where}: there is no {'folder' if found.kind == 'folder' else 'file'} {image}"
        elif found.kind == "archive" and (why := _of_archive(found.file)):
            yield f"{where}: {image} {why}; docker save and skopeo copy write one, and amlaunch image import {image} makes a .sqsh of a root file system"


def _of_archive(path: Path) -> str:
    from amlaunch.containers.images.layers import why_no_image  # what reads archives takes a while to load

    return why_no_image(path)


def is_online(loaded: LoadedRecipe) -> bool:
    """Whether W&B is to be reached while the run is on its way."""
    return ((loaded.recipe.wandb or {}).get("mode") or os.environ.get("WANDB_MODE", "online")) == "online"


def brings(loaded: LoadedRecipe, *names: str) -> bool:
    """Whether the recipe itself sets one of these variables."""
    return loaded.recipe.container is not None and any(name in loaded.recipe.container.env for name in names)


def has_wandb_key() -> bool:
    """Whether W&B will find its key: in the environment, or where ``wandb login`` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
