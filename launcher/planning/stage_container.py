"""From a recipe's ``container`` section and a site to the container of each stage, and from that to what is started."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlaunch.containers.images.reference import doubts
from amlaunch.containers.runtimes import catalog
from amlaunch.containers.runtimes.catalog import (
    BadMount,
    BadReference,
    ContainerSpec,
    Mount,
    Reference,
    make_mount,
    parse,
    parse_mount,
)
from amlaunch.containers.runtimes.environment import RANK_VARIABLES, library_variables
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.planning.image_folder import image_folder
from amlaunch.launcher.specs.cluster_profile import STAGES, ContainerProfile, check_profile
from amlaunch.launcher.specs.plan import Plan, Stage, StageContainer
from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.placeholders import PLACEHOLDER, has_placeholder
from amlaunch.recipes.format.schema import ContainerSection, MountSection, is_own_tokenizer
from amlaunch.recipes.format.secret_keys import is_secret_variable
from amlaunch.recipes.format.yaml_reader import KeyPath
from amlaunch.recipes.run_layout import RunDir

if TYPE_CHECKING:  # only a run in an image needs it
    from amlaunch.launcher.runs.packages import Inside

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
INSIDE_PYTHON = "python3"
"""Of the image's search path."""


@dataclass(frozen=True)
class Available:
    """What a place has to start containers with."""

    runtimes: tuple[str, ...]
    """Best first."""
    asks_node: bool = False
    """Whether the nodes may have what is not here."""
    profile: ContainerProfile = field(default_factory=ContainerProfile)
    lines: Mapping[KeyPath, str] = field(default_factory=dict)
    source: str = ""
    images: str | None = None
    """The profile's folder of converted images."""

    def at(self, key: str) -> str:
        """Where the profile set a key of its ``container`` section."""
        return f"{self.lines.get(('container', key), self.source)}: container.{key}"


def containers_of(loaded: LoadedRecipe, available: Available, cwd: Path) -> dict[str, StageContainer | None]:
    """The container of each stage; None: without one. Raises BadInput with all that is wrong."""
    section = loaded.recipe.container
    if section is None:
        return dict.fromkeys(STAGES)
    problems = ErrorCollector()
    known = (*catalog.RUNTIMES, "auto")
    for where, name in (
        (_at(loaded, "runtime"), section.runtime),
        (available.at("runtime"), available.profile.runtime),
    ):
        if name not in known:
            problems.add([f"{where}: {name!r} is not known; {did_you_mean(name, known)}"])
    problems.refuse()
    problems.add(
        f"{_at(loaded, 'env', name)}: no program reads a variable of that name; letters, digits and _ make one"
        for name in section.env
        if not NAME.fullmatch(name)
    )
    if section.workdir is not None and not section.workdir.startswith("/"):
        problems.add([f"{_at(loaded, 'workdir')}: {section.workdir!r}: the path inside the container begins with a /"])
    mounts: list[Mount] = []
    with problems.collected():
        mounts = [*site_mounts(available), *_mounts(section.mounts, partial(_at, loaded), cwd)]
    found: dict[str, StageContainer | None] = {}
    reads = list(read_paths(loaded, cwd))
    for stage in STAGES:
        with problems.collected():
            found[stage] = _container(
                loaded, section, stage, available, cwd, [*(Mount(str(path), str(path)) for path in reads), *mounts]
            )
    problems.refuse()
    return found


def _at(loaded: LoadedRecipe, *key: str) -> str:
    path = ("container", *key)
    return f"{next((loaded.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in loaded.lines), loaded.path)}: {'.'.join(path)}"


def image_text(section: ContainerSection, stage: str) -> tuple[str | None, tuple[str, ...]]:
    """The image of a stage as the recipe writes it (None: no container), and the key that does."""
    own = getattr(section.stages, stage)
    if own in (None, "none"):
        return None, ("stages", stage)
    return (own, ("stages", stage)) if own else (section.image, ("image",))


def _container(
    loaded: LoadedRecipe,
    section: ContainerSection,
    stage: str,
    available: Available,
    cwd: Path,
    mounts: Sequence[Mount],
) -> StageContainer | None:
    text, key = image_text(section, stage)
    if text is None or section.runtime == "none":
        return None
    where = _at(loaded, *key)
    named = _parsed(text, where, cwd)
    folder = image_folder(site=available.images)
    reference = mapped(named, available)
    stored = folder.find(named.name) if reference is named and named.kind == "registry" else None
    if stored and stored.is_complete and _starts(parse(stored.path), section.runtime, available):
        reference = parse(stored.path)
    runtime = _runtime(reference, section.runtime, available, where)
    if runtime is None or runtime == "none":
        return None
    return StageContainer(
        image=spelled(reference),
        runtime=runtime,
        mounts=[(mount.source, mount.target, mount.read_only) for mount in last_wins(mounts)],
        workdir=section.workdir,
        entrypoint=section.entrypoint,
        options=list(available.profile.options),
        runtime_env=list(available.profile.runtime_env),
        passed=sorted({name for name, _ in PLACEHOLDER.findall(loaded.text())}),
        facts={"cuda": folder.facts(named.name).cuda, "architecture": (stored and stored.architecture) or None},
    )


def _starts(reference: Reference, asked: str, available: Available) -> bool:
    """Whether what starts containers here can start such a file."""
    chosen = asked if asked != "auto" else available.profile.runtime
    return (
        reference.kind in catalog.KINDS.get(chosen, ())
        if chosen != "auto"
        else catalog.choose(reference, available.runtimes) is not None
    )


def _parsed(text: str, where: str, base: Path) -> Reference:
    if has_placeholder(text):
        raise BadInput(f"{where}: {text}: a variable in it is not set here")
    try:
        return parse(text, base)
    except BadReference as error:
        raise BadInput(f"{where}: {error}") from None


def spelled(reference: Reference) -> str:
    """What :func:`containers.parse` reads as the same image."""
    if reference.kind == "archive" and reference.layout:
        return f"{reference.layout}-archive:{reference.file}"
    if reference.path is not None:
        return f"file://{reference.path}" if reference.kind == "folder" else str(reference.path)
    return (
        f"{reference.user}@{reference.registry}#{reference.repository}{reference.version}"
        if reference.user
        else reference.name
    )


def mapped(reference: Reference, available: Available) -> Reference:
    """The file that stands for an image here, as the profile says. Raises BadInput."""
    for name, file in available.profile.images.items():
        where = f"{available.lines.get(('container', 'images', name), available.source)}: container.images"
        if _parsed(name, where, Path("/")).name == reference.name:
            found = _parsed(file, where, Path("/"))
            if found.path is None:
                raise BadInput(f"{where}: {file!r} is not a file; write its path from the root")
            return found
    return reference


def _runtime(reference: Reference, asked: str, available: Available, where: str) -> str | None:
    """What starts an image here; ``auto``: the node's; None: nothing does, and nobody insisted."""
    chosen = asked if asked != "auto" else available.profile.runtime
    kind = catalog.KIND_LABELS[reference.kind]
    if chosen not in ("auto", "none"):
        if reference.kind not in catalog.KINDS[chosen]:
            converts = reference.kind in ("registry", "archive") and {"sqsh", "sif"} & set(catalog.KINDS[chosen])
            more = ", and amlaunch image import makes a file that it starts" if converts else ""
            raise BadInput(
                f"{where}: {chosen} cannot start {kind}; {' or '.join(catalog.runtimes_for(reference))} can{more}"
            )
        if chosen not in available.runtimes and not available.asks_node:
            raise BadInput(
                f"{where}: {chosen} is not here ({', '.join(available.runtimes) or 'no runtime is'}); container.runtime: none runs without a container"
            )
        return chosen
    if chosen == "none":
        return None
    found = catalog.choose(reference, available.runtimes)
    if found or available.asks_node:
        return found or "auto"
    if available.runtimes:
        raise BadInput(
            f"{where}: {', '.join(available.runtimes)} cannot start {kind}; {' or '.join(catalog.runtimes_for(reference))} can, and container.runtime: none runs without a container"
        )
    return None


def inside_of(loaded: LoadedRecipe, stages: Sequence[Stage], images: str | None) -> Inside | None:
    """What the stages' processes import that their images lack, and that comes with the run; None: no stage is in an image."""
    by_image: dict[str, list[str]] = {}
    for stage in stages:
        text = (
            image_text(loaded.recipe.container, stage.name)[0] if loaded.recipe.container and stage.container else None
        )
        if text:
            by_image.setdefault(text, []).append(stage.name)
    if not by_image:
        return None
    from amlaunch.launcher.runs import packages  # its look at what is installed takes a while

    folder = image_folder(site=images)
    found = [packages.inside(packages.wanted(loaded, names), folder.facts(text)) for text, names in by_image.items()]
    problems = [f"{_at(loaded, 'image')}: {problem}" for one in found for problem in one.problems]
    copied = {package.name: package for one in found for package in one.copied}
    expected, notes = [name for one in found for name in one.expected], [note for one in found for note in one.notes]
    return packages.Inside(
        tuple(copied.values()), tuple(dict.fromkeys(expected)), tuple(problems), tuple(dict.fromkeys(notes))
    )


def images_of(plan: Plan) -> str | None:
    """The folder of converted images that the profile of a plan names."""
    tree = (plan.cluster or {}).get("profile")
    return check_profile(tree, {}).images if tree else None


def container_notes(loaded: LoadedRecipe, plan: Plan, where: str) -> list[str]:
    """List what to know about the containers of a plan before it starts ``where`` (this machine, cluster lab)."""
    section = loaded.recipe.container
    if section is None:
        return []
    notes: list[str] = []
    for stage, container in ((stage.name, stage.container) for stage in plan.stages):
        text, _ = image_text(section, stage)
        if text is None or section.runtime == "none":
            continue
        if container is None:
            notes.append(
                f"container.image {text}: {where} has nothing that starts containers, or its profile says none; the stages run without one, in the environment that started them"
            )
        elif container.runtime == "auto":
            notes.append(
                f"container.image {text}: nothing on {where} says how nodes start containers; each asks what it has (container.runtime in the profile says it)"
            )
        else:
            notes += doubts(parse(container.image))
    return list(dict.fromkeys(notes))


def _mounts(given: Iterable[str | MountSection], where: Any, base: Path) -> list[Mount]:
    problems, found = ErrorCollector(), []
    for index, one in enumerate(given):
        try:
            if isinstance(one, str):
                found.append(parse_mount(one, base))
            else:
                found.append(make_mount(one.source, one.target, one.read_only, base))
        except BadMount as error:
            problems.add([f"{where('mounts')}: {index + 1}: {error}"])
    problems.refuse()
    return found


def site_mounts(available: Available) -> list[Mount]:
    """Those of the profile. Raises BadInput."""
    return _mounts(available.profile.mounts, available.at, Path("/"))


def last_wins(mounts: Iterable[Mount]) -> list[Mount]:
    """One mount for each place inside, outer ones first."""
    return sorted(
        {mount.target: mount for mount in mounts}.values(), key=lambda mount: (mount.target.count("/"), mount.target)
    )


def read_paths(loaded: LoadedRecipe, cwd: Path) -> Iterator[Path]:
    """Files and folders that the recipe's processes read or write beside the run directory; the same path inside as outside."""
    recipe = loaded.recipe
    texts: list[str] = []
    if recipe.preprocess:
        given = recipe.preprocess.data_files
        texts += [_before_glob(text) for text in ([given] if isinstance(given, str) else given or [])]
        texts += [recipe.preprocess.data_cache_dir or ""]
        if is_own_tokenizer(recipe.preprocess.tokenizer):
            texts.append(recipe.preprocess.tokenizer.removeprefix("char:"))
        if recipe.preprocess.dataset and (cwd / Path(recipe.preprocess.dataset).expanduser()).exists():
            texts.append(recipe.preprocess.dataset)
    for section in (recipe.dataset, recipe.validation_dataset or {}):
        pattern = section.get("file_pattern")
        texts += [_before_glob(text) for text in ([pattern] if isinstance(pattern, str) else pattern or [])]
    texts += [value for value in _values(recipe.model) if "/" in value and (cwd / Path(value).expanduser()).exists()]
    texts += [
        recipe.checkpoint.restore_from if "/" in recipe.checkpoint.restore_from else "",
        recipe.tensorboard.log_dir or "" if recipe.tensorboard else "",
    ]
    for text in texts:
        path = cwd / os.path.expanduser(text)
        if text and not has_placeholder(text) and path.exists():  # what is not there is said by others
            yield Path(os.path.normpath(path))


def _before_glob(text: str) -> str:
    """The folder in which a pattern begins to be one; of a plain path itself."""
    parts = Path(text).parts
    plain = [part for part in parts if not set("*?[") & set(part)]
    return (
        text
        if len(plain) == len(parts)
        else str(Path(*parts[: next(i for i, part in enumerate(parts) if set("*?[") & set(part))]))
    )


def _values(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for child in node.values():
            yield from _values(child)
    elif isinstance(node, str):
        yield node


# --- what is started ------------------------------------------------------------------------------------


def runtime_here(container: StageContainer) -> str:
    """The runtime of a stage on this node, where ``auto`` was left to it. ``none``: it has none that could."""
    if container.runtime != "auto":
        return container.runtime
    return catalog.choose(parse(container.image), catalog.installed()) or "none"


def image_of(
    run: RunDir, plan: Plan, stage: Stage, env: Mapping[str, str], passed: Iterable[str], *, on_slurm: bool
) -> ContainerSpec:
    """All that a stage's container is made of; ``env``: what is set inside, ``passed``: what each task has a value of its own for."""
    container = stage.container
    assert container is not None
    mounts = [
        *(Mount(str(path), str(path)) for path in run_paths(run, plan, stage)),
        *(Mount(*mount) for mount in container.mounts),
    ]
    return ContainerSpec(
        reference=parse(container.image),
        mounts=tuple(_without_repeats(last_wins(mounts))),
        env=dict(env),
        passed=tuple(
            sorted(
                name
                for name in set(passed) - set(env)
                if name in container.passed or is_seen(name, os.environ.get(name, ""), mounts)
            )
        ),
        workdir=container.workdir or (plan.cwd if may_mount(Path(plan.cwd)) else str(run.root)),
        entrypoint=container.entrypoint,
        gpus=bool(stage.needs.gpus_per_node),
        on_slurm=on_slurm,
        options=tuple(container.options),
    )


def is_seen(name: str, value: str, mounts: Sequence[Mount]) -> bool:
    """Whether a variable of the host means the same inside: not where its value is a path that is not mounted; what libraries find by themselves is nearer."""
    is_word = not value.startswith("/") or (
        is_secret_variable(name) and not name.endswith(("_PATH", "_FILE", "_DIR"))
    )  # a key may begin with a /
    return is_word or any(Path(value).is_relative_to(mount.target) for mount in mounts)


def run_paths(run: RunDir, plan: Plan, stage: Stage) -> list[Path]:
    """What every stage of a run reads and writes: its directory, the shards, checkpoints elsewhere, the folder it was typed in."""
    folders = [
        run.root,
        *([Path(plan.data)] if plan.data else []),
        *([Path(plan.shared)] if plan.shared else []),
        *named_folders(stage),
    ]
    folders += [Path(plan.cwd)] if may_mount(Path(plan.cwd)) else []
    return list(dict.fromkeys(path for folder in folders for path in (folder, folder.resolve())))


def named_folders(stage: Stage) -> list[Path]:
    """The folders that the arguments of a stage name: what is mounted must be there."""
    words = [word for element in stage.elements for word in element.arguments]
    return [Path(words[i + 1]) for i, word in enumerate(words[:-1]) if word in ("--checkpoints", "--data", "--out")]


def may_mount(folder: Path) -> bool:
    """A user's home, and what is above it, is not mounted unless they say so."""
    homes = (Path.home(), Path.home().resolve())
    return folder != Path("/") and not any(
        home.is_relative_to(place) for home in homes for place in (folder, folder.resolve())
    )


def _without_repeats(mounts: Sequence[Mount]) -> Iterator[Mount]:
    """Without what another mount shows already, at the same place and for writing, too."""
    for mount in mounts:
        outer = [one for one in mounts if one is not mount and Path(mount.target).is_relative_to(one.target)]
        nearest = max(outer, key=lambda one: len(one.target), default=None)
        inside = (
            os.path.normpath(f"{nearest.source}/{os.path.relpath(mount.target, nearest.target)}") if nearest else None
        )
        if nearest is None or inside != mount.source or nearest.read_only != mount.read_only:
            yield mount


def passed_names(container: StageContainer, secrets: Iterable[str], *, on_slurm: bool) -> list[str]:
    """Variables of the host that enter a container, beside those that are set inside: see :mod:`amlaunch.containers.runtimes.environment`."""
    per_task = RANK_VARIABLES if on_slurm else ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES")
    mine = {name for name in (*container.passed, *secrets) if name in os.environ}
    return sorted(
        name for name in {*library_variables(os.environ), *per_task, *mine} - {"PATH", "HOME"} if NAME.fullmatch(name)
    )


def node_check(
    container: StageContainer, runtime: str, image: ContainerSpec, launch: catalog.Launch, verdicts: Path
) -> dict[str, Any]:
    """What ``python -m amlaunch.containers.node_setup`` is given: nothing secret. ``verdicts``: the folder for the reasons of nodes that refuse."""
    return {
        "verdicts": str(verdicts),
        "runtime": runtime,
        "image": image.image.short,
        "path": str(image.image.path) if image.image.path else None,
        "mounts": sorted({mount.source for mount in image.mounts}),
        "prepare": [list(command) for command in launch.prepare],
        "gpus": image.gpus,
        "entrypoint": image.entrypoint,
        "passed": [*image.passed, *container.runtime_env],
        **container.facts,
    }


def host_python(profile_python: str | None) -> str:
    """The Python that checks a node."""
    return os.path.expanduser(profile_python) if profile_python else sys.executable
