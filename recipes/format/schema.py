"""The sections of a recipe, one frozen dataclass each, in the vocabulary of NeMo AutoModel's guide.

A field's name is the YAML key, its type is checked, and its default is the value of an absent key. The docstrings of
classes and fields are the text of ``docs/recipes.md`` (``docs/generate_recipes_page.py``). Sections with a ``_target_``
stay mappings: their keys belong to the callable (see :mod:`amlaunch.recipes.format.targets`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from amlaunch.recipes.format.units import (
    AboveZero,
    Count,
    Memory,
    Minutes,
    Natural,
    NotNegative,
    Positive,
    PositiveCount,
)

TOKENIZERS = {
    "gpt2": 50257,
    "r50k_base": 50257,
    "p50k_base": 50281,
    "p50k_edit": 50284,
    "cl100k_base": 100277,
    "o200k_base": 200019,
    "o200k_harmony": 201088,
    "byte": 257,
}
"""Vocabulary sizes of tiktoken's encodings (tiktoken 0.14), known without importing it, and of our own."""


def is_own_tokenizer(name: str) -> bool:
    """Return True if a tokenizer is a user's file or folder: ``char:FILE``, a path with a slash, a tokenizer.json."""
    return name.startswith("char:") or "/" in name or name.endswith(".json")


@dataclass(frozen=True)
class StepScheduler:
    """Batch sizes, the number of steps, and the intervals of checkpoints and validation."""

    global_batch_size: Positive = 32
    """Samples (windows or packed rows) per step, over all ranks and micro-batches."""
    local_batch_size: Positive = 1
    """Samples that a rank processes at once (the micro-batch)."""
    max_steps: Positive | None = None
    """Last step. `null`: the end of the last epoch."""
    num_epochs: Positive | None = None
    """Passes over the data; the earlier of `num_epochs` and `max_steps` ends the run. `null`: one without `max_steps`,
    otherwise as many as its steps need."""
    ckpt_every_steps: Positive | None = 1000
    """Steps between checkpoints. `null`: only at the end."""
    val_every_steps: Positive | None = None
    """Steps between validations. `null`: only at the end."""
    val_batches: Positive = 20
    """Batches of `global_batch_size` samples in each validation: always the same samples, on any number of ranks."""
    max_skipped_steps: Positive = 10
    """Steps in a row with a loss or gradient that is not a number, after which the run fails. Such a step changes
    nothing."""


@dataclass(frozen=True)
class LRScheduler:
    """Learning rate as a function of the step. Without this section the rate is constant."""

    lr_decay_style: Literal["cosine", "linear", "constant", "WSD", "inverse-square-root"] = "cosine"
    """Shape of the decay; WSD is warmup, stable, decay."""
    lr_warmup_steps: Natural = 0
    """Steps from `init_lr` to the peak."""
    lr_warmup_tokens: Count | None = None
    """Tokens of the warmup, instead of steps; a step that has begun counts as a full step."""
    lr_decay_steps: Positive | None = None
    """Step at which the rate reaches `min_lr`. `null`: the last step."""
    lr_decay_tokens: PositiveCount | None = None
    """Tokens until `min_lr`, instead of steps."""
    lr_wsd_decay_steps: Positive | None = None
    """WSD: steps of the final decay. `null`: a fifth of all steps."""
    lr_wsd_decay_tokens: PositiveCount | None = None
    """WSD: tokens of the final decay, instead of steps."""
    lr_wsd_decay_style: Literal["linear", "cosine", "minus_sqrt", "exponential"] = "linear"
    """WSD: shape of the decay."""
    init_lr: NotNegative = 0.0
    """Rate at the first step of the warmup."""
    min_lr: NotNegative = 0.0
    """Rate at the end of the decay; at most the optimizer's."""


@dataclass(frozen=True)
class ParameterGroup:
    """Settings of the parameters whose names match a pattern; the first group that matches applies."""

    match: str
    """Shell pattern of parameter names."""
    lr: NotNegative | None = None
    """Peak rate; the schedule scales it. `null`: `lr_scale` times the optimizer's."""
    lr_scale: NotNegative = 1.0
    """Factor of the optimizer's rate."""
    weight_decay: NotNegative | None = None
    """`null`: the optimizer's on matrices, 0 on vectors."""


@dataclass(frozen=True)
class Distributed:
    """Parallelism: how the model is spread over the ranks. See [Many GPUs](#many-gpus)."""

    strategy: Literal["fsdp2", "ddp", "none"] = "fsdp2"
    """`fsdp2` shards the model over the data-parallel ranks, `ddp` replicates it, `none` trains on one data-parallel
    rank."""
    dp_size: Positive | None = None
    """Data-parallel ranks. `null` or `none`: all ranks that the other dimensions leave."""
    dp_replicate_size: Positive | None = None
    """Replicas of the sharded model (HSDP). `null`: one."""
    tp_size: Positive = 1
    """Ranks that share every matrix (tensor parallelism)."""
    cp_size: Positive = 1
    """Ranks that share the positions of every window (context parallelism)."""
    sequence_parallel: bool = False
    """With `tp_size`: also divide norms, dropout and the residual stream, by positions."""
    dtype: Literal["bfloat16", "float32", "float64"] | None = None
    """Type that the model computes in. `null`: bfloat16 on GPUs, float32 on CPUs. Master weights are at least
    float32."""
    bf16_residual: bool = False
    """Keep the residual stream between blocks in bfloat16 if the model computes in it, as FSDP2 always does; false:
    float32."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which FSDP2 sums gradients if the model computes in bfloat16."""
    reshard_after_forward: bool = True
    """Free a block's weights after its forward pass and gather them again for the backward pass; false: keep them."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute in the backward pass instead of storing: nothing, entire blocks, or all but matrix products and
    attention."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the host's memory (fsdp2 only)."""
    timeout_minutes: Positive = 10
    """Time after which a collective that does not complete is an error."""
    hang_seconds: Positive | None = None
    """Time without progress after which a rank writes its stacks and ends the job. `null`: 9/10 of `timeout_minutes`,
    or of `resources.train.hang_minutes` if that is less."""


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoints: location, number, format. See [checkpoints.md](checkpoints.md)."""

    enabled: bool = True
    """Write checkpoints."""
    checkpoint_dir: str | None = None
    """`null`: in the run directory; a path: `<path>/<run-id>`."""
    max_recent_checkpoints: Positive = 2
    """Latest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    keep_every_steps: Positive | None = None
    """Also keep, permanently, the checkpoint of every step that is a multiple of this."""
    is_async: bool = True
    """Write during training, from a copy in the host's memory; false: without the copy, while training waits."""
    model_save_format: Literal["torch_save", "safetensors"] = "torch_save"
    """Format of the sharded weights; optimizer state always uses torch.distributed.checkpoint."""
    save_consolidated: bool = False
    """Also write a Hugging Face folder, which transformers can load, into every checkpoint."""
    restore_from: str = "auto"
    """`auto`: the latest, if there is one; `latest`; `best`; or the path of a checkpoint to begin from."""


@dataclass(frozen=True)
class PackedSequence:
    """Packing of complete documents, which do not attend to one another, into rows of one length.

    See [data.md](data.md#what-the-trainer-reads).
    """

    packed_sequence_size: Natural = 0
    """Tokens of a row. 0: no packing; the stream is cut into windows of `dataset.seq_len`."""


@dataclass(frozen=True)
class DataLoader:
    """Reading of batches from disk. The order of the data does not depend on these keys."""

    num_workers: Natural = 1
    """Threads that read ahead. 0: none, training waits for each batch."""
    prefetch_factor: Positive = 2
    """Batches that all threads together keep ready."""


@dataclass(frozen=True)
class ClipGradNorm:
    """Clipping by the global gradient norm; `clip_grad_norm: null` does not clip."""

    max_norm: AboveZero = 1.0
    """Largest norm of the gradient."""


@dataclass(frozen=True)
class Compile:
    """``torch.compile``, with static shapes."""

    enabled: bool = False
    """Compile the model."""
    scope: Literal["auto", "blocks", "model"] = "auto"
    """Unit of compilation; `auto`: the entire model on one rank, otherwise each transformer block."""
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """Mode of `torch.compile`."""


@dataclass(frozen=True)
class Fp8:
    """8-bit matrix products in the blocks' linear layers, for large models on Hopper GPUs and later."""

    enabled: bool = False
    """Use 8-bit products."""
    exclude: list[str] = field(default_factory=list)
    """Patterns of names of linear layers that stay in the model's type."""


@dataclass(frozen=True)
class Preprocess:
    """Text to shards. Set one of `dataset`, `data_files` and `source`. See [data.md](data.md)."""

    dataset: str | None = None
    """Name on the Hugging Face hub, or a local dataset folder."""
    set_name: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split of the dataset."""
    revision: str | None = None
    """Commit, tag or branch of the dataset on the hub. `null`: the latest commit when the element starts."""
    data_files: list[str] | str | None = None
    """Globs of local files. The suffix selects the format: .parquet, .jsonl, .jsonl.gz, .jsonl.zst; any other file is
    one document."""
    exclude: list[str] | str = field(default_factory=list)
    """Globs of files to skip."""
    source: dict[str, Any] | None = None
    """`_target_` of an iterable of texts; a callable with parameters `part` and `parts` yields one part."""
    data_cache_dir: str | None = None
    """Folder to download the hub's files into before they are read. `null`: stream them."""
    text_column: str = "text"
    """Column with the text."""
    encoding: str = "utf-8"
    """Encoding of text files; `python` honours each source file's coding line (PEP 263)."""
    encoding_errors: Literal["strict", "replace", "skip"] = "strict"
    """If a file cannot be decoded: fail, write U+FFFD, or skip the file and count it."""
    on_error: Literal["fail", "skip"] = "fail"
    """If a record or file is damaged: fail and name it, or skip, count and list it."""
    tokenizer: str = "gpt2"
    """A tiktoken encoding; `byte`; `char:FILE` (the characters of a text file); or a folder with a tokenizer.json."""
    bos: bool = True
    """Begin each document with the tokenizer's beginning-of-sequence token (end-of-text if it has none)."""
    engine: Literal["auto", "tiktoken", "gigatoken"] = "auto"
    """Tokenising library; the tokens are the same. `auto`: gigatoken if it is installed and verified for the
    encoding."""
    max_tokens: Count | None = None
    """Token budget, validation included, from the front of the source. `null`: all tokens."""
    val_tokens: Count = 0
    """Minimum tokens of the validation split, in complete documents."""
    shard_tokens: PositiveCount = 100_000_000
    """Maximum tokens of a shard; a longer document gets a shard of its own."""
    parts: Positive | None = None
    """Parts of the source, processed independently, each into its own shards; more parts use more CPUs. `null`: by
    size."""
    elements: Positive = 1
    """Array elements; each processes some of the parts."""
    num_workers: Positive | None = None
    """Processes of an element. `null`: one per CPU."""
    chunk_size: Positive = 256
    """Maximum rows to read at once."""
    format: Literal["bin", "raw"] = "bin"
    """`raw` also writes train.bin and val.bin without headers, as nanoGPT reads them."""
    output_dir: str | None = None
    """Folder of the shards. `null`: a folder beside the runs, named by a fingerprint of this section."""


PREPROCESS_EXECUTION_KEYS = ("data_cache_dir", "engine", "num_workers", "chunk_size")
"""Keys of ``preprocess`` that affect how the shards are made, not their content."""


@dataclass(frozen=True)
class StageResources:
    """Resources of one element of a stage: `resources.preprocess`, `.verify`, `.train` and `.export`."""

    nodes: Positive | None = None
    """Nodes. `null`: one."""
    gpus_per_node: Natural | None = None
    """GPUs per node. `null`: for `train`, as many of the node's as divide the batch."""
    tasks_per_node: Positive | None = None
    """Ranks per node. `null`: one per GPU, or one without GPUs."""
    cpus: Positive | None = None
    """CPUs per node."""
    mem: Memory | None = None
    """Memory per node."""
    time: Minutes | None = None
    """Time limit, in Slurm's formats."""
    hang_minutes: Positive | None = None
    """Time without a step or a line of output after which the ranks are stopped and retried. `null`: 30."""


@dataclass(frozen=True)
class Resources:
    """Resources of each stage."""

    preprocess: StageResources = StageResources()
    """Resources of one preprocess element."""
    verify: StageResources = StageResources()
    """Resources of the verify stage."""
    train: StageResources = StageResources()
    """Resources of one train element."""
    export: StageResources = StageResources()
    """Resources of one export element."""


@dataclass(frozen=True)
class MountSection:
    """The long form of a mount."""

    source: str
    """Path on the host."""
    target: str | None = None
    """Path inside. `null`: the same path."""
    read_only: bool = False
    """Mount read-only."""


@dataclass(frozen=True)
class StageImages:
    """Images of stages that do not run in ``container.image``; ``none``: no container."""

    preprocess: str | None = ""
    verify: str | None = ""
    train: str | None = ""
    export: str | None = ""


@dataclass(frozen=True)
class ContainerSection:
    """Image and runtime of the stages; without this section they run in the environment that starts them.

    See [containers.md](containers.md).
    """

    image: str | None = None
    """A name in a registry, a .sqsh, .sif or .tar file, or the folder of an OCI bundle."""
    mounts: list[str | MountSection] = field(default_factory=list)
    """`/host/path[:/inside][:ro]`, or `{source: …, target: …, read_only: true}`."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables inside."""
    workdir: str | None = None
    """Working directory inside. `null`: the folder in which you typed the command."""
    runtime: str = "auto"
    """Container runtime. `auto`: the one in the cluster profile, else an installed one."""
    entrypoint: bool = False
    """Run the image's own entrypoint first."""
    stages: StageImages = StageImages()
    """Image of single stages; `none`: no container, but the environment that submits."""


@dataclass(frozen=True)
class ProfileSection:
    """Trace of some steps with torch's profiler, in each attempt; traces lie beside `metrics.jsonl`."""

    start_step: Positive = 10
    """First traced step, counted from the step at which the attempt starts."""
    steps: Positive = 3
    """Number of traced steps."""
    memory_snapshot: bool = False
    """Also record the CUDA allocator's history of these steps."""


@dataclass(frozen=True)
class TensorBoard:
    """Event files for TensorBoard; `tensorboard: {}` turns them on."""

    log_dir: str | None = None
    """`null`: `tensorboard/` beside `metrics.jsonl`."""


@dataclass(frozen=True)
class Export:
    """Hugging Face folder and text sample at the end of training; `export: null` writes none."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the exported weights."""
    prompt: str = "\n"
    """Beginning of the text sample."""
    max_new_tokens: Natural = 64
    """Tokens of the sample. 0: no sample."""
    temperature: NotNegative = 0.8
    """Sampling temperature."""
    top_k: Positive = 50
    """Sample from the k most likely tokens."""


@dataclass(frozen=True)
class Recipe:
    """One run, from raw text to a trained model."""

    model: dict[str, Any]
    """`_target_` and keywords of the model."""
    dataset: dict[str, Any]
    """Training data; see [Data sets](#data-sets)."""
    name: str = "run"
    """Name of the run's folder. Default: the file's name."""
    validation_dataset: dict[str, Any] | None = None
    """Validation data: one data set, or several by name; see [Data sets](#data-sets)."""
    optimizer: dict[str, Any] = field(default_factory=lambda: {"_target_": "torch.optim.AdamW", "lr": 2e-4})
    """`_target_` and keywords of the optimizer; see [Optimizers and rates](#optimizers-and-rates)."""
    lr_scheduler: LRScheduler | None = None
    """Learning-rate schedule. `null`: a constant rate."""
    parameter_groups: list[ParameterGroup] = field(default_factory=list)
    """Different rates and weight decay for some parameters."""
    loss_fn: dict[str, Any] = field(default_factory=lambda: {"_target_": "amlaunch.trainer.loss.MaskedCrossEntropy"})
    """`_target_` and keywords of the loss; see [Losses](#losses)."""
    step_scheduler: StepScheduler = StepScheduler()
    """Batch sizes, number of steps, intervals."""
    distributed: Distributed = Distributed()
    """Parallelism and types."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints."""
    packed_sequence: PackedSequence = PackedSequence()
    """Packing of documents."""
    dataloader: DataLoader = DataLoader()
    """Reading ahead."""
    clip_grad_norm: ClipGradNorm | None = ClipGradNorm()
    """Gradient clipping. `null`: none."""
    wandb: dict[str, Any] | None = None
    """Any keyword of `wandb.init`; `mode: offline` writes beside the run, for `wandb sync`."""
    tensorboard: TensorBoard | None = None
    """TensorBoard. `null`: none."""
    profile: ProfileSection | None = None
    """Profiler traces. `null`: none."""
    seed: Natural = 42
    """Seed of weights, data order and dropout."""
    compile: Compile = Compile()
    """`torch.compile`."""
    fp8: Fp8 = Fp8()
    """8-bit matrix products."""
    sdpa_method: list[Literal["cudnn_attention", "flash_attention", "efficient_attention", "math"]] | None = None
    """Attention kernels, in the order to try. `null`: the device's fastest first."""
    preprocess: Preprocess | None = None
    """Text to shards. `null`: the shards exist already (`dataset.file_pattern`)."""
    resources: Resources = Resources()
    """Resources of each stage."""
    container: ContainerSection | None = None
    """Container. `null`: none."""
    sweep: dict[str, list[Any]] | None = None
    """Keys and their values: one train element for each sweep point, all on the same shards."""
    export: Export | None = Export()
    """Hugging Face export. `null`: none."""


def has_named_datasets(node: Mapping[str, Any]) -> bool:
    """Return True if a ``validation_dataset`` section holds several data sets by name: all its values are sections."""
    is_one_dataset = bool({"_target_", "sources"} & node.keys())
    return len(node) > 0 and not is_one_dataset and all(isinstance(child, Mapping) for child in node.values())


def validation_sets(node: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return the data sets of a ``validation_dataset`` section by name; a single one is named ``""``.

    The first decides which checkpoint is best.
    """
    if not node:
        return {}
    return dict(node) if has_named_datasets(node) else {"": dict(node)}


def data_sections(recipe: Recipe) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return every data set of a recipe by its key path: the training set, then the validation sets."""
    sections: dict[tuple[str, ...], dict[str, Any]] = {("dataset",): recipe.dataset}
    for name, node in validation_sets(recipe.validation_dataset).items():
        sections[("validation_dataset", name) if name else ("validation_dataset",)] = node
    return sections


def file_sections(recipe: Recipe) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return :func:`data_sections` with each mixture replaced by its sources: the sections that name shards."""
    sections: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, node in data_sections(recipe).items():
        sources = node.get("sources")
        if sources is None:
            sections[path] = node
        elif isinstance(sources, Mapping):
            sections |= {
                (*path, "sources", name): source for name, source in sources.items() if isinstance(source, Mapping)
            }
    return sections
