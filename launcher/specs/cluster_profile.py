"""Cluster profiles: the settings of a site, so that a recipe runs on every cluster unchanged.

A profile is found by its name in ``clusters.yaml`` of the current folder, then in the user's
``~/.config/amlaunch/clusters.yaml``, then among the built-in ones; or by its file: ``--cluster site.yaml``,
``--cluster sites.yaml:NAME``.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from amlaunch.launcher.specs.profile_files import FILE, profile_files
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.placeholders import has_placeholder, variables
from amlaunch.recipes.format.schema import MountSection
from amlaunch.recipes.format.secret_keys import is_secret_variable, refuse_secrets
from amlaunch.recipes.format.section_checks import Checker, raise_problems
from amlaunch.recipes.format.targets import TargetPolicy
from amlaunch.recipes.format.units import Memory, Minutes, Positive
from amlaunch.recipes.format.yaml_reader import KeyPath, read_file
from amlaunch.recipes.suggestions import did_you_mean

_LOGS, _RESOURCES = "logs go into the run directory", "set resources in the recipe"
_JOB_ID, _REQUEUE = "amlaunch reads the job ID", "amlaunch decides"
RESERVED_OPTIONS = {
    "array": "it follows from the elements of the stage",
    "output": _LOGS,
    "error": _LOGS,
    "dependency": "it follows from the order of the stages",
    "comment": "it identifies the job",
    "signal": "set signal_seconds",
    "job-name": "it follows from the name of the run",
    "chdir": "relative paths in a recipe start in the folder of the submit command",
    "export": "set pass_env or env",
    "requeue": _REQUEUE,
    "no-requeue": _REQUEUE,
    "open-mode": "logs are appended",
    "wrap": "amlaunch writes the script",
    "wait": "use amlaunch submit --wait",
    "test-only": "use amlaunch submit --dry-run",
    "parsable": _JOB_ID,
    "quiet": _JOB_ID,
    "clusters": "export SLURM_CLUSTERS",
    "nodes": _RESOURCES,
    "ntasks-per-node": _RESOURCES,
    "cpus-per-task": _RESOURCES,
    "gpus-per-node": _RESOURCES,
    "mem": "set mem in the profile, or resources in the recipe",
    "time": "set time in the profile, or resources in the recipe",
}
"""Options of sbatch that amlaunch sets itself, with the reason or the alternative."""
SINGLE_LINE_KEYS = ("partition", "account", "qos", "gpu_type", "interface", "python", "runs")
MAX_SIGNAL_SECONDS = 65535
"""sbatch(1), ``--signal``."""

STAGES = ("preprocess", "verify", "train", "export")


@dataclass(frozen=True)
class StageProfile:
    """Settings for one stage; unset ones come from the profile."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    cpus: Positive | None = None
    """CPUs per node, unless the recipe sets them."""
    mem: Memory | None = None
    """Memory per node, unless the recipe sets it."""
    time: Minutes | None = None
    """Time limit, unless the recipe sets it."""
    throttle: Positive | None = None
    """Maximum number of elements of an array that run at once."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Any other options of sbatch, by their long names."""


@dataclass(frozen=True)
class StageProfiles:
    """Settings for each stage."""

    preprocess: StageProfile = StageProfile()
    verify: StageProfile = StageProfile()
    train: StageProfile = StageProfile()
    export: StageProfile = StageProfile()


@dataclass(frozen=True)
class ContainerProfile:
    """Settings of a site for containers."""

    runtime: str = "auto"
    """The meaning of ``runtime: auto`` in a recipe. ``none``: no container.

    ``auto``: pyxis if srun has it, or else an installed runtime.
    """
    images: dict[str, str] = field(default_factory=dict)
    """Local files for images: ``nvcr.io/nvidia/pytorch:26.06-py3: /shared/images/pytorch-26.06.sqsh``."""
    mounts: list[str | MountSection] = field(default_factory=list)
    """Mounts for every stage in a container; the recipe's override them."""
    options: list[str] = field(default_factory=list)
    """Further arguments of the runtime (for pyxis: flags of srun)."""
    runtime_env: list[str] = field(default_factory=list)
    """Variables that the runtime's own configuration reads (``graphroot = "$SCRATCH/images"``)."""


@dataclass(frozen=True)
class ClusterProfile:
    """The settings of one cluster."""

    executor: Literal["slurm", "local"] = "slurm"
    runs: str | None = None
    """The folder of run directories, on the file system that all nodes share. None: ``--runs``, or else ./runs."""
    image_folder: str | None = None
    """The folder of imported images, on the file system that all nodes share. None: ``images`` beside the runs."""
    shared_roots: list[str] = field(default_factory=list)
    """Folders that all nodes see; a run elsewhere is refused. Empty: a run on a local disk causes a warning."""
    partition: str | None = None
    """None: Slurm's default, or for stages with GPUs a partition with enough of them."""
    account: str | None = None
    qos: str | None = None
    mem: Memory | None = None
    time: Minutes | None = None
    throttle: Positive | None = None
    sbatch: dict[str, Any] = field(default_factory=dict)
    gpus_per_node: Positive | None = None
    """None: as Slurm reports for the partition."""
    gpu_type: str | None = None
    """The name before the count, if the site requires it: ``h100`` requests ``gpu:h100:8``."""
    interface: str | None = None
    """The network interface on which ranks meet (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), IPv4 or IPv6."""
    signal_seconds: Positive = 300
    """Time of the warning before the job's time limit: at least twice as long as a step and a checkpoint."""
    python: str | None = None
    """Python with torch on the nodes. None: the Python that submits."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run first on the node: ``module load cuda``."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables for every stage; the recipe's override them."""
    pass_env: list[str] = field(default_factory=list)
    """Secret variables that jobs need besides those that the recipe names; they travel in a private file (0600)."""
    srun: list[str] = field(default_factory=list)
    """Further arguments of srun."""
    container: ContainerProfile = ContainerProfile()
    stages: StageProfiles = StageProfiles()

    @property
    def images(self) -> str | None:
        """The folder of images: ``image_folder``, or else ``images`` beside the runs."""
        if self.image_folder or not self.runs:
            return self.image_folder
        return str(Path(self.runs).expanduser().parent / "images")

    def stage(self, name: str) -> StageProfile:
        """Return the settings of one stage, completed by the profile's; sbatch options are merged."""
        settings: StageProfile = getattr(self.stages, name)
        inherited = ("partition", "account", "qos", "mem", "time", "throttle")
        values = {key: getattr(settings, key) or getattr(self, key) for key in inherited}
        return StageProfile(**values, cpus=settings.cpus, sbatch={**self.sbatch, **settings.sbatch})


@dataclass(frozen=True)
class Cluster:
    """A cluster profile with its name and its source."""

    name: str
    profile: ClusterProfile
    source: str
    """The file of the profile."""
    tree: Mapping[str, Any]
    """The profile as written; the run directory stores it."""
    lines: Mapping[KeyPath, str] = field(default_factory=dict)
    """The place where each key was set: ``file:line``."""

    def where(self, stage: str, key: str) -> str:
        """Return the place of a stage's setting, ``clusters.yaml:3: stages.train.time``; empty if it is not set."""
        own_value = ((self.tree.get("stages") or {}).get(stage) or {}).get(key)
        if own_value:
            return self.at(("stages", stage, key))
        return self.at((key,)) if self.tree.get(key) else ""

    def shell_note(self) -> str:
        """Name the settings that come from the shell's defaults for sbatch; empty if there are none."""
        used = {place: path for path, place in self.lines.items() if place.startswith("$")}
        values = [f"{place} ({'.'.join(path)} {_value_at(self.tree, path)})" for place, path in used.items()]
        return f"from your shell, because the profile does not set them: {', '.join(values)}" if values else ""

    def at(self, path: KeyPath) -> str:
        """Return a key with its place: ``clusters.yaml:3: stages.train.time``."""
        return f"{self.lines.get(path, self.source)}: {'.'.join(path)}"


def _value_at(tree: Mapping[str, Any], path: KeyPath) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


SHELL_DEFAULTS = {
    "SBATCH_ACCOUNT": ("account",),
    "SBATCH_PARTITION": ("partition",),
    "SBATCH_QOS": ("qos",),
    "SBATCH_TIMELIMIT": ("time",),
    "SBATCH_RESERVATION": ("sbatch", "reservation"),
    "SBATCH_CONSTRAINT": ("sbatch", "constraint"),
    "SBATCH_WCKEY": ("sbatch", "wckey"),
}
"""Variables that sbatch itself reads (sbatch(1), INPUT ENVIRONMENT VARIABLES), and their keys in a profile."""
BUILT_IN: dict[str, dict[str, Any]] = {"slurm": {}, "local": {"executor": "local"}}


def find_cluster(name: str) -> Cluster:
    """Find a cluster by the name or the file of its profile. Raises BadInput with the nearest name."""
    file, _, name_in_file = name.partition(":")
    if file.endswith((".yaml", ".yml")) or os.sep in file:
        return _cluster_in(Path(file).expanduser(), name_in_file)
    for path in profile_files():
        tree, lines = _read(path)
        if name in tree:
            return _cluster(name, tree[name], path, lines)
    if name in BUILT_IN:
        return _cluster(name, BUILT_IN[name], None, {})
    files = ", ".join(map(str, profile_files())) or f"there is no {FILE}"
    raise BadInput(
        f"no cluster {name!r} ({files}); {did_you_mean(name, known_clusters())}; "
        f"to write a profile of this site, run: amlaunch doctor --save {FILE}"
    )


def known_clusters() -> list[str]:
    """Return the names of all profiles."""
    return sorted({*BUILT_IN, *(name for path in profile_files() for name in _read(path)[0])})


def _cluster_in(path: Path, name: str) -> Cluster:
    """Return a cluster from a file; an empty name stands for the only one. Raises BadInput."""
    if not path.is_file():
        raise BadInput(f"--cluster {path}: no such file")
    tree, lines = _read(path)
    if not name and len(tree) == 1:
        name = next(iter(tree))
    if name in tree:
        return _cluster(name, tree[name], path, lines)
    hint = did_you_mean(name, tree)
    if name:
        raise BadInput(f"{path}: no cluster {name!r}; {hint}")
    raise BadInput(f"{path} defines {len(tree)} clusters; choose one with --cluster {path}:NAME; {hint}")


def _read(path: Path) -> tuple[dict[str, Any], Mapping[Any, str]]:
    tree, lines = read_file(path)
    if not isinstance(tree, dict) or not tree:
        raise BadInput(f"{path}: expected a mapping from cluster names to profiles")
    return tree, lines


def _cluster(name: str, tree: Any, path: Path | None, lines: Mapping[Any, str]) -> Cluster:
    own_lines = {key[1:]: place for key, place in lines.items() if key[:1] == (name,)}
    if isinstance(tree, dict | None) and (tree or {}).get("executor") != "local":
        tree, own_lines = _with_shell_defaults(tree or {}, own_lines)
    profile = check_profile(tree or {}, own_lines)
    return Cluster(name, profile, str(path) if path else "built in", tree or {}, own_lines)


def _with_shell_defaults(tree: dict[str, Any], lines: dict[Any, str]) -> tuple[dict[str, Any], dict[Any, str]]:
    """Complete a profile by the shell's defaults for sbatch, such as ``$SBATCH_ACCOUNT``.

    Inside a job they may be those of that job, and are ignored.
    """
    if "SLURM_JOB_ID" in os.environ:
        return tree, lines
    completed, places = dict(tree), dict(lines)
    options = tree.get("sbatch") or {}
    for variable, path in SHELL_DEFAULTS.items():
        value = os.environ.get(variable)
        is_option = path[0] == "sbatch"
        if not value or not isinstance(options, dict) or path[-1] in (options if is_option else tree):
            continue
        if is_option:
            completed["sbatch"] = {**(completed.get("sbatch") or {}), path[-1]: value}
        else:
            completed[path[0]] = value
        places[path] = f"${variable}"
    return completed, places


def readable_profiles() -> list[ClusterProfile]:
    """Return the valid profiles of all profile files. Problems of the others are reported when those are used."""
    profiles = []
    for path in profile_files():
        with suppress(BadInput, AttributeError):
            for tree in read_file(path)[0].values():
                with suppress(BadInput):
                    profiles.append(check_profile(tree or {}, {}))
    return profiles


def check_profile(tree: Any, lines: Mapping[Any, str]) -> ClusterProfile:
    """Build a profile from plain data. Raises BadInput with every problem at its line."""
    # Scripts must not contain secrets.
    known = {name: value for name, value in variables().items() if not is_secret_variable(name)}
    checker = Checker(lines, known, TargetPolicy(), job_start=False)
    profile = checker.section(ClusterProfile, tree, ())
    if isinstance(tree, Mapping):
        _check_tree(checker, tree, lines)
    if profile is not None:
        _check_values(checker, profile)
    raise_problems(checker.problems)
    # The shell on the node fills in placeholders in ``setup``, and the driver those in ``env``: neither this host nor
    # the script contains their values.
    checked: ClusterProfile = replace(profile, setup=list(tree.get("setup") or []), env=dict(tree.get("env") or {}))
    return checked


def _check_tree(checker: Checker, tree: Mapping[str, Any], lines: Mapping[Any, str]) -> None:
    """Check the profile and its stages as they are written."""
    try:
        refuse_secrets(tree, lines)
    except BadInput as error:
        checker.problems.append(str(error))
    stages = tree.get("stages")
    sections: list[tuple[KeyPath, Any]] = [((), tree)]
    if isinstance(stages, Mapping):
        sections += [(("stages", str(name)), section) for name, section in stages.items()]
    for path, section in sections:
        if isinstance(section, Mapping):
            _check_sbatch(checker, section, path)
            _check_single_lines(checker, section, path)


def _check_values(checker: Checker, profile: ClusterProfile) -> None:
    if profile.signal_seconds > MAX_SIGNAL_SECONDS:
        checker.problem(("signal_seconds",), f"sbatch accepts at most {MAX_SIGNAL_SECONDS}")
    for root in profile.shared_roots:
        if not root.startswith(("/", "~", "$")):
            checker.problem(
                ("shared_roots",), f"{root!r}: expected an absolute path, which is the same on every machine"
            )
    if has_placeholder(profile.runs):
        checker.problem(("runs",), f"{profile.runs}: a variable in it is not set; export it")


def _check_single_lines(checker: Checker, section: Mapping[str, Any], path: KeyPath) -> None:
    """Check for line breaks, which would end an ``#SBATCH`` line and begin another one."""
    for key in SINGLE_LINE_KEYS:
        if isinstance(section.get(key), str) and len(section[key].splitlines()) > 1:
            checker.problem((*path, key), "expected one line of text")


def _check_sbatch(checker: Checker, section: Mapping[str, Any], path: KeyPath) -> None:
    """Check the names and values of sbatch options; whether sbatch has them is checked elsewhere (slurm.sbatch)."""
    options = section.get("sbatch")
    for key, value in options.items() if isinstance(options, Mapping) else ():
        name = str(key).replace("_", "-")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
            problem = f"{key!r}: expected the long name of an sbatch option, without leading dashes"
            checker.problem((*path, "sbatch"), problem)
        elif name in RESERVED_OPTIONS:
            checker.problem((*path, "sbatch", key), f"amlaunch sets this option ({RESERVED_OPTIONS[name]}); remove it")
        elif isinstance(value, (dict, list)) or len(str(value).splitlines()) > 1:
            checker.problem((*path, "sbatch", key), "expected one line of text, a number, or true")
