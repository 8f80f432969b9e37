"""Read a recipe: file, overrides, the guide's names, types, and what must hold between keys."""

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

from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.files import fingerprint
from amlaunch.recipes.format.automodel_names import translate
from amlaunch.recipes.format.overrides import apply_override, parse_overrides
from amlaunch.recipes.format.placeholders import expand_known, has_placeholder, variables
from amlaunch.recipes.format.schema import (
    SAME_BYTES,
    TOKENIZERS,
    Preprocess,
    Recipe,
    data_sections,
    file_sections,
    is_own_tokenizer,
)
from amlaunch.recipes.format.section_checks import Checker, fits, refuse
from amlaunch.recipes.format.targets import OURS, Policy, code_digest, signature, split_target, stable_names
from amlaunch.recipes.format.yaml_reader import KeyPath, dump, read_file

EXECUTION = ("name", "resources", "container", "wandb", "tensorboard", "profile")
"""Sections that say where a run happens, not what it computes: another value is still the same run."""
SECRET = re.compile(r"(^|_)(TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH)(_|$)", re.IGNORECASE)
"""Names of variables whose value is nobody's business."""
NO_SECRET = re.compile(r"(^|_)(bos|eos|eot|pad|unk|sep|cls|mask)_token$", re.IGNORECASE)
"""Keys of recipes that only sound like one."""
SECRET_ENDS = re.compile(
    r"(^|_)((api|access|private|wandb|secret)_?key|token|secret|passwd|password|credentials?)$", re.IGNORECASE
)
SWEPT = (
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
"""Sections that may differ between the elements of a sweep, which share their data, their nodes and their export."""
OUR_DATA = "amlaunch.trainer.data.NanogptDataset"
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
    lines: Mapping[KeyPath, str] = field(default_factory=dict)
    """Where each key was set: ``file:line``, or the override as it was typed."""

    def text(self) -> str:
        """The resolved recipe as YAML, placeholders kept: what a run directory stores."""
        return dump(self.tree)

    def fingerprint(self) -> str:
        """Eight hex digits of what the recipe computes, from which files and with which code; equal ones are one run."""
        kept = {key: value for key, value in self.tree.items() if key not in EXECUTION}
        if isinstance(kept.get("preprocess"), dict):
            kept["preprocess"] = {key: value for key, value in kept["preprocess"].items() if key not in SAME_BYTES}
        code = [code_digest(name, self.policy) for name in file_targets(self.tree)]
        return fingerprint(
            [stable_names(self.visible(kept)), code, self.places("preprocess", "dataset", "validation_dataset")]
        )

    def visible(self, value: Any) -> Any:
        """``value`` with its placeholders filled in, but for those that are secrets."""
        return expand_known(value, {name: text for name, text in variables().items() if not is_secret_variable(name)})

    def places(self, *sections: str) -> list[str]:
        """The absolute form of every path to data in ``sections``: another folder's ``text/*.txt`` is other text."""
        return [place for section in sections for place in places_of(self.visible(self.tree.get(section) or {}))]

    def elements(self) -> list[dict[str, Any]]:
        """One mapping of overrides for each point of the sweep; a single empty one without a sweep."""
        axes = self.tree.get("sweep") or {}  # not the expanded ones: what is in them is written down
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def places_of(section: Mapping[str, Any]) -> list[str]:
    """The absolute form of every path to data in a section."""
    found = [place for child in section.values() if _names_shards(child) for place in places_of(child)]
    for key in ("data_files", "file_pattern", "dataset"):
        values = section.get(key)
        for value in values if isinstance(values, list) else [values]:
            if value and (key != "dataset" or os.path.exists(value)):  # else a name on the hub
                found.append(os.path.abspath(os.path.expanduser(str(value))))
    return found


def _names_shards(value: Any) -> bool:
    """Whether a part of a section is data sets of ours: a mixture's sources, one of them, a named validation set."""
    return isinstance(value, Mapping) and str(value.get("_target_", OUR_DATA)).startswith("amlaunch.trainer.data.")


def data_name(section: Preprocess, places: Sequence[str]) -> str:
    """What a folder of shards is called where the recipe does not say: its source, its tokenizer, and a fingerprint of both."""
    kept = {key: value for key, value in dataclasses.asdict(section).items() if key not in SAME_BYTES}
    made_of = {**kept, "output_dir": None, "places": places}
    source = (section.dataset or ("iterator" if section.source else "files")).rstrip("/").rpartition("/")[2]
    tokenizer = re.sub(r"[^A-Za-z0-9._-]+", "-", section.tokenizer).strip("-")
    return f"{source}-{tokenizer}-{fingerprint(made_of)}"


def file_targets(node: Any) -> list[str]:
    """The ``file.py:object`` targets of a recipe."""
    if isinstance(node, Mapping):
        own = [node["_target_"]] if ":" in str(node.get("_target_", "")) else []
        return own + [name for child in node.values() for name in file_targets(child)]
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
    if "name" not in tree and RUN_NAME.fullmatch(path.stem):
        tree["name"] = path.stem
    folder = (recipe_dir or path.parent).resolve()
    policy = Policy(folder, tuple(_place(name, folder) if name.endswith(".py") else name for name in allow))
    _settle_targets(tree, folder)
    refuse_secrets(tree, lines)
    recipe = _typed(tree, lines, policy, job_start)
    loaded = Loaded(path, tree, recipe, notes, policy, lines)
    _check_sweep(loaded, lines, job_start)
    return loaded


def _settle_targets(node: Any, folder: Path) -> None:
    """Name a file in the recipe's folder relative to it, so that it is found in a snapshot too; any other absolutely."""
    if isinstance(node, list):
        for child in node:
            _settle_targets(child, folder)
    if not isinstance(node, dict):
        return
    for child in node.values():
        _settle_targets(child, folder)
    file, name = split_target(str(node.get("_target_", "")))
    if file:
        node["_target_"] = f"{_place(file, folder)}:{name}"


def _place(file: str, folder: Path) -> str:
    path = (folder / os.path.expanduser(file)).resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def refuse_secrets(tree: Any, lines: Mapping[KeyPath, str], path: KeyPath = ()) -> None:
    """A literal secret would be stored with the run: BadInput says how to pass it by the environment."""
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            refuse_secrets(value, lines, (*path, str(key)))
    elif path and isinstance(tree, str) and tree and is_secret(path[-1]) and not re.fullmatch(r"\$\{\w+\}", tree):
        name = path[-1].upper()
        where = re.sub("=.*", "", lines.get(path, "recipe"), flags=re.DOTALL)
        raise BadInput(
            f"{where}: {'.'.join(path)}: a secret would be written down with the run; export {name}=… and write ${{{name}}}"
        )


def _typed(tree: dict[str, Any], lines: dict[KeyPath, str], policy: Policy, job_start: bool) -> Recipe:
    checker = Checker(lines, variables(), policy, job_start)
    recipe = checker.section(Recipe, tree, ())
    refuse(checker.problems)
    _check_together(recipe, checker)
    refuse(checker.problems)
    return recipe


def is_secret_variable(name: str) -> bool:
    """Whether a variable of the environment is a secret, by its name."""
    return SECRET.search(name) is not None


def is_secret(key: str) -> bool:
    """Whether a key's value is a secret, by its name."""
    return SECRET_ENDS.search(key) is not None and NO_SECRET.search(key) is None


def _check_sweep(loaded: Loaded, lines: dict[KeyPath, str], job_start: bool) -> None:
    places = {
        key: lines.get(("sweep", key), lines.get(("sweep",), str(loaded.path))) for key in loaded.recipe.sweep or {}
    }
    for key, where in places.items():
        if not loaded.tree["sweep"][key]:
            raise BadInput(f"{where}: sweep.{key}: an empty list sweeps over nothing")
        values = [json.dumps(value, sort_keys=True) for value in loaded.tree["sweep"][key]]
        if len(set(values)) < len(values):
            raise BadInput(
                f"{where}: sweep.{key}: {next(value for value in values if values.count(value) > 1)} is there twice"
            )
        if key.split(".")[0] not in SWEPT:
            raise BadInput(
                f"{where}: sweep.{key}: the elements of a sweep share it; what may differ is {', '.join(SWEPT)}"
            )
    for point in loaded.elements() if places else []:
        at_point(loaded, point, lines, job_start)


def at_point(
    loaded: Loaded, point: Mapping[str, Any], lines: Mapping[KeyPath, str] | None = None, job_start: bool = False
) -> Recipe:
    """The recipe of one element of a sweep. Raises BadInput where it does not hold together."""
    tree = copy.deepcopy(loaded.tree)
    found = dict(lines or {})
    for key, value in point.items():
        path = tuple(key.split("."))
        where = f"{found.get(('sweep', key), loaded.path)}: sweep.{key}={value}"
        apply_override(tree, path, value, where)
        found[path] = where
    return _typed(tree, found, loaded.policy, job_start)


def _check_together(recipe: Recipe, checker: Checker) -> None:
    _check_name(recipe, checker)
    _check_model(recipe, checker)
    _check_data(recipe, checker)
    _check_parallel(recipe, checker)
    _check_numbers(recipe, checker)
    steps = recipe.step_scheduler
    if steps.global_batch_size % steps.local_batch_size:
        checker.problem(
            ("step_scheduler", "global_batch_size"),
            f"{steps.global_batch_size} windows do not divide into micro-batches of local_batch_size {steps.local_batch_size}",
        )


def _check_name(recipe: Recipe, checker: Checker) -> None:
    if not RUN_NAME.fullmatch(recipe.name):
        checker.problem(("name",), f"{recipe.name!r}: a name is letters, digits, '.', '_' and '-' (it names a folder)")


def _check_numbers(recipe: Recipe, checker: Checker) -> None:
    if recipe.clip_grad_norm and not 0 < recipe.clip_grad_norm.max_norm < float("inf"):
        checker.problem(
            ("clip_grad_norm", "max_norm"),
            f"{recipe.clip_grad_norm.max_norm}: expected a number above 0; clip_grad_norm: null does not clip",
        )
    if recipe.seed >= 2**63:
        checker.problem(("seed",), "beyond 64 bits")
    rate = recipe.optimizer.get("lr", 0.0)
    if isinstance(rate, float) and not 0 <= rate < float("inf"):
        checker.problem(("optimizer", "lr"), f"{rate}: expected a number of at least 0")
    _check_rates(recipe, checker)
    if recipe.checkpoint.restore_from != "auto" and not recipe.checkpoint.enabled:
        checker.problem(
            ("checkpoint", "restore_from"), "needs checkpoint.enabled: true, for the run remembers that it was done"
        )
    if recipe.export and not recipe.export.temperature >= 0:
        checker.problem(("export", "temperature"), f"{recipe.export.temperature}: expected a number of at least 0")
    if recipe.export and not recipe.checkpoint.enabled:
        checker.problem(("checkpoint", "enabled"), "false leaves nothing to export; write export: null too")


def _check_rates(recipe: Recipe, checker: Checker) -> None:
    """What is given twice, and rates and decays below 0."""
    for what in ("warmup", "decay", "wsd_decay"):
        steps, tokens = f"lr_{what}_steps", f"lr_{what}_tokens"
        if (
            recipe.lr_scheduler
            and getattr(recipe.lr_scheduler, steps)
            and getattr(recipe.lr_scheduler, tokens) is not None
        ):
            checker.problem(("lr_scheduler", tokens), f"{steps} says it, too; write one of them")
    for i, group in enumerate(recipe.parameter_groups):
        for key in ("lr", "lr_scale", "weight_decay"):
            value = getattr(group, key)
            if value is not None and not 0 <= value < float("inf"):
                checker.problem(("parameter_groups", str(i), key), f"{value}: expected a number of at least 0")


def _check_parallel(recipe: Recipe, checker: Checker) -> None:
    """What cannot be dealt out to so many ranks, and settings that would do nothing."""
    section, tp = recipe.distributed, recipe.distributed.tp_size

    def problem(key: str, text: str) -> None:
        checker.problem(("distributed", key), text)

    if section.sequence_parallel and tp == 1:
        problem(
            "sequence_parallel",
            "shares out what tensor parallelism leaves whole, and tp_size is 1; write false, or a tp_size",
        )
    if section.strategy != "fsdp2" and (section.dp_replicate_size or 1) > 1:
        problem("dp_replicate_size", f"replicas of shards are for strategy fsdp2, not {section.strategy}")
    if section.cpu_offload and section.strategy != "fsdp2":
        problem("cpu_offload", f"is for strategy fsdp2, not {section.strategy}")
    if section.strategy == "none" and section.cp_size > 1:
        problem("cp_size", f"{section.cp_size}: strategy none adds up no gradients; write fsdp2 or ddp")
    for key, value in _dealt_out(recipe, checker.policy).items():
        if value % tp:
            problem(
                "tp_size",
                f"{tp} does not divide model.{key} {value}"
                + ("; multiples of 128 are fastest" if key == "vocab_size" else ""),
            )
    share, row = tp * section.cp_size, recipe.packed_sequence.packed_sequence_size
    lengths = {f"{'.'.join(path)}.seq_len": node.get("seq_len") for path, node in data_sections(recipe).items()}
    for name, length in ({"packed_sequence_size": row} if row else lengths).items():
        if isinstance(length, int) and length % share:
            key = "cp_size" if section.cp_size > 1 else "tp_size"
            problem(
                key,
                f"the ranks that share a window have equal parts of it, and {share} (tp_size x cp_size) does not divide {name} {length}",
            )


def _dealt_out(recipe: Recipe, policy: Policy) -> dict[str, int]:
    """Sizes of the model that tensor parallelism divides, by key, as far as they are known without building it."""
    target = recipe.model["_target_"]
    ours = target in OURS
    found = signature(target, policy) if ours else None
    defaults = (
        {key: known.default for key, known in found.parameters.items() if isinstance(known.default, int)}
        if found
        else {}
    )
    keys = (
        "n_head",
        "num_attention_heads",
        "num_key_value_heads",
        *(("vocab_size", "intermediate_size") if ours else ()),
    )
    sizes = _numbers(recipe.model, defaults)
    return {key: sizes[key] for key in keys if key in sizes and (ours or target.startswith("transformers."))}


def _check_data(recipe: Recipe, checker: Checker) -> None:
    source = recipe.preprocess
    if source is not None:
        if sum(bool(given) for given in (source.dataset, source.data_files, source.source)) != 1:
            checker.problem(
                ("preprocess",),
                "give one of dataset (Hugging Face), data_files (local files) and source (an iterator of yours)",
            )
        if source.max_tokens is not None and source.val_tokens >= source.max_tokens:
            checker.problem(
                ("preprocess", "val_tokens"),
                f"{source.val_tokens:,} leaves nothing of max_tokens {source.max_tokens:,}",
            )
        vocab = TOKENIZERS.get(source.tokenizer)
        if vocab is None and is_own_tokenizer(source.tokenizer):
            pass  # its size is known when it is read
        elif vocab is None:
            checker.problem(
                ("preprocess", "tokenizer"), f"{source.tokenizer!r}: {did_you_mean(source.tokenizer, TOKENIZERS)}"
            )
        elif _numbers(recipe.model, {}).get("vocab_size", vocab) < vocab:
            checker.problem(
                ("model", "vocab_size"),
                f"{source.tokenizer} has {vocab} tokens; write at least as many (multiples of 128 are fastest)",
            )
    for path, node in data_sections(recipe).items():
        if node["_target_"].endswith("MixedDataset"):
            _check_sources(path, node, checker)
    for path, node in file_sections(recipe).items():
        if node.get("_target_", OUR_DATA).startswith("amlaunch.trainer.data.") and not node.get("file_pattern"):
            _check_split(path, node, recipe, checker)


def _check_sources(path: KeyPath, node: Mapping[str, Any], checker: Checker) -> None:
    """Names of a mixture's sources, their keys, and a weight for all or for none."""
    sources = node.get("sources")
    if (
        not isinstance(sources, Mapping)
        or not sources
        or not all(isinstance(source, Mapping) for source in sources.values())
    ):
        checker.problem((*path, "sources"), "expected sections by name, each with file_pattern (or split) and weight")
        return
    found = signature(OUR_DATA, checker.policy)
    known = {**(found.parameters if found else {})}
    for name, source in sources.items():
        where = (*path, "sources", name)
        for key, value in source.items():
            if key in ("seq_len", "shuffle_files", "data_dir"):
                checker.problem((*where, key), f"is the same for all sources: write it under {path[-1]}")
            elif key != "weight" and key not in known:
                checker.problem((*where, key), f"unknown key of a source; {did_you_mean(key, ['weight', *known])}")
            elif key != "weight" and not has_placeholder(value) and not fits(value, known[key].annotation):
                checker.problem((*where, key), f"expected {known[key].annotation}, found {value!r}")
        weight = source.get("weight")
        if weight is not None and (
            isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf")
        ):
            checker.problem((*where, "weight"), f"{weight!r}: expected a number above 0")
    if len({source.get("weight") is None for source in sources.values()}) > 1:
        checker.problem((*path, "sources"), "a weight for all of them, or for none: then each counts by its size")


def _check_split(path: KeyPath, node: Mapping[str, Any], recipe: Recipe, checker: Checker) -> None:
    """Shards that nobody names are those that the preprocess stage will make: it has these splits and no others."""
    split = node.get("split", "train")
    if recipe.preprocess is None:
        checker.problem(path, "no file_pattern, and no preprocess section that would make the shards")
    elif split not in ("train", "val"):
        checker.problem((*path, "split"), f"{split!r}: {did_you_mean(str(split), ('train', 'val'))}")
    elif split == "val" and not recipe.preprocess.val_tokens:
        checker.problem(
            (*path, "split"), "val: preprocess.val_tokens is 0, so there will be none; write val_tokens: 5M, say"
        )


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
    defaults = (
        {key: known.default for key, known in found.parameters.items() if isinstance(known.default, int)}
        if found
        else {}
    )
    sizes = _numbers(recipe.model, defaults)
    for name in (
        "n_layer",
        "n_head",
        "n_embd",
        "n_positions",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        if sizes.get(name, 1) < 1:
            checker.problem(("model", name), f"{sizes[name]}: expected a whole number of at least 1")
    if not 0 <= recipe.model.get("dropout", 0.0) < 1:
        checker.problem(("model", "dropout"), f"{recipe.model['dropout']}: expected a number from 0 to below 1")
    for width, heads in (
        ("n_embd", "n_head"),
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if sizes.get(heads, 0) > 0 and width in sizes and sizes[width] % sizes[heads]:
            checker.problem(("model", width), f"{sizes[width]} is not divisible by {heads} {sizes[heads]}")
    context = sizes.get("n_ctx") or sizes.get("n_positions") or sizes.get("max_position_embeddings")
    for path, node in data_sections(recipe).items():
        length = node.get("seq_len", 1024 if node["_target_"].startswith("amlaunch.trainer.data.") else None)
        if isinstance(length, int) and length < 1:
            checker.problem((*path, "seq_len"), f"{length}: expected a whole number of at least 1")
        row = recipe.packed_sequence.packed_sequence_size
        if context and isinstance(length, int) and min(length, row or length) > context:
            checker.problem((*path, "seq_len"), f"{length} is beyond the model's context of {context} positions")


def check_batch(recipe: Recipe, ranks: int) -> str | None:
    """What is wrong with the global batch on so many ranks; None where it divides."""
    steps, spread = recipe.step_scheduler, recipe.distributed
    if ranks % (spread.tp_size * spread.cp_size):
        return f"distributed.tp_size {spread.tp_size} x cp_size {spread.cp_size} does not divide {ranks} ranks"
    share = ranks // (spread.tp_size * spread.cp_size) * steps.local_batch_size
    if steps.global_batch_size % share == 0:
        return None
    lower = steps.global_batch_size // share * share
    near = f"{lower} or {lower + share}" if lower else str(share)
    return (
        f"step_scheduler.global_batch_size {steps.global_batch_size} does not divide over {_parts(recipe, ranks)} x local_batch_size "
        f"{steps.local_batch_size}; write {near}, or another local_batch_size"
    )


def _parts(recipe: Recipe, ranks: int) -> str:
    """The data-parallel ranks among ``ranks``, in words."""
    share = recipe.distributed.tp_size * recipe.distributed.cp_size
    return f"{ranks // share} {'data-parallel ' if share > 1 else ''}ranks"


def check_ranks(recipe: Recipe, ranks: int) -> str | None:
    """What is wrong with training on so many ranks; None where nothing is."""
    spread = recipe.distributed
    wrong = check_batch(recipe, ranks)
    if ranks % (spread.tp_size * spread.cp_size):
        return wrong
    parts = ranks // (spread.tp_size * spread.cp_size)
    if spread.dp_size not in (None, parts):
        return f"distributed.dp_size is {spread.dp_size}, but there are {_parts(recipe, ranks)}; write none to use what is there"
    if parts % (spread.dp_replicate_size or 1):
        return f"distributed.dp_replicate_size {spread.dp_replicate_size} does not divide {_parts(recipe, ranks)}"
    if spread.strategy == "none" and parts > 1:
        return (
            f"distributed.strategy none trains on one rank, but there are {_parts(recipe, ranks)}; write fsdp2 or ddp"
        )
    return wrong
