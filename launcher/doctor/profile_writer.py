"""Write a cluster profile, as commented YAML, from what :mod:`amlaunch.launcher.doctor.probe` read."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from amlaunch.launcher.doctor.probe import Folder, SitePartition, SlurmSite
from amlaunch.launcher.specs.cluster_profile import BUILT_IN, Cluster, check_profile
from amlaunch.launcher.specs.profile_files import FILE
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import reason_not_writable, write_text
from amlaunch.recipes.format.yaml_reader import parse, read_file, scalar


@dataclass(frozen=True)
class Proposal:
    """A profile that fits the cluster."""

    name: str
    text: str
    """Its YAML in ``clusters.yaml``."""

    def cluster(self) -> Cluster:
        """Parse the text, as ``--cluster`` would."""
        tree, _ = parse(self.text, self.name)
        return Cluster(self.name, check_profile(tree[self.name], {}), "proposed from the facts above", tree[self.name])


def propose(site: SlurmSite, folders: Iterable[Folder], runs: Path) -> Proposal:
    """Propose a profile for a site from the facts alone."""
    name = re.sub(r"[^\w-]+", "-", site.cluster) or "cluster"
    name = f"{name}-cluster" if name in BUILT_IN else name
    account = site.default_account or next(iter(site.accounts), "")
    cpu, gpu = best_partitions(site)

    lines = ["executor: slurm"]
    if cpu:
        lines.append(f"partition: {_text(cpu.name)}  # stages without GPUs; {_description(cpu)}")
    if account:
        comment = f"  # your accounts: {', '.join(site.accounts)}" if len(site.accounts) > 1 else ""
        lines.append(f"account: {_text(account)}{comment}")
    lines += _folder_lines(folders, runs)
    if gpu:
        if gpu.gpu_type:
            lines.append(f"gpu_type: {_text(gpu.gpu_type)}  # requests gpu:{gpu.gpu_type}:N")
        comment = f"{gpu.gpu_summary} per node; {_description(gpu)}"
        lines += ["stages:", "  train:", f"    partition: {_text(gpu.name)}  # {comment}"]
    return Proposal(name, "\n  ".join([f"{name}:", *lines]) + "\n")


def best_partitions(site: SlurmSite) -> tuple[SitePartition | None, SitePartition | None]:
    """Choose the partitions for stages without GPUs and for training, among those that work and are open to the user.

    Stages without GPUs leave GPU nodes to others, and training avoids partitions whose jobs are
    preempted. After that the default partition wins, then a longer time limit, then more nodes.
    """

    def preference(partition: SitePartition) -> tuple[bool, int, int]:
        return partition.default, partition.minutes or sys.maxsize, partition.nodes

    accounts = [site.default_account] if site.default_account else site.accounts
    usable = [partition for partition in site.partitions if partition.works and partition.open_to(accounts)]
    with_gpus = [partition for partition in usable if partition.gpus]
    return (
        max(usable, key=lambda partition: (not partition.gpus, *preference(partition)), default=None),
        max(with_gpus, key=lambda partition: (partition.preempt == "OFF", *preference(partition)), default=None),
    )


def _description(partition: SitePartition) -> str:
    nodes = f"{partition.nodes} node{'s' * (partition.nodes != 1)}"
    limit = "no time limit" if partition.minutes is None else f"at most {partition.limit}"
    return f"{nodes}, {partition.cpus} CPUs each, {limit}"


def _text(value: str) -> str:
    """Return text that YAML reads back as the same string: plain if possible, else quoted as in JSON."""
    is_plain = re.fullmatch(r"[A-Za-z_/][\w./@+=-]*", value) and isinstance(scalar(value), str)
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _list(values: Iterable[Path]) -> str:
    return f"[{', '.join(_text(str(value)) for value in values)}]"


def _folder_lines(folders: Iterable[Folder], runs: Path) -> list[str]:
    """Return the lines for ``runs`` and ``shared_roots``.

    The folder for runs is kept if other machines see it. Otherwise the network folder with the
    most free space is used, the home folder only if there is no other.
    """
    network = [folder for folder in folders if folder.network and folder.writable]
    network.sort(key=lambda folder: (folder.use == "runs", folder.use != "home", folder.free_bytes), reverse=True)
    if not network:
        return [
            f"runs: {_text(str(runs))}",
            "# No network file system was found. If all nodes see this folder under",
            "# the same path, remove the # from the next line:",
            f"# shared_roots: {_list([runs.parent])}",
        ]

    best = network[0]
    chosen = runs if best.use == "runs" else Path(best.path, "runs")
    roots = _list(dict.fromkeys(shared_root(Path(folder.path)) for folder in network))
    return [
        f"runs: {_text(str(chosen))}  # {best.file_system}, {best.free_bytes / 1e12:.1f} TB free",
        f"shared_roots: {roots}  # runs elsewhere are refused",
    ]


def shared_root(path: Path) -> Path:
    """Return the topmost folder above ``path`` on the same file system, with links as ``path`` spells them."""
    existing = [folder for folder in (path, *path.parents) if folder.exists()]
    device = existing[0].stat().st_dev
    *_, root = takewhile(lambda folder: folder.stat().st_dev == device, existing)
    return root


def save(proposal: Proposal, path: Path) -> None:
    """Add the profile to a file and keep those already in it.

    Raises BadInput, without changing the file, if the profile cannot be added.
    """
    # Resolved, so that a link stays a link.
    path = path.resolve()
    try:
        write_text(path, _file_with(proposal, path))
    except OSError as error:
        raise BadInput(f"--save {path}: not writable ({error.strerror}); choose another file") from None


def _file_with(proposal: Proposal, path: Path) -> str:
    """Return the text of the file with the profile added at its end. Raises BadInput and OSError."""
    text = f"# Written by amlaunch doctor on {time.strftime('%Y-%m-%d')}.\n{proposal.text}"
    if path.exists():
        tree, lines = read_file(path)
        if isinstance(tree, dict) and proposal.name in tree:
            where = lines.get((proposal.name,), path)
            raise BadInput(
                f"{where}: profile {proposal.name} exists already and was not changed; "
                "remove it first, or choose another file with --save"
            )
        text = f"{path.read_text(encoding='utf-8').rstrip()}\n\n{text}".lstrip("\n")

    try:
        parse(text, str(path))
    except BadInput as error:
        # For example if the other profiles are written as {…}.
        raise BadInput(
            f"{path}: profile {proposal.name} cannot be added at the end ({error}); choose another file with --save"
        ) from None
    return text


def check_save_path(path: Path) -> None:
    """Check, before Slurm is asked anything, that a profile can be saved at ``path``. Raises BadInput."""
    absolute = path.absolute()
    existing = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
    if path.is_dir():
        raise BadInput(f"--save {path}: this is a folder; name a file, such as {FILE}")
    if existing != absolute and not existing.is_dir():
        raise BadInput(f"--save {path}: {existing} is a file, not a folder; choose another path, such as {FILE}")
    if not os.access(existing, os.W_OK):
        reason = reason_not_writable(existing)
        raise BadInput(f"--save {path}: {existing} is not writable ({reason}); choose another file")
