"""Predict a recipe's memory on each GPU, and suggest changes if it does not fit.

``python -m amlaunch.trainer.tools.plan_memory RECIPE``
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.format.loader import LoadedRecipe, load
from amlaunch.recipes.format.schema import Recipe
from amlaunch.recipes.python_process import die_with_parent
from amlaunch.recipes.shipped import find_recipe
from amlaunch.trainer.process.errors import exit_process, print_error, run_guarded
from amlaunch.trainer.tools.memory_model import MemoryNeed, predict
from amlaunch.trainer.torch_features import simulates_compilation

DOES_NOT_FIT = 3
"""Exit code if the prediction exceeds the available memory."""
GIB = 2.0**30

Reload = Callable[[Sequence[str]], LoadedRecipe]
"""Loads the recipe with more overrides."""


# --- advising -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alternative:
    """A change of the recipe, and the memory that it would need."""

    override: str
    gib: float
    fits: bool


def find_alternatives(reload: Reload, need: MemoryNeed, limit: float, cuda: bool) -> list[Alternative]:
    """Try single changes that need less memory, the least intrusive first, until one fits in ``limit`` bytes."""
    alternatives = []
    for override, ranks in candidate_changes(reload([]).recipe, need):
        overrides = [override] if override.startswith("--") else []
        try:
            total = predict(reload(overrides), ranks, cuda=cuda).total(cuda)
        except BadInput:
            continue
        alternatives.append(Alternative(override, total / GIB, total <= limit))
        if total <= limit:
            break
    return alternatives


def candidate_changes(recipe: Recipe, need: MemoryNeed) -> Iterator[tuple[str, int]]:
    """Yield ``(override, ranks)`` of changes that may help, the least intrusive first."""
    distributed, ranks = recipe.distributed, need.ranks
    is_fsdp = distributed.strategy == "fsdp2"
    if recipe.loss_fn["_target_"] == "amlaunch.trainer.loss.MaskedCrossEntropy":
        yield "--loss_fn._target_=amlaunch.trainer.loss.LinearCrossEntropy", ranks
    for size in smaller_micro_batches(recipe.step_scheduler.local_batch_size):
        yield f"--step_scheduler.local_batch_size={size}", ranks
    if is_fsdp and not distributed.reshard_after_forward and ranks > 1:
        yield "--distributed.reshard_after_forward=true", ranks
    if distributed.activation_checkpointing == "none":
        yield "--distributed.activation_checkpointing=selective", ranks
    if distributed.activation_checkpointing != "full":
        yield "--distributed.activation_checkpointing=full", ranks
    if not is_fsdp and ranks > 1:
        yield "--distributed.strategy=fsdp2", ranks
    if is_fsdp and not distributed.cpu_offload:
        yield "--distributed.cpu_offload=true", ranks
    if is_fsdp:
        for factor in (2, 4, 8, 16):
            yield f"{ranks * factor} GPUs", ranks * factor


def smaller_micro_batches(local_batch_size: int) -> Iterator[int]:
    """Yield divisors of ``local_batch_size``, each at most half of the previous one."""
    size = local_batch_size
    while size > 1:
        size = next(divisor for divisor in range(size // 2, 0, -1) if local_batch_size % divisor == 0)
        yield size


def samples_per_rank(recipe: Recipe, ranks: int) -> int:
    """Return a rank's share of a step, which is the largest possible micro-batch."""
    dp_size = ranks // (recipe.distributed.tp_size * recipe.distributed.cp_size)
    return recipe.step_scheduler.global_batch_size // dp_size


def largest_micro_batch(reload: Reload, need: MemoryNeed, limit: float, cuda: bool) -> int | None:
    """Return the largest micro-batch that fits in ``limit`` bytes and divides a rank's share of a step; None if none.

    Memory grows linearly with the micro-batch, so a second prediction is enough.
    """
    rank_batch = samples_per_rank(reload([]).recipe, need.ranks)
    divisors = [size for size in range(1, rank_batch + 1) if rank_batch % size == 0]
    smaller = [size for size in divisors if size < need.local_batch_size]
    larger = [size for size in divisors if size > need.local_batch_size]
    total = need.total(cuda)
    if not smaller and not larger:
        return need.local_batch_size if total <= limit else None

    other_size = smaller[-1] if smaller else larger[0]
    other = predict(reload([f"--step_scheduler.local_batch_size={other_size}"]), need.ranks, cuda=cuda)
    bytes_per_sample = (total - other.total(cuda)) / (need.local_batch_size - other_size)
    fitting = [size for size in divisors if total + bytes_per_sample * (size - need.local_batch_size) <= limit]
    return max(fitting, default=None)


# --- the command ----------------------------------------------------------------------------------


def parse_bytes(text: str) -> float:
    """Parse a size such as ``80GB`` (decimal) or ``80GiB``. Raises BadInput for anything else, also without a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", text.strip(), re.I)
    if not match:
        raise BadInput(f"--gpu-memory {text}: expected a size with its unit, such as 80GB or 79GiB")
    number, prefix, binary = match.groups()
    return float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper())


def main(arguments: Sequence[str]) -> int:
    """Predict, print, and return the exit code: 0 if the recipe fits, 3 if not."""
    die_with_parent()
    parser = argparse.ArgumentParser(
        prog="amlaunch plan-memory", description="Predict a recipe's memory on each GPU.", allow_abbrev=False
    )
    parser.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("--gpus", type=int, help="number of ranks (default: the recipe's)")
    parser.add_argument("--gpu-memory", default="80GB", metavar="SIZE", help="memory of each GPU (80GB)")
    parser.add_argument("--on-cpu", action="store_true", help="predict for CPUs: no CUDA, float32 by default")
    parser.add_argument(
        "--allow-target", action="append", default=[], metavar="NAME", help="allow a _target_ to load NAME"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options, overrides = parser.parse_known_args(arguments)
    return run_guarded(lambda: run(options, overrides))


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Predict and print."""
    if options.gpus is not None and options.gpus < 1:
        raise BadInput(f"--gpus {options.gpus}: expected at least 1; without --gpus, the recipe's number applies")
    limit = parse_bytes(options.gpu_memory)
    path = find_recipe(options.recipe)

    def reload(more_overrides: Sequence[str]) -> LoadedRecipe:
        return load(path, [*overrides, *more_overrides], allow=options.allow_target, job_start=True)

    loaded = reload([])
    ranks = options.gpus or default_ranks(loaded.recipe)
    cuda = not options.on_cpu

    print_error(f"{loaded.recipe.name}: simulating a step on rank 0 of {ranks} (no memory is allocated) …")
    need = predict(loaded, ranks, cuda=cuda)
    fits = need.total(cuda) <= limit
    print_error("searching for the largest micro-batch that fits …")
    largest = largest_micro_batch(reload, need, limit, cuda)
    alternatives = []
    if not fits:
        print_error("searching for changes that make it fit …")
        alternatives = find_alternatives(reload, need, limit, cuda)

    report = {
        "recipe": loaded.recipe.name,
        **asdict(need),
        "total": need.total(cuda),
        "gpu_memory": limit,
        "fits": fits,
        "largest_local_batch_size": largest,
        "samples_per_rank": samples_per_rank(loaded.recipe, ranks),
        "ignores_compilation": loaded.recipe.compile.enabled and not simulates_compilation(),
        "ways": [asdict(alternative) for alternative in alternatives],
    }
    print(json.dumps(report, indent=2) if options.json else format_report(report, cuda), flush=True)
    return OK if fits else DOES_NOT_FIT


def default_ranks(recipe: Recipe) -> int:
    """Return the number of ranks of the recipe's train stage."""
    train = recipe.resources.train
    return (train.nodes or 1) * (train.tasks_per_node or train.gpus_per_node or 1)


def format_report(report: dict[str, Any], cuda: bool) -> str:
    """Format the prediction for the console."""
    device = "GPU" if cuda else "CPU rank"
    plural = "s" * (report["ranks"] > 1)
    rows = [
        ("parameters", report["parameters"]),
        ("gradients", report["gradients"]),
        ("optimizer state", report["optimizer"]),
        ("activations and temporary buffers", report["activations"]),
        ("peak", report["peak"]),
    ]
    if report["on_host"] and cuda:
        rows.append(("of which in host memory", report["on_host"]))
    if cuda:
        rows.append(("total with CUDA, NCCL and allocator", report["total"]))
    rows.append(("available", report["gpu_memory"]))

    largest = report["largest_local_batch_size"]
    lines = [
        f"{report['recipe']} on {report['ranks']} {device}{plural}, micro-batches of {report['local_batch_size']}; "
        f"GiB on each {device}",
        *(f"  {name:<36}{size / GIB:>8.2f}" for name, size in rows),
    ]
    if report["ignores_compilation"]:
        lines.append(
            f"predicted without compile.enabled, which this torch ({torch.__version__}) cannot simulate; compiled, the "
            "training needs up to a fifth less"
        )
    if cuda:
        lines.append("CUDA, NCCL and the allocator are estimated")
    lines.append(
        f"a step of {report['tokens']:,} tokens takes {report['flops'] / 1e12:,.1f} TFLOP "
        f"in matrix products and attention, over all {device}s"
    )
    if largest:
        is_whole_step = largest == report["samples_per_rank"]
        limit = " (limited by step_scheduler.global_batch_size, not by memory)" if is_whole_step else ""
        lines.append(f"largest step_scheduler.local_batch_size that fits: {largest}{limit}")
    else:
        lines.append("no step_scheduler.local_batch_size fits")
    if report["fits"]:
        return "\n".join([*lines, "it fits"])
    lines.append("it does not fit")
    if report["ways"]:
        lines.append("changes tried, one at a time:")
    for alternative in report["ways"]:
        verdict = "fits" if alternative["fits"] else "does not fit"
        lines.append(f"  {alternative['override']}: {alternative['gib']:.2f} GiB, {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("AMLAUNCH_DEVICE", "cpu")
    exit_process(main(sys.argv[1:]))
