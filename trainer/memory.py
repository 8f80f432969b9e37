"""``python -m trainer.memory RECIPE``: what training needs of each GPU's memory, without a GPU and in seconds.

The recipe's own step is taken: its model, wrapped for its ranks, its loss,
backward pass and optimizer. But the tensors have no contents (torch's
FakeTensorMode) and the ranks are not there (the process group ``fake``). What
lives at each moment is counted, storage by storage.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from recipes.errors import OK, BadInput
from recipes.loader import Loaded, check_ranks, load
from recipes.process import die_with_parent
from recipes.schema import Recipe
from recipes.shipped import find_recipe
from trainer.errors import guarded, leave
from trainer.loss import LinearCrossEntropy

DOES_NOT_FIT = 3
"""The exit code where the prediction is above the memory there is."""
SET_ASIDE = 1.5e9
"""Bytes for CUDA's context and libraries: a round figure, not a measurement; NCCL's buffers are as much again."""
LOOSE = 0.04
"""Of what is in use, the part that CUDA's allocator cannot give out: a round figure, not a measurement."""
MICRO_STEPS = 2
"""More micro-batches than that need no more memory."""
GIB = 2.0**30


def flops_of(func: Any, args: Sequence[Any], found: Any) -> int:
    """Of one call, by torch's own formulas; attention, of whose kernels those know the GPU's only, as if it were not causal."""
    name = func._overloadpacket
    if name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    return int(flop_registry[name](*args, out_val=found)) if name in flop_registry else 0


# --- counting -------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that were made under it and still live, and floating-point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.flops = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        here = [arg.to_local() if hasattr(arg, "to_local") else arg for arg in args]
        self.flops += flops_of(func, here, found)
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return found

    def _note(self, tensor: torch.Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):  # a DTensor is what it is made of
            for name in tensor.__tensor_flatten__()[0]:
                inner = getattr(tensor, name)
                if isinstance(inner, torch.Tensor):
                    self._note(inner)
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            self._set(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self._gone, storage._cdata)

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    @contextlib.contextmanager
    def watching_sizes(self) -> Iterator[Live]:
        """Count under this mode; FSDP2 frees what it gathered by giving its storage the size 0, which no operator sees."""
        plain: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            found = plain(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, size)
            return found

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]


# --- predicting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """What one rank needs, in bytes, and what it computes."""

    ranks: int
    local_batch_size: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """And all else that is there only within a step, at the peak."""
    peak: int
    flops: float
    """Of a step, matrix products and attention, over all ranks."""
    tokens: int
    """Of a step, over all ranks."""

    def total(self, cuda: bool = True) -> float:
        """With what CUDA, NCCL and the allocator keep for themselves."""
        return self.peak * (1 + LOOSE) + SET_ASIDE * (2 if self.ranks > 1 else 1) if cuda else self.peak


def predict(loaded: Loaded, ranks: int, *, cuda: bool = True) -> Need:
    """Take two steps of the recipe on one of ``ranks`` ranks, of tensors without contents.

    ``cuda``: as on GPUs, else as on CPUs, which compute in float32 where the recipe does not say. Raises BadInput.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    recipe = loaded.recipe
    wrong = check_ranks(recipe, ranks)
    if wrong:
        raise BadInput(f"{loaded.path}: {wrong}")
    with fake_ranks(ranks), FakeTensorMode(allow_non_fake_inputs=True), Live().watching_sizes() as live:
        return _stepped(loaded, ranks, cuda, live)


@contextlib.contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """A process group in which collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _stepped(loaded: Loaded, ranks: int, cuda: bool, live: Live) -> Need:
    from trainer import job as jobs
    from trainer.batches import Batch
    from trainer.data import sample_length
    from trainer.loop import take_step
    from trainer.optim import Schedule, build_optimizers
    from trainer.parallel import World, compute_dtype
    from trainer.profiling import Profiler

    recipe, policy = loaded.recipe, loaded.policy
    section = recipe.distributed
    if section.dtype is None and cuda:
        section = dataclasses.replace(section, dtype="bfloat16")
    recipe = dataclasses.replace(recipe, distributed=section)
    cpu = torch.device("cpu")
    world = World(0, ranks, cpu, timedelta(minutes=1), section.tp_size, section.cp_size)
    before = live.now
    with default_type(torch.float64 if compute_dtype(section, cpu) is torch.float64 else torch.float32):
        bare = jobs.build_model(recipe, policy)
    jobs.fit_for_training(bare, dataclasses.replace(recipe, compile=dataclasses.replace(recipe.compile, enabled=False), fp8=type(recipe.fp8)()), world)
    if recipe.compile.enabled and section.tp_size == 1:
        as_compiled(bare)
    model, buckets = spread_out(bare, recipe, world)
    optimizers = build_optimizers(recipe.optimizer, recipe.parameter_groups, policy, model)
    parameters = live.now - before - (buckets.size if buckets else 0)
    length = recipe.dataset.get("seq_len") or sample_length(jobs.build_dataset(recipe.dataset, recipe, policy, None))
    local, mine = recipe.step_scheduler.local_batch_size, recipe.step_scheduler.global_batch_size // world.dp_size
    micro_steps = min(MICRO_STEPS, mine // local)
    loss_fn = jobs.build_loss(dataclasses.replace(recipe, compile=type(recipe.compile)()), policy)
    if recipe.compile.enabled and isinstance(loss_fn, LinearCrossEntropy):
        loss_fn._of_chunk = lambda logits, labels, vocab, ignored, wanted: (logits.new_zeros((), dtype=torch.float32), torch.empty_like(logits))
    small = dataclasses.replace(recipe, step_scheduler=dataclasses.replace(recipe.step_scheduler, global_batch_size=local * micro_steps * world.dp_size))
    job: Any = SimpleNamespace(
        recipe=small,
        world=world,
        model=model,
        loss_fn=loss_fn,
        optimizers=optimizers,
        schedule=Schedule(None, optimizers.rate, 1),
        watch=SimpleNamespace(beat=lambda *_, **__: None, at=lambda *_, **__: None),
        profiler=Profiler(None, loaded.path, 0, cpu),
        step=0,
        taken=0,
    )
    for counts in (False, True):  # the first step makes the optimizer's state, and traces the blocks, which wants no hooks
        tokens = torch.zeros(local * micro_steps, int(length), dtype=torch.int64)
        live.peak, live.flops = live.now, 0
        if buckets and counts:
            buckets.begin(micro_steps)
        take_step(job, Batch(tokens, tokens.clone()))
    state = sum(_bytes(value) for part in optimizers.parts for held in part.state.values() for value in held.values() if isinstance(value, torch.Tensor))
    gradients = sum(_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return Need(
        ranks=ranks,
        local_batch_size=local,
        parameters=parameters,
        gradients=gradients,
        optimizer=state,
        activations=live.peak - before - parameters - gradients - state,
        peak=live.peak - before,
        flops=float(live.flops) * ranks * (mine / (local * micro_steps)),
        tokens=recipe.step_scheduler.global_batch_size * int(length),
    )


@contextlib.contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """Models are built in ``dtype``: turning a tensor without contents into another type in place is not possible."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def spread_out(bare: nn.Module, recipe: Recipe, world: Any) -> tuple[nn.Module, Buckets | None]:
    """The model as :func:`trainer.parallel.spread` has it; DDP, whose reducer is not Python, by :class:`Buckets`."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from trainer.parallel import spread

    section = recipe.distributed
    ddp = section.strategy == "ddp"
    bare.to = lambda *_, **__: bare  # type: ignore[method-assign] # it is where it should be, in its type
    try:
        with unset_fake_temporarily():  # a mesh of ranks is made of real tensors
            model = spread(bare, dataclasses.replace(section, strategy="none") if ddp else section, world, recipe.seed)
    finally:
        del bare.to
    return model, Buckets(model) if ddp else None


class Buckets:
    """DDP's memory: buffers as large as all gradients, there for good; after the last micro-batch gradients are views of them."""

    def __init__(self, model: nn.Module):
        self._views = {parameter: torch.zeros_like(parameter) for parameter in model.parameters() if parameter.requires_grad}
        self.size = sum(_bytes(view) for view in self._views.values())
        self._left: dict[Any, int] = {}

    def begin(self, micro_steps: int) -> None:
        """The step that counts begins: the one before, in which blocks are traced, must find no hooks."""
        for parameter in self._views:
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self._left = dict.fromkeys(self._views, micro_steps)

    def _arrived(self, parameter: Any) -> None:
        self._left[parameter] -= 1
        if self._left[parameter] == 0:
            parameter.grad = self._views[parameter]


def as_compiled(model: nn.Module) -> None:
    """Have each block keep for the backward pass what it keeps where it is compiled: torch's own partitioner decides.

    Kernels are not fused here, so what lives only within a block is overestimated.
    """
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch.nn.utils.stateless import _reparametrize_module

    from trainer.models import blocks

    def traced(template: nn.Module) -> Any:
        plain = type(template).forward

        def forward(tensors: dict[str, torch.Tensor], *args: Any) -> Any:
            with _reparametrize_module(template, tensors):
                return plain(template, *args)

        unfused: Any = boxed_nop
        return aot_function(forward, unfused, unfused, min_cut_rematerialization_partition, select_decomp_table())

    def compiled(block: nn.Module, function: Any, *args: Any) -> Any:
        return function({**dict(block.named_parameters()), **dict(block.named_buffers())}, *args)

    made: dict[type, Any] = {}  # one graph for blocks that are alike
    for block in blocks(model):
        if type(block) not in made:
            made[type(block)] = traced(block)
        block.forward = partial(compiled, block, made[type(block)])


def _bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


# --- advising -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A change of the recipe, and what it would need then."""

    override: str
    gib: float
    fits: bool


def ways(reload: Callable[[Sequence[str]], Loaded], need: Need, limit: float, cuda: bool) -> list[Way]:
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
    if recipe.loss_fn["_target_"] == "trainer.loss.MaskedCrossEntropy":
        yield "--loss_fn._target_=trainer.loss.LinearCrossEntropy", need.ranks
    size = recipe.step_scheduler.local_batch_size
    while size > 1:
        size = next(divisor for divisor in range(size // 2, 0, -1) if recipe.step_scheduler.local_batch_size % divisor == 0)
        yield f"--step_scheduler.local_batch_size={size}", need.ranks
    if recipe.distributed.strategy == "fsdp2" and not recipe.distributed.reshard_after_forward and need.ranks > 1:
        yield "--distributed.reshard_after_forward=true", need.ranks
    if recipe.distributed.activation_checkpointing == "none":
        yield "--distributed.activation_checkpointing=selective", need.ranks
    if recipe.distributed.activation_checkpointing != "full":
        yield "--distributed.activation_checkpointing=full", need.ranks
    if recipe.distributed.strategy != "fsdp2" and need.ranks > 1:
        yield "--distributed.strategy=fsdp2", need.ranks
    if recipe.distributed.strategy == "fsdp2":
        for factor in (2, 4, 8, 16):
            yield f"{need.ranks * factor} GPUs", need.ranks * factor


def largest_micro_batch(reload: Callable[[Sequence[str]], Loaded], need: Need, limit: float, cuda: bool) -> int | None:
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
    return max((size for size in divisors if need.total(cuda) + each * (size - need.local_batch_size) <= limit), default=None)


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
    parser = argparse.ArgumentParser(prog="amlaunch plan-memory", description="Predict a recipe's memory.", allow_abbrev=False)
    parser.add_argument("recipe")
    parser.add_argument("--gpus", type=int, help="ranks in all (default: as the recipe says)")
    parser.add_argument("--gpu-memory", type=parse_bytes, default=80e9, help="of each GPU (80GB)")
    parser.add_argument("--on-cpu", action="store_true", help="as on CPUs: no CUDA, float32 where the recipe does not say")
    parser.add_argument("--allow-target", action="append", default=[], metavar="NAME")
    parser.add_argument("--json", action="store_true")
    given, overrides = parser.parse_known_args(arguments)
    return guarded(lambda: run(given, overrides))


def run(given: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Predict as ``given``, and print."""
    path = find_recipe(given.recipe)

    def reload(more: Sequence[str]) -> Loaded:
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
    lines = [f"{report['recipe']} on {report['ranks']} GPUs, {report['local_batch_size']} windows at once; GiB on each GPU"]
    names = ("parameters", "gradients", "optimizer", "activations")
    lines += [f"  {name + (' and all else in a step' if name == 'activations' else ''):<36}{report[name] / GIB:>8.2f}" for name in names]
    lines.append(f"  {'peak':<36}{report['peak'] / GIB:>8.2f}")
    if cuda:
        lines.append(f"  {'with CUDA, NCCL and the allocator':<36}{report['total'] / GIB:>8.2f}   (round figures are assumed for these)")
    lines.append(f"  {'there is':<36}{report['gpu_memory'] / GIB:>8.2f}")
    lines.append(f"a step of {report['tokens']:,} tokens: {report['flops'] / 1e12:,.1f} TFLOP in matrix products and attention, over all GPUs")
    largest = report["largest_local_batch_size"]
    lines.append(f"largest step_scheduler.local_batch_size that fits: {largest}" if largest else "no step_scheduler.local_batch_size fits")
    if report["fits"]:
        return "\n".join([*lines, "it fits"])
    lines.append("it does not fit")
    lines += [f"  {way['override']}: {way['gib']:.2f} GiB, which {'fits' if way['fits'] else 'is still too much'}" for way in report["ways"]]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("AMLAUNCH_DEVICE", "cpu")
    leave(main(sys.argv[1:]))
