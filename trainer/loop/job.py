"""From a recipe to a job that can train, and from its end to ``result.json``."""

from __future__ import annotations

import math
import os
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.files import write_json
from amlaunch.recipes.format.loader import LoadedRecipe, check_ranks
from amlaunch.recipes.format.schema import Recipe, validation_sets
from amlaunch.recipes.format.targets import TargetPolicy, build, resolve, signature, stable_names
from amlaunch.trainer.checkpoints import checkpoint
from amlaunch.trainer.checkpoints.hf_folder import known_vocab, write_folder
from amlaunch.trainer.checkpoints.saver import Saver
from amlaunch.trainer.data.batches import StepBatches, ValidationBatches
from amlaunch.trainer.data.datasets import data_fingerprint, pack_dataset, sample_length, sample_order_of
from amlaunch.trainer.loop.training_loop import train
from amlaunch.trainer.loop.training_state import Job
from amlaunch.trainer.metrics.profiling import Profiler
from amlaunch.trainer.metrics.writers import Metrics, open_tensorboard, open_wandb, peak_flops, summary
from amlaunch.trainer.models.base import flops_per_token, parameter_count, supports_deferred_init, vocab_rows
from amlaunch.trainer.models.document_masks import keep_documents_apart
from amlaunch.trainer.optim.optimizers import Schedule, build_optimizers
from amlaunch.trainer.parallel.world import World, compute_dtype, dump_flight_record, join_world, parallelize, unwrap
from amlaunch.trainer.performance import attention_kernels, fp8
from amlaunch.trainer.performance.compilation import compile_loss, compile_model, compile_scope
from amlaunch.trainer.process.arguments import Options
from amlaunch.trainer.process.errors import TrainingFailed
from amlaunch.trainer.process.hang_watch import HangWatch, hang_limits
from amlaunch.trainer.process.rank_environment import read_rank_environment
from amlaunch.trainer.process.stop_request import StopFlag


def run(options: Options, stop: StopFlag) -> int:
    """Train the recipe of ``options`` on this rank; the exit code is OK or RESUMABLE.

    Raises BadInput and TrainingFailed.
    """
    recipe = options.loaded.recipe
    ranks = read_rank_environment(os.environ)
    wrong = check_ranks(recipe, ranks.size)
    if wrong:
        raise BadInput(f"{options.loaded.path}: {wrong}")
    timeout = recipe.distributed.timeout_minutes if ranks.size > 1 else math.inf  # alone it waits for nobody
    steady, first = hang_limits(timeout, recipe.resources.train.hang_minutes, recipe.distributed.hang_seconds)
    record = options.element.root / f"flight-recorder.rank{ranks.rank}.pickle"
    with HangWatch(ranks.rank, steady, first, also=lambda: dump_flight_record(record)) as watch, ExitStack() as held:
        world = join_world(recipe.distributed, ranks)
        job = prepare(options, stop, world, watch, held)
        try:
            code = train(job)
        except TrainingFailed:  # on all ranks: what is being written can still be finished
            if job.saver is not None:
                job.saver.wait()
            raise
        finally:
            job.profiler.close(job.step)
        job.batches.close()
        if job.metrics:
            job.metrics.close()
            if code == OK:
                write_json(options.element.result, result(job, options))
        KEPT.append(job)
    return code


KEPT: list[Job] = []
"""Finished jobs, kept until the process ends: DDP's reducer takes a process group along when it is freed, and gloo's
waits, holding Python's lock, for a thread that may want it (2 of 55 runs of two ranks hung so, torch 2.13)."""


def prepare(options: Options, stop: StopFlag, world: World, watch: HangWatch, held: ExitStack) -> Job:
    """Build everything, and go to where the checkpoint that the recipe means left off; ``held`` gives back at the end."""
    recipe, policy = options.loaded.recipe, options.loaded.policy
    train_set = build_dataset(recipe.dataset, recipe, policy, options.data)
    check_length(sample_length(train_set), recipe)
    check_graphs(recipe, world)
    order = sample_order_of(train_set, recipe.seed)
    last_step = steps_of(recipe, order.size)
    stop.file, stop.polls_file = options.element.stop, world.is_main
    bare = build_model(recipe, policy, empty=True)
    fit_for_training(bare, recipe, world)
    held.enter_context(
        attention_kernels.prefer_backends(
            attention_kernels.backend_order(recipe.sdpa_method, world.device), world.device
        )
    )
    if recipe.packed_sequence.packed_sequence_size:
        keep_documents_apart(bare, recipe.distributed)
    vocab, flops = vocab_rows(bare), flops_per_token(bare, sample_length(train_set))
    model = parallelize(bare, recipe.distributed, world, recipe.seed)
    optimizers = build_optimizers(recipe.optimizer, recipe.parameter_groups, policy, unwrap(model))
    batches = StepBatches(train_set, order, recipe.step_scheduler.global_batch_size, vocab, world)
    job = Job(
        recipe=recipe,
        world=world,
        model=model,
        loss_fn=build_loss(recipe, policy),
        optimizers=optimizers,
        schedule=Schedule(recipe.lr_scheduler, optimizers.rate, last_step, batches.step_tokens),
        batches=batches,
        validation=build_validation(options, vocab, world),
        identity=checkpoint.Identity(
            model_identity(options.loaded), data_fingerprint(train_set, recipe.seed, batches.global_batch)
        ),
        saver=open_saver(options, model, vocab, world, held),
        metrics=open_metrics(options, world, last_step, flops) if world.is_main else None,
        stop=stop,
        watch=watch,
        profiler=Profiler(recipe.profile, options.element.root / "profile", world.rank, world.device),
        last_step=last_step,
    )
    resume(job, options)
    batches.start(job.step, last_step, recipe.dataloader.prefetch_factor, recipe.dataloader.num_workers)
    introduce(job)
    return job


def build_model(recipe: Recipe, policy: TargetPolicy, *, empty: bool = False) -> torch.nn.Module:
    """The model on the CPU, its weights a function of the seed.

    ``empty``: on the meta device, where it can make its weights later, and then
    the same ones (:func:`amlaunch.trainer.models.base.fill`); that costs neither time nor memory.
    """
    torch.manual_seed(recipe.seed)
    later = empty and supports_deferred_init(resolve(recipe.model["_target_"], policy))
    with torch.device("meta") if later else nullcontext():
        model = build(recipe.model, policy)
    if not isinstance(model, torch.nn.Module):
        raise BadInput(
            f"model._target_ {recipe.model['_target_']} gave a {type(model).__name__}, not a torch.nn.Module"
        )
    return model


def fit_for_training(model: torch.nn.Module, recipe: Recipe, world: World) -> None:
    """What an export does without: the fast paths that the recipe asks for, and no cache for generation, which only costs memory."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    fp8.convert_linear_layers(model, recipe.fp8, world.device, recipe.distributed.tp_size)
    if recipe.distributed.bf16_residual and compute_dtype(recipe.distributed, world.device) is torch.bfloat16:
        attention_kernels.cast_residual_stream(model, torch.bfloat16)
    compile_model(model, recipe.compile, compile_scope(recipe.compile, recipe.distributed, world.size))


def model_identity(loaded: LoadedRecipe) -> dict[str, Any]:
    """The model section as checkpoints remember it: filled in, but for what may be a secret."""
    return dict(stable_names(loaded.visible(loaded.tree["model"])))


def build_loss(recipe: Recipe, policy: TargetPolicy) -> Any:
    """The loss, compiled where the model is."""
    return compile_loss(build(recipe.loss_fn, policy), recipe.compile)


def build_dataset(node: dict[str, Any], recipe: Recipe, policy: TargetPolicy, data: Path | None) -> Any:
    """The data set of a section, packed where the recipe says so; one that takes ``data_dir`` learns where the run's shards are."""
    takes = signature(node["_target_"], policy)
    extra: dict[str, Any] = {}
    if data is not None and takes is not None and "data_dir" in takes.parameters and "data_dir" not in node:
        extra["data_dir"] = str(data)
    return pack_dataset(build(node, policy, **extra), recipe.packed_sequence.packed_sequence_size)


def check_length(length: int, recipe: Recipe) -> None:
    """BadInput where the ranks that share a window cannot have equal parts of its ``length`` positions."""
    share = recipe.distributed.tp_size * recipe.distributed.cp_size
    if length % share:
        raise BadInput(
            f"dataset: windows of {length} positions do not divide over {share} ranks (distributed.tp_size x cp_size)"
        )


def check_graphs(recipe: Recipe, world: World) -> None:
    """BadInput where CUDA graphs would overwrite the gradients that a step still adds to (pytorch/pytorch#169545)."""
    steps, mode = recipe.step_scheduler, recipe.compile.mode
    graphs = recipe.compile.enabled and world.device.type == "cuda" and mode in ("reduce-overhead", "max-autotune")
    if graphs and steps.global_batch_size > steps.local_batch_size * world.dp_size:
        raise BadInput(
            f"compile.mode {mode}: its CUDA graphs cannot add up the gradients of several micro-batches; write default or "
            f"max-autotune-no-cudagraphs, or step_scheduler.local_batch_size {steps.global_batch_size // world.dp_size}"
        )


def build_validation(options: Options, vocab: int | None, world: World) -> dict[str, ValidationBatches]:
    """The validation samples of each set, the same ones every time; of a single set under the name ""."""
    recipe, policy = options.loaded.recipe, options.loaded.policy
    steps = recipe.step_scheduler
    most = steps.val_batches * steps.global_batch_size
    found = {}
    for name, node in validation_sets(recipe.validation_dataset).items():
        dataset = build_dataset(node, recipe, policy, options.data)
        found[name] = ValidationBatches(
            dataset, sample_order_of(dataset, recipe.seed), steps.local_batch_size, most, vocab, world
        )
    return found


def steps_of(recipe: Recipe, samples: int) -> int:
    """The last step: as the recipe says, or the whole steps in its epochs of ``samples`` each. Raises BadInput where that is none."""
    section = recipe.step_scheduler
    if section.max_steps is not None:
        return section.max_steps
    steps = section.num_epochs * samples // section.global_batch_size
    if steps == 0:
        raise BadInput(
            f"the data has {samples} samples in {section.num_epochs} epochs, fewer than one step takes "
            f"(step_scheduler.global_batch_size {section.global_batch_size}); write max_steps, or a smaller batch"
        )
    return steps


def open_metrics(options: Options, world: World, last_step: int, flops: float) -> Metrics:
    """Where rank 0 writes its numbers."""
    return Metrics(
        element=options.element,
        device=world.device,
        ranks=world.size,
        last_step=last_step,
        flops_per_token=flops,
        peak=peak_flops(world.device),
        wandb=open_wandb(options.loaded.recipe.wandb, options.run_id),
    )


def open_saver(
    options: Options, model: torch.nn.Module, vocab: int | None, world: World, held: ExitStack
) -> Saver | None:
    """What writes the checkpoints, its folder held until the end; None where the recipe wants none."""
    recipe = options.loaded.recipe
    if not recipe.checkpoint.enabled:
        return None

    def consolidate(found: checkpoint.Whole, out: Path) -> None:
        write_folder(
            out,
            unwrap(model),
            min(known_vocab(options.data), vocab or sys.maxsize),
            "float32",
            checkpoint.full_weights(found),
        )

    saver = Saver(options.checkpoints, recipe.checkpoint, world, options.loaded.text(), consolidate)
    held.callback(saver.close)
    return saver


def resume(job: Job, options: Options) -> None:
    """Go to where the checkpoint that the recipe means left off, or to the beginning."""
    if job.saver is not None:
        found = checkpoint.start_point(job.saver.root, job.recipe.checkpoint.restore_from, job.identity, job.world)
        if found is not None:
            checkpoint.load(found, job.model, job.optimizers.parts)
            job.step = found.step
            job.saver.saved = found.step if found.folder.parent == job.saver.root else 0
            job.last_loss = found.meta["loss"]
            if job.world.is_main and job.saver.saved == 0:
                print(f"begins from {found.folder}", flush=True)
    if job.metrics:
        job.metrics.resume_at(job.step)
        job.metrics.tensorboard = open_tensorboard(job.recipe.tensorboard, options.element, job.step)


def introduce(job: Job) -> None:
    """Say what is about to happen."""
    if not job.world.is_main:
        return
    recipe, dataset = job.recipe, job.batches.dataset
    begin = f"going on after step {job.step}" if job.step else "beginning"
    samples = dataset.describe() if hasattr(dataset, "described") else f"{len(dataset):,} samples"
    seen = ", ".join(f"{epoch:.2f} of {name}" for name, epoch in job.batches.epochs(job.last_step).items())
    epochs = f"{job.batches.epoch(job.last_step):.2f} epochs" + (f": {seen}" if seen else "")
    print(
        f"{recipe.name}: {parameter_count(unwrap(job.model)):,} parameters, {job.world.size} x {job.world.device.type}, "
        f"{recipe.distributed.strategy}; {samples}, {job.last_step:,} steps of {job.batches.step_tokens:,} tokens "
        f"({epochs}); {begin}",
        flush=True,
    )
    for line in paths(job):
        print(line, flush=True)


def paths(job: Job) -> list[str]:
    """Which fast paths the run takes, and a warning where one that is wanted cannot be had."""
    recipe, device = job.recipe, job.world.device
    dtype = compute_dtype(recipe.distributed, device)
    order = attention_kernels.backend_order(recipe.sdpa_method, device)
    length, packs = (
        job.batches.step_tokens // job.batches.global_batch,
        bool(recipe.packed_sequence.packed_sequence_size),
    )
    attention = attention_kernels.select_backend(
        unwrap(job.model), order, length, dtype, device, packed=packs, compiled=recipe.compile.enabled
    )
    said = [str(dtype).removeprefix("torch.")]
    said += (
        [f"compiled by {compile_scope(recipe.compile, recipe.distributed, job.world.size)}"]
        if recipe.compile.enabled
        else ["not compiled"]
    )
    said += [f"attention by {attention.backend}"] if attention else []
    said += ["8-bit products"] if recipe.fp8.enabled else []
    return [
        "computes in " + ", ".join(said),
        *([f"warning: {attention.warning}"] if attention and attention.warning else []),
    ]


def result(job: Job, options: Options) -> dict[str, Any]:
    """What the finished run says of itself; first and median come from ``metrics.jsonl``, which resumes do not cut short."""
    folder = checkpoint.folder_of(options.checkpoints, job.step)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if job.saver is not None else []
    return {
        "step": job.step,
        "tokens": job.step * job.batches.step_tokens,
        **summary(options.element.metrics),
        "checkpoint": str(folder) if files else None,
        "outputs": {str(path): path.stat().st_size for path in files},
    }
