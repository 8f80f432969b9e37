"""Check disk space, folders and the files that jobs need, without asking Slurm.

See :mod:`amlaunch.launcher.checks.slurm_limits` for what Slurm is asked, and
:mod:`amlaunch.launcher.checks.containers` for what containers need.
"""

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
from amlaunch.launcher.display import wording
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.specs.cluster_profile import STAGES, Cluster, ClusterProfile
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.schema import TOKENIZERS
from amlaunch.recipes.format.yaml_reader import KeyPath
from amlaunch.recipes.run_layout import RunDir

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
LOCAL_FILE_SYSTEMS = (*MEMORY_FILE_SYSTEMS, "ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "zfs")
"""Types that other nodes do not see unless the folder is exported."""
PROBE_BYTES = 1 << 20
MIN_FREE_INODES = 10_000
CHECKPOINT_BYTES_PER_PARAMETER = 16
"""float32 weights, AdamW's two moments, the manifest and some headroom."""
SMALL_VOCABULARY = 1 << 16
"""Token IDs below this take two bytes in a shard, others four."""


class OutputFolder(NamedTuple):
    """A folder that a run writes to."""

    path: Path
    size: int
    """Bytes still to be written; 0 if the data exists already."""
    remedy: str
    """The instruction for choosing another folder, used at the end of error messages."""


def check_disk(loaded: LoadedRecipe, plan: Plan, runs: Path, profile: ClusterProfile | None) -> list[str]:
    """Check that nodes see every output folder, and that each is writable and large enough.

    ``profile``: the cluster's; None: the run stays on this machine. Returns notes. Raises BadInput with all problems.
    """
    problems = ErrorCollector()
    outputs = _output_folders(loaded, plan, runs)
    bytes_by_device: dict[int, int] = {}

    for output in outputs:
        with problems.collected():
            _check_output(output, profile, bytes_by_device)
    problems.raise_if_any()
    if profile is None:
        return []

    folders = [*(output.path for output in outputs), Path(plan.cwd), *_input_folders(loaded)]
    return _local_disk_notes(folders, profile)


def check_python(cluster: Cluster) -> list[str]:
    """Check the Python that jobs will use, as far as this machine can see it.

    Returns notes. Raises BadInput.
    """
    python = cluster.profile.python
    if python is None:
        return _own_python_notes(cluster.profile)

    # A bare name is looked up on the node, after the profile's setup lines.
    path = Path(python).expanduser().absolute()
    if os.sep not in python or (os.access(path, os.X_OK) and path.is_file()):
        return []

    where = cluster.at(("python",))
    if path.exists():
        raise BadInput(f"{where}: {python} is not an executable file")
    folder = nearest_folder(path)
    if is_shared(path, cluster.profile) or file_system(folder) not in (*LOCAL_FILE_SYSTEMS, ""):
        raise BadInput(f"{where}: {python} does not exist, here or on the nodes, which share {folder}")
    return [f"{where}: {python} does not exist on this machine; jobs fail at once on nodes that lack it too"]


def check_prerequisites(loaded: LoadedRecipe) -> None:
    """Check that image files and the W&B key exist. Raises BadInput with all problems."""
    problems = ErrorCollector()
    problems.add(image_problems(loaded))
    if uses_wandb(loaded) and not _has_wandb_key() and not sets_variable(loaded, "WANDB_API_KEY"):
        where = loaded.lines.get(("wandb",), loaded.path)
        problems.add(
            [
                f"{where}: wandb is enabled, but no API key was found; export WANDB_API_KEY=…, "
                "or run `wandb login` once. To train without one, add --wandb.mode offline "
                "(logs stay on disk) or --wandb null (no logging to W&B)"
            ]
        )
    problems.raise_if_any()


# --- folders that a run writes to


def _output_folders(loaded: LoadedRecipe, plan: Plan, runs: Path) -> list[OutputFolder]:
    """List the folders that a run writes to, with the space each still needs."""
    run_exists = RunDir(runs / plan.run_id).root.is_dir()
    checkpoint_dir = loaded.recipe.checkpoint.checkpoint_dir
    checkpoint_size = 0 if run_exists else checkpoint_bytes(loaded)

    outputs = [OutputFolder(runs, 0 if checkpoint_dir else checkpoint_size, _choose("--runs DIR"))]
    if checkpoint_dir:
        path = Path(plan.cwd, os.path.expanduser(checkpoint_dir))
        outputs.append(OutputFolder(path, checkpoint_size, _choose("checkpoint.checkpoint_dir")))
    if plan.data:
        section = loaded.recipe.preprocess
        option = "preprocess.output_dir" if section and section.output_dir else "--runs DIR"
        size = 0 if Path(plan.data).is_dir() else _data_bytes(loaded)
        outputs.append(OutputFolder(Path(plan.data).parent, size, _choose(option)))
    return outputs


def _choose(option: str) -> str:
    return f"choose another folder with {option}"


def _input_folders(loaded: LoadedRecipe) -> Iterator[Path]:
    """List the folders that the recipe's own text is read from."""
    section = loaded.recipe.preprocess
    patterns = section.data_files if section else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        prefix = re.split(r"[*?\[]", pattern)[0]
        yield Path(os.path.expanduser(prefix)).absolute()


def _check_output(output: OutputFolder, profile: ClusterProfile | None, bytes_by_device: dict[int, int]) -> None:
    """Check one output folder; ``bytes_by_device`` adds up folders on the same file system. Raises BadInput."""
    if profile is not None:
        _check_visible(output, profile)
    folder = nearest_folder(output.path)
    _check_is_folder(folder, output)
    _check_writable(folder, output)

    device = folder.stat().st_dev
    bytes_by_device[device] = bytes_by_device.get(device, 0) + output.size
    _check_space(folder, output, bytes_by_device[device])


def _check_visible(output: OutputFolder, profile: ClusterProfile) -> None:
    """Raise BadInput if other nodes cannot see the folder."""
    if profile.shared_roots:
        if not is_shared(output.path, profile):
            roots = ", ".join(profile.shared_roots)
            raise BadInput(f"{output.path}: not below the profile's shared_roots ({roots}); {output.remedy}")
        return

    kind = file_system(nearest_folder(output.path))
    if kind in MEMORY_FILE_SYSTEMS:
        raise BadInput(f"{output.path}: in this machine's memory ({kind}), which nodes cannot see; {output.remedy}")


def _check_is_folder(folder: Path, output: OutputFolder) -> None:
    """Raise BadInput if a file blocks the path below ``folder``, or if sbatch cannot take the path."""
    for path in (output.path, *output.path.parents):
        if path == folder or not path.is_relative_to(folder):
            break
        if path.exists():
            raise BadInput(f"{path}: not a folder; {output.remedy}")

    if len(str(output.path).splitlines()) > 1:
        raise BadInput(f"{str(output.path)!r}: sbatch does not accept a path with a line break; {output.remedy}")


def _check_writable(folder: Path, output: OutputFolder) -> None:
    try:
        write_probe(folder)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise BadInput(
                f"{output.path}: this file system does not support flock, which stops two jobs "
                "from running the same element; on Lustre, mount with -o flock"
            ) from None
        raise BadInput(f"{output.path}: not writable ({error.strerror}); {output.remedy}") from None


def _check_space(folder: Path, output: OutputFolder, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BadInput(
            f"{output.path}: the run needs about {wording.size(needed)}, "
            f"but only {wording.size(free)} is free; {output.remedy}"
        )
    inodes = os.statvfs(folder)
    if inodes.f_files and inodes.f_favail < MIN_FREE_INODES:
        raise BadInput(f"{output.path}: only {inodes.f_favail} more files fit (inodes); {output.remedy}")


def _data_bytes(loaded: LoadedRecipe) -> int:
    """Estimate the size of the shards; 0 if the recipe has no preprocess section or no limit."""
    section = loaded.recipe.preprocess
    if section is None:
        return 0
    bytes_per_token = 2 if TOKENIZERS.get(section.tokenizer, 0) <= SMALL_VOCABULARY else 4
    return bytes_per_token * (section.max_tokens or 0)


def checkpoint_bytes(loaded: LoadedRecipe) -> int:
    """Estimate the size of the checkpoints of all elements; 0 if the model's size is unknown here."""
    recipe, section = loaded.recipe, loaded.recipe.checkpoint
    if not section.enabled:
        return 0
    keeps_best = section.keep_best and recipe.validation_dataset is not None
    kept = section.max_recent_checkpoints + keeps_best
    being_written = 1
    size = CHECKPOINT_BYTES_PER_PARAMETER * _parameter_count(recipe.model)
    return size * (kept + being_written) * len(loaded.elements())


def _parameter_count(model: dict[str, Any]) -> int:
    """Estimate a transformer's parameters: embeddings plus 12 x width² a layer; 0 if unknown."""
    config = model.get("config")
    sizes = {**model, **(config if isinstance(config, dict) else {})}

    def size(*names: str) -> int:
        return next((sizes[name] for name in names if isinstance(sizes.get(name), int)), 0)

    width, layers = size("n_embd", "hidden_size"), size("n_layer", "num_hidden_layers")
    return size("vocab_size") * width + 12 * layers * width * width


# --- paths and file systems


def nearest_folder(path: Path) -> Path:
    """Return ``path`` itself or its nearest parent that is an existing folder."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def write_probe(folder: Path) -> None:
    """Write, sync and lock a temporary file in ``folder``. Raises OSError.

    The file is large enough for an exceeded quota to show, which nothing else reveals.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".amlaunch-probe-") as file:
        file.write(os.urandom(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        fcntl.flock(file, fcntl.LOCK_EX)


def is_shared(path: Path, profile: ClusterProfile) -> bool:
    """Return True if ``path``, as written or resolved, is below one of the profile's shared_roots."""
    roots = [Path(root).expanduser() for root in profile.shared_roots]
    return any(path.is_relative_to(root) or path.resolve().is_relative_to(root.resolve()) for root in roots)


def file_system(path: Path) -> str:
    """Return the type of the file system that holds ``path``, as /proc/mounts names it; empty if unknown."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""

    resolved = path.resolve()
    longest, kind_of_longest = "", ""
    for line in lines:
        _, mount, kind = line.split(" ")[:3]
        mount = mount.replace("\\040", " ")
        if resolved.is_relative_to(mount) and len(mount) >= len(longest):
            longest, kind_of_longest = mount, kind
    return kind_of_longest


def _local_disk_notes(folders: Iterable[Path], profile: ClusterProfile) -> list[str]:
    """Warn about folders that are probably on a disk of this machine alone."""
    kinds = {folder: file_system(nearest_folder(folder)) for folder in folders if not is_shared(folder, profile)}
    local = {folder: kind for folder, kind in kinds.items() if kind in LOCAL_FILE_SYSTEMS}
    if not local:
        return []

    top = [folder for folder in local if not any(folder != other and folder.is_relative_to(other) for other in local)]
    several = len(top) > 1
    return [
        f"{', '.join(map(str, top))} {'are on local disks' if several else 'is on a local disk'} of this machine "
        f"({', '.join(sorted(set(local.values())))}); nodes must see the same path{'s' * several}. "
        f"If they do, add {'them' if several else 'it'} to shared_roots in the profile"
    ]


def _own_python_notes(profile: ClusterProfile) -> list[str]:
    """Warn if jobs use this Python and it is a virtual environment on a local disk."""
    # A system Python usually exists on the nodes too; an environment on a local disk seldom does.
    prefix = Path(sys.prefix)
    is_environment = sys.prefix != sys.base_prefix
    if not is_environment or is_shared(prefix, profile) or file_system(prefix) not in LOCAL_FILE_SYSTEMS:
        return []
    return [
        f"jobs use this Python, in {prefix}, which is on a local disk of this machine; "
        "nodes must see the same path. To use another Python, set python in the profile"
    ]


# --- images and W&B


def image_problems(loaded: LoadedRecipe) -> Iterator[str]:
    """List image files that do not exist or are no image."""
    section = loaded.recipe.container
    if section is None:
        return
    images: dict[KeyPath, str | None] = {("image",): section.image}
    images |= {("stages", stage): getattr(section.stages, stage) for stage in STAGES}

    for key, image in images.items():
        if not image or image == "none":
            continue
        where = f"{loaded.lines.get(('container', *key), loaded.path)}: container.{'.'.join(key)}"
        yield from (f"{where}: {problem}" for problem in _problems_of_image(image))


def _problems_of_image(image: str) -> Iterator[str]:
    try:
        reference = parse(image)
    except BadReference as error:
        yield str(error)
        return

    if reference.path is not None and not reference.path.exists():
        yield f"{'folder' if reference.kind == 'folder' else 'file'} {image} does not exist"
    elif reference.kind == "archive":
        # The archive reader is slow to import.
        from amlaunch.containers.images.layers import archive_problem

        problem = archive_problem(reference.file)
        if problem:
            yield (f"{image} {problem}; create an image archive with docker save or skopeo copy")


def uses_wandb(loaded: LoadedRecipe) -> bool:
    """Return True if the run contacts W&B while it trains."""
    section = loaded.recipe.wandb
    return section is not None and (section.get("mode") or os.environ.get("WANDB_MODE", "online")) == "online"


def sets_variable(loaded: LoadedRecipe, *names: str) -> bool:
    """Return True if the recipe's container section sets one of these environment variables."""
    container = loaded.recipe.container
    return container is not None and any(name in container.env for name in names)


def _has_wandb_key() -> bool:
    """Return True if W&B finds its key in the environment or where ``wandb login`` stores it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
