"""Write the metrics of each step: console, ``metrics.jsonl``, heartbeat, wandb and TensorBoard.

MFU follows nanoGPT's convention: 6N + 12·L·d·T operations per token against the
manufacturer's dense bfloat16 peak, without sparsity.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_json_lines, read_object, write_text
from amlaunch.recipes.format.schema import TensorBoard
from amlaunch.recipes.run_layout import ElementDir, Heartbeat
from amlaunch.trainer.metrics.full_disk import DISK_FULL, MetricsFile, show_life, warn
from amlaunch.trainer.performance.compilation import compile_stats
from amlaunch.trainer.process.start_time import seconds_since_start

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "H20": 148e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
}
"""Dense bfloat16 operations per second (float16 on devices without bfloat16), by a substring of the device name."""


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bfloat16 peak of a device; None if unknown, as for a CPU."""
    if device.type != "cuda":
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """Return the peak of a device by name; the longest known substring wins (``GH200`` over ``H200``)."""
    matches = [known for known in PEAK_FLOPS if known in name]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass(frozen=True)
class StepRecord:
    """Numbers of one step, as the loop reports them."""

    step: int
    epoch: float
    tokens: int
    """Tokens since the beginning of the run."""
    loss: float
    grad_norm: float
    lr: float
    step_tokens: int
    step_time_s: float
    """Duration including waiting for data, excluding checkpoints and validation."""
    data_time_s: float
    checkpoint_time_s: float = 0.0
    """Time since the previous record during which checkpoints blocked the loop."""
    validation_time_s: float = 0.0
    """Time spent on validation since the previous record."""
    epochs: Mapping[str, float] = field(default_factory=dict)
    """Epochs of each source of a data mixture."""

    @property
    def is_skipped(self) -> bool:
        """True if the update was skipped because the loss or gradient norm was not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


class LossSpikeDetector:
    """Flags a loss more than ``SIGMAS`` standard deviations above the mean of the last ``WINDOW`` steps."""

    WINDOW = 128
    MIN_LOSSES = 32
    SIGMAS = 6.0

    def __init__(self, losses: Iterable[float] = ()):
        self._losses: deque[float] = deque(losses, maxlen=self.WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Return True if ``loss`` is a spike, and add it to the window."""
        spike = False
        if len(self._losses) >= self.MIN_LOSSES:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            spike = loss > mean + self.SIGMAS * max(deviation, 1e-3 * abs(mean))
        self._losses.append(loss)
        return spike


@dataclass
class Metrics:
    """Writes the metrics of a run; exists on rank 0 only."""

    element: ElementDir
    device: torch.device
    ranks: int
    last_step: int
    flops_per_token: float
    peak_flops: float | None
    wandb: Any = None
    tensorboard: Any = None
    skipped_steps: int = 0
    """Skipped updates since the beginning of the run."""
    spike_detector: LossSpikeDetector = field(default_factory=LossSpikeDetector)
    heartbeat: Heartbeat = field(init=False)
    val_loss: float | None = None
    save_seconds: float | None = None
    """Duration of the newest save, also of an earlier start; the driver uses it near the time limit."""
    saved_step: int = 0
    """Step from which a restart would resume."""
    startup: dict[str, Any] = field(default_factory=dict)
    """Times from the start of this process to the end of its first step (:func:`startup_times`)."""
    wandb_step: int = 0
    """Last step that an earlier start logged to wandb; steps that are trained again are not logged twice."""
    latest_beat: dict[str, Any] = field(default_factory=dict)
    """Content of the newest heartbeat, whether or not it was due to be written."""

    file: MetricsFile = field(init=False)

    def __post_init__(self) -> None:
        self.heartbeat = Heartbeat(self.element.progress)
        self.file = MetricsFile(self.element.metrics)
        self.save_seconds = read_object(self.element.progress).get("save_seconds")

    def resume_at(self, step: int) -> float | None:
        """Drop the lines of steps that will be repeated, so that each step appears once.

        Return the learning rate of ``step``; None if it is not recorded.
        """
        self.saved_step = step
        lines = read_json_lines(self.element.metrics)
        self.wandb_step = max((line["step"] for line in lines), default=0)
        kept = [line for line in lines if line["step"] <= step]
        write_text(self.element.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self.val_loss = next((line["val_loss"] for line in reversed(kept) if "val_loss" in line), None)
        self.skipped_steps = next((line["skipped_steps"] for line in reversed(kept) if "skipped_steps" in line), 0)
        self.spike_detector = LossSpikeDetector(line["loss"] for line in kept if line.get("loss") is not None)
        return next((line["lr"] for line in reversed(kept) if line["step"] == step and "lr" in line), None)

    def has_validation(self, step: int) -> bool:
        """Return True if ``metrics.jsonl`` has the validation of ``step``."""
        lines = [*read_json_lines(self.element.metrics), *self.file.waiting]
        return any(line["step"] == step and "val_loss" in line for line in lines)

    def log_step(self, record: StepRecord) -> None:
        """Write the numbers of a finished step to every destination."""
        self.skipped_steps += record.is_skipped
        fields = self._step_fields(record)
        if not self.startup:
            self.startup = startup_times()
            fields["startup"] = self.startup
        self.file.append(fields)

        print(console_line(fields, self.last_step), flush=True)
        if "startup" in fields:
            print(startup_line(self.startup), flush=True)
        if record.is_skipped:
            print(
                f"warning: step {record.step}: update skipped, because the loss is {record.loss} "
                f"and the gradient norm is {record.grad_norm}",
                flush=True,
            )
        if fields["spike"]:
            print(f"warning: step {record.step}: loss spike ({record.loss:.4f})", flush=True)
        self._beat(record)
        self._log_to_trackers(record.step, fields)

    def _step_fields(self, record: StepRecord) -> dict[str, Any]:
        """Return a step's line of ``metrics.jsonl``."""
        rate = record.step_tokens / record.step_time_s
        mfu = rate * self.flops_per_token / (self.ranks * self.peak_flops) if self.peak_flops else None
        return {
            "step": record.step,
            "epoch": round(record.epoch, 6),
            **{f"epoch/{name}": round(epoch, 6) for name, epoch in record.epochs.items()},
            "tokens": record.tokens,
            "loss": finite_or_none(record.loss),
            "grad_norm": finite_or_none(record.grad_norm),
            "lr": record.lr,
            "tokens_per_s": round(rate, 1),
            "tokens_per_s_per_gpu": round(rate / self.ranks, 1),
            "mfu": None if mfu is None else round(mfu, 4),
            "peak_memory_gib": round(peak_memory_gib(self.device), 3),
            "step_time_s": round(record.step_time_s, 6),
            "data_time_s": round(record.data_time_s, 6),
            "checkpoint_time_s": round(record.checkpoint_time_s, 6),
            "validation_time_s": round(record.validation_time_s, 6),
            "skipped_steps": self.skipped_steps,
            "spike": not record.is_skipped and self.spike_detector.is_spike(record.loss),
            "time": round(time.time(), 3),
        }

    def _beat(self, record: StepRecord) -> None:
        self.latest_beat = {
            "unit": "step",
            "done": record.step,
            "total": self.last_step,
            "rate": round(record.step_tokens / record.step_time_s, 1),
            "eta_s": round((self.last_step - record.step) * record.step_time_s, 1),
            "loss": self.latest_beat.get("loss") if record.is_skipped else record.loss,
            "saved": self.saved_step,
            "step_seconds": round(record.step_time_s, 3),
            "save_seconds": self.save_seconds,
        }
        self._write_heartbeat()

    def _write_heartbeat(self, *, last: bool = False) -> None:
        try:
            self.heartbeat.beat(**self.latest_beat, val_loss=self.val_loss, last=last)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            show_life(self.element.progress)

    def checkpoint_saved(self, step: int, seconds: float) -> None:
        """Record a complete checkpoint, from which a restart would resume, and the duration of its save."""
        self.saved_step, self.save_seconds = step, round(seconds, 3)
        if self.latest_beat:
            self.latest_beat.update(saved=step, save_seconds=self.save_seconds)

    def log_validation(self, step: int, losses: Mapping[str, float], seconds: float) -> None:
        """Write the validation losses by set, the decisive one first; a single set has the name ""."""
        self.val_loss = next(iter(losses.values()))
        losses_by_key = {"val_loss": self.val_loss}
        losses_by_key |= {f"val_loss/{name}": loss for name, loss in losses.items() if name}
        timing = {"validation_time_s": round(seconds, 6), "time": round(time.time(), 3)}
        self.file.append({"step": step, **losses_by_key, **timing})
        shown = ", ".join(f"{loss:.4f}" + (f" ({name})" if name else "") for name, loss in losses.items())
        print(f"step {step}/{self.last_step} | validation loss {shown}", flush=True)
        self._log_to_trackers(step, {"step": step, **losses_by_key})

    def _log_to_trackers(self, step: int, fields: Mapping[str, Any]) -> None:
        """Log to wandb and TensorBoard if the recipe has them."""
        if self.wandb is not None and step > self.wandb_step:
            self.wandb.log(dict(fields), step=step)
        if self.tensorboard is None:
            return
        try:
            for name, value in fields.items():
                if name not in ("step", "time", "startup") and value is not None:
                    self.tensorboard.add_scalar(name, float(value), step)
        except OSError as error:
            # Its writer does not recover.
            self.tensorboard = None
            warn(f"no more events for TensorBoard: {error}")

    def close(self) -> None:
        """Write the last heartbeat and finish TensorBoard and wandb."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.latest_beat:
            self._write_heartbeat(last=True)
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
            if self.wandb.offline:
                pieces = Path(self.wandb.dir).parents[1] / f"offline-run-*-{self.wandb.id}"
                print(f"wandb was offline; to upload all pieces of the run, in order: wandb sync {pieces}", flush=True)


def startup_times() -> dict[str, Any]:
    """Return the time from the process start to the end of its first step, and torch.compile's share and cache hits."""
    compilation = compile_stats()
    return {
        "seconds": round(seconds_since_start(), 3),
        "compile_seconds": round(compilation.seconds, 3),
        "compile_cache_hits": compilation.hits,
        "compile_cache_misses": compilation.misses,
    }


def startup_line(startup: Mapping[str, Any]) -> str:
    """Format :func:`startup_times` for the console."""
    text = f"first step finished {startup['seconds']:.1f} s after process start"
    hits = startup["compile_cache_hits"]
    graphs = hits + startup["compile_cache_misses"]
    if graphs:
        text += f"; torch.compile took {startup['compile_seconds']:.1f} s ({hits} of {graphs} graphs were cached)"
    return text


def finite_or_none(value: float) -> float | None:
    """Return ``value``, or None if it is not finite, which JSON cannot express."""
    return value if math.isfinite(value) else None


def console_line(fields: dict[str, Any], last_step: int) -> str:
    """Format a line of ``metrics.jsonl`` for the console."""
    mfu = "" if fields["mfu"] is None else f" | mfu {fields['mfu']:.1%}"
    loss, norm = (math.nan if fields[key] is None else fields[key] for key in ("loss", "grad_norm"))
    return (
        f"step {fields['step']}/{last_step} | loss {loss:.4f} | grad norm {norm:.3f} | "
        f"lr {fields['lr']:.2e} | {fields['tokens_per_s']:,.0f} tokens/s{mfu} | {fields['peak_memory_gib']:.2f} GiB"
    )


def open_wandb(section: dict[str, Any] | None, run_id: str, folder: Path) -> Any:
    """Open the wandb run, the same one after a resume; None without a section.

    Its files are in ``folder``, or in ``$WANDB_DIR``. Raises BadInput if wandb is not installed.
    """
    if section is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise BadInput(
            f"wandb cannot be imported ({error}). Install it with pip install 'amlaunch[wandb]', "
            "or remove the section (--wandb null)"
        ) from None
    place = {} if "WANDB_DIR" in os.environ else {"dir": str(folder)}
    run = wandb.init(**{"id": run_id, "resume": "allow", **place, **section})
    run.define_metric("*", step_metric="step")
    return run


def open_tensorboard(section: TensorBoard | None, element: ElementDir, step: int) -> Any:
    """Open a TensorBoard writer and drop events after ``step``; None without a section.

    Raises BadInput if TensorBoard is not installed.
    """
    if section is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadInput(
            f"TensorBoard cannot be imported ({error}). Install it with pip install 'amlaunch[tensorboard]', "
            "or remove the section (--tensorboard null)"
        ) from None
    return SummaryWriter(section.log_dir or str(element.root / "tensorboard"), purge_step=step + 1 if step else None)


def summarise_metrics(path: Path) -> dict[str, Any]:
    """Return first and last losses and the median speed of a run, from its ``metrics.jsonl``."""
    lines = read_json_lines(path)
    steps = [line for line in lines if line.get("loss") is not None]
    validation_losses = [line["val_loss"] for line in lines if "val_loss" in line]
    summary: dict[str, Any] = {}
    if steps:
        summary["loss_first"], summary["loss_last"] = steps[0]["loss"], steps[-1]["loss"]
        summary["tokens_per_s"] = statistics.median(line["tokens_per_s"] for line in steps)
        summary["skipped_steps"] = steps[-1].get("skipped_steps", 0)
        startups = [line["startup"] for line in steps if "startup" in line]
        if startups:
            summary["startup"] = startups[-1]
    if validation_losses:
        summary["val_loss_first"], summary["val_loss"] = validation_losses[0], validation_losses[-1]
    return summary
