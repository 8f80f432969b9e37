"""Suggestions for misspelt names: the nearest valid name, and what other tools call a recipe key."""

from __future__ import annotations

from collections.abc import Iterable

MAX_LISTED_NAMES = 12
MIN_SIMILARITY = 0.65
"""Minimum ``difflib`` ratio of a hint: ``tarin`` finds ``train`` (0.8), ``plot`` does not find ``export`` (0.6)."""

ALIASES: dict[str, tuple[str, ...]] = {
    "optimizer.lr": ("lr", "learning_rate", "max_lr", "peak_lr"),
    "optimizer.weight_decay": ("weight_decay", "wd"),
    "optimizer.betas": ("betas", "adam_betas", "beta1", "beta2"),
    "lr_scheduler.lr_warmup_steps": ("warmup", "warmup_steps", "warmup_iters", "num_warmup_steps"),
    "lr_scheduler.lr_decay_style": ("scheduler", "lr_scheduler_type", "decay_style"),
    "lr_scheduler.min_lr": ("min_lr", "min_learning_rate"),
    "clip_grad_norm.max_norm": ("grad_clip", "clip_grad", "max_grad_norm", "gradient_clipping", "gradient_clip_val"),
    "step_scheduler.global_batch_size": ("batch_size", "global_batch_size", "train_batch_size", "gbs"),
    "step_scheduler.local_batch_size": (
        "local_batch_size",
        "micro_batch_size",
        "per_device_train_batch_size",
        "device_batch_size",
        "mbs",
    ),
    "step_scheduler.max_steps": ("max_steps", "steps", "num_steps", "train_steps", "max_iters", "iters", "iterations"),
    "step_scheduler.num_epochs": ("epochs", "num_epochs", "max_epochs", "num_train_epochs"),
    "step_scheduler.ckpt_every_steps": (
        "save_every",
        "save_steps",
        "save_interval",
        "checkpoint_every",
        "ckpt_every",
        "checkpoint_interval",
    ),
    "step_scheduler.val_every_steps": ("eval_every", "eval_steps", "eval_interval", "val_every", "val_interval"),
    "step_scheduler.val_batches": ("eval_iters", "eval_batches", "val_steps", "limit_val_batches"),
    "dataset.seq_len": (
        "seq_len",
        "seq_length",
        "sequence_length",
        "max_seq_len",
        "max_seq_length",
        "context_length",
        "block_size",
    ),
    "dataset.file_pattern": ("shards", "train_data", "train_files"),
    "preprocess.data_files": ("data", "data_path", "data_dir", "dataset_path", "text_files", "input_files"),
    "preprocess.dataset": ("dataset_name", "hf_dataset"),
    "preprocess.set_name": ("dataset_config", "dataset_config_name", "config_name", "subset"),
    "preprocess.tokenizer": ("tokenizer", "tokenizer_name", "tokenizer_path", "vocab"),
    "preprocess.max_tokens": ("max_tokens", "num_tokens", "max_length", "train_tokens"),
    "preprocess.num_workers": ("workers", "num_proc"),
    "distributed.dtype": ("dtype", "precision", "mixed_precision", "amp", "bf16", "fp16", "half"),
    "distributed.strategy": ("strategy", "fsdp", "ddp", "parallelism"),
    "distributed.tp_size": ("tp", "tp_size", "tensor_parallel", "tensor_parallel_size", "tensor_model_parallel_size"),
    "distributed.cp_size": ("cp", "cp_size", "context_parallel", "context_parallel_size"),
    "distributed.activation_checkpointing": (
        "activation_checkpointing",
        "gradient_checkpointing",
        "recompute",
        "remat",
    ),
    "checkpoint.max_recent_checkpoints": ("save_total_limit", "keep_last", "max_checkpoints"),
    "checkpoint.restore_from": ("restore_from", "resume_from", "resume_from_checkpoint", "init_from", "load"),
    "checkpoint.checkpoint_dir": ("checkpoint_dir", "ckpt_dir", "save_dir"),
    "resources.train.nodes": ("nodes", "num_nodes", "nnodes", "n_nodes"),
    "resources.train.gpus_per_node": ("gpus", "gpus_per_node", "num_gpus", "n_gpus", "gres", "ngpus"),
    "resources.train.tasks_per_node": ("tasks_per_node", "ntasks", "ntasks_per_node", "nproc_per_node"),
    "resources.train.cpus": ("cpus", "cpus_per_task", "num_cpus", "cpu"),
    "resources.train.mem": ("mem", "memory", "ram", "mem_gb"),
    "resources.train.time": ("time", "time_limit", "walltime", "timeout", "timeout_min"),
    "container.image": ("image", "container_image", "docker_image"),
    "container.mounts": ("mounts", "container_mounts", "volumes", "binds"),
    "container.env": ("env", "environment", "env_vars"),
    "wandb.project": ("wandb_project", "project"),
    "export.dtype": ("export_dtype",),
    "seed": ("random_seed", "rng_seed", "manual_seed"),
    "name": ("run_name", "job_name", "experiment", "experiment_name"),
    "compile": ("torch_compile", "use_compile"),
    "profile": ("profiler", "profiling"),
}
"""Key of a recipe -> the names that other tools and habits give it."""
KEY_OF_ALIAS = {alias: key for key, aliases in ALIASES.items() for alias in aliases}

RECIPE_SECTION = "step_scheduler"
"""A name that only the sections of a recipe have."""

CLUSTER_PROFILE_KEYS = ("partition", "account", "qos", "sbatch", "constraint", "reservation", "exclude", "nodelist")
"""Slurm settings of a site: a cluster profile holds them, never a recipe."""
PROFILE_FIELDS = ("partition", "account", "qos", "sbatch")
"""Those with a key of their own in a profile; the others are options of ``sbatch``."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a clause that names the valid name nearest to ``word``, or lists the valid names if none is near.

    Looks for the same name in another case, then for a common alias (``lr`` means ``optimizer.lr``), then for a
    similar spelling. For a Slurm setting, the clause points to the cluster profile.
    """
    names = sorted({str(name) for name in known})
    if not names:
        return "no names are valid here"

    same = next((name for name in names if name.lower() == word.lower()), None)
    names_recipe_keys = RECIPE_SECTION in names or f"--{RECIPE_SECTION}" in names
    if same is None and names_recipe_keys and (hint := cluster_profile_hint(word)):
        return hint

    nearest = same or resolve_alias(word, names)
    nearest = nearest or similar_name(word, names)
    if nearest is not None:
        return f"did you mean {nearest!r}?"

    more = ", …" if len(names) > MAX_LISTED_NAMES else ""
    return f"valid names: {', '.join(names[:MAX_LISTED_NAMES])}{more}"


def similar_name(word: str, known: Iterable[str]) -> str | None:
    """Return the same name in another case, else the one with the most similar spelling; None if none is near."""
    # Imported here because it slows down every start.
    import difflib

    names = list(known)
    same = next((name for name in names if name.lower() == word.lower()), None)
    return same or next(iter(difflib.get_close_matches(word, names, n=1, cutoff=MIN_SIMILARITY)), None)


def resolve_alias(word: str, known: Iterable[str]) -> str | None:
    """Return the valid name that ``word`` is an alias of; None if it is no alias or its key is not valid here.

    Among the sections of a recipe the result is the full key (``optimizer.lr``), inside a section the key alone
    (``lr``). Leading dashes of an option are kept.
    """
    name = word.lstrip("-")
    dashes = word[: len(word) - len(name)]
    key = KEY_OF_ALIAS.get(name.lower().replace("-", "_"))
    if key is None:
        return None

    names = set(known)
    if dashes + RECIPE_SECTION in names:
        return dashes + key
    last = key.rpartition(".")[2]
    # Options of a command are spelled with dashes for underscores.
    spellings = (dashes + last.replace("_", "-"), dashes + last) if dashes else (last,)
    return next((spelling for spelling in spellings if spelling in names), None)


def cluster_profile_hint(key: str, stage: str = "train") -> str | None:
    """Return the place of a site's setting in a cluster profile; None if ``key`` is not such a setting."""
    name = key.lstrip("-").replace("-", "_")
    if name not in CLUSTER_PROFILE_KEYS:
        return None
    profile_key = f"stages.{stage}.{name}" if name in PROFILE_FIELDS else f"stages.{stage}.sbatch.{name}"
    return (
        f"{name} belongs to the cluster profile, not to the recipe: set {profile_key} in clusters.yaml "
        "(`amlaunch doctor` writes one)"
    )
