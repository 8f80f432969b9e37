"""The sections of a recipe, one frozen dataclass each, in the vocabulary of NeMo AutoModel's guide.

A field's name is the YAML key, its type is what is checked, its default is
what an absent key means. Sections that carry a ``_target_`` stay mappings:
their keys belong to the callable (see :mod:`amlaunch.recipes.format.targets`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: Any) -> int:
    """``500M``, ``1.5B``, ``2_000`` or a whole number, as an int; decimal multiples as in the guide's options.

    Raises ValueError for anything else, negative numbers and fractions of one included.
    """
    if isinstance(value, bool):
        raise ValueError("a count such as 500M or 1.5B")
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:[eE][+]?\d+)?)\s*([KMBTkmbt]?)", str(value).strip())
    if match and len(str(value)) < 30 and float(match[1]) < 1e30:
        number = float(match[1]) * SUFFIXES[match[2].upper()]
        whole = (
            int(match[1].replace("_", "")) * SUFFIXES[match[2].upper()]
            if "." not in match[1] and "e" not in match[1].lower()
            else round(number)
        )
        if whole == number or abs(number) > 2**53:
            return whole
    raise ValueError("a count such as 500M or 1.5B")


MINUTES = "a time such as 90 (minutes), 04:00:00 or 1-12:00:00"
TIME_FORMS = (
    r"(?P<minutes>\d+)(:(?P<seconds>[0-5]?\d))?",
    r"(?P<hours>\d+):(?P<minutes>[0-5]?\d):(?P<seconds>[0-5]?\d)",
    r"(?P<days>\d+)-(?P<hours>[01]?\d|2[0-3])(:(?P<minutes>[0-5]?\d)(:(?P<seconds>[0-5]?\d))?)?",
)
SECONDS_OF = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def parse_minutes(value: Any) -> int:
    """Slurm's time formats (sbatch(1), ``--time``) as whole minutes, rounded up.

    They are minutes, ``MM:SS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM`` and ``D-HH:MM:SS``; only the first number may be
    as large as it likes. Raises ValueError for anything else, and for no time at all, which Slurm takes for no limit.
    """
    text = "" if isinstance(value, bool) else str(value).strip()
    match = next((found for form in TIME_FORMS if (found := re.fullmatch(form, text, re.ASCII))), None)
    seconds = sum(int(number or 0) * SECONDS_OF[unit] for unit, number in match.groupdict().items()) if match else 0
    if not seconds or seconds >= 60 * 2**31:
        raise ValueError(MINUTES)
    return -(-seconds // 60)


def parse_memory(value: Any) -> str:
    """Slurm's form of memory (sbatch(1), ``--mem``): a whole number and K, M (the default), G or T; 0: all of a node.

    Raises ValueError for anything else.
    """
    text = "" if isinstance(value, bool) else str(value).strip().upper()
    if not re.fullmatch(r"[0-9]{1,15}[KMGT]?", text):
        raise ValueError("memory such as 64G or 900M (a whole number with K, M, G or T; 0 is all of a node)")
    return text


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
"""tiktoken's encodings and the size of their vocabularies (tiktoken 0.14), known without importing it, and our own."""


def is_own_tokenizer(name: str) -> bool:
    """Whether a tokenizer is a user's file or folder: ``char:FILE``, a path with a slash, a tokenizer.json."""
    return name.startswith("char:") or "/" in name or name.endswith(".json")


Count = Annotated[int, parse_count]
Minutes = Annotated[int, parse_minutes]
Memory = Annotated[str, parse_memory]
Positive = Annotated[int, "positive"]
Natural = Annotated[int, "natural"]


@dataclass(frozen=True)
class StepScheduler:
    """How many steps, of how many windows, and what happens every so many of them."""

    global_batch_size: Positive = 32
    """Windows a step, over all ranks and micro-batches."""
    local_batch_size: Positive = 1
    """Windows a rank holds at once (the micro-batch)."""
    max_steps: Positive | None = None
    """Where to end; None: at the end of the last epoch."""
    num_epochs: Positive = 1
    ckpt_every_steps: Positive | None = 1000
    val_every_steps: Positive | None = None
    val_batches: Positive = 20
    """Batches of ``global_batch_size`` windows in each validation: the same windows every time, on any number of ranks."""
    max_skipped_steps: Positive = 10
    """So many steps in a row whose loss or gradient is not a number end the run; such a step changes nothing."""


@dataclass(frozen=True)
class LRScheduler:
    """Learning rate as a function of the step; an absent section is a constant rate."""

    lr_decay_style: Literal["cosine", "linear", "constant", "WSD", "inverse-square-root"] = "cosine"
    lr_warmup_steps: Natural = 0
    lr_warmup_tokens: Count | None = None
    """Instead of steps; a step that is begun counts whole."""
    lr_decay_steps: Positive | None = None
    """Step at which ``min_lr`` is reached; None: the last step."""
    lr_decay_tokens: Count | None = None
    lr_wsd_decay_steps: Positive | None = None
    """WSD (warmup, stable, decay): how many of the last steps decay; None: a fifth."""
    lr_wsd_decay_tokens: Count | None = None
    lr_wsd_decay_style: Literal["linear", "cosine", "minus_sqrt", "exponential"] = "linear"
    init_lr: float = 0.0
    min_lr: float = 0.0


@dataclass(frozen=True)
class ParameterGroup:
    """Settings of the parameters whose names fit a pattern; the first group that fits decides."""

    match: str
    """As in a shell: ``wte.*``, ``*.attn.*``."""
    lr: float | None = None
    """The peak; the schedule's rate is scaled by it. None: ``lr_scale`` times the optimizer's."""
    lr_scale: float = 1.0
    weight_decay: float | None = None
    """None: the optimizer's on matrices, 0 on vectors."""


@dataclass(frozen=True)
class Distributed:
    """How the model is spread over the ranks."""

    strategy: Literal["fsdp2", "ddp", "none"] = "fsdp2"
    dp_size: Positive | None = None
    """Data-parallel ranks; None: what is left of the world."""
    dp_replicate_size: Positive | None = None
    """Replicas of the sharded model (HSDP); None: one."""
    tp_size: Positive = 1
    """Ranks that share every matrix."""
    cp_size: Positive = 1
    """Ranks that share the positions of every window."""
    sequence_parallel: bool = False
    """With ``tp_size``: norms, dropout and the residual stream are shared out, too, by positions."""
    dtype: Literal["bfloat16", "float32", "float64"] | None = None
    """Type that the model computes in; None: bfloat16 on GPU, float32 on CPU. Master weights are at least float32."""
    bf16_residual: bool = False
    """Carry the residual stream in bfloat16 where the model computes in it, as FSDP2 always does; else it is float32."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that FSDP2 adds up gradients in, where the model computes in bfloat16."""
    reshard_after_forward: bool = True
    """Free a block's weights after its forward, and gather them again for its backward; false: keep them."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Compute again in the backward instead of keeping: none, whole blocks, or all but matrix products and attention."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the host's memory (fsdp2)."""
    timeout_minutes: Positive = 10
    """After which a collective that does not come is an error."""
    hang_seconds: Positive | None = None
    """A rank that gets nowhere for so long writes down what its threads do, and ends the job; None: nine tenths of
    ``timeout_minutes``, or of ``resources.train.hang_minutes`` where that is less."""


@dataclass(frozen=True)
class Checkpoint:
    """Where and how checkpoints are kept."""

    enabled: bool = True
    checkpoint_dir: str | None = None
    """None: in the run directory; a path: ``<path>/<run-id>``."""
    max_recent_checkpoints: Positive = 2
    keep_best: bool = True
    """Keep that of the lowest validation loss, too."""
    keep_every_steps: Positive | None = None
    """Keep one of every so many steps for good."""
    is_async: bool = True
    """Write beside the training, from a copy in the host's memory; false: without the copy, while training waits."""
    model_save_format: Literal["torch_save", "safetensors"] = "torch_save"
    """Of the weights, sharded; optimizer state is always torch.distributed.checkpoint's."""
    save_consolidated: bool = False
    """Put a folder that transformers loads into every checkpoint."""
    restore_from: str = "auto"
    """auto: the newest, if there is one; latest; best; or a path of a checkpoint to begin from."""


@dataclass(frozen=True)
class PackedSequence:
    """Packing of whole documents, which do not see one another, into rows of one length."""

    packed_sequence_size: Natural = 0
    """Tokens a row; 0: no packing, windows of ``dataset.seq_len`` are cut from the stream."""


@dataclass(frozen=True)
class DataLoader:
    """How batches get from disk to the device."""

    num_workers: Natural = 1
    """Threads that read ahead, each every so-many-th batch; 0: none does, and training waits for each batch."""
    prefetch_factor: Positive = 2
    """Batches that they keep ready, together."""


@dataclass(frozen=True)
class ClipGradNorm:
    """Clipping by the global gradient norm."""

    max_norm: float = 1.0


@dataclass(frozen=True)
class Compile:
    """``torch.compile``, with static shapes."""

    enabled: bool = False
    scope: Literal["auto", "blocks", "model"] = "auto"
    """How much at once; auto: the whole model on one rank, else each transformer block."""
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"


@dataclass(frozen=True)
class Fp8:
    """Products of the blocks' linear layers in 8 bits: for large models on Hopper GPUs and later."""

    enabled: bool = False
    exclude: list[str] = field(default_factory=list)
    """Patterns of the names of linear layers that stay as they are: ``*.c_proj``, ``h.0.*``."""


@dataclass(frozen=True)
class Preprocess:
    """Text to shards, from one of ``dataset`` (Hugging Face), ``data_files`` (local files) and ``source`` (an iterator)."""

    dataset: str | None = None
    """Name on the Hugging Face hub, or a local dataset folder."""
    set_name: str | None = None
    split: str = "train"
    revision: str | None = None
    """Commit, tag or branch of the dataset on the hub; None: the newest commit when the element starts."""
    data_files: list[str] | str | None = None
    """Globs; the ending decides: .parquet, .jsonl, .jsonl.gz, .jsonl.zst, anything else is one document a file."""
    exclude: list[str] | str = field(default_factory=list)
    """Globs of files to leave out."""
    source: dict[str, Any] | None = None
    """An iterable of texts by ``_target_``; a callable with parameters ``part`` and ``parts`` gives each part alone."""
    data_cache_dir: str | None = None
    """Where files of the hub are downloaded before they are read; None: they are streamed."""
    text_column: str = "text"
    encoding: str = "utf-8"
    """Of text files; ``python`` honours a source file's coding line (PEP 263)."""
    encoding_errors: Literal["strict", "replace", "skip"] = "strict"
    """What a file that cannot be decoded means: an error, U+FFFD in its place, or the file left out and counted."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a damaged record or file means: the element fails and names it, or it is left out, counted and listed."""
    tokenizer: str = "gpt2"
    """An encoding of tiktoken; ``byte``; ``char:FILE`` (the characters of a text file); a folder with a tokenizer.json."""
    bos: bool = True
    """Begin each document with the tokenizer's beginning-of-sequence token (end-of-text where it has none)."""
    engine: Literal["auto", "tiktoken", "gigatoken"] = "auto"
    """What tokenises; the tokens are the same. auto: gigatoken where it is installed and proven for the encoding."""
    max_tokens: Count | None = None
    """Budget: the first so many tokens of the source, validation included."""
    val_tokens: Count = 0
    """Of which at least so many (whole documents) become the validation split."""
    shard_tokens: Count = 100_000_000
    """The most that a shard holds; a document that is longer has one to itself."""
    parts: Positive | None = None
    """Pieces of the source that are worked on independently, each its own shards; None: by size. More keep more CPUs busy."""
    elements: Positive = 1
    """Array elements; each takes some of the parts."""
    num_workers: Positive | None = None
    """Processes of an element; None: one a CPU."""
    chunk_size: Positive = 256
    """The most rows that are read at once."""
    format: Literal["bin", "raw"] = "bin"
    """raw: also train.bin and val.bin without headers, as nanoGPT reads them."""
    output_dir: str | None = None
    """None: a folder named by the fingerprint of this section, beside the runs."""


SAME_BYTES = ("data_cache_dir", "engine", "num_workers", "chunk_size")
"""Keys of ``preprocess`` that say how the shards are made, not what is in them."""


@dataclass(frozen=True)
class StageResources:
    """What one element of a stage needs."""

    nodes: Positive | None = None
    gpus_per_node: Natural | None = None
    tasks_per_node: Positive | None = None
    """Ranks a node; None: one a GPU, or one without GPUs."""
    cpus: Positive | None = None
    """CPUs a node."""
    mem: Memory | None = None
    """Memory a node."""
    time: Minutes | None = None
    hang_minutes: Positive | None = None
    """Ranks that neither step nor write a line for so long are ended and tried again; None: 30."""


@dataclass(frozen=True)
class Resources:
    """What each stage needs."""

    preprocess: StageResources = StageResources()
    verify: StageResources = StageResources()
    train: StageResources = StageResources()
    export: StageResources = StageResources()


@dataclass(frozen=True)
class Mount:
    """The long form of a mount."""

    source: str
    target: str | None = None
    """None: the same path inside."""
    read_only: bool = False


@dataclass(frozen=True)
class StageImages:
    """Stages that do not run in ``container.image``: an image of their own, or ``none``."""

    preprocess: str | None = ""
    verify: str | None = ""
    train: str | None = ""
    export: str | None = ""


@dataclass(frozen=True)
class Container:
    """In which image the stages run."""

    image: str | None = None
    """A name in a registry, or a .sqsh, .sif or .tar file, or the folder of an OCI bundle."""
    mounts: list[str | Mount] = field(default_factory=list)
    """``/host/path[:/inside][:ro]``, or ``{source: …, target: …, read_only: true}``."""
    env: dict[str, str] = field(default_factory=dict)
    workdir: str | None = None
    """None: the folder that submit was typed in."""
    runtime: str = "auto"
    """auto: what the site has."""
    entrypoint: bool = False
    """Run the image's own entrypoint first."""
    stages: StageImages = StageImages()
    """``{preprocess: none}``: that stage without a container, in the environment that submits."""


@dataclass(frozen=True)
class Profile:
    """torch's profiler over some steps of this start of the run; traces lie beside ``metrics.jsonl``."""

    start_step: Positive = 10
    """The first step that is traced, counted from where the run goes on."""
    steps: Positive = 3
    memory_snapshot: bool = False
    """Also what the CUDA allocator did in these steps."""


@dataclass(frozen=True)
class TensorBoard:
    """Where TensorBoard finds the numbers."""

    log_dir: str | None = None
    """None: ``tensorboard/`` beside ``metrics.jsonl``."""


@dataclass(frozen=True)
class Export:
    """What is written when training is done."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    prompt: str = "\n"
    max_new_tokens: Natural = 64
    """0: no sample."""
    temperature: float = 0.8
    top_k: Positive = 50


@dataclass(frozen=True)
class Recipe:
    """One run, from raw text to a trained model."""

    model: dict[str, Any]
    dataset: dict[str, Any]
    name: str = "run"
    validation_dataset: dict[str, Any] | None = None
    """One data set, or several by name; see :func:`validation_sets`."""
    optimizer: dict[str, Any] = field(default_factory=lambda: {"_target_": "torch.optim.AdamW", "lr": 2e-4})
    lr_scheduler: LRScheduler | None = None
    parameter_groups: list[ParameterGroup] = field(default_factory=list)
    loss_fn: dict[str, Any] = field(default_factory=lambda: {"_target_": "amlaunch.trainer.loss.MaskedCrossEntropy"})
    step_scheduler: StepScheduler = StepScheduler()
    distributed: Distributed = Distributed()
    checkpoint: Checkpoint = Checkpoint()
    packed_sequence: PackedSequence = PackedSequence()
    dataloader: DataLoader = DataLoader()
    clip_grad_norm: ClipGradNorm | None = ClipGradNorm()
    wandb: dict[str, Any] | None = None
    tensorboard: TensorBoard | None = None
    profile: Profile | None = None
    seed: Natural = 42
    compile: Compile = Compile()
    fp8: Fp8 = Fp8()
    sdpa_method: list[Literal["cudnn_attention", "flash_attention", "efficient_attention", "math"]] | None = None
    """Kernels of attention in the order in which they are tried; None: the fastest of the device first."""
    preprocess: Preprocess | None = None
    resources: Resources = Resources()
    container: Container | None = None
    sweep: dict[str, list[Any]] | None = None
    export: Export | None = Export()


def is_named(node: Mapping[str, Any]) -> bool:
    """Whether a ``validation_dataset`` section is several data sets by name: then all of its values are sections."""
    return (
        len(node) > 0
        and not {"_target_", "sources"} & node.keys()
        and all(isinstance(child, Mapping) for child in node.values())
    )


def validation_sets(node: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The data sets of a ``validation_dataset`` section by name, that of a single one "" ; the first decides which checkpoint is best."""
    if not node:
        return {}
    return dict(node) if is_named(node) else {"": dict(node)}


def data_sections(recipe: Recipe) -> dict[tuple[str, ...], dict[str, Any]]:
    """Every data set of a recipe by the keys that lead to it: training's and validation's."""
    found = {("dataset",): recipe.dataset}
    return found | {
        ("validation_dataset", *([name] if name else [])): node
        for name, node in validation_sets(recipe.validation_dataset).items()
    }


def file_sections(recipe: Recipe) -> dict[tuple[str, ...], dict[str, Any]]:
    """The same, with a mixture's sources instead of itself: where shards are named."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, node in data_sections(recipe).items():
        sources = node.get("sources")
        named = sources.items() if isinstance(sources, Mapping) else ()
        found |= (
            {path: node}
            if sources is None
            else {(*path, "sources", name): source for name, source in named if isinstance(source, Mapping)}
        )
    return found
