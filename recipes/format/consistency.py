"""Check what must hold between the keys of a recipe, and between a recipe and its number of ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from amlaunch.recipes.format.placeholders import has_placeholder
from amlaunch.recipes.format.schema import (
    TOKENIZERS,
    Preprocess,
    Recipe,
    data_sections,
    file_sections,
    is_own_tokenizer,
)
from amlaunch.recipes.format.section_checks import DATASET, Checker, annotation_problem, matches_annotation
from amlaunch.recipes.format.targets import OWN_TARGETS, TargetPolicy, signature
from amlaunch.recipes.format.yaml_reader import KeyPath
from amlaunch.recipes.output import counted
from amlaunch.recipes.suggestions import did_you_mean

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MODEL_SIZES = (
    "n_layer",
    "n_head",
    "n_embd",
    "n_positions",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
)
OPTIMIZER_NOT_NEGATIVE = ("lr", "eps", "weight_decay", "momentum", "alpha", "lambd", "rho", "lr_decay")
"""Numbers of torch's optimizers that may not be negative."""
DIVISIBLE_SIZES = (
    ("n_embd", "n_head"),
    ("hidden_size", "num_attention_heads"),
    ("num_attention_heads", "num_key_value_heads"),
)
"""Pairs of model sizes of which the second must divide the first."""
SHARED_BY_TENSOR_PARALLELISM = ("n_head", "num_attention_heads", "num_key_value_heads")
"""Sizes that ``tp_size`` must divide; of our own models also ``vocab_size`` and ``intermediate_size``."""


def check_consistency(recipe: Recipe, checker: Checker) -> None:
    """Record every problem between keys in ``checker``."""
    _check_name(recipe, checker)
    _check_model(recipe, checker)
    _check_data(recipe, checker)
    _check_parallel(recipe, checker)
    _check_numbers(recipe, checker)
    steps = recipe.step_scheduler
    if steps.global_batch_size % steps.local_batch_size:
        checker.problem(
            ("step_scheduler", "global_batch_size"),
            f"{steps.global_batch_size} is not a multiple of local_batch_size {steps.local_batch_size}; "
            "change one of them",
        )


def _check_name(recipe: Recipe, checker: Checker) -> None:
    if not RUN_NAME.fullmatch(recipe.name):
        checker.problem(
            ("name",),
            f"{recipe.name!r} cannot name the run's folder; use letters, digits, '.', '_' and '-', starting with a "
            "letter or digit (at most 64 characters)",
        )


def _check_numbers(recipe: Recipe, checker: Checker) -> None:
    if recipe.seed >= 2**63:
        checker.problem(("seed",), f"{recipe.seed} exceeds 63 bits; use a smaller seed")
    _check_optimizer(recipe.optimizer, ("optimizer",), checker)
    _check_schedule(recipe, checker)
    if recipe.checkpoint.restore_from != "auto" and not recipe.checkpoint.enabled:
        checker.problem(
            ("checkpoint", "restore_from"),
            "needs checkpoint.enabled: true, because the run must record that it has restored the checkpoint",
        )
    if recipe.export and not recipe.checkpoint.enabled:
        checker.problem(("checkpoint", "enabled"), "false leaves nothing to export; also set export: null")


def _check_optimizer(section: Mapping[str, Any], path: KeyPath, checker: Checker) -> None:
    """Record settings outside of their range: the rate of any optimizer, the others of torch's."""
    is_torch = str(section.get("_target_")).startswith("torch.optim.")
    for key in OPTIMIZER_NOT_NEGATIVE if is_torch else ("lr",):
        _check_not_negative(section.get(key), (*path, key), checker)
    betas = section.get("betas") if is_torch else None
    for beta in betas if isinstance(betas, list) else []:
        if _is_number(beta) and not 0 <= beta < 1:
            checker.problem((*path, "betas"), f"expected numbers of at least 0 and below 1, got {beta}")
    if isinstance(section.get("others"), Mapping):
        _check_optimizer(section["others"], (*path, "others"), checker)


def _check_not_negative(value: Any, path: KeyPath, checker: Checker) -> None:
    """Record a number below 0, infinite or not a number; other types are checked elsewhere."""
    if _is_number(value) and not 0 <= value < math.inf:
        checker.problem(path, f"expected a number of at least 0, got {value}")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_schedule(recipe: Recipe, checker: Checker) -> None:
    """Record lengths that are set in steps and in tokens, a decay within the warmup, and rates above the peak."""
    schedule, peak = recipe.lr_scheduler, recipe.optimizer.get("lr")
    if schedule is None:
        return
    for phase in ("warmup", "decay", "wsd_decay"):
        steps, tokens = f"lr_{phase}_steps", f"lr_{phase}_tokens"
        if getattr(schedule, steps) and getattr(schedule, tokens) is not None:
            checker.problem(("lr_scheduler", tokens), f"{steps} is set too; remove one of them")
    if schedule.lr_decay_steps is not None and schedule.lr_decay_steps < schedule.lr_warmup_steps:
        checker.problem(
            ("lr_scheduler", "lr_decay_steps"),
            f"the decay ends at step {schedule.lr_decay_steps}, before the warmup ends at step "
            f"{schedule.lr_warmup_steps}; lengthen the decay or shorten the warmup",
        )
    warms_up = schedule.lr_warmup_steps or schedule.lr_warmup_tokens
    for key, is_used in (("min_lr", schedule.lr_decay_style != "constant"), ("init_lr", warms_up)):
        rate = getattr(schedule, key)
        if is_used and _is_number(peak) and 0 <= peak < rate:
            checker.problem(
                ("lr_scheduler", key),
                f"{rate} is above optimizer.lr {peak}, the highest rate; lower it or raise the other",
            )


def _check_parallel(recipe: Recipe, checker: Checker) -> None:
    """Record sizes that the ranks cannot divide, and settings that would have no effect."""
    section, tp_size = recipe.distributed, recipe.distributed.tp_size

    def problem(key: str, text: str) -> None:
        checker.problem(("distributed", key), text)

    if section.sequence_parallel and tp_size == 1:
        problem("sequence_parallel", "has no effect with tp_size 1; set false, or a larger tp_size")
    if section.strategy != "fsdp2" and (section.dp_replicate_size or 1) > 1:
        problem("dp_replicate_size", f"needs strategy fsdp2, not {section.strategy}; change one of them")
    if section.cpu_offload and section.strategy != "fsdp2":
        problem("cpu_offload", f"needs strategy fsdp2, not {section.strategy}; change one of them")
    if section.strategy == "none" and section.cp_size > 1:
        problem("cp_size", f"{section.cp_size} needs strategy fsdp2 or ddp: strategy none does not sum gradients")

    for key, value in _sizes_to_divide(recipe, checker.policy).items():
        if value % tp_size:
            advice = " (multiples of 128 are fastest)" if key == "vocab_size" else ""
            problem("tp_size", f"{tp_size} does not divide model.{key} {value}; change one of them{advice}")

    ranks_of_window = tp_size * section.cp_size
    for name, length in _window_lengths(recipe).items():
        if length % ranks_of_window:
            problem(
                "cp_size" if section.cp_size > 1 else "tp_size",
                f"{ranks_of_window} (tp_size x cp_size) does not divide {name} {length}; change one of them, because "
                "the ranks that share a window need equal parts of it",
            )


def _window_lengths(recipe: Recipe) -> dict[str, int]:
    """Return the length of a row or of each data set's windows, by key, as far as they are integers."""
    row = recipe.packed_sequence.packed_sequence_size
    if row:
        return {"packed_sequence_size": row}
    lengths = {f"{'.'.join(path)}.seq_len": node.get("seq_len") for path, node in data_sections(recipe).items()}
    return {name: length for name, length in lengths.items() if isinstance(length, int)}


def _sizes_to_divide(recipe: Recipe, policy: TargetPolicy) -> dict[str, int]:
    """Return the model's sizes that tensor parallelism divides, by key, as far as known without building it."""
    target = recipe.model["_target_"]
    is_ours = target in OWN_TARGETS
    if not is_ours and not target.startswith("transformers."):
        return {}
    sizes = _integers(recipe.model, _default_integers(target, policy) if is_ours else {})
    keys = (*SHARED_BY_TENSOR_PARALLELISM, *(("vocab_size", "intermediate_size") if is_ours else ()))
    return {key: sizes[key] for key in keys if key in sizes}


def _default_integers(target: str, policy: TargetPolicy) -> dict[str, int]:
    """Return the integer defaults of a target's keywords."""
    known = signature(target, policy)
    parameters = known.parameters if known else {}
    return {key: parameter.default for key, parameter in parameters.items() if isinstance(parameter.default, int)}


def _integers(node: Any, known: Mapping[str, int]) -> dict[str, int]:
    """Return ``known`` updated with all integers of a model section by key, nested configs included."""
    integers = dict(known)
    if isinstance(node, Mapping):
        for key, value in node.items():
            if isinstance(value, int) and not isinstance(value, bool):
                integers[key] = value
            integers = _integers(value, integers)
    return integers


def _check_model(recipe: Recipe, checker: Checker) -> None:
    sizes = _integers(recipe.model, _default_integers(recipe.model["_target_"], checker.policy))
    for name in MODEL_SIZES:
        if sizes.get(name, 1) < 1:
            checker.problem(("model", name), f"expected an integer of at least 1, got {sizes[name]}")
    dropout = recipe.model.get("dropout", 0.0)
    if _is_number(dropout) and not 0 <= dropout < 1:
        checker.problem(("model", "dropout"), f"expected a number of at least 0 and below 1, got {dropout}")
    for width, heads in DIVISIBLE_SIZES:
        if sizes.get(heads, 0) > 0 and width in sizes and sizes[width] % sizes[heads]:
            checker.problem(
                ("model", width), f"{sizes[width]} is not divisible by {heads} {sizes[heads]}; change one of them"
            )

    context = sizes.get("n_ctx") or sizes.get("n_positions") or sizes.get("max_position_embeddings")
    row = recipe.packed_sequence.packed_sequence_size
    for path, node in data_sections(recipe).items():
        length = node.get("seq_len", 1024 if _is_our_dataset(node) else None)
        if isinstance(length, int) and length < 1:
            checker.problem((*path, "seq_len"), f"expected an integer of at least 1, got {length}")
        if context and isinstance(length, int) and min(length, row or length) > context:
            checker.problem(
                (*path, "seq_len"), f"{length} exceeds the model's context of {context} positions; change one of them"
            )


def _is_our_dataset(node: Mapping[str, Any]) -> bool:
    return str(node.get("_target_", DATASET["_target_"])).startswith("amlaunch.trainer.data.")


def _check_data(recipe: Recipe, checker: Checker) -> None:
    if recipe.preprocess is not None:
        _check_preprocess(recipe.preprocess, checker)
        _check_vocabulary(recipe, recipe.preprocess.tokenizer, checker)
    for path, node in data_sections(recipe).items():
        if node["_target_"].endswith("MixedDataset"):
            _check_sources(path, node, checker)
    for path, node in file_sections(recipe).items():
        _check_not_negative(node.get("bos_token") if _is_our_dataset(node) else None, (*path, "bos_token"), checker)
        if _is_our_dataset(node) and not node.get("file_pattern"):
            _check_split(path, node, recipe, checker)


def _check_preprocess(section: Preprocess, checker: Checker) -> None:
    sources = (section.dataset, section.data_files, section.source)
    if sum(bool(source) for source in sources) != 1:
        checker.problem(
            ("preprocess",),
            "set exactly one of dataset (Hugging Face), data_files (local files) and source (your own iterator)",
        )
    if section.max_tokens is not None and section.val_tokens >= section.max_tokens:
        checker.problem(
            ("preprocess", "val_tokens"),
            f"{section.val_tokens:,} of max_tokens {section.max_tokens:,} leaves nothing to train on; lower val_tokens",
        )


def _check_vocabulary(recipe: Recipe, tokenizer: str, checker: Checker) -> None:
    """Record an unknown tokenizer, or one with more tokens than the model's vocabulary."""
    if is_own_tokenizer(tokenizer):
        # Its size is known only when it is read.
        return
    size = TOKENIZERS.get(tokenizer)
    if size is None:
        checker.problem(
            ("preprocess", "tokenizer"), f"unknown tokenizer {tokenizer!r}; {did_you_mean(tokenizer, TOKENIZERS)}"
        )
        return
    vocab_size = _integers(recipe.model, {}).get("vocab_size", size)
    if vocab_size < size:
        checker.problem(
            ("model", "vocab_size"),
            f"{vocab_size} is too small: the tokenizer {tokenizer} has {size} tokens; set at least {size} "
            "(multiples of 128 are fastest)",
        )


def _check_sources(path: KeyPath, node: Mapping[str, Any], checker: Checker) -> None:
    """Check the names of a mixture's sources, their keys, and that all of them or none have a weight."""
    sources = node.get("sources")
    if not isinstance(sources, Mapping) or not sources or not all(isinstance(s, Mapping) for s in sources.values()):
        checker.problem((*path, "sources"), "expected named sections, each with file_pattern (or split) and weight")
        return
    for name, source in sources.items():
        _check_source((*path, "sources", name), source, path[-1], checker)
    if len({source.get("weight") is None for source in sources.values()}) > 1:
        checker.problem(
            (*path, "sources"),
            "some sources have a weight and some do not; set all weights, or none to weight sources by their size",
        )


def _check_source(path: KeyPath, source: Mapping[str, Any], dataset: str, checker: Checker) -> None:
    known = signature(DATASET["_target_"], checker.policy)
    parameters = known.parameters if known else {}
    for key, value in source.items():
        if key == "weight":
            continue
        if key in ("seq_len", "shuffle_files", "data_dir"):
            checker.problem((*path, key), f"must be the same for all sources; set it in {dataset}")
        elif key not in parameters:
            checker.problem((*path, key), f"unknown key of a source; {did_you_mean(key, ['weight', *parameters])}")
        elif not has_placeholder(value) and not matches_annotation(value, parameters[key].annotation):
            checker.problem((*path, key), annotation_problem(parameters[key].annotation, value))
    weight = source.get("weight")
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 < weight < math.inf):
        checker.problem((*path, "weight"), f"expected a number above 0, got {weight!r}")


def _check_split(path: KeyPath, node: Mapping[str, Any], recipe: Recipe, checker: Checker) -> None:
    """Check a data set without ``file_pattern``: it reads the shards that the preprocess stage writes."""
    split = node.get("split", "train")
    if recipe.preprocess is None and checker.has_shards:
        return
    if recipe.preprocess is None:
        checker.problem(path, "no file_pattern, and no preprocess section to make the shards; add one of them")
    elif split not in ("train", "val"):
        checker.problem((*path, "split"), f"unknown split {split!r}; {did_you_mean(str(split), ('train', 'val'))}")
    elif split == "val" and not recipe.preprocess.val_tokens:
        checker.problem((*path, "split"), "val is empty, because preprocess.val_tokens is 0; set it, for example to 5M")


def check_batch(recipe: Recipe, ranks: int) -> str | None:
    """Return why the global batch cannot be divided among ``ranks`` ranks; None if it can."""
    steps, parallel = recipe.step_scheduler, recipe.distributed
    ranks_of_window = parallel.tp_size * parallel.cp_size
    if ranks % ranks_of_window:
        return (
            f"distributed.tp_size {parallel.tp_size} x cp_size {parallel.cp_size} does not divide the number of ranks "
            f"{ranks}; use a multiple of {ranks_of_window} ranks, or change tp_size or cp_size"
        )
    samples = ranks // ranks_of_window * steps.local_batch_size
    if steps.global_batch_size % samples == 0:
        return None
    lower = steps.global_batch_size // samples * samples
    nearest = f"{lower} or {lower + samples}" if lower else str(samples)
    return (
        f"step_scheduler.global_batch_size {steps.global_batch_size} is not a multiple of "
        f"{_data_parallel_ranks(recipe, ranks)} x local_batch_size {steps.local_batch_size}; "
        f"set {nearest}, or another local_batch_size"
    )


def _data_parallel_ranks(recipe: Recipe, ranks: int) -> str:
    """Return the number of data-parallel ranks among ``ranks``, in words."""
    ranks_of_window = recipe.distributed.tp_size * recipe.distributed.cp_size
    return counted(ranks // ranks_of_window, "data-parallel rank" if ranks_of_window > 1 else "rank")


def check_ranks(recipe: Recipe, ranks: int) -> str | None:
    """Return why the recipe cannot train on ``ranks`` ranks; None if it can."""
    parallel = recipe.distributed
    batch_problem = check_batch(recipe, ranks)
    ranks_of_window = parallel.tp_size * parallel.cp_size
    if ranks % ranks_of_window:
        return batch_problem
    data_parallel = ranks // ranks_of_window
    available = _data_parallel_ranks(recipe, ranks)
    if parallel.dp_size not in (None, data_parallel):
        return (
            f"distributed.dp_size is {parallel.dp_size}, but the run has {available}; set it to none to use all of them"
        )
    if data_parallel % (parallel.dp_replicate_size or 1):
        return f"distributed.dp_replicate_size {parallel.dp_replicate_size} does not divide {available}; set a divisor"
    if parallel.strategy == "none" and data_parallel > 1:
        return f"distributed.strategy none trains on one rank, but the run has {available}; set fsdp2 or ddp"
    return batch_problem
