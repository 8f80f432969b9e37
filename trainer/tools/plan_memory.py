"""``python -m amlaunch.trainer.tools.plan_memory RECIPE``: what a recipe needs of each GPU, whether it fits, and what would make it fit."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.format.loader import LoadedRecipe, load
from amlaunch.recipes.format.schema import Recipe
from amlaunch.recipes.python_process import die_with_parent
from amlaunch.recipes.shipped import find_recipe
from amlaunch.trainer.process.errors import exit_process, run_guarded
from amlaunch.trainer.tools.memory_model import Need, predict

DOES_NOT_FIT = 3
"""The exit code where the prediction is above the memory there is."""
GIB = 2.0**30

# --- advising -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A change of the recipe, and what it would need then."""

    override: str
    gib: float
    fits: bool


def ways(reload: Callable[[Sequence[str]], LoadedRecipe], need: Need, limit: float, cuda: bool) -> list[Way]:
    """Changes that need less, each on its own; the least intrusive first, until one fits."""
    recipe = reload([]).recipe
    found = []
    for override, ranks in changes(recipe, need):
        try:
            other = predict(reload([override] if override.startswith("--") else []), ranks, cuda=cuda)
        except BadInput:
            continue
        found.append(Way(override, other.total(cuda) / GIB, other.total(cuda) <= limit))
        if found[-1].fits:
            break
    return found


def changes(recipe: Recipe, need: Need) -> Iterator[tuple[str, int]]:
    """``(override, ranks)`` of what might help, the least intrusive first."""
    if recipe.loss_fn["_target_"] == "amlaunch.trainer.loss.MaskedCrossEntropy":
        yield "--loss_fn._target_=amlaunch.trainer.loss.LinearCrossEntropy", need.ranks
    size = recipe.step_scheduler.local_batch_size
    while size > 1:
        size = next(
            divisor for divisor in range(size // 2, 0, -1) if recipe.step_scheduler.local_batch_size % divisor == 0
        )
        yield f"--step_scheduler.local_batch_size={size}", need.ranks
    if recipe.distributed.strategy == "fsdp2" and not recipe.distributed.reshard_after_forward and need.ranks > 1:
        yield "--distributed.reshard_after_forward=true", need.ranks
    if recipe.distributed.activation_checkpointing == "none":
        yield "--distributed.activation_checkpointing=selective", need.ranks
    if recipe.distributed.activation_checkpointing != "full":
        yield "--distributed.activation_checkpointing=full", need.ranks
    if recipe.distributed.strategy != "fsdp2" and need.ranks > 1:
        yield "--distributed.strategy=fsdp2", need.ranks
    if recipe.distributed.strategy == "fsdp2" and not recipe.distributed.cpu_offload:
        yield "--distributed.cpu_offload=true", need.ranks
    if recipe.distributed.strategy == "fsdp2":
        for factor in (2, 4, 8, 16):
            yield f"{need.ranks * factor} GPUs", need.ranks * factor


def largest_micro_batch(
    reload: Callable[[Sequence[str]], LoadedRecipe], need: Need, limit: float, cuda: bool
) -> int | None:
    """The most windows at once that fit, of those that divide a rank's share: memory grows by the same for each window."""
    recipe = reload([]).recipe
    share = recipe.step_scheduler.global_batch_size // _dp_size(recipe, need.ranks)
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    other = max((size for size in divisors if size < need.local_batch_size), default=None)
    if other is None:
        other = next((size for size in divisors if size > need.local_batch_size), None)
    if other is None:
        return need.local_batch_size if need.total(cuda) <= limit else None
    second = predict(reload([f"--step_scheduler.local_batch_size={other}"]), need.ranks, cuda=cuda)
    each = (need.total(cuda) - second.total(cuda)) / (need.local_batch_size - other)
    return max(
        (size for size in divisors if need.total(cuda) + each * (size - need.local_batch_size) <= limit), default=None
    )


def _dp_size(recipe: Recipe, ranks: int) -> int:
    return ranks // (recipe.distributed.tp_size * recipe.distributed.cp_size)


# --- the command ----------------------------------------------------------------------------------


def parse_bytes(text: str) -> float:
    """``80GB`` (decimal) or ``80GiB`` as bytes. Raises argparse's error for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.I)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: a size such as 80GB or 79GiB was expected")
    return float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")


def main(arguments: Sequence[str]) -> int:
    """Predict, print, and return the exit code: 0 it fits, 3 it does not."""
    die_with_parent()
    parser = argparse.ArgumentParser(
        prog="amlaunch plan-memory", description="Predict a recipe's memory.", allow_abbrev=False
    )
    parser.add_argument("recipe")
    parser.add_argument("--gpus", type=int, help="ranks in all (default: as the recipe says)")
    parser.add_argument("--gpu-memory", type=parse_bytes, default=80e9, help="of each GPU (80GB)")
    parser.add_argument(
        "--on-cpu", action="store_true", help="as on CPUs: no CUDA, float32 where the recipe does not say"
    )
    parser.add_argument("--allow-target", action="append", default=[], metavar="NAME")
    parser.add_argument("--json", action="store_true")
    given, overrides = parser.parse_known_args(arguments)
    return run_guarded(lambda: run(given, overrides))


def run(given: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Predict as ``given``, and print."""
    path = find_recipe(given.recipe)

    def reload(more: Sequence[str]) -> LoadedRecipe:
        return load(path, [*overrides, *more], allow=given.allow_target, job_start=True)

    loaded = reload([])
    ranks = given.gpus or ranks_of(loaded.recipe)
    cuda = not given.on_cpu
    told = sys.stderr
    print(f"{loaded.recipe.name}: taking a step on rank 0 of {ranks}, without contents …", file=told, flush=True)
    need = predict(loaded, ranks, cuda=cuda)
    fits = need.total(cuda) <= given.gpu_memory
    print("looking for the largest micro-batch …", file=told, flush=True)
    largest = largest_micro_batch(reload, need, given.gpu_memory, cuda)
    found = []
    if not fits:
        print("looking for what would make it fit …", file=told, flush=True)
        found = ways(reload, need, given.gpu_memory, cuda)
    report = {
        "recipe": loaded.recipe.name,
        **asdict(need),
        "total": need.total(cuda),
        "gpu_memory": given.gpu_memory,
        "fits": fits,
        "largest_local_batch_size": largest,
        "ways": [asdict(way) for way in found],
    }
    print(json.dumps(report, indent=2) if given.json else text_of(report, cuda), flush=True)
    return OK if fits else DOES_NOT_FIT


def ranks_of(recipe: Recipe) -> int:
    """Ranks of the train stage where nothing else is said."""
    train = recipe.resources.train
    return (train.nodes or 1) * (train.tasks_per_node or train.gpus_per_node or 1)


def text_of(report: dict[str, Any], cuda: bool) -> str:
    """The prediction, for people."""
    lines = [
        f"{report['recipe']} on {report['ranks']} GPU{'s' * (report['ranks'] > 1)}, {report['local_batch_size']} windows at once; GiB on each GPU"
    ]
    names = ("parameters", "gradients", "optimizer", "activations")
    lines += [
        f"  {name + (' and all else in a step' if name == 'activations' else ''):<36}{report[name] / GIB:>8.2f}"
        for name in names
    ]
    lines.append(f"  {'peak':<36}{report['peak'] / GIB:>8.2f}")
    if report["on_host"] and cuda:
        lines.append(f"  {'of which in the memory of the host':<36}{report['on_host'] / GIB:>8.2f}")
    if cuda:
        lines.append(
            f"  {'with CUDA, NCCL and the allocator':<36}{report['total'] / GIB:>8.2f}   (round figures are assumed for these)"
        )
    lines.append(f"  {'there is':<36}{report['gpu_memory'] / GIB:>8.2f}")
    lines.append(
        f"a step of {report['tokens']:,} tokens: {report['flops'] / 1e12:,.1f} TFLOP in matrix products and attention, over all GPUs"
    )
    largest = report["largest_local_batch_size"]
    lines.append(
        f"largest step_scheduler.local_batch_size that fits: {largest}"
        if largest
        else "no step_scheduler.local_batch_size fits"
    )
    if report["fits"]:
        return "\n".join([*lines, "it fits"])
    lines.append("it does not fit")
    lines += [
        f"  {way['override']}: {way['gib']:.2f} GiB, which {'fits' if way['fits'] else 'is still too much'}"
        for way in report["ways"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("AMLAUNCH_DEVICE", "cpu")
    exit_process(main(sys.argv[1:]))
