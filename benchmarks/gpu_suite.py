"""Run all speed measurements that need a GPU: trainer, baselines, ablations, larger models and device checks.

Usage: benchmarks/gpu_suite.sh [--dry] [--minutes N] [--only NAME,NAME] [--list] [--out FILE]

Each measurement runs in one or more processes. If one fails or exceeds its time
limit, all its processes are killed and the next measurement starts. The order is
by importance, so that the total time limit cuts the least important ones. The
table is printed at the end, also after a signal (Ctrl-C, SIGTERM) or when the
time is over. ``--out`` is updated after each measurement. ``--dry`` tests the
suite on a CPU with tiny models, without GPU-only measurements; its numbers mean
nothing. The exit code is 1 if a measurement failed, and 130 after a signal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
PEAK_FLOPS = 989e12
"""Dense bfloat16 operations per second of H100 SXM and H200, for the MFU of the baselines."""
MIN_SECONDS = 25.0
"""A measurement is not started with less time left."""
DRY_LIMIT_FACTOR = 5
"""Factor on time limits in a dry run, because a CPU is slow."""
GRACE_SECONDS = 5.0
"""Time for a killed process to end, and for the last measurement to end after the total time limit."""
LOSS_BOUND, NORM_BOUND = 2e-3, 2e-2
"""Maximum deviation of all fast paths together from float64 (docs/performance.md)."""
TINY_GPT2 = [
    "--model.n_layer=2",
    "--model.n_embd=64",
    "--model.n_head=2",
    "--model.vocab_size=512",
    "--model.n_positions=64",
    "--dataset.seq_len=64",
    "--loss_fn.vocab_size=500",
    "--preprocess.tokenizer=byte",
    "--step_scheduler.global_batch_size=8",
    "--step_scheduler.local_batch_size=4",
    "--compile.enabled=false",
    "--distributed.dtype=float32",
]
TINY_LLAMA = [
    "--model.num_hidden_layers=2",
    "--model.hidden_size=64",
    "--model.intermediate_size=128",
    "--model.num_attention_heads=2",
    "--model.num_key_value_heads=2",
    "--model.vocab_size=512",
    "--dataset.seq_len=64",
    "--loss_fn.vocab_size=500",
    "--preprocess.tokenizer=byte",
    "--step_scheduler.global_batch_size=8",
    "--step_scheduler.local_batch_size=4",
    "--compile.enabled=false",
    "--distributed.dtype=float32",
]
ONE_MICRO_BATCH = ("--step_scheduler.global_batch_size=64",)
"""Ablations take one micro-batch per step, which shows differences and leaves time for more ablations."""
TORCH_LOSS = "--loss_fn={_target_: amlaunch.trainer.loss.LinearCrossEntropy, implementation: torch}"
"""torch's implementation takes no ``vocab_size``."""


class MeasurementFailed(Exception):
    """A measurement failed; the message says why."""


class MeasurementSkipped(Exception):
    """A measurement is not possible on this machine; the message says why."""


class OutOfTime(Exception):
    """The total time ended during a measurement; the message has its last output."""


@dataclass
class Measurement:
    """One row of the table."""

    name: str
    run: Callable[[Measurement, Suite], dict[str, Any]]
    arguments: Sequence[str] = ()
    limit: float = 120.0
    """Time limit in seconds for all its processes together; longer in a dry run."""
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass
class Suite:
    """Settings and time limits shared by all measurements."""

    dry: bool
    folder: Path
    deadline: float
    measurement_deadline: float = float("inf")
    """Deadline of the current measurement."""

    def start(self, measurement: Measurement) -> None:
        """Start the time limit of a measurement."""
        limit = measurement.limit * (DRY_LIMIT_FACTOR if self.dry else 1)
        self.measurement_deadline = min(self.deadline, time.monotonic() + limit)

    def process(
        self, argv: Sequence[str], ok_codes: Sequence[int] = (0,), variables: Mapping[str, str] | None = None
    ) -> str:
        """Run a command, with additional environment ``variables``, and return its stdout.

        Raises MeasurementFailed for an exit code not in ``ok_codes`` or a timeout, and OutOfTime at the deadline.
        """
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compile"),
        }
        if self.dry:
            environment["AMLAUNCH_DEVICE"] = "cpu"
        environment.update(variables or {})
        timeout = max(1.0, min(self.measurement_deadline, self.deadline) - time.monotonic())

        # files, because a pipe stays open while any descendant of the process is alive
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            child = subprocess.Popen(
                argv,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                code = child.wait(timeout)
            except subprocess.TimeoutExpired:
                output = f"last output: {last_line(contents(stdout) + contents(stderr))}"
                if self.measurement_deadline >= self.deadline:
                    raise OutOfTime(output) from None
                raise MeasurementFailed(f"exceeded its time limit of {timeout:.0f} s; {output}") from None
            finally:
                kill_session(child)
            output, errors = contents(stdout), contents(stderr)
        if code not in ok_codes:
            raise MeasurementFailed(last_line(output + errors, "rror") or f"exit code {code}")
        return output


def contents(file: Any) -> str:
    """Return everything written to a file."""
    file.seek(0)
    return str(file.read())


def last_line(text: str, word: str = "") -> str:
    """Return the last line that contains ``word``, or else the last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if word in line), lines[-1] if lines else "")


def kill_session(child: subprocess.Popen[bytes]) -> None:
    """Kill a process and the rest of its session."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    # a process that hangs in a GPU driver is left behind
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)


def module(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of amlaunch with any supported Python."""
    from amlaunch.recipes.python_process import python_command

    return [*python_command(name), *arguments]


# --- the measurements -----------------------------------------------------------------------------


def bench(measurement: Measurement, suite: Suite) -> dict[str, Any]:
    """Run ``bench train`` with the measurement's arguments: a recipe, then overrides."""
    from amlaunch.trainer.torch_features import has_linear_cross_entropy

    if suite.dry and "--fp8.enabled=true" in measurement.arguments:
        raise MeasurementSkipped("FP8 needs a GPU")
    if TORCH_LOSS in measurement.arguments and not has_linear_cross_entropy():
        raise MeasurementSkipped("torch's linear_cross_entropy needs torch 2.13")
    tiny = TINY_LLAMA if measurement.arguments[0].startswith("llama") else TINY_GPT2
    if TORCH_LOSS in measurement.arguments:
        tiny = [override for override in tiny if not override.startswith("--loss_fn.")]
    arguments = [*measurement.arguments, *(tiny if suite.dry else ())]
    return dict(json.loads(suite.process(module("amlaunch.trainer.tools.bench", "train", *arguments, "--json"))))


def baseline(measurement: Measurement, suite: Suite) -> dict[str, Any]:
    """Measure Hugging Face's GPT-2."""
    mode, micro_batch = measurement.arguments
    arguments = [mode, "--micro-batch", micro_batch]
    if suite.dry:
        arguments = ["eager", "--tiny", "--micro-batch", "4", "--steps", "3"]
    output = suite.process([sys.executable, str(ROOT / "benchmarks/baselines.py"), *arguments])
    report = dict(json.loads(last_line(output)))
    mfu = None if suite.dry else report["tokens_per_s"] * report["flops_per_token"] / PEAK_FLOPS
    return {**report, "mfu": mfu}


def device(measurement: Measurement, suite: Suite) -> dict[str, Any]:
    """Measure matrix products and copies like ``doctor --gpu``."""
    out = suite.folder / "gpucheck.json"
    suite.process(module("amlaunch.trainer.tools.gpu_check", "--out", str(out)))
    report = json.loads(out.read_text())
    gpu = report["gpus"][0]
    return {
        "note": f"{gpu['device']}: {gpu['gemm_tflops']:.4g} TFLOP/s, copies {gpu['copy_gb_s']:.4g} GB/s, "
        f"torch {report['torch']}, NCCL {report['nccl']}"
    }


def doctor(measurement: Measurement, suite: Suite) -> dict[str, Any]:
    """Run ``amlaunch doctor --gpu`` if the launcher's packages are installed; its bad findings are no failure."""
    missing = [name for name in ("submitit", "rich", "yaml", "shtab") if importlib.util.find_spec(name) is None]
    if missing:
        raise MeasurementSkipped(f"not installed: {', '.join(missing)}")
    arguments = ["doctor", "--json"] if suite.dry else ["doctor", "--json", "--gpu"]
    report = json.loads(suite.process(module("amlaunch", *arguments), ok_codes=(0, 1)))
    bad = [finding["name"] for finding in report["findings"] if finding["verdict"] == "bad"]
    return {"note": f"verdict: {report['verdict']}" + (f" ({', '.join(bad)})" if bad else "")}


def text_overrides(suite: Suite) -> list[str]:
    """Return overrides that train nanogpt on this machine's Python sources, one token per byte.

    That is real text without a download; its paragraphs are documents.
    """
    import numpy as np

    from amlaunch.preprocess.shards.shard_format import write_shard

    shard = suite.folder / "text.bin"
    if not shard.exists():
        raw, max_bytes = bytearray(), 1 << 19 if suite.dry else 1 << 25
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
            raw += path.read_bytes()
            if len(raw) > max_bytes:
                break
        paragraphs = [text + b"\n\n" for text in bytes(raw).split(b"\n\n")]
        write_shard(shard, [np.frombuffer(text, dtype=np.uint8).astype("<u2") for text in paragraphs], np.dtype("<u2"))
    return [
        f"--dataset.file_pattern={shard}",
        "--validation_dataset=null",
        "--export=null",
        "--preprocess.tokenizer=byte",
        "--model.vocab_size=384",
        "--loss_fn.vocab_size=257",
    ]


def train(
    suite: Suite,
    name: str,
    *overrides: str,
    recipe: str = "nanogpt",
    ranks: int = 1,
    variables: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Train with the trainer itself, under torchrun if ``ranks`` > 1; return the lines of ``metrics.jsonl``."""
    element = suite.folder / name
    element.mkdir(exist_ok=True)
    tiny = TINY_GPT2 if recipe == "nanogpt" else TINY_LLAMA
    tiny = [override for override in tiny if "vocab_size" not in override] if suite.dry else []
    folders = ["--element", str(element), "--checkpoints", str(element / "checkpoints")]
    command = module("amlaunch.trainer")
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*torchrun, "-m", "amlaunch.trainer"]
    arguments = [recipe, *folders, *text_overrides(suite), *tiny, *overrides]
    suite.process([*command, *arguments], variables=variables)
    return [json.loads(line) for line in (element / "metrics.jsonl").read_text().splitlines()]


def checkpoints(measurement: Measurement, suite: Suite) -> dict[str, Any]:
    """Save during training and resume; the losses must be those of an uninterrupted run."""
    batch = "8" if suite.dry else "32"
    overrides = [
        "--step_scheduler.ckpt_every_steps=3",
        f"--step_scheduler.global_batch_size={batch}",
        f"--step_scheduler.local_batch_size={batch}",
        "--lr_scheduler=null",
        "--compile.enabled=false",
    ]
    uninterrupted = train(suite, "uninterrupted", *overrides, "--step_scheduler.max_steps=6")
    train(suite, "resumed", *overrides, "--step_scheduler.max_steps=3")
    resumed = train(suite, "resumed", *overrides, "--step_scheduler.max_steps=6")
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(uninterrupted, resumed, strict=True))
    if len(resumed) != 6 or difference > 5e-3:
        raise MeasurementFailed(f"the loss differs by {difference:.2g} after a resume")
    blocked = max(line["checkpoint_time_s"] for line in uninterrupted)
    note = f"resumed after step 3 (loss within {difference:.1g}); a save blocked training for {blocked * 1e3:.0f} ms"
    return {"note": note}


def residual(measurement: Measurement, suite: Suite) -> dict[str, Any]:
    """Compare the loss curves of a float32 and a bfloat16 residual stream on the same data."""
    steps = "12" if suite.dry else "150"
    overrides = [
        f"--step_scheduler.max_steps={steps}",
        "--step_scheduler.global_batch_size=64",
        "--checkpoint.enabled=false",
        "--lr_scheduler.lr_warmup_steps=10",
    ]
    if suite.dry:
        overrides += ["--step_scheduler.global_batch_size=8", "--distributed.dtype=bfloat16"]
    curves = {}
    for name, is_bfloat16 in (("float32", "false"), ("bfloat16", "true")):
        lines = train(suite, f"residual-{name}", *overrides, f"--distributed.bf16_residual={is_bfloat16}")
        curves[name] = [line["loss"] for line in lines]
    ends = {name: sum(curve[-10:]) / 10 for name, curve in curves.items()}
    note = f"mean loss of the last 10 of {steps} steps: float32 {ends['float32']:.4f}, bfloat16 {ends['bfloat16']:.4f}"
    return {"note": note, "curves": curves}


FAST = (
    "--distributed.dtype=bfloat16",
    "--distributed.bf16_residual=true",
    "--compile.scope=model",
    "--step_scheduler.local_batch_size=4",
)
EXACT = (
    "--distributed.dtype=float64",
    "--compile.enabled=false",
    "--step_scheduler.local_batch_size=8",
    "--loss_fn={_target_: amlaunch.trainer.loss.MaskedCrossEntropy, vocab_size: 257}",
)
PARITY_MODELS = {
    "nanogpt": ("--model.n_layer=2", "--model.n_embd=256", "--model.n_head=4"),
    "llama-350m": (
        "--model.num_hidden_layers=2",
        "--model.hidden_size=256",
        "--model.intermediate_size=512",
        "--model.num_attention_heads=4",
        "--model.num_key_value_heads=2",
    ),
}


def parity(measurement: Measurement, suite: Suite) -> dict[str, Any]:
    """Compare all fast paths together, on this device's kernels, with plain float64.

    Covers GPT-2, and Llama on packed documents.
    """
    common = (
        "--step_scheduler.max_steps=12",
        "--step_scheduler.global_batch_size=8",
        "--step_scheduler.val_every_steps=null",
        "--checkpoint.enabled=false",
        "--lr_scheduler=null",
        "--optimizer.lr=3e-4",
        "--distributed.strategy=none",
    )
    length = 64 if suite.dry else 512
    errors = {}
    for recipe, sizes in PARITY_MODELS.items():
        packed_size = length if recipe.startswith("llama") else 0
        samples = (f"--dataset.seq_len={length}", f"--packed_sequence.packed_sequence_size={packed_size}")
        fast = train(suite, f"{recipe}-fast", *sizes, *common, *samples, *FAST, recipe=recipe)
        exact = train(suite, f"{recipe}-exact", *sizes, *common, *samples, *EXACT, recipe=recipe)
        for column in ("loss", "grad_norm"):
            errors[f"{recipe} {column}"] = max(abs(a[column] / b[column] - 1) for a, b in zip(fast, exact, strict=True))
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    note = f"largest deviation of bfloat16 with all fast paths from float64 over 12 steps: {shown}"
    if any(error > (LOSS_BOUND if name.endswith("loss") else NORM_BOUND) for name, error in errors.items()):
        raise MeasurementFailed(note)
    return {"note": note, "errors": errors}


TYPE_BOUNDS = {"float32": 1e-6, "bfloat16": 4e-3}
"""Bounds of the relative difference from one rank in float64: about the unit of rounding of bfloat16, and 16 times
that of float32 (docs/performance.md). A sum instead of an average over two ranks differs by 1."""
TYPE_STEPS = (
    "--step_scheduler.max_steps=3",
    "--step_scheduler.global_batch_size=8",
    "--step_scheduler.local_batch_size=4",
    "--step_scheduler.val_every_steps=null",
    "--checkpoint.enabled=false",
    "--compile.enabled=false",
    "--lr_scheduler=null",
    "--optimizer={_target_: torch.optim.SGD, lr: 0.5}",
    "--clip_grad_norm.max_norm=0.2",
    "--loss_fn={_target_: amlaunch.trainer.loss.MaskedCrossEntropy, vocab_size: 257}",
    "--dataset.seq_len=64",
)
"""SGD and clipping pass on a wrong scale of the gradients to the next loss, which AdamW would hide."""
TYPE_MODELS = {
    "nanogpt": ("--model.n_layer=2", "--model.n_embd=64", "--model.n_head=4"),
    "llama-350m": (
        "--model.num_hidden_layers=2",
        "--model.hidden_size=64",
        "--model.intermediate_size=128",
        "--model.num_attention_heads=4",
        "--model.num_key_value_heads=2",
    ),
}
ON_ONE_RANK = {"none": ("nanogpt", ("strategy=none",)), "fsdp2": ("llama-350m", ("strategy=fsdp2",))}
ON_TWO_RANKS = {
    "ddp": ("nanogpt", ("strategy=ddp",)),
    "fsdp2": ("nanogpt", ("strategy=fsdp2",)),
    "tp": ("llama-350m", ("tp_size=2",)),
    "cp": ("llama-350m", ("cp_size=2",)),
}


def parity_of_types(measurement: Measurement, suite: Suite) -> dict[str, Any]:
    """Compare losses and gradient norms before clipping with one rank in float64 on the CPU, in float32 and bfloat16.

    Two GPUs are two ranks over NCCL. NCCL does not put two ranks on one GPU, so one GPU is one rank. A dry run is two
    ranks over gloo.
    """
    import torch

    ranks = 2 if suite.dry else min(2, torch.cuda.device_count())
    if ranks == 0:
        raise MeasurementSkipped("this machine has no GPU; --dry compares two ranks on the CPU")
    cases = ON_TWO_RANKS if ranks == 2 else ON_ONE_RANK
    # NGC's images switch TF32 on, which is no float32
    exact = {"NVIDIA_TF32_OVERRIDE": "0"}
    references = {
        recipe: train(
            suite,
            f"types-{recipe}",
            *TYPE_STEPS,
            *sizes,
            "--distributed.dtype=float64",
            "--distributed.strategy=none",
            recipe=recipe,
            variables={"AMLAUNCH_DEVICE": "cpu"},
        )
        for recipe, sizes in TYPE_MODELS.items()
        if recipe in {recipe for recipe, _ in cases.values()}
    }
    errors = {}
    for name, (recipe, settings) in cases.items():
        for dtype in TYPE_BOUNDS:
            distributed = [f"--distributed.{setting}" for setting in (f"dtype={dtype}", *settings)]
            overrides = (*TYPE_STEPS, *TYPE_MODELS[recipe], *distributed)
            lines = train(suite, f"types-{name}-{dtype}", *overrides, recipe=recipe, ranks=ranks, variables=exact)
            errors[f"{name} {dtype}"] = largest_deviation(lines, references[recipe])
    where = "one rank on a GPU" if ranks == 1 else f"two ranks over {'gloo' if suite.dry else 'NCCL'}"
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    note = f"largest deviation from one rank in float64 on the CPU, {where}, 3 steps: {shown}"
    # not "error > bound", which a NaN would pass
    if not all(error < TYPE_BOUNDS[name.split()[1]] for name, error in errors.items()):
        raise MeasurementFailed(note)
    return {"note": note, "errors": errors}


def largest_deviation(lines: list[dict[str, Any]], reference: list[dict[str, Any]]) -> float:
    """Return the largest relative deviation of losses and gradient norms; NaN if one of them is."""
    import numpy as np

    columns = ("loss", "grad_norm")
    values, expected = (np.array([[line[name] for name in columns] for line in run]) for run in (lines, reference))
    return float(np.abs(values / expected - 1).max())


def measurements() -> list[Measurement]:
    """Return all measurements, the most important first.

    References come first, then larger models, ablations, and what is slow to start.
    """
    quick = ("--steps=8", "--warmup=3", "--profiled=0", *ONE_MICRO_BATCH)
    medium = ("llama-350m", "--steps=8", "--warmup=3", "--profiled=1", "--step_scheduler.global_batch_size=64")
    large = ("llama-1.3b", "--steps=6", "--warmup=3", "--step_scheduler.global_batch_size=32")
    masked_loss = "--loss_fn={_target_: amlaunch.trainer.loss.MaskedCrossEntropy, vocab_size: 50257}"
    flash = "--sdpa_method=[flash_attention, efficient_attention, math]"
    micro_8, micro_16, micro_32 = (f"--step_scheduler.local_batch_size={size}" for size in (8, 16, 32))
    return [
        Measurement("device", device, limit=60),
        Measurement("124M", bench, ("nanogpt", "--steps=10", "--warmup=3", "--profiled=2"), 150),
        Measurement("hf-compile", baseline, ("compile", "32"), 100),
        Measurement("hf-eager", baseline, ("eager", "32"), 60),
        Measurement("residual-curves", residual, limit=150),
        Measurement("350M", bench, (*medium, micro_16), 120),
        Measurement("1.3B", bench, (*large, "--profiled=1", micro_8), 150),
        Measurement("checkpoints", checkpoints, limit=120),
        Measurement("350M-32", bench, (*medium, micro_32), 120),
        Measurement("1.3B-16", bench, (*large, "--profiled=1", micro_16), 150),
        Measurement("parity", parity, limit=120),
        Measurement("parity-types", parity_of_types, limit=150),
        Measurement("micro-64", bench, ("nanogpt", *quick), 90),
        Measurement("loss-logits", bench, ("nanogpt", *quick, masked_loss), 90),
        Measurement("loss-torch", bench, ("nanogpt", *quick, TORCH_LOSS), 90),
        Measurement("residual-f32", bench, ("nanogpt", *quick, "--distributed.bf16_residual=false"), 90),
        Measurement("attention-flash", bench, ("nanogpt", *quick, flash), 90),
        Measurement("blocks", bench, ("nanogpt", *quick, "--compile.scope=blocks"), 90),
        Measurement("micro-32", bench, ("nanogpt", *quick, micro_32), 90),
        Measurement("fp8-124M", bench, ("nanogpt", *quick, "--fp8.enabled=true"), 90),
        Measurement("fp8-1.3B", bench, (*large, "--profiled=0", micro_8, "--fp8.enabled=true"), 150),
        Measurement("eager", bench, ("nanogpt", *quick, "--compile.enabled=false", micro_32), 60),
        Measurement("doctor", doctor, limit=120),
        Measurement("autotune", bench, ("nanogpt", *quick, "--compile.mode=max-autotune-no-cudagraphs"), 200),
    ]


# --- running them ---------------------------------------------------------------------------------


def run_one(measurement: Measurement, suite: Suite) -> None:
    """Run a measurement and store its outcome, whatever it is."""
    started = time.monotonic()
    if suite.deadline - started < (1.0 if suite.dry else MIN_SECONDS):
        measurement.outcome = {"state": "no time left"}
        return
    suite.start(measurement)
    try:
        measurement.outcome = {**measurement.run(measurement, suite), "state": "done"}
    except MeasurementSkipped as reason:
        measurement.outcome = {"state": f"skipped: {reason}"}
    except OutOfTime as reason:
        measurement.outcome = {"state": f"no time left; {reason}"}
    except MeasurementFailed as reason:
        measurement.outcome = {"state": f"FAILED: {reason}"}
    except KeyboardInterrupt:
        measurement.outcome = {"state": "interrupted"}
        raise
    except Exception as error:
        measurement.outcome = {"state": f"FAILED: {type(error).__name__}: {error}"}
    finally:
        seconds = measurement.outcome["seconds"] = round(time.monotonic() - started, 1)
    print(f"{measurement.name}: {measurement.outcome['state']} after {seconds} s", file=sys.stderr, flush=True)


@contextmanager
def interrupted_at(deadline: float) -> Iterator[None]:
    """Raise KeyboardInterrupt at a signal, and a short time after ``deadline``."""

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_REAL, max(0.1, deadline - time.monotonic() + GRACE_SECONDS))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_all(selected: Sequence[Measurement], suite: Suite, out: Path | None) -> bool:
    """Run the measurements in turn; return False if interrupted."""
    for measurement in selected:
        measurement.outcome = {"state": "not started"}
    try:
        with interrupted_at(suite.deadline):
            for measurement in selected:
                try:
                    run_one(measurement, suite)
                finally:
                    write_outcomes(selected, out)
    except KeyboardInterrupt:
        return False
    return True


def write_outcomes(selected: Sequence[Measurement], out: Path | None) -> None:
    """Write all outcomes so far."""
    if out is not None:
        from amlaunch.recipes.files import write_json

        write_json(out, {measurement.name: measurement.outcome for measurement in selected})


def format_row(measurement: Measurement) -> str:
    """Format a measurement as a row of the table."""
    outcome = measurement.outcome
    if outcome["state"] != "done" or "tokens_per_s" not in outcome:
        return f"{measurement.name:<16}{outcome.get('note') or outcome['state']}"
    mfu = f"{outcome['mfu']:.1%}" if outcome.get("mfu") else ""
    peak = f"{outcome['peak_memory_gib']:.1f}" if outcome.get("peak_memory_gib") else ""
    startup = outcome.get("startup_s", outcome.get("warmup_s", 0.0))
    step_ms = outcome["step_time_s"]["median"] * 1e3
    row = f"{measurement.name:<16}{outcome['tokens_per_s']:>12,.0f}{mfu:>8}{step_ms:>10.1f}{peak:>8}{startup:>8.0f}"
    row += "  " + ", ".join(outcome.get("attention", {}).get("used", []))
    if outcome.get("host_waits_per_step"):
        row += f"  {outcome['host_waits_per_step']:.1f} host waits per step"
    return row


def format_table(selected: Sequence[Measurement], dry: bool) -> str:
    """Format all measurements as a table."""
    head = f"{'measurement':<16}{'tokens/s':>12}{'MFU':>8}{'step ms':>10}{'GiB':>8}{'start s':>8}  attention"
    lines = [head + ("   (dry run: these numbers mean nothing)" if dry else "")]
    for measurement in selected:
        lines.append(format_row(measurement))
        if "advice" in measurement.outcome:
            lines.append(f"{'':<16}advice: {measurement.outcome['advice']}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Run all speed measurements that need a GPU.")
    parser.add_argument("--dry", action="store_true", help="test the suite on a CPU with tiny models")
    parser.add_argument("--minutes", type=float, default=8.7, help="total time limit (8.7)")
    parser.add_argument("--only", help="names of the measurements to run, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names of the measurements")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    return parser.parse_args()


def main() -> int:
    """Run the measurements, print the table, and return the exit code."""
    started, options = time.monotonic(), parse_arguments()
    names = set(options.only.split(",")) if options.only else set()
    selected = [measurement for measurement in measurements() if not names or measurement.name in names]
    unknown = names - {measurement.name for measurement in selected}
    if unknown:
        print(f"error: unknown measurement: {', '.join(sorted(unknown))}. Run --list to see all", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(measurement.name for measurement in selected))
        return 0
    with tempfile.TemporaryDirectory(prefix="gpu-suite-", ignore_cleanup_errors=True) as folder:
        suite = Suite(options.dry, Path(folder), started + 60 * options.minutes)
        is_complete = run_all(selected, suite, options.out)
        # print before the folder is deleted, which can take long
        print(format_table(selected, options.dry), flush=True)
    if not is_complete:
        return 130
    return 1 if any("FAILED" in measurement.outcome["state"] for measurement in selected) else 0


if __name__ == "__main__":
    sys.exit(main())
