"""Plan the container of each stage from a recipe and the container runtimes of a site."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlaunch.containers.images.reference import name_warnings
from amlaunch.containers.runtimes import catalog
from amlaunch.containers.runtimes.catalog import (
    BadMount,
    BadReference,
    Mount,
    Reference,
    make_mount,
    parse,
    parse_mount,
)
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.planning.image_folder import image_folder
from amlaunch.launcher.specs.cluster_profile import STAGES, ContainerProfile, check_profile
from amlaunch.launcher.specs.plan import Plan, Stage, StageContainer
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.placeholders import PLACEHOLDER, has_placeholder
from amlaunch.recipes.format.schema import ContainerSection, MountSection, is_own_tokenizer
from amlaunch.recipes.format.yaml_reader import KeyPath
from amlaunch.recipes.suggestions import did_you_mean

# Only runs in images need it.
if TYPE_CHECKING:
    from amlaunch.launcher.runs.packages import ImagePackages

VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class SiteRuntimes:
    """The container runtimes of a site, and its profile's settings for them."""

    runtimes: tuple[str, ...]
    """Best first."""
    asks_node: bool = False
    """True if nodes may have runtimes that this machine lacks."""
    profile: ContainerProfile = field(default_factory=ContainerProfile)
    lines: Mapping[KeyPath, str] = field(default_factory=dict)
    """``file:line`` of each key of the profile."""
    source: str = ""
    """The profile's file."""
    images: str | None = None
    """The profile's folder of converted images."""

    def at(self, *key: str) -> str:
        """Locate a key of the profile's ``container`` section, for the beginning of an error."""
        return f"{self.lines.get(('container', *key), self.source)}: {'.'.join(('container', *key))}"


# --- planning


def containers_of(loaded: LoadedRecipe, site: SiteRuntimes, cwd: Path) -> dict[str, StageContainer | None]:
    """Plan the container of each stage (None: no container). Raises BadInput with all problems."""
    section = loaded.recipe.container
    if section is None:
        return dict.fromkeys(STAGES)
    _check_runtime_names(loaded, section, site)

    problems = ErrorCollector()
    problems.add(_section_problems(loaded, section))
    mounts = [Mount(str(path), str(path)) for path in input_paths(loaded, cwd)]
    with problems.collected():
        mounts += [*site_mounts(site), *_parse_mounts(section.mounts, _at(loaded, "mounts"), cwd)]
    containers: dict[str, StageContainer | None] = {}
    for stage in STAGES:
        with problems.collected():
            containers[stage] = _stage_container(loaded, section, stage, site, cwd, mounts)
    problems.raise_if_any()
    return containers


def _check_runtime_names(loaded: LoadedRecipe, section: ContainerSection, site: SiteRuntimes) -> None:
    """Raise BadInput for an unknown runtime in the recipe or the profile."""
    problems = ErrorCollector()
    known = (*catalog.RUNTIMES, "auto")
    settings = ((_at(loaded, "runtime"), section.runtime), (site.at("runtime"), site.profile.runtime))
    for where, name in settings:
        if name not in known:
            problems.add([f"{where}: unknown runtime {name!r}; {did_you_mean(name, known)}"])
    problems.raise_if_any()


def _section_problems(loaded: LoadedRecipe, section: ContainerSection) -> Iterator[str]:
    """Yield the problems of variables and the working directory."""
    for name in section.env:
        if not VARIABLE_NAME.fullmatch(name):
            yield f"{_at(loaded, 'env', name)}: not a valid variable name; use letters, digits and _"
    if section.workdir is not None and not section.workdir.startswith("/"):
        yield f"{_at(loaded, 'workdir')}: {section.workdir!r}: expected an absolute path inside the container"


def _at(loaded: LoadedRecipe, *key: str) -> str:
    """Locate a key of the recipe's ``container`` section, for the beginning of an error."""
    path = ("container", *key)
    prefixes = (path[:length] for length in range(len(path), 0, -1))
    line = next((loaded.lines[prefix] for prefix in prefixes if prefix in loaded.lines), loaded.path)
    return f"{line}: {'.'.join(path)}"


def image_text(section: ContainerSection, stage: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the image of a stage as written in the recipe (None: no container), and its key."""
    stage_image = getattr(section.stages, stage)
    if stage_image in (None, "none"):
        return None, ("stages", stage)
    return (stage_image, ("stages", stage)) if stage_image else (section.image, ("image",))


def _stage_container(
    loaded: LoadedRecipe,
    section: ContainerSection,
    stage: str,
    site: SiteRuntimes,
    cwd: Path,
    mounts: Sequence[Mount],
) -> StageContainer | None:
    """Plan the container of one stage (None: no container). Raises BadInput."""
    text, key = image_text(section, stage)
    if text is None or section.runtime == "none":
        return None
    where = _at(loaded, *key)
    named = _parse_reference(text, where, cwd)
    reference = site_image(named, site)
    folder = image_folder(profile_folder=site.images)
    stored = folder.find(named.name) if reference is named and named.kind == "registry" else None
    if stored and stored.is_complete and _can_start(parse(stored.path), section.runtime, site):
        reference = parse(stored.path)

    runtime = _choose_runtime(reference, section.runtime, site, where)
    if runtime is None:
        return None
    return StageContainer(
        image=reference_text(reference),
        runtime=runtime,
        mounts=[(mount.source, mount.target, mount.read_only) for mount in merge_mounts(mounts)],
        workdir=section.workdir,
        entrypoint=section.entrypoint,
        options=list(site.profile.options),
        runtime_env=list(site.profile.runtime_env),
        passed=sorted({name for name, _ in PLACEHOLDER.findall(loaded.text())}),
        facts={"cuda": folder.facts(named.name).cuda, "architecture": (stored and stored.architecture) or None},
    )


def _parse_reference(text: str, where: str, base: Path) -> Reference:
    if has_placeholder(text):
        names = ", ".join(f"${{{name}}}" for name, _ in PLACEHOLDER.findall(text))
        raise BadInput(f"{where}: {text}: {names} is not set; export it")
    try:
        return parse(text, base)
    except BadReference as error:
        raise BadInput(f"{where}: {error}") from None


def reference_text(reference: Reference) -> str:
    """Return a text that :func:`amlaunch.containers.images.reference.parse` reads as the same image."""
    if reference.kind == "archive" and reference.layout:
        return f"{reference.layout}-archive:{reference.file}"
    if reference.path is not None:
        return f"file://{reference.path}" if reference.kind == "folder" else str(reference.path)
    if reference.user:
        return f"{reference.user}@{reference.registry}#{reference.repository}{reference.version}"
    return reference.name


def site_image(reference: Reference, site: SiteRuntimes) -> Reference:
    """Return the file that the profile uses instead of an image, or the image itself. Raises BadInput."""
    for name, file in site.profile.images.items():
        where = f"{site.lines.get(('container', 'images', name), site.source)}: container.images"
        if _parse_reference(name, where, Path("/")).name != reference.name:
            continue
        replacement = _parse_reference(file, where, Path("/"))
        if replacement.path is None:
            raise BadInput(f"{where}: expected the absolute path of an image file, got {file!r}")
        return replacement
    return reference


# --- runtimes


def _can_start(reference: Reference, runtime: str, site: SiteRuntimes) -> bool:
    """Return True if the site's runtime can start such a file."""
    chosen = runtime if runtime != "auto" else site.profile.runtime
    if chosen == "auto":
        return catalog.choose(reference, site.runtimes) is not None
    return reference.kind in catalog.KINDS.get(chosen, ())


def _choose_runtime(reference: Reference, runtime: str, site: SiteRuntimes, where: str) -> str | None:
    """Choose what starts an image; ``auto``: each node's own; None: no container. Raises BadInput."""
    chosen = runtime if runtime != "auto" else site.profile.runtime
    if chosen == "none":
        return None
    if chosen != "auto":
        _check_runtime(reference, chosen, site, where)
        return chosen
    installed = catalog.choose(reference, site.runtimes)
    if installed or site.asks_node:
        return installed or "auto"
    if not site.runtimes:
        return None
    raise BadInput(
        f"{where}: {', '.join(site.runtimes)} cannot start {catalog.KIND_LABELS[reference.kind]}; "
        f"install {' or '.join(catalog.runtimes_for(reference))}, or run without a container: "
        "container.runtime: none"
    )


def _check_runtime(reference: Reference, runtime: str, site: SiteRuntimes, where: str) -> None:
    """Raise BadInput if a runtime cannot start an image, or is not installed."""
    if reference.kind not in catalog.KINDS[runtime]:
        is_convertible = reference.kind in ("registry", "archive") and {"sqsh", "sif"} & set(catalog.KINDS[runtime])
        conversion = ", or convert it with amlaunch image import" if is_convertible else ""
        raise BadInput(
            f"{where}: {runtime} cannot start {catalog.KIND_LABELS[reference.kind]}; "
            f"use {' or '.join(catalog.runtimes_for(reference))}{conversion}"
        )
    if runtime not in site.runtimes and not site.asks_node:
        installed = ", ".join(site.runtimes) or "no container runtime"
        raise BadInput(
            f"{where}: {runtime} is not installed here (installed: {installed}); "
            "to run without a container, write container.runtime: none"
        )


def container_notes(loaded: LoadedRecipe, plan: Plan, where: str) -> list[str]:
    """List what to know about the containers of a plan before it starts; ``where``: this machine, cluster lab."""
    section = loaded.recipe.container
    if section is None:
        return []
    notes: list[str] = []
    for stage in plan.stages:
        text, _ = image_text(section, stage.name)
        if text is None or section.runtime == "none":
            continue
        if stage.container is None:
            notes.append(
                f"container.image {text}: {where} has no container runtime, or its profile sets runtime: none; "
                "the stages run without a container, in the current environment"
            )
        elif stage.container.runtime == "auto":
            notes.append(
                f"container.image {text}: the container runtime of {where} is not known here; each node uses its own "
                "(set container.runtime in the profile to choose one)"
            )
        else:
            notes += name_warnings(parse(stage.container.image))
    return list(dict.fromkeys(notes))


# --- packages


def image_packages(loaded: LoadedRecipe, stages: Sequence[Stage], images: str | None) -> ImagePackages | None:
    """Return the packages that stages import and their images lack, to be copied with the run; None: no images.

    ``images``: the profile's folder of converted images.
    """
    section = loaded.recipe.container
    stages_by_image: dict[str, list[str]] = {}
    for stage in stages:
        text = image_text(section, stage.name)[0] if section and stage.container else None
        if text:
            stages_by_image.setdefault(text, []).append(stage.name)
    if not stages_by_image:
        return None
    # Reading what is installed takes a while.
    from amlaunch.launcher.runs import packages

    folder = image_folder(profile_folder=images)
    results = [
        packages.packages_for_image(packages.required_packages(loaded, names), folder.facts(text))
        for text, names in stages_by_image.items()
    ]
    copied = {package.name: package for result in results for package in result.copied}
    return packages.ImagePackages(
        tuple(copied.values()),
        tuple(dict.fromkeys(name for result in results for name in result.expected)),
        tuple(f"{_at(loaded, 'image')}: {problem}" for result in results for problem in result.problems),
        tuple(dict.fromkeys(note for result in results for note in result.notes)),
    )


def profile_image_folder(plan: Plan) -> str | None:
    """Return the folder of converted images that the profile of a plan names."""
    tree = (plan.cluster or {}).get("profile")
    return check_profile(tree, {}).images if tree else None


# --- mounts


def site_mounts(site: SiteRuntimes) -> list[Mount]:
    """Return the profile's mounts. Raises BadInput."""
    return _parse_mounts(site.profile.mounts, site.at("mounts"), Path("/"))


def _parse_mounts(mounts: Iterable[str | MountSection], where: str, base: Path) -> list[Mount]:
    problems = ErrorCollector()
    parsed = []
    for number, mount in enumerate(mounts, start=1):
        try:
            if isinstance(mount, str):
                parsed.append(parse_mount(mount, base))
            else:
                parsed.append(make_mount(mount.source, mount.target, mount.read_only, base))
        except BadMount as error:
            problems.add([f"{where}: {number}: {error}"])
    problems.raise_if_any()
    return parsed


def merge_mounts(mounts: Iterable[Mount]) -> list[Mount]:
    """Return one mount per target, the last one given; outer targets first."""
    by_target = {mount.target: mount for mount in mounts}
    return sorted(by_target.values(), key=lambda mount: (mount.target.count("/"), mount.target))


def input_paths(loaded: LoadedRecipe, cwd: Path) -> Iterator[Path]:
    """Yield the existing files and folders that a recipe names; in a container they keep their paths."""
    for text in _named_paths(loaded, cwd):
        path = cwd / os.path.expanduser(text)
        # Missing paths are reported by the checks.
        if text and not has_placeholder(text) and path.exists():
            yield Path(os.path.normpath(path))


def _named_paths(loaded: LoadedRecipe, cwd: Path) -> Iterator[str]:
    """Yield the paths that a recipe names, as written; for a glob pattern, the folder in which it starts."""
    recipe = loaded.recipe
    if recipe.preprocess:
        section = recipe.preprocess
        yield from map(_before_glob, _as_list(section.data_files))
        yield section.data_cache_dir or ""
        if is_own_tokenizer(section.tokenizer):
            yield section.tokenizer.removeprefix("char:")
        if section.dataset and (cwd / Path(section.dataset).expanduser()).exists():
            yield section.dataset
    for dataset in (recipe.dataset, recipe.validation_dataset or {}):
        yield from map(_before_glob, _as_list(dataset.get("file_pattern")))
    for value in _strings(recipe.model):
        if "/" in value and (cwd / Path(value).expanduser()).exists():
            yield value
    if "/" in recipe.checkpoint.restore_from:
        yield recipe.checkpoint.restore_from
    if recipe.tensorboard:
        yield recipe.tensorboard.log_dir or ""


def _as_list(patterns: list[str] | str | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns or []


def _before_glob(text: str) -> str:
    """Return the folder in which a pattern starts, or a plain path itself."""
    parts = Path(text).parts
    for index, part in enumerate(parts):
        if GLOB_CHARACTERS & set(part):
            return str(Path(*parts[:index]))
    return text


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for child in node.values():
            yield from _strings(child)
    elif isinstance(node, str):
        yield node
