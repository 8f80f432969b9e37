"""Set up a training job from a recipe, run it, and write ``result.json``."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.files import write_json
from amlaunch.recipes.format.consistency import check_ranks
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.schema import Recipe, validation_sets
from amlaunch.recipes.format.targets import TargetPolicy, build, resolve, signature, stable_names
from amlaunch.trainer.checkpoints import checkpoint
from amlaunch.trainer.checkpoints.hf_folder import Vocabulary, write_folder
from amlaunch.trainer.checkpoints.saver import Saver
from amlaunch.trainer.data.batches import StepBatches, ValidationBatches
from amlaunch.trainer.data.datasets import data_fingerprint, pack_dataset, sample_length, sample_order_of
from amlaunch.trainer.data.overlap import refuse_shared_data
from amlaunch.trainer.data.token_stream import shards_folder
from amlaunch.trainer.loop.training_loop import train
from amlaunch.trainer.loop.training_state import TrainingState
from amlaunch.trainer.metrics.profiling import Profiler
from amlaunch.trainer.metrics.writers import Metrics, open_tensorboard, open_wandb, peak_flops, summarise_metrics
from amlaunch.trainer.models.base import (
    context_length,
    enable_router_loss,
    flops_per_token,
    parameter_count,
    supports_deferred_init,
    vocab_rows,
)
from amlaunch.trainer.models.document_masks import keep_documents_apart
from amlaunch.trainer.optim.optimizers import LearningRateSchedule, build_optimizers
from amlaunch.trainer.parallel.world import World, compute_dtype, dump_flight_record, join_world, parallelize, unwrap
from amlaunch.trainer.performance import attention_kernels, fp8
from amlaunch.trainer.performance.compilation import compile_loss, compile_model, compile_scope
from amlaunch.trainer.process.arguments import Options
from amlaunch.trainer.process.errors import TrainingFailed
from amlaunch.trainer.process.hang_watch import HangWatch, hang_limits
from amlaunch.trainer.process.rank_environment import read_rank_environment
from amlaunch.trainer.process.stop_request import StopFlag

FINISHED: list[TrainingState] = []
"""Finished runs, kept alive until the process ends.

DDP's reducer frees a process group together with itself, and gloo's clean-up
then waits, holding Python's lock, for a thread that may need that lock: 2 of
55 runs of two ranks hung this way (torch 2.13).
"""


def run(options: Options, stop: StopFlag) -> int:
    """Train the recipe of ``options`` on this rank; return the exit code OK or RESUMABLE.

    Raises BadInput and TrainingFailed.
    """
    recipe = options.loaded.recipe
    ranks = read_rank_environment(os.environ)
    problem = check_ranks(recipe, ranks.size)
    if problem:
        raise BadInput(f"{options.loaded.path}: {problem}")

    # a single rank never waits for a peer
    timeout = recipe.distributed.timeout_minutes if ranks.size > 1 else math.inf
    steady, first = hang_limits(timeout, recipe.resources.train.hang_minutes, recipe.distributed.hang_seconds)
    record = options.element.root / f"flight-recorder.rank{ranks.rank}.pickle"
    with (
        HangWatch(ranks.rank, steady, first, on_hang=lambda: dump_flight_record(record)) as watch,
        ExitStack() as cleanup,
    ):
        world = join_world(recipe.distributed, ranks)
        state = set_up(options, stop, world, watch, cleanup)
        try:
            code = train(state)
        except TrainingFailed:
            # raised on all ranks together, so the save in progress can still finish
            if state.saver is not None:
                state.saver.wait()
            raise
        finally:
            state.profiler.close(state.step)
        state.batches.close()
        if state.metrics:
            state.metrics.close()
            if code == OK:
                write_json(options.element.result, run_result(state, options))
        # srun ends the ranks that remain when one leaves, and rank 0 may take long to finish wandb.
        watch.beat("waiting for rank 0 to finish its metrics")
        world.barrier()
        FINISHED.append(state)
    return code


# --- set-up ---------------------------------------------------------------------------------------


def set_up(options: Options, stop: StopFlag, world: World, watch: HangWatch, cleanup: ExitStack) -> TrainingState:
    """Build all parts of the run and restore the checkpoint that the recipe selects.

    ``cleanup`` releases the checkpoint folder and torch settings at the end.
    """
    recipe, policy = options.loaded.recipe, options.loaded.policy
    train_set = build_dataset(recipe.dataset, recipe, policy, options.data)
    check_sequence_split(sample_length(train_set), recipe)
    check_cuda_graphs(recipe, world)
    order = sample_order_of(train_set, recipe.seed)
    last_step = total_steps(recipe, order.size)
    stop.file, stop.polls_file = options.element.stop, world.is_main

    bare_model = build_model(recipe, policy, empty=True)
    if not recipe.packed_sequence.packed_sequence_size:
        check_context(bare_model, sample_length(train_set))
    apply_fast_paths(bare_model, recipe, world)
    attention_order = attention_kernels.backend_order(recipe.sdpa_method, world.device)
    cleanup.enter_context(attention_kernels.prefer_backends(attention_order, world.device))
    if recipe.packed_sequence.packed_sequence_size:
        keep_documents_apart(bare_model, recipe.distributed)
    vocab, flops = vocab_rows(bare_model), flops_per_token(bare_model, sample_length(train_set))

    validation = build_validation(options, vocab, world)
    refuse_shared_data(train_set, {name: batches.dataset for name, batches in validation.items()})
    model = parallelize(bare_model, recipe.distributed, world, recipe.seed)
    optimizers = build_optimizers(recipe.optimizer, recipe.parameter_groups, policy, unwrap(model))
    batches = StepBatches(train_set, order, recipe.step_scheduler.global_batch_size, vocab, world)
    state = TrainingState(
        recipe=recipe,
        world=world,
        model=model,
        loss_fn=build_loss(recipe, policy),
        optimizers=optimizers,
        schedule=LearningRateSchedule(recipe.lr_scheduler, optimizers.peak_rate, last_step, batches.step_tokens),
        batches=batches,
        validation=validation,
        identity=checkpoint.Identity(
            section_identity(options.loaded, "model"),
            data_fingerprint(train_set, section_identity(options.loaded, "dataset"), recipe.seed, batches.global_batch),
        ),
        saver=open_saver(options, model, world, cleanup),
        metrics=open_metrics(options, world, last_step, flops) if world.is_main else None,
        stop=stop,
        watch=watch,
        profiler=Profiler(recipe.profile, options.element.root / "profile", world.rank, world.device),
        last_step=last_step,
    )
    resume(state, options)
    batches.start(state.step, last_step, recipe.dataloader.prefetch_factor, recipe.dataloader.num_workers)
    print_start(state)
    return state


def build_model(recipe: Recipe, policy: TargetPolicy, *, empty: bool = False) -> torch.nn.Module:
    """Build the model on the CPU; its weights are a function of the seed.

    ``empty``: build it on the meta device if it can create the same weights
    later (:func:`amlaunch.trainer.models.base.initialize_parameters`), which takes neither time nor memory now.
    """
    torch.manual_seed(recipe.seed)
    on_meta = empty and supports_deferred_init(resolve(recipe.model["_target_"], policy))
    with torch.device("meta") if on_meta else nullcontext():
        model = build(recipe.model, policy)
    if not isinstance(model, torch.nn.Module):
        target = recipe.model["_target_"]
        raise BadInput(f"model._target_: {target} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def apply_fast_paths(model: torch.nn.Module, recipe: Recipe, world: World) -> None:
    """Apply the recipe's fast paths, which an export does not need, and disable the generation cache.

    The cache (``use_cache``) only costs memory in training.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    enable_router_loss(model)
    fp8.convert_linear_layers(model, recipe.fp8, world.device, recipe.distributed.tp_size)
    if recipe.distributed.bf16_residual and compute_dtype(recipe.distributed, world.device) is torch.bfloat16:
        attention_kernels.cast_residual_stream(model, torch.bfloat16)
    compile_model(model, recipe.compile, compile_scope(recipe.compile, recipe.distributed, world.size))


def section_identity(loaded: LoadedRecipe, section: str) -> dict[str, Any]:
    """Return a resolved section as checkpoints store it, without values that may be secret."""
    return dict(stable_names(loaded.visible(loaded.tree[section])))


def build_loss(recipe: Recipe, policy: TargetPolicy) -> Any:
    """Build the loss function, compiled if the model is."""
    return compile_loss(build(recipe.loss_fn, policy), recipe.compile)


def build_dataset(node: dict[str, Any], recipe: Recipe, policy: TargetPolicy, data: Path | None) -> Any:
    """Build the data set of a section, packed if the recipe says so.

    A data set that takes ``data_dir`` receives ``data``, the folder of the run's shards, unless the section sets it.
    """
    accepted = signature(node["_target_"], policy)
    extra: dict[str, Any] = {}
    if data is not None and accepted is not None and "data_dir" in accepted.parameters and "data_dir" not in node:
        extra["data_dir"] = str(data)
    dataset = build(node, policy, **extra)
    by_number = hasattr(dataset, "batch") or hasattr(dataset, "__getitem__")
    # torch's IterableDataset has a __getitem__ that raises, and may have a length.
    if not hasattr(dataset, "__len__") or not by_number or isinstance(dataset, torch.utils.data.IterableDataset):
        raise BadInput(
            f"dataset: {type(dataset).__name__} can only be iterated over. Give it __len__ and __getitem__, because "
            "a run finds any step's samples by number, or write its texts to shards with preprocess.source"
        )
    return pack_dataset(dataset, recipe.packed_sequence.packed_sequence_size)


def check_context(model: torch.nn.Module, length: int) -> None:
    """Raise BadInput if samples of ``length`` positions exceed the model's context, as far as it is known."""
    context = context_length(model)
    if context is not None and context < length:
        raise BadInput(
            f"dataset: samples of {length} positions exceed the model's context of {context}. Lower dataset.seq_len, "
            "or build a model with a longer context"
        )


def check_sequence_split(length: int, recipe: Recipe) -> None:
    """Raise BadInput if a sample of ``length`` positions cannot be split evenly over the ranks that share it."""
    ranks = recipe.distributed.tp_size * recipe.distributed.cp_size
    if length % ranks:
        raise BadInput(
            f"dataset: samples of {length} positions cannot be split evenly over {ranks} ranks "
            f"(distributed.tp_size x cp_size). Use a sample length that is a multiple of {ranks}"
        )


def check_cuda_graphs(recipe: Recipe, world: World) -> None:
    """Raise BadInput if CUDA graphs would overwrite gradients that a step accumulates (pytorch/pytorch#169545)."""
    steps, mode = recipe.step_scheduler, recipe.compile.mode
    uses_graphs = recipe.compile.enabled and mode in ("reduce-overhead", "max-autotune")
    accumulates = steps.global_batch_size > steps.local_batch_size * world.dp_size
    if uses_graphs and accumulates and world.device.type == "cuda":
        raise BadInput(
            f"compile.mode: {mode} uses CUDA graphs, which cannot accumulate gradients over several micro-batches. "
            "Set compile.mode to default or max-autotune-no-cudagraphs, "
            f"or step_scheduler.local_batch_size to {steps.global_batch_size // world.dp_size}"
        )


def build_validation(options: Options, vocab: int | None, world: World) -> dict[str, ValidationBatches]:
    """Build the fixed validation batches of each set, by name; a single set has the name ""."""
    recipe, policy = options.loaded.recipe, options.loaded.policy
    steps = recipe.step_scheduler
    max_samples = steps.val_batches * steps.global_batch_size
    batches_by_name = {}
    for name, node in validation_sets(recipe.validation_dataset).items():
        dataset = build_dataset(node, recipe, policy, options.data)
        order = sample_order_of(dataset, recipe.seed)
        batches_by_name[name] = ValidationBatches(dataset, order, steps.local_batch_size, max_samples, vocab, world)
    return batches_by_name


def total_steps(recipe: Recipe, samples: int) -> int:
    """Return the last step: the earlier of ``max_steps`` and the full steps in ``num_epochs`` of ``samples`` each.

    Raises BadInput if there is not even one full step.
    """
    section = recipe.step_scheduler
    if section.max_steps is not None and section.num_epochs is None:
        return section.max_steps
    epochs = section.num_epochs or 1
    steps = epochs * samples // section.global_batch_size
    if steps == 0:
        raise BadInput(
            f"dataset: {samples} samples x {epochs} epochs (step_scheduler.num_epochs) are less than one "
            f"step (step_scheduler.global_batch_size {section.global_batch_size}). "
            "Set a smaller global_batch_size, more num_epochs, or max_steps alone"
        )
    return min(steps, section.max_steps or steps)


def open_metrics(options: Options, world: World, last_step: int, flops: float) -> Metrics:
    """Create the metrics writer of rank 0; ``flops`` is the number of operations per token."""
    return Metrics(
        element=options.element,
        device=world.device,
        ranks=world.size,
        last_step=last_step,
        flops_per_token=flops,
        peak_flops=peak_flops(world.device),
        wandb=open_wandb(options.loaded.recipe.wandb, options.run_id, options.element.root),
    )


def open_saver(options: Options, model: torch.nn.Module, world: World, cleanup: ExitStack) -> Saver | None:
    """Open the checkpoint writer, which locks its folder until ``cleanup``; None if checkpoints are disabled."""
    recipe = options.loaded.recipe
    if not recipe.checkpoint.enabled:
        return None

    def consolidate(source: checkpoint.StoredCheckpoint, out: Path) -> None:
        bare_model = unwrap(model)
        vocabulary = Vocabulary.of_model(bare_model, shards_folder(options.data, recipe.dataset))
        write_folder(out, bare_model, vocabulary, "float32", checkpoint.read_full_weights(source))

    saver = Saver(options.checkpoints, recipe.checkpoint, world, options.loaded.json_text(), consolidate)
    cleanup.callback(saver.close)
    return saver


def resume(state: TrainingState, options: Options) -> None:
    """Restore the checkpoint that the recipe selects, if any, and align the metrics with it."""
    if state.saver is not None:
        root, restore_from = state.saver.root, state.recipe.checkpoint.restore_from
        start = checkpoint.find_start(root, restore_from, state.identity, state.world)
        if start is not None:
            check_steps_left(start, state)
            checkpoint.load(start, state.model, state.optimizers.members)
            state.step = start.step
            state.last_loss = start.meta["loss"]
            is_own = start.folder.parent == root
            state.saver.saved_step = start.step if is_own else 0
            if state.world.is_main and not is_own:
                print(f"starting from the checkpoint {start.folder}", flush=True)
    if state.metrics:
        report_rate_change(state, state.metrics.resume_at(state.step))
        state.metrics.tensorboard = open_tensorboard(state.recipe.tensorboard, options.element, state.step)


def check_steps_left(start: checkpoint.StoredCheckpoint, state: TrainingState) -> None:
    """Raise BadInput if the checkpoint is beyond the last step; at the last step the run is complete."""
    if start.step > state.last_step:
        section = state.recipe.step_scheduler
        key = "max_steps" if state.last_step == section.max_steps else "num_epochs"
        raise BadInput(
            f"the checkpoint {start.folder} is at step {start.step}, beyond the last step {state.last_step}, so "
            f"nothing is left to train. Raise step_scheduler.{key}, or start a new run"
        )


def report_rate_change(state: TrainingState, recorded: float | None) -> None:
    """Say that the schedule now has another rate at the checkpoint's step than the run had there."""
    rate = state.schedule.rate(state.step) if state.step else None
    if rate is not None and recorded is not None and not math.isclose(rate, recorded, rel_tol=1e-6):
        print(
            f"note: the learning rate was {recorded:.3g} at step {state.step}, "
            f"and the schedule now has {rate:.3g} there",
            flush=True,
        )


# --- what the user sees ---------------------------------------------------------------------------


def print_start(state: TrainingState) -> None:
    """Print the size of the run, its starting point and its fast paths on rank 0."""
    if not state.world.is_main:
        return
    recipe, dataset, batches = state.recipe, state.batches.dataset, state.batches
    start = f"resuming after step {state.step}" if state.step else "starting at step 1"
    samples = dataset.describe() if hasattr(dataset, "describe") else f"{len(dataset):,} samples"
    epochs = f"{batches.epoch(state.last_step):.2f} epochs"
    by_source = ", ".join(f"{epoch:.2f} of {name}" for name, epoch in batches.epochs(state.last_step).items())
    if by_source:
        epochs += f": {by_source}"
    section = recipe.step_scheduler
    if section.max_steps and state.last_step < section.max_steps:
        print(f"note: num_epochs {section.num_epochs} ends the run before max_steps {section.max_steps}", flush=True)
    if state.schedule.warmup > state.last_step:
        print(
            f"note: the warmup ends at step {state.schedule.warmup}, after the last step {state.last_step}, so the "
            "learning rate never reaches its peak",
            flush=True,
        )
    print(
        f"{recipe.name}: {parameter_count(unwrap(state.model)):,} parameters, "
        f"{state.world.size} x {state.world.device.type}, {recipe.distributed.strategy}; "
        f"{samples}, {state.last_step:,} steps of {batches.step_tokens:,} tokens ({epochs}); {start}",
        flush=True,
    )
    for line in describe_fast_paths(state):
        print(line, flush=True)


def describe_fast_paths(state: TrainingState) -> list[str]:
    """Describe the fast paths in use, and warn if a requested one is unavailable."""
    recipe, device = state.recipe, state.world.device
    dtype = compute_dtype(recipe.distributed, device)
    attention = attention_kernels.select_backend(
        unwrap(state.model),
        attention_kernels.backend_order(recipe.sdpa_method, device),
        state.batches.step_tokens // state.batches.global_batch,
        dtype,
        device,
        packed=bool(recipe.packed_sequence.packed_sequence_size),
        compiled=recipe.compile.enabled,
    )
    facts = [str(dtype).removeprefix("torch.")]
    if recipe.compile.enabled:
        facts.append(f"compile scope: {compile_scope(recipe.compile, recipe.distributed, state.world.size)}")
    else:
        facts.append("not compiled")
    if attention:
        facts.append(f"attention: {attention.backend}")
    if recipe.fp8.enabled:
        facts.append("FP8 matrix products")

    lines = ["compute: " + ", ".join(facts)]
    if attention and attention.warning:
        lines.append(f"warning: {attention.warning}")
    return lines


def run_result(state: TrainingState, options: Options) -> dict[str, Any]:
    """Return the content of ``result.json``.

    First losses and median speed come from ``metrics.jsonl``, which covers all starts of the run.
    """
    folder = checkpoint.checkpoint_folder(options.checkpoints, state.step)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if state.saver is not None else []
    return {
        "step": state.step,
        "tokens": state.step * state.batches.step_tokens,
        **summarise_metrics(options.element.metrics),
        "checkpoint": str(folder) if files else None,
        "outputs": {str(path): path.stat().st_size for path in files},
    }
