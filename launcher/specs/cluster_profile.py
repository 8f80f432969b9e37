"""Cluster profiles: what a site needs, so that a recipe runs on every cluster unchanged.

A profile is found by name in ``clusters.yaml`` of the current folder, then in
the user's ``~/.config/amlaunch/clusters.yaml``, then among the built-in ones;
or by file: ``--cluster site.yaml``, ``--cluster sites.yaml:NAME``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from amlaunch.launcher.specs.profile_files import FILE, profile_files
from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.format.placeholders import has_placeholder, variables
from amlaunch.recipes.format.schema import MountSection
from amlaunch.recipes.format.secret_keys import is_secret_variable, refuse_secrets
from amlaunch.recipes.format.section_checks import Checker, raise_problems
from amlaunch.recipes.format.targets import TargetPolicy
from amlaunch.recipes.format.units import Memory, Minutes, Positive
from amlaunch.recipes.format.yaml_reader import KeyPath, read_file

OURS = {
    "array": "the elements of a stage make it", "output": "logs go into the run directory", "error": "logs go into the run directory",
    "dependency": "the stages' order makes it", "comment": "it finds the job again", "signal": "write signal_seconds",
    "job-name": "the run's name makes it", "chdir": "relative paths in a recipe start where submit was typed",
    "export": "write pass_env or env", "requeue": "amlaunch decides", "no-requeue": "amlaunch decides", "open-mode": "logs are appended",
    "wrap": "amlaunch writes the script", "wait": "write submit --wait", "test-only": "write submit --dry-run", "parsable": "amlaunch reads the id",
    "quiet": "amlaunch reads the id", "clusters": "export SLURM_CLUSTERS instead",
    "nodes": "write resources in the recipe", "ntasks-per-node": "write resources in the recipe", "cpus-per-task": "write resources in the recipe",
    "gpus-per-node": "write resources in the recipe", "mem": "write mem here, or resources in the recipe", "time": "write time here, or resources in the recipe",
}  # fmt: skip
"""sbatch's options that amlaunch sets itself, and what to write instead."""
ONE_LINE = ("partition", "account", "qos", "gpu_type", "interface", "python", "runs")
MAX_SIGNAL_SECONDS = 65535
"""sbatch(1), ``--signal``."""

STAGES = ("preprocess", "verify", "train", "export")


@dataclass(frozen=True)
class StageProfile:
    """Settings for one stage; each one left out is the profile's."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    cpus: Positive | None = None
    """CPUs a node where the recipe does not say."""
    mem: Memory | None = None
    """Memory a node where the recipe does not say."""
    time: Minutes | None = None
    """Time limit where the recipe does not say."""
    throttle: Positive | None = None
    """Elements of an array that run at once."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Anything else that sbatch knows, by its long name."""


@dataclass(frozen=True)
class StageProfiles:
    """Settings for each stage."""

    preprocess: StageProfile = StageProfile()
    verify: StageProfile = StageProfile()
    train: StageProfile = StageProfile()
    export: StageProfile = StageProfile()


@dataclass(frozen=True)
class ContainerProfile:
    """What a site says of containers."""

    runtime: str = "auto"
    """What ``runtime: auto`` in a recipe stands for here; ``none``: no container. ``auto``: pyxis where srun has it, else what is installed."""
    images: dict[str, str] = field(default_factory=dict)
    """Files that stand for images: ``nvcr.io/nvidia/pytorch:25.08-py3: /shared/images/pytorch-25.08.sqsh``."""
    mounts: list[str | MountSection] = field(default_factory=list)
    """For every stage in a container; a recipe's own win."""
    options: list[str] = field(default_factory=list)
    """Further arguments of the runtime (of pyxis: further flags of srun)."""
    runtime_env: list[str] = field(default_factory=list)
    """Names of variables that the runtime's own configuration reads (``graphroot = "$SCRATCH/images"``)."""


@dataclass(frozen=True)
class ClusterProfile:
    """One cluster."""

    executor: Literal["slurm", "local"] = "slurm"
    runs: str | None = None
    """Where the run directories are: on the file system that all nodes share. None: as ``--runs`` says, else ./runs."""
    image_folder: str | None = None
    """Where ``amlaunch image import`` puts images: on the file system that all nodes share. None: ``images`` beside the runs."""
    shared_roots: list[str] = field(default_factory=list)
    """Folders that all nodes see; a run elsewhere is refused. None given: a run on a local disk is warned of."""
    partition: str | None = None
    """None: Slurm's default, or for stages with GPUs one that has enough of them."""
    account: str | None = None
    qos: str | None = None
    mem: Memory | None = None
    time: Minutes | None = None
    throttle: Positive | None = None
    sbatch: dict[str, Any] = field(default_factory=dict)
    gpus_per_node: Positive | None = None
    """None: as Slurm says of the partition."""
    gpu_type: str | None = None
    """The name before the count where a site wants one: ``h100`` asks for ``gpu:h100:8``."""
    interface: str | None = None
    """Network interface that ranks meet on (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), IPv4 or IPv6."""
    signal_seconds: Positive = 300
    """How long before the time limit a job is told: at least twice a step and a checkpoint."""
    python: str | None = None
    """Python on the nodes, with torch. None: the one that submits."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run first on the node: ``module load cuda``."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables for every stage; a recipe's own win."""
    pass_env: list[str] = field(default_factory=list)
    """Secret-looking variables of the shell that jobs need besides those that the recipe names; they travel in a 0600 file."""
    srun: list[str] = field(default_factory=list)
    """Further arguments for srun."""
    container: ContainerProfile = ContainerProfile()
    stages: StageProfiles = StageProfiles()

    @property
    def images(self) -> str | None:
        """Where its images are: as ``image_folder`` says, else beside its ``runs``."""
        return self.image_folder or (str(Path(self.runs).expanduser().parent / "images") if self.runs else None)

    def stage(self, name: str) -> StageProfile:
        """The settings of one stage, the profile's own filled in; its sbatch options are joined."""
        own: StageProfile = getattr(self.stages, name)
        chosen = {
            key: getattr(own, key) or getattr(self, key)
            for key in ("partition", "account", "qos", "mem", "time", "throttle")
        }
        return StageProfile(**chosen, cpus=own.cpus, sbatch={**self.sbatch, **own.sbatch})


@dataclass(frozen=True)
class Cluster:
    """A profile with its name and where it was found."""

    name: str
    profile: ClusterProfile
    source: str
    tree: Mapping[str, Any]
    """As written: what the run directory stores."""
    lines: Mapping[KeyPath, str] = field(default_factory=dict)
    """Where each key was set: ``file:line``."""

    def where(self, stage: str, key: str) -> str:
        """Who set a stage's ``key``, for the start of a sentence: ``clusters.yaml:3: stages.train.time``; empty: nobody."""
        own = ((self.tree.get("stages") or {}).get(stage) or {}).get(key)
        path = ("stages", stage, key) if own else (key,)
        return self.at(path) if own or self.tree.get(key) else ""

    def at(self, path: KeyPath) -> str:
        """A key with its place."""
        return f"{self.lines.get(path, self.source)}: {'.'.join(path)}"


BUILT_IN: dict[str, dict[str, Any]] = {"slurm": {}, "local": {"executor": "local"}}


def find_cluster(name: str) -> Cluster:
    """A cluster by its profile's name or file. Raises BadInput with the nearest name."""
    file, _, chosen = name.partition(":") if ":" in name else (name, "", "")
    if file.endswith((".yaml", ".yml")) or os.sep in file:
        return _from_file(Path(file).expanduser(), chosen)
    for path in profile_files():
        found = _read(path)
        if name in found[0]:
            return _checked(name, found[0][name], path, found[1])
    if name in BUILT_IN:
        return _checked(name, BUILT_IN[name], None, {})
    files = ", ".join(map(str, profile_files())) or f"{FILE} is not here"
    raise BadInput(
        f"no cluster {name!r} ({files}); {did_you_mean(name, known_clusters())}; amlaunch doctor writes a profile of this site"
    )


def known_clusters() -> list[str]:
    """The names of all profiles."""
    return sorted({*BUILT_IN, *(name for path in profile_files() for name in _read(path)[0])})


def _from_file(path: Path, chosen: str) -> Cluster:
    if not path.is_file():
        raise BadInput(f"--cluster {path}: there is no such file")
    tree, lines = _read(path)
    if not chosen and len(tree) == 1:
        chosen = next(iter(tree))
    if chosen not in tree:
        wanted = f"no cluster {chosen!r}" if chosen else f"{len(tree)} clusters; say which: --cluster {path}:NAME"
        raise BadInput(f"{path}: {wanted}; {did_you_mean(chosen, tree)}")
    return _checked(chosen, tree[chosen], path, lines)


def _read(path: Path) -> tuple[dict[str, Any], Mapping[Any, str]]:
    tree, lines = read_file(path)
    if not isinstance(tree, dict) or not tree:
        raise BadInput(f"{path}: a mapping from a cluster's name to its profile was expected")
    return tree, lines


def _checked(name: str, tree: Any, path: Path | None, lines: Mapping[Any, str]) -> Cluster:
    below = {key[1:]: where for key, where in lines.items() if key[:1] == (name,)}
    return Cluster(name, check_profile(tree or {}, below), str(path) if path else "built in", tree or {}, below)


def check_profile(tree: Any, lines: Mapping[Any, str]) -> ClusterProfile:
    """A profile from plain data. Raises BadInput with every problem at its line."""
    visible = {
        name: value for name, value in variables().items() if not is_secret_variable(name)
    }  # scripts hold no secrets
    checker = Checker(lines, visible, TargetPolicy(), job_start=False)
    profile = checker.section(ClusterProfile, tree, ())
    if isinstance(tree, Mapping):
        try:
            refuse_secrets(tree, lines)
        except BadInput as error:
            checker.problems.append(str(error))
        stages = tree.get("stages")
        sections: list[tuple[KeyPath, Any]] = [((), tree)]
        sections += (
            [(("stages", str(name)), own) for name, own in stages.items()] if isinstance(stages, Mapping) else []
        )
        for path, own in sections:
            _check_sbatch(checker, own, path)
            _check_lines(checker, own, path)
    if profile is not None and profile.signal_seconds > MAX_SIGNAL_SECONDS:
        checker.problem(("signal_seconds",), f"sbatch takes {MAX_SIGNAL_SECONDS} at most")
    for root in profile.shared_roots if profile is not None else []:
        if not root.startswith(("/", "~", "$")):
            checker.problem(
                ("shared_roots",), f"{root!r}: expected a path from the root, for it is the same on every machine"
            )
    if profile is not None and has_placeholder(profile.runs):
        checker.problem(("runs",), f"{profile.runs}: a variable in it is not set here")
    raise_problems(checker.problems)
    # The shell on the node fills in what setup says, and the driver what env says: not this host, and not into a script.
    found: ClusterProfile = replace(profile, setup=list(tree.get("setup") or []), env=dict(tree.get("env") or {}))
    return found


def _check_lines(checker: Checker, tree: Any, path: KeyPath) -> None:
    """A line break would end an ``#SBATCH`` line, and begin another one."""
    for key in ONE_LINE if isinstance(tree, Mapping) else ():
        if isinstance(tree.get(key), str) and len(tree[key].splitlines()) > 1:
            checker.problem((*path, key), "expected one line of text")


def _check_sbatch(checker: Checker, tree: Any, path: KeyPath) -> None:
    """Of sbatch's options, those that are ours to set; whether sbatch knows the others is asked of sbatch."""
    options = tree.get("sbatch") if isinstance(tree, Mapping) else None
    for key, value in options.items() if isinstance(options, Mapping) else ():
        name = str(key).replace("_", "-")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
            checker.problem(
                (*path, "sbatch"), f"{key!r}: expected the long name of an option of sbatch, without dashes before it"
            )
        elif name in OURS:
            checker.problem((*path, "sbatch", key), f"amlaunch sets it ({OURS[name]})")
        elif isinstance(value, (dict, list)) or len(str(value).splitlines()) > 1:
            checker.problem((*path, "sbatch", key), "expected one line of text, a number, or true")
