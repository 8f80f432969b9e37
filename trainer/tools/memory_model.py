"""Predict the memory that training needs on each GPU, in seconds and without a GPU.

The prediction takes the recipe's own step: its model, wrapped for its ranks,
its loss, backward pass and optimizer. But tensors have no contents (torch's
FakeTensorMode) and there are no other ranks (the process group ``fake``). Live
memory is counted storage by storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.consistency import check_ranks
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.schema import Recipe
from amlaunch.recipes.format.targets import TargetPolicy
from amlaunch.trainer.tools.compiled_memory import count_compiled
from amlaunch.trainer.tools.live_tensors import MemoryCounter, local_bytes
from amlaunch.trainer.torch_features import register_fake_collectives

if TYPE_CHECKING:
    from amlaunch.trainer.data.batches import Batch
    from amlaunch.trainer.optim.optimizers import Optimizers
    from amlaunch.trainer.parallel.world import World

CUDA_BYTES = 1.5e9
"""Estimated bytes for CUDA's context and libraries; NCCL's buffers take as much again. Not measured."""
FRAGMENTATION = 0.04
"""Estimated fraction of the memory in use that CUDA's allocator cannot hand out. Not measured."""
SIMULATED_MICRO_BATCHES = 2
"""More micro-batches than this need no more memory."""


@dataclass(frozen=True)
class MemoryNeed:
    """Predicted bytes of one rank, and the operations of a step."""

    ranks: int
    local_batch_size: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Everything that exists only within a step, at the peak."""
    peak: int
    flops: float
    """Operations of matrix products and attention in a step, over all ranks."""
    tokens: int
    """Tokens of a step, over all ranks."""
    on_host: int = 0
    """Bytes of the peak that ``cpu_offload`` keeps off the GPU: weights and optimizer state, but not gradients."""

    def total(self, cuda: bool = True) -> float:
        """Return the bytes on a GPU including CUDA, NCCL and the allocator, or those of a process on a CPU."""
        if not cuda:
            return self.peak
        overhead = CUDA_BYTES * (2 if self.ranks > 1 else 1)
        return (self.peak - self.on_host) * (1 + FRAGMENTATION) + overhead


def predict(loaded: LoadedRecipe, ranks: int, *, cuda: bool = True) -> MemoryNeed:
    """Simulate two steps of the recipe on one of ``ranks`` ranks, on fake tensors.

    ``cuda``: predict for GPUs, otherwise for CPUs, which compute in float32 by default. Raises BadInput.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    recipe = loaded.recipe
    problem = check_ranks(recipe, ranks)
    if problem:
        raise BadInput(f"{loaded.path}: {problem}")
    fake_tensors = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_process_group(ranks), fake_tensors, MemoryCounter().tracking_resizes() as counter:
        try:
            return _simulate(loaded, ranks, cuda, counter)
        finally:
            # without this, dynamo stops compiling after eight predictions
            if recipe.compile.enabled:
                torch._dynamo.reset()


@contextlib.contextmanager
def fake_process_group(ranks: int) -> Iterator[None]:
    """Provide a process group in which collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    register_fake_collectives()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _simulate(loaded: LoadedRecipe, ranks: int, cuda: bool, counter: MemoryCounter) -> MemoryNeed:
    from amlaunch.trainer.loop.training_loop import take_step
    from amlaunch.trainer.optim.optimizers import build_optimizers
    from amlaunch.trainer.parallel.world import World

    recipe, policy = _with_device_dtype(loaded.recipe, cuda), loaded.policy
    section, steps = recipe.distributed, recipe.step_scheduler
    world = World(0, ranks, torch.device("cpu"), timedelta(minutes=1), section.tp_size, section.cp_size)
    baseline = counter.live
    model, buckets = _build_model(recipe, policy, world, counter)
    optimizers = build_optimizers(recipe.optimizer, recipe.parameter_groups, policy, model)
    parameters = counter.live - baseline - (buckets.size if buckets else 0)

    length = _sample_length(recipe, policy)
    local_batch, rank_batch = steps.local_batch_size, steps.global_batch_size // world.dp_size
    micro_batches = min(SIMULATED_MICRO_BATCHES, rank_batch // local_batch)
    simulated_batch = local_batch * micro_batches
    small_steps = dataclasses.replace(steps, global_batch_size=simulated_batch * world.dp_size)
    small_recipe = dataclasses.replace(recipe, step_scheduler=small_steps)
    state = _simulated_state(small_recipe, loaded, world, model, optimizers, counter)

    # The first step creates the optimizer state and compiles, which must find no hooks. The second one counts.
    is_packed = recipe.packed_sequence.packed_sequence_size > 0
    for is_counted in (False, True):
        counter.peak, counter.flops = counter.live, 0
        if buckets and is_counted:
            buckets.register_hooks(micro_batches)
        take_step(state, _fake_batch(simulated_batch, length, is_packed))

    optimizer_bytes = _optimizer_bytes(optimizers)
    gradients = sum(local_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
    peak = counter.peak - baseline
    return MemoryNeed(
        ranks=ranks,
        local_batch_size=local_batch,
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer_bytes,
        activations=peak - parameters - gradients - optimizer_bytes,
        peak=peak,
        flops=float(counter.flops) * ranks * (rank_batch / simulated_batch),
        tokens=steps.global_batch_size * length,
        on_host=parameters + optimizer_bytes if section.cpu_offload else 0,
    )


def _with_device_dtype(recipe: Recipe, cuda: bool) -> Recipe:
    """Return the recipe with the default dtype of its device filled in."""
    if recipe.distributed.dtype is not None or not cuda:
        return recipe
    return dataclasses.replace(recipe, distributed=dataclasses.replace(recipe.distributed, dtype="bfloat16"))


def _sample_length(recipe: Recipe, policy: TargetPolicy) -> int:
    from amlaunch.trainer.data.datasets import sample_length
    from amlaunch.trainer.loop.job import build_dataset

    configured_length = recipe.packed_sequence.packed_sequence_size or recipe.dataset.get("seq_len")
    return int(configured_length or sample_length(build_dataset(recipe.dataset, recipe, policy, None)))


def _fake_batch(size: int, length: int, is_packed: bool) -> Batch:
    from amlaunch.trainer.data.batches import Batch

    tokens = torch.zeros(size, length, dtype=torch.int64)
    documents = (tokens.clone(), tokens.int()) if is_packed else ()
    return Batch(tokens, tokens.clone(), *documents)


def _optimizer_bytes(optimizers: Optimizers) -> int:
    return sum(
        local_bytes(value)
        for optimizer in optimizers.members
        for parameter_state in optimizer.state.values()
        for value in parameter_state.values()
        if isinstance(value, torch.Tensor)
    )


def _build_model(
    recipe: Recipe, policy: TargetPolicy, world: World, counter: MemoryCounter
) -> tuple[nn.Module, DdpBuckets | None]:
    """Build the model as the trainer has it on this rank."""
    from amlaunch.trainer.loop.job import apply_fast_paths, build_model
    from amlaunch.trainer.parallel.world import compute_dtype

    is_double = compute_dtype(recipe.distributed, world.device) is torch.float64
    with default_dtype(torch.float64 if is_double else torch.float32):
        model = build_model(recipe, policy)
    without_fp8 = dataclasses.replace(recipe, fp8=type(recipe.fp8)())
    with count_compiled(counter):
        apply_fast_paths(model, without_fp8, world)
    return parallelize_fake(model, recipe, world)


def _simulated_state(
    recipe: Recipe,
    loaded: LoadedRecipe,
    world: World,
    model: nn.Module,
    optimizers: Optimizers,
    counter: MemoryCounter,
) -> Any:
    """Return the state that ``take_step`` needs, without watch, profile and metrics."""
    from amlaunch.trainer.loop.job import build_loss
    from amlaunch.trainer.metrics.profiling import Profiler
    from amlaunch.trainer.optim.optimizers import LearningRateSchedule

    with count_compiled(counter):
        loss_fn = build_loss(recipe, loaded.policy)
    return SimpleNamespace(
        recipe=recipe,
        world=world,
        model=model,
        loss_fn=loss_fn,
        optimizers=optimizers,
        schedule=LearningRateSchedule(None, optimizers.peak_rate, 1),
        watch=SimpleNamespace(beat=lambda *_, **__: None),
        profiler=Profiler(None, loaded.path, 0, world.device),
        step=0,
        steps_this_start=0,
    )


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create floating-point tensors in ``dtype``, because fake tensors cannot change dtype in place."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def parallelize_fake(model: nn.Module, recipe: Recipe, world: World) -> tuple[nn.Module, DdpBuckets | None]:
    """Parallelize a fake model like the trainer; :class:`DdpBuckets` stands in for DDP's reducer, which is C++."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from amlaunch.trainer.parallel.world import is_sharded, parallelize

    section = recipe.distributed
    # replicas under tensor parallelism are FSDP2's, not DDP's
    uses_ddp = section.strategy == "ddp" and not is_sharded(section)
    if uses_ddp:
        section = dataclasses.replace(section, strategy="none")
    # the model already has its device and dtype
    model.to = lambda *_, **__: model  # type: ignore[method-assign]
    try:
        # a device mesh consists of real tensors
        with unset_fake_temporarily():
            parallel_model = parallelize(model, section, world, recipe.seed)
    finally:
        del model.to
    return parallel_model, DdpBuckets(parallel_model) if uses_ddp and world.size > 1 else None


class DdpBuckets:
    """DDP's permanent buffers for all gradients; after the last micro-batch, gradients are views of them."""

    def __init__(self, model: nn.Module):
        self._views = {
            parameter: torch.zeros_like(parameter) for parameter in model.parameters() if parameter.requires_grad
        }
        self.size = sum(local_bytes(view) for view in self._views.values())
        self._remaining: dict[Any, int] = {}

    def register_hooks(self, micro_batches: int) -> None:
        """Replace each gradient with its view after ``micro_batches`` micro-batches.

        Call this only for the counted step: blocks are traced in the one before, which must find no hooks.
        """
        for parameter in self._views:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
        self._remaining = dict.fromkeys(self._views, micro_batches)

    def _on_gradient(self, parameter: Any) -> None:
        self._remaining[parameter] -= 1
        if self._remaining[parameter] == 0:
            parameter.grad = self._views[parameter]
