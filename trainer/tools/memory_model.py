"""What training needs of each GPU's memory, predicted without a GPU and in seconds.

The recipe's own step is taken: its model, wrapped for its ranks, its loss,
backward pass and optimizer. But the tensors have no contents (torch's
FakeTensorMode) and the ranks are not there (the process group ``fake``). What
lives at each moment is counted, storage by storage.
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
from amlaunch.recipes.format.loader import LoadedRecipe, check_ranks
from amlaunch.recipes.format.schema import Recipe
from amlaunch.recipes.format.targets import TargetPolicy
from amlaunch.trainer.tools.compiled_memory import compiling
from amlaunch.trainer.tools.live_tensors import Live, size_of

if TYPE_CHECKING:
    from amlaunch.trainer.optim.optimizers import Optimizers
    from amlaunch.trainer.parallel.world import World

SET_ASIDE = 1.5e9
"""Bytes for CUDA's context and libraries: a round figure, not a measurement; NCCL's buffers are as much again."""
LOOSE = 0.04
"""Of what is in use, the part that CUDA's allocator cannot give out: a round figure, not a measurement."""
MICRO_STEPS = 2
"""More micro-batches than that need no more memory."""


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
    on_host: int = 0
    """Of the peak, what ``cpu_offload`` keeps off the GPU: weights and the optimizer's state. (Gradients are counted as if they stayed.)"""

    def total(self, cuda: bool = True) -> float:
        """Of a GPU, with what CUDA, NCCL and the allocator keep for themselves; of a process on a CPU."""
        return (
            (self.peak - self.on_host) * (1 + LOOSE) + SET_ASIDE * (2 if self.ranks > 1 else 1) if cuda else self.peak
        )


def predict(loaded: LoadedRecipe, ranks: int, *, cuda: bool = True) -> Need:
    """Take two steps of the recipe on one of ``ranks`` ranks, of tensors without contents.

    ``cuda``: as on GPUs, else as on CPUs, which compute in float32 where the recipe does not say. Raises BadInput.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    recipe = loaded.recipe
    wrong = check_ranks(recipe, ranks)
    if wrong:
        raise BadInput(f"{loaded.path}: {wrong}")
    with fake_ranks(ranks), FakeTensorMode(allow_non_fake_inputs=True), Live().watching_sizes() as live:
        try:
            return _stepped(loaded, ranks, cuda, live)
        finally:
            if recipe.compile.enabled:
                torch._dynamo.reset()  # else it gives up after eight predictions


@contextlib.contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """A process group in which collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _stepped(loaded: LoadedRecipe, ranks: int, cuda: bool, live: Live) -> Need:
    from amlaunch.trainer.data.batches import Batch
    from amlaunch.trainer.data.datasets import sample_length
    from amlaunch.trainer.loop.job import build_dataset
    from amlaunch.trainer.loop.training_loop import take_step
    from amlaunch.trainer.optim.optimizers import build_optimizers
    from amlaunch.trainer.parallel.world import World

    recipe, policy = _in_the_type_of(loaded.recipe, cuda), loaded.policy
    section, steps = recipe.distributed, recipe.step_scheduler
    world = World(0, ranks, torch.device("cpu"), timedelta(minutes=1), section.tp_size, section.cp_size)
    before = live.now
    model, buckets = _build(recipe, policy, world, live)
    optimizers = build_optimizers(recipe.optimizer, recipe.parameter_groups, policy, model)
    parameters = live.now - before - (buckets.size if buckets else 0)
    packed = recipe.packed_sequence.packed_sequence_size
    length = int(
        packed or recipe.dataset.get("seq_len") or sample_length(build_dataset(recipe.dataset, recipe, policy, None))
    )
    local, mine = steps.local_batch_size, steps.global_batch_size // world.dp_size
    micro_steps = min(MICRO_STEPS, mine // local)
    small = dataclasses.replace(
        recipe, step_scheduler=dataclasses.replace(steps, global_batch_size=local * micro_steps * world.dp_size)
    )
    job = _job(small, loaded, world, model, optimizers, live)
    for counts in (False, True):  # the first step makes the optimizer's state, and compiles, which wants no hooks
        tokens = torch.zeros(local * micro_steps, length, dtype=torch.int64)
        live.peak, live.flops = live.now, 0
        if buckets and counts:
            buckets.begin(micro_steps)
        take_step(job, Batch(tokens, tokens.clone(), *((tokens.clone(), tokens.int()) if packed else ())))
    state = sum(
        size_of(value)
        for part in optimizers.members
        for held in part.state.values()
        for value in held.values()
        if isinstance(value, torch.Tensor)
    )
    gradients = sum(size_of(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return Need(
        ranks=ranks,
        local_batch_size=local,
        parameters=parameters,
        gradients=gradients,
        optimizer=state,
        activations=live.peak - before - parameters - gradients - state,
        peak=live.peak - before,
        flops=float(live.flops) * ranks * (mine / (local * micro_steps)),
        tokens=steps.global_batch_size * length,
        on_host=parameters + state if section.cpu_offload else 0,
    )


def _in_the_type_of(recipe: Recipe, cuda: bool) -> Recipe:
    """The recipe with the type that its device computes in where it does not say."""
    if recipe.distributed.dtype is not None or not cuda:
        return recipe
    return dataclasses.replace(recipe, distributed=dataclasses.replace(recipe.distributed, dtype="bfloat16"))


def _build(recipe: Recipe, policy: TargetPolicy, world: World, live: Live) -> tuple[nn.Module, Buckets | None]:
    """The model as the trainer would have it on this rank."""
    from amlaunch.trainer.loop.job import build_model, apply_fast_paths
    from amlaunch.trainer.parallel.world import compute_dtype

    double = compute_dtype(recipe.distributed, world.device) is torch.float64
    with default_type(torch.float64 if double else torch.float32):
        bare = build_model(recipe, policy)
    with compiling(live):
        apply_fast_paths(bare, dataclasses.replace(recipe, fp8=type(recipe.fp8)()), world)
    return spread_out(bare, recipe, world)


def _job(
    recipe: Recipe, loaded: LoadedRecipe, world: World, model: nn.Module, optimizers: Optimizers, live: Live
) -> Any:
    """What :func:`amlaunch.trainer.loop.training_loop.take_step` needs of a job, without watch, profile and metrics."""
    from amlaunch.trainer.loop.job import build_loss
    from amlaunch.trainer.metrics.profiling import Profiler
    from amlaunch.trainer.optim.optimizers import LearningRateSchedule

    with compiling(live):
        loss_fn = build_loss(recipe, loaded.policy)
    return SimpleNamespace(
        recipe=recipe,
        world=world,
        model=model,
        loss_fn=loss_fn,
        optimizers=optimizers,
        schedule=LearningRateSchedule(None, optimizers.peak_rate, 1),
        watch=SimpleNamespace(beat=lambda *_, **__: None, at=lambda *_, **__: None),
        profiler=Profiler(None, loaded.path, 0, world.device),
        step=0,
        steps_this_start=0,
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


def spread_out(bare: nn.Module, recipe: Recipe, world: World) -> tuple[nn.Module, Buckets | None]:
    """The model as :func:`amlaunch.trainer.parallel.world.spread` has it; DDP, whose reducer is not Python, by :class:`Buckets`."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from amlaunch.trainer.parallel.world import is_sharded, parallelize

    section = recipe.distributed
    ddp = section.strategy == "ddp" and not is_sharded(section)  # tensor parallelism's replicas are FSDP2's
    bare.to = lambda *_, **__: bare  # type: ignore[method-assign] # it is where it should be, in its type
    try:
        with unset_fake_temporarily():  # a mesh of ranks is made of real tensors
            model = parallelize(
                bare, dataclasses.replace(section, strategy="none") if ddp else section, world, recipe.seed
            )
    finally:
        del bare.to
    return model, Buckets(model) if ddp and world.size > 1 else None


class Buckets:
    """DDP's memory: buffers as large as all gradients, there for good; after the last micro-batch gradients are views of them."""

    def __init__(self, model: nn.Module):
        self._views = {
            parameter: torch.zeros_like(parameter) for parameter in model.parameters() if parameter.requires_grad
        }
        self.size = sum(size_of(view) for view in self._views.values())
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
