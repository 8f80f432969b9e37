"""Load a recipe: file, overrides, the guide's names, types, and consistency between keys."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import fingerprint
from amlaunch.recipes.format.automodel_names import translate
from amlaunch.recipes.format.consistency import RUN_NAME, check_consistency
from amlaunch.recipes.format.overrides import apply_override, parse_overrides
from amlaunch.recipes.format.placeholders import expand_known, variables
from amlaunch.recipes.format.schema import PREPROCESS_EXECUTION_KEYS, Preprocess, Recipe
from amlaunch.recipes.format.secret_keys import is_secret_variable, refuse_secrets
from amlaunch.recipes.format.section_checks import DATASET, Checker, raise_problems
from amlaunch.recipes.format.targets import TargetPolicy, code_digest, split_target, stable_names
from amlaunch.recipes.format.yaml_reader import KeyPath, dump, read_file

EXECUTION_SECTIONS = ("name", "resources", "container", "wandb", "tensorboard", "profile")
"""Sections that affect where a run executes, not its result: another value is still the same run."""
SWEEPABLE_SECTIONS = (
    "model",
    "dataset",
    "optimizer",
    "lr_scheduler",
    "parameter_groups",
    "loss_fn",
    "step_scheduler",
    "distributed",
    "clip_grad_norm",
    "compile",
    "seed",
)
"""Sections that may differ between sweep points, which share their shards, their nodes and their export settings."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that passed all checks."""

    path: Path
    tree: dict[str, Any]
    """As written: overrides applied, the guide's names translated, placeholders kept."""
    recipe: Recipe
    """Typed: defaults filled in, placeholders expanded if the variable is known."""
    notes: list[str]
    """One line for each translated name."""
    policy: TargetPolicy
    lines: Mapping[KeyPath, str] = field(default_factory=dict)
    """Place at which each key was set: ``file:line``, or the override as it was typed."""

    def text(self) -> str:
        """Return the resolved recipe as YAML, placeholders kept, as a run directory stores it."""
        return dump(self.tree)

    def json_text(self) -> str:
        """Return the resolved recipe as JSON, placeholders kept: a job can write it without PyYAML."""
        return json.dumps(self.tree, indent=2) + "\n"

    def fingerprint(self) -> str:
        """Return eight hex digits that identify the result: what is computed, from which files, with which code."""
        sections = {key: value for key, value in self.tree.items() if key not in EXECUTION_SECTIONS}
        if isinstance(sections.get("preprocess"), dict):
            sections["preprocess"] = _without_execution_keys(sections["preprocess"])
        code = [code_digest(name, self.policy) for name in file_targets(self.tree)]
        paths = self.data_paths("preprocess", "dataset", "validation_dataset")
        return fingerprint([stable_names(self.visible(sections)), code, paths])

    def visible(self, value: Any) -> Any:
        """Return ``value`` with its placeholders expanded, except those of secrets."""
        return expand_known(value, {name: text for name, text in variables().items() if not is_secret_variable(name)})

    def data_paths(self, *sections: str) -> list[str]:
        """Return the absolute form of every data path in ``sections``: ``text/*.txt`` differs between folders."""
        nodes = [self.visible(self.tree.get(section) or {}) for section in sections]
        return [path for node in nodes for path in data_paths_of(node)]

    def elements(self) -> list[dict[str, Any]]:
        """Return one mapping of overrides for each sweep point; a single empty one without a sweep."""
        # The tree's axes, with placeholders: the values are stored.
        axes = self.tree.get("sweep") or {}
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _without_execution_keys(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in preprocess.items() if key not in PREPROCESS_EXECUTION_KEYS}


def data_paths_of(section: Mapping[str, Any]) -> list[str]:
    """Return the absolute form of every data path in a section."""
    paths = [path for child in section.values() if _is_dataset_section(child) for path in data_paths_of(child)]
    for key in ("data_files", "file_pattern", "dataset"):
        values = section.get(key)
        for value in values if isinstance(values, list) else [values]:
            # A dataset that is no local folder is a name on the hub.
            if value and (key != "dataset" or os.path.exists(value)):
                paths.append(os.path.abspath(os.path.expanduser(str(value))))
    return paths


def _is_dataset_section(value: Any) -> bool:
    """Return True for a data set of ours inside a section: a mixture's sources, one of them, a named validation set."""
    if not isinstance(value, Mapping):
        return False
    return str(value.get("_target_", DATASET["_target_"])).startswith("amlaunch.trainer.data.")


def shards_folder_name(section: Preprocess, paths: Sequence[str]) -> str:
    """Return the default name of a folder of shards: source, tokenizer, and a fingerprint of the section."""
    content = {**_without_execution_keys(dataclasses.asdict(section)), "output_dir": None, "places": paths}
    source = section.dataset or ("iterator" if section.source else "files")
    tokenizer = re.sub(r"[^A-Za-z0-9._-]+", "-", section.tokenizer).strip("-")
    return f"{source.rstrip('/').rpartition('/')[2]}-{tokenizer}-{fingerprint(content)}"


def file_targets(node: Any) -> list[str]:
    """Return the ``file.py:object`` targets of a recipe."""
    if isinstance(node, Mapping):
        target = str(node.get("_target_", ""))
        nested = [name for child in node.values() for name in file_targets(child)]
        return [target, *nested] if ":" in target else nested
    if isinstance(node, list):
        return [name for child in node for name in file_targets(child)]
    return []


def load(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    recipe_dir: Path | None = None,
    allow: Sequence[str] = (),
    job_start: bool = False,
    has_shards: bool = False,
) -> LoadedRecipe:
    """Read and check the recipe at ``path``; imports nothing and writes nothing.

    ``overrides`` are command-line arguments (``--a.b value``). File targets are relative to ``recipe_dir``, by default
    the recipe's own folder. ``job_start`` requires a value for every ``${VAR}``. ``has_shards``: a folder of shards was
    given, so the recipe needs neither ``file_pattern`` nor ``preprocess``. Raises BadInput with every problem, one a
    line, each with file and line.
    """
    tree, lines = read_file(path)
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: expected sections (model:, dataset:, …)")
    # A place for anchors, as in Compose files.
    tree = {key: value for key, value in tree.items() if not key.startswith("x-")}
    for key_path, value, typed in parse_overrides(overrides):
        apply_override(tree, key_path, value, typed)
        for depth in range(1, len(key_path)):
            lines.setdefault(key_path[:depth], typed)
        lines[key_path] = typed

    notes = translate(tree, lines)
    if "name" not in tree and RUN_NAME.fullmatch(path.stem):
        tree["name"] = path.stem
    folder = (recipe_dir or path.parent).resolve()
    allowed = tuple(_relative_if_inside(name, folder) if name.endswith(".py") else name for name in allow)
    policy = TargetPolicy(folder, allowed)
    _resolve_file_targets(tree, folder)
    refuse_secrets(tree, lines)
    recipe = _typed(tree, lines, policy, job_start, has_shards)
    loaded = LoadedRecipe(path, tree, recipe, notes, policy, lines)
    _check_sweep(loaded, lines, job_start)
    return loaded


def _resolve_file_targets(node: Any, folder: Path) -> None:
    """Make file targets relative to the recipe's folder, so that a code snapshot has them too; others absolute."""
    if isinstance(node, list):
        for child in node:
            _resolve_file_targets(child, folder)
    if not isinstance(node, dict):
        return
    for child in node.values():
        _resolve_file_targets(child, folder)
    file, name = split_target(str(node.get("_target_", "")))
    if file:
        node["_target_"] = f"{_relative_if_inside(file, folder)}:{name}"


def _relative_if_inside(file: str, folder: Path) -> str:
    path = (folder / os.path.expanduser(file)).resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _typed(
    tree: dict[str, Any], lines: Mapping[KeyPath, str], policy: TargetPolicy, job_start: bool, has_shards: bool = False
) -> Recipe:
    checker = Checker(lines, variables(), policy, job_start, has_shards)
    recipe = checker.section(Recipe, tree, ())
    raise_problems(checker.problems)
    check_consistency(recipe, checker)
    raise_problems(checker.problems)
    return recipe


def _check_sweep(loaded: LoadedRecipe, lines: Mapping[KeyPath, str], job_start: bool) -> None:
    for key in loaded.recipe.sweep or {}:
        place = _sweep_place(loaded.path, lines, key)
        values = [json.dumps(value, sort_keys=True) for value in loaded.tree["sweep"][key]]
        repeated = next((value for value in values if values.count(value) > 1), None)
        if not values:
            raise BadInput(f"{place}: the list is empty; give it values, or remove the key")
        if repeated is not None:
            raise BadInput(f"{place}: {repeated} is listed twice")
        if key.split(".")[0] not in SWEEPABLE_SECTIONS:
            raise BadInput(f"{place}: sweep points share this setting; sweep over {', '.join(SWEEPABLE_SECTIONS)}")
    if loaded.recipe.sweep:
        for point in loaded.elements():
            recipe_at_point(loaded, point, lines, job_start)


def _sweep_place(path: Path, lines: Mapping[KeyPath, str], key: str, value: Any = None) -> str:
    """Return the place of a sweep's key, or of one of its values; an option names both already."""
    place = lines.get(("sweep", key), lines.get(("sweep",), str(path)))
    if place.startswith("--sweep "):
        return place
    return f"{place}: sweep.{key}" if value is None else f"{place}: sweep.{key}={value}"


def recipe_at_point(
    loaded: LoadedRecipe,
    point: Mapping[str, Any],
    lines: Mapping[KeyPath, str] | None = None,
    job_start: bool = False,
) -> Recipe:
    """Return the recipe of one sweep point. Raises BadInput if its keys are inconsistent."""
    tree = copy.deepcopy(loaded.tree)
    point_lines = dict(lines or {})
    for key, value in point.items():
        path = tuple(key.split("."))
        place = _sweep_place(loaded.path, point_lines, key, value)
        apply_override(tree, path, value, place)
        point_lines[path] = place
    return _typed(tree, point_lines, loaded.policy, job_start)
