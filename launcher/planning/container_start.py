"""Describe a stage's planned container to the runtime that starts it on a node: mounts, variables, node checks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from amlaunch.containers.runtimes import catalog
from amlaunch.containers.runtimes.catalog import ContainerSpec, Mount, parse
from amlaunch.containers.runtimes.environment import RANK_VARIABLES, library_variables
from amlaunch.launcher.planning.container_plan import VARIABLE_NAME, merge_mounts
from amlaunch.launcher.specs.plan import Plan, Stage, StageContainer
from amlaunch.recipes.format.secret_keys import is_secret_variable
from amlaunch.recipes.run_layout import RunDir

IMAGE_PYTHON = "python3"
"""Found on the image's search path."""


def node_runtime(container: StageContainer) -> str:
    """Return the runtime of a stage on this node: for ``auto`` the best one installed, or ``none``."""
    if container.runtime != "auto":
        return container.runtime
    return catalog.choose(parse(container.image), catalog.installed()) or "none"


def container_spec(
    run: RunDir, plan: Plan, stage: Stage, env: Mapping[str, str], passed: Iterable[str], *, on_slurm: bool
) -> ContainerSpec:
    """Describe a stage's container completely.

    ``env``: variables set inside. ``passed``: variables whose value may differ between tasks.
    """
    container = stage.container
    assert container is not None
    mounts = [Mount(str(path), str(path)) for path in _run_paths(run, plan, stage)]
    mounts += [Mount(*mount) for mount in container.mounts]
    visible = [
        name
        for name in sorted(set(passed) - set(env))
        if name in container.passed or is_visible_inside(name, os.environ.get(name, ""), mounts)
    ]
    default_workdir = plan.cwd if may_mount(Path(plan.cwd)) else str(run.root)
    return ContainerSpec(
        reference=parse(container.image),
        mounts=tuple(_without_redundant(merge_mounts(mounts))),
        env=dict(env),
        passed=tuple(visible),
        workdir=container.workdir or default_workdir,
        entrypoint=container.entrypoint,
        gpus=bool(stage.needs.gpus_per_node),
        on_slurm=on_slurm,
        options=tuple(container.options),
    )


def is_visible_inside(name: str, value: str, mounts: Sequence[Mount]) -> bool:
    """Return True if a variable of the host means the same inside: its value is no path, or a mounted one."""
    # The value of a secret may begin with a slash without being a path.
    is_path = value.startswith("/") and (not is_secret_variable(name) or name.endswith(("_PATH", "_FILE", "_DIR")))
    return not is_path or any(Path(value).is_relative_to(mount.target) for mount in mounts)


def _run_paths(run: RunDir, plan: Plan, stage: Stage) -> list[Path]:
    """Return the folders that every stage of a run uses, as named and resolved."""
    folders = [run.root, *(Path(folder) for folder in (plan.data, plan.shared) if folder), *argument_folders(stage)]
    if may_mount(Path(plan.cwd)):
        folders.append(Path(plan.cwd))
    return list(dict.fromkeys(path for folder in folders for path in (folder, folder.resolve())))


def argument_folders(stage: Stage) -> list[Path]:
    """Return the folders that the arguments of a stage name; they must exist before they can be mounted."""
    arguments = [argument for element in stage.elements for argument in element.arguments]
    return [Path(value) for option, value in pairwise(arguments) if option in ("--checkpoints", "--data", "--out")]


def may_mount(folder: Path) -> bool:
    """Return False for the root, the user's home and the folders above it: they are mounted only on request."""
    homes = (Path.home(), Path.home().resolve())
    contains_home = any(home.is_relative_to(place) for home in homes for place in (folder, folder.resolve()))
    return folder != Path("/") and not contains_home


def _without_redundant(mounts: Sequence[Mount]) -> Iterator[Mount]:
    """Yield the mounts that no other mount provides at the same place and with the same access."""
    for mount in mounts:
        outer = [other for other in mounts if other is not mount and Path(mount.target).is_relative_to(other.target)]
        nearest = max(outer, key=lambda other: len(other.target), default=None)
        if nearest is None:
            yield mount
            continue
        source = os.path.normpath(f"{nearest.source}/{os.path.relpath(mount.target, nearest.target)}")
        if source != mount.source or nearest.read_only != mount.read_only:
            yield mount


def passed_variables(container: StageContainer, secrets: Iterable[str], *, on_slurm: bool) -> list[str]:
    """Return the variables of the host that enter a container, besides those that are set inside.

    See :mod:`amlaunch.containers.runtimes.environment`.
    """
    rank_variables = RANK_VARIABLES if on_slurm else ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES")
    requested = {name for name in (*container.passed, *secrets) if name in os.environ}
    names = {*library_variables(os.environ), *rank_variables, *requested} - {"PATH", "HOME"}
    return sorted(name for name in names if VARIABLE_NAME.fullmatch(name))


def node_check_settings(
    container: StageContainer, runtime: str, spec: ContainerSpec, launch: catalog.Launch, verdicts: Path
) -> dict[str, Any]:
    """Return the settings of ``python -m amlaunch.containers.node_setup``; no secrets.

    ``verdicts``: folder in which nodes record why they refuse.
    """
    return {
        "verdicts": str(verdicts),
        "runtime": runtime,
        "image": spec.image.short,
        "path": str(spec.image.path) if spec.image.path else None,
        "mounts": sorted({mount.source for mount in spec.mounts}),
        "prepare": [list(command) for command in launch.prepare],
        "gpus": spec.gpus,
        "entrypoint": spec.entrypoint,
        "passed": [*spec.passed, *container.runtime_env],
        **container.facts,
    }


def host_python(profile_python: str | None) -> str:
    """Return the Python that checks a node: the profile's, else this one."""
    return os.path.expanduser(profile_python) if profile_python else sys.executable
