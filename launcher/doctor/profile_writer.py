"""The profile of a cluster that follows from what was found there (amlaunch.launcher.doctor.probe), as text with comments."""

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

from amlaunch.launcher.doctor.probe import Folder, Place, SlurmSite
from amlaunch.launcher.specs.cluster_profile import BUILT_IN, Cluster, check_profile
from amlaunch.launcher.specs.profile_files import FILE
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import write_text
from amlaunch.recipes.format.yaml_reader import parse, read_file, scalar


@dataclass(frozen=True)
class Proposal:
    """A profile that fits what was found."""

    name: str
    text: str
    """As ``clusters.yaml`` has it."""

    def cluster(self) -> Cluster:
        """As it will be read."""
        tree, _ = parse(self.text, self.name)
        return Cluster(self.name, check_profile(tree[self.name], {}), "made from the above", tree[self.name])


def propose(site: SlurmSite, folders: Iterable[Folder], runs: Path) -> Proposal:
    """The profile of a site, from what was found alone."""
    name = re.sub(r"[^\w-]+", "-", site.cluster) or "cluster"
    name = f"{name}-cluster" if name in BUILT_IN else name
    account = site.default_account or next(iter(site.accounts), "")
    cpu, gpu = places_for(site)
    lines = ["executor: slurm"]
    if cpu:
        lines.append(f"partition: {_text(cpu.name)}  # stages without GPUs; {_about(cpu)}")
    if account:
        others = f"  # yours: {', '.join(site.accounts)}" if len(site.accounts) > 1 else ""
        lines.append(f"account: {_text(account)}{others}")
    lines += _folder_lines(folders, runs)
    if gpu:
        if gpu.gpu_type:
            lines.append(f"gpu_type: {_text(gpu.gpu_type)}  # asks for gpu:{gpu.gpu_type}:N")
        partition = f"partition: {_text(gpu.name)}  # {gpu.gpus_each} a node; {_about(gpu)}"
        lines += ["stages:", "  train:", f"    {partition}"]
    return Proposal(name, "\n  ".join([f"{name}:", *lines]) + "\n")


def places_for(site: SlurmSite) -> tuple[Place | None, Place | None]:
    """Where stages without GPUs go, and training: of what works and is open, what fits best.

    GPUs are left to those who need them, and training keeps off partitions whose
    jobs are pushed out. Then the default is best, a longer limit, more nodes.
    """

    def merit(place: Place) -> tuple[bool, int, int]:
        return place.default, place.minutes or sys.maxsize, place.nodes

    mine = [site.default_account] if site.default_account else site.accounts
    able = [place for place in site.partitions if place.works and place.open_to(mine)]
    with_gpus = [place for place in able if place.gpus]
    return (
        max(able, key=lambda place: (not place.gpus, *merit(place)), default=None),
        max(with_gpus, key=lambda place: (place.preempt == "OFF", *merit(place)), default=None),
    )


def _about(place: Place) -> str:
    limit = "no time limit" if place.minutes is None else f"at most {place.limit}"
    return f"{place.nodes} node{'s' * (place.nodes != 1)}, {place.cpus} CPUs each, {limit}"


def _text(value: str) -> str:
    """Text as YAML reads it back: JSON's quotes are YAML's, too."""
    plain = re.fullmatch(r"[A-Za-z_/][\w./@+=-]*", value) and isinstance(scalar(value), str)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _list(values: Iterable[Path]) -> str:
    return f"[{', '.join(_text(str(value)) for value in values)}]"


def _folder_lines(folders: Iterable[Folder], runs: Path) -> list[str]:
    """Where runs go: here, if other machines see it, else the roomiest network folder that can be written, home last."""
    network = sorted(
        (one for one in folders if one.network and one.writable),
        key=lambda one: (one.use == "runs", one.use != "home", one.free_bytes),
        reverse=True,
    )
    if not network:
        return [
            f"runs: {_text(str(runs))}",
            "# No network file system was found here. If all nodes see that folder",
            "# under the same path, say so:",
            f"# shared_roots: {_list([runs.parent])}",
        ]
    best = network[0]
    chosen = runs if best.use == "runs" else Path(best.path, "runs")
    roots = _list(dict.fromkeys(shared_root(Path(one.path)) for one in network))
    return [
        f"runs: {_text(str(chosen))}  # {best.file_system}, {best.free_bytes / 1e12:.1f} TB free",
        f"shared_roots: {roots}  # runs elsewhere are refused",
    ]


def shared_root(path: Path) -> Path:
    """The uppermost folder above ``path`` on its file system; through links, as ``path`` is written."""
    there = [part for part in (path, *path.parents) if part.exists()]
    *_, root = takewhile(lambda part: part.stat().st_dev == there[0].stat().st_dev, there)
    return root


def save(proposal: Proposal, path: Path) -> None:
    """Add the profile to a file, beside those that are in it. Raises BadInput where it cannot stand there; then nothing is changed."""
    path = path.resolve()  # a link stays a link
    try:
        write_text(path, _joined(proposal, path))
    except OSError as error:
        raise BadInput(f"--save {path}: cannot be written ({error.strerror}); --save another file") from None


def _joined(proposal: Proposal, path: Path) -> str:
    """The text of a file with the profile added at its end. Raises BadInput and OSError."""
    text = f"# Made by amlaunch doctor on {time.strftime('%Y-%m-%d')}.\n{proposal.text}"
    if path.exists():
        tree, lines = read_file(path)  # with its complaints
        if isinstance(tree, dict) and proposal.name in tree:
            where = lines.get((proposal.name,), path)
            raise BadInput(
                f"{where}: there is a profile {proposal.name} already, and it was left as it is; remove it there first, or --save another file"
            )
        text = f"{path.read_text(encoding='utf-8').rstrip()}\n\n{text}".lstrip("\n")
    try:
        parse(text, str(path))
    except BadInput as error:  # the others are written as {…}
        raise BadInput(f"{path}: {proposal.name} cannot be added at its end ({error}); --save another file") from None
    return text


def check_place(path: Path) -> None:
    """Raises BadInput where a profile cannot be saved, before anybody is asked anything."""
    there = next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())
    if path.is_dir() or (there != path.absolute() and not there.is_dir()):
        raise BadInput(
            f"--save {path}: {there} is {'a folder' if path.is_dir() else 'a file'}; --save FILE, such as {FILE}"
        )
    if not os.access(there, os.W_OK):
        raise BadInput(f"--save {path}: cannot be written (no right to write {there}); --save another file")
