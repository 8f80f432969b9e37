"""Read a recipe: file, overrides, the guide's names, types, and what must hold between keys."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.check import Checker, refuse
from recipes.compat import translate
from recipes.errors import BadInput
from recipes.expand import PLACEHOLDER, Unset, expand_tree, variables
from recipes.files import fingerprint
from recipes.overrides import apply_override, parse_overrides
from recipes.schema import Recipe
from recipes.targets import Policy, signature, split_target
from recipes.yamlfile import KeyPath, dump, read_file

EXECUTION = ("name", "resources", "container", "wandb")
"""Sections that say where a run happens, not what it computes: another value is still the same run."""
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL|AUTH", re.IGNORECASE)
SECRET_KEY = re.compile(r"^token$|(^|_)(api_?key|password|secret)$|(^|_)(hf|auth|access|api|bearer|hub)_token$", re.IGNORECASE)
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Loaded:
    """A recipe that holds together."""

    path: Path
    tree: dict[str, Any]
    """As written and overridden, the guide's names translated, placeholders kept."""
    recipe: Recipe
    """Typed, defaults filled in, placeholders expanded where the variable is known."""
    notes: list[str]
    policy: Policy

    def text(self) -> str:
        """The resolved recipe as YAML, placeholders kept: what a run directory stores."""
        return dump(self.tree)

    def fingerprint(self) -> str:
        """Eight hex digits of what the recipe computes; equal recipes are one run."""
        visible = {name: value for name, value in variables().items() if not SECRET.search(name)}
        kept = {key: _expand_known(value, visible) for key, value in self.tree.items() if key not in EXECUTION}
        return fingerprint(kept)

    def elements(self) -> list[dict[str, Any]]:
        """One mapping of overrides for each point of the sweep; a single empty one without a sweep."""
        axes = self.recipe.sweep or {}
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _expand_known(value: Any, known: Mapping[str, str]) -> Any:
    try:
        return expand_tree(value, known)
    except Unset:
        if isinstance(value, dict):
            return {key: _expand_known(child, known) for key, child in value.items()}
        if isinstance(value, list):
            return [_expand_known(child, known) for child in value]
        return PLACEHOLDER.sub(lambda match: match[0], value)


def load(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    recipe_dir: Path | None = None,
    allow: Sequence[str] = (),
    job_start: bool = False,
) -> Loaded:
    """Read and check the recipe at ``path``; nothing is imported, nothing is written.

    ``overrides`` are command-line tokens (``--a.b value``); ``recipe_dir`` is
    where file targets are relative to (the recipe's own folder by default);
    ``job_start`` demands a value for every ``${VAR}``. Raises BadInput with
    every problem found, one a line, each with file and line.
    """
    tree, lines = read_file(path)
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: a recipe is a mapping of sections (model:, dataset:, …)")
    for key_path, value, shown in parse_overrides(overrides):
        apply_override(tree, key_path, value, shown)
        for depth in range(1, len(key_path)):
            lines.setdefault(key_path[:depth], shown)
        lines[key_path] = shown
    notes = translate(tree, lines)
    policy = Policy(recipe_dir or path.resolve().parent, tuple(allow))
    _relative_targets(tree, policy)
    refuse_secrets(tree, lines)
    recipe = _typed(tree, lines, policy, job_start)
    loaded = Loaded(path, tree, recipe, notes, policy)
    _check_sweep(loaded, lines, job_start)
    return loaded


def _relative_targets(node: Any, policy: Policy) -> None:
    """Name a file in the recipe's folder relative to it, so that it is found in a snapshot of that folder too."""
    if isinstance(node, list):
        for child in node:
            _relative_targets(child, policy)
    if not isinstance(node, dict):
        return
    for child in node.values():
        _relative_targets(child, policy)
    file, name = split_target(str(node.get("_target_", "")))
    if file and policy.folder and Path(file).is_absolute() and Path(file).is_relative_to(policy.folder):
        node["_target_"] = f"{Path(file).relative_to(policy.folder)}:{name}"


def refuse_secrets(tree: Any, lines: Mapping[KeyPath, str], path: KeyPath = ()) -> None:
    """A literal secret would be stored with the run: BadInput says how to pass it by the environment."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            refuse_secrets(value, lines, (*path, key))
    elif path and isinstance(tree, str) and tree and SECRET_KEY.search(path[-1]) and not PLACEHOLDER.search(tree):
        name = path[-1].upper()
        where = re.sub("=.*", "", lines.get(path, "recipe"), flags=re.DOTALL)
        raise BadInput(f"{where}: {'.'.join(path)}: a secret would be written down with the run; export {name}=… and write ${{{name}}}")


def _typed(tree: dict[str, Any], lines: dict[KeyPath, str], policy: Policy, job_start: bool) -> Recipe:
    checker = Checker(lines, variables(), policy, job_start)
    recipe = checker.section(Recipe, tree, ())
    refuse(checker.problems)
    _check_together(recipe, checker)
    refuse(checker.problems)
    return recipe


def _check_sweep(loaded: Loaded, lines: dict[KeyPath, str], job_start: bool) -> None:
    for key, values in (loaded.recipe.sweep or {}).items():
        where = lines.get(("sweep", key), lines.get(("sweep",), str(loaded.path)))
        if not values:
            raise BadInput(f"{where}: sweep.{key}: an empty list sweeps over nothing")
        for value in values:
            tree = copy.deepcopy(loaded.tree)
            apply_override(tree, tuple(key.split(".")), value, f"{where}: sweep.{key}")
            _typed(tree, {**lines, tuple(key.split(".")): where}, loaded.policy, job_start)


def _check_together(recipe: Recipe, checker: Checker) -> None:
    _check_name(recipe, checker)
    _check_model(recipe, checker)
    _check_data(recipe, checker)
    _check_unsupported(recipe, checker)
    steps = recipe.step_scheduler
    if steps.global_batch_size % steps.local_batch_size:
        checker.problem(
            ("step_scheduler", "global_batch_size"),
            f"{steps.global_batch_size} windows do not divide into micro-batches of local_batch_size {steps.local_batch_size}",
        )


def _check_name(recipe: Recipe, checker: Checker) -> None:
    if not RUN_NAME.fullmatch(recipe.name):
        checker.problem(("name",), f"{recipe.name!r}: a name is letters, digits, '.', '_' and '-' (it names a folder)")


def _check_unsupported(recipe: Recipe, checker: Checker) -> None:
    """Settings of the guide that only have one value here are refused before a node is asked for."""
    ones = {"tp_size": recipe.distributed.tp_size, "cp_size": recipe.distributed.cp_size}
    for key, value in ones.items():
        if value != 1:
            checker.problem(("distributed", key), f"{value}: this version trains with data parallelism alone; write 1")
    if recipe.distributed.sequence_parallel:
        checker.problem(("distributed", "sequence_parallel"), "needs tensor parallelism; write false")
    if recipe.packed_sequence.packed_sequence_size:
        checker.problem(("packed_sequence", "packed_sequence_size"), "this version cuts the stream into windows; write 0")


def _check_data(recipe: Recipe, checker: Checker) -> None:
    source = recipe.preprocess
    if source is not None:
        if (source.dataset is None) == (source.data_files is None):
            checker.problem(("preprocess",), "give either dataset (Hugging Face) or data_files (local files)")
        if source.max_tokens is not None and source.val_tokens >= source.max_tokens:
            checker.problem(("preprocess", "val_tokens"), f"{source.val_tokens:,} leaves nothing of max_tokens {source.max_tokens:,}")
    for section in ("dataset", "validation_dataset"):
        node = getattr(recipe, section)
        if node and node["_target_"].endswith("NanogptDataset") and not node.get("file_pattern") and source is None:
            checker.problem((section,), "no file_pattern, and no preprocess section that would make the shards")


def _numbers(node: Any, known: dict[str, int]) -> dict[str, int]:
    """All whole numbers of a model section, nested configs included, by key."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if isinstance(value, int) and not isinstance(value, bool):
                known[key] = value
            _numbers(value, known)
    return known


def _check_model(recipe: Recipe, checker: Checker) -> None:
    found = signature(recipe.model["_target_"], checker.policy)
    defaults = {key: known.default for key, known in found.parameters.items() if isinstance(known.default, int)} if found else {}
    sizes = _numbers(recipe.model, defaults)
    for width, heads in (("n_embd", "n_head"), ("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        if sizes.get(heads) and width in sizes and sizes[width] % sizes[heads]:
            checker.problem(("model", width), f"{sizes[width]} is not divisible by {heads} {sizes[heads]}")
    context = sizes.get("n_ctx") or sizes.get("n_positions") or sizes.get("max_position_embeddings")
    for section in ("dataset", "validation_dataset"):
        length = (getattr(recipe, section) or {}).get("seq_len")
        if context and isinstance(length, int) and length > context:
            checker.problem((section, "seq_len"), f"{length} is beyond the model's context of {context} positions")


def check_batch(recipe: Recipe, ranks: int) -> str | None:
    """What is wrong with the global batch on so many data-parallel ranks; None where it divides."""
    steps = recipe.step_scheduler
    share = ranks * steps.local_batch_size
    if steps.global_batch_size % share == 0:
        return None
    lower = steps.global_batch_size // share * share
    near = f"{lower} or {lower + share}" if lower else str(share)
    return (
        f"step_scheduler.global_batch_size {steps.global_batch_size} does not divide over {ranks} ranks x local_batch_size "
        f"{steps.local_batch_size}; write {near}, or another local_batch_size"
    )
