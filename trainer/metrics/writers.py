"""What a step was like: the console line, ``metrics.jsonl``, the heartbeat, wandb, TensorBoard.

MFU follows nanoGPT's convention, 6N + 12·L·d·T operations a token, against the
dense bfloat16 peak that the maker states, not the one with sparsity.
"""

from __future__ import annotations

import json
import math
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
from amlaunch.recipes.files import append_json_line, read_json_lines, read_object, write_text
from amlaunch.recipes.format.schema import TensorBoard
from amlaunch.recipes.run_layout import ElementDir, Heartbeat
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
"""Dense bfloat16 operations a second (float16 where there is no bfloat16), by a part of the device's name."""


def peak_flops(device: torch.device) -> float | None:
    """The dense bfloat16 peak of a device; None where it is not known, as for a CPU."""
    if device.type != "cuda":
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """The peak of the device with this name: the longest known part decides (``GH200`` is no ``H200``)."""
    words = [known for known in PEAK_FLOPS if known in name]
    return PEAK_FLOPS[max(words, key=len)] if words else None


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


@dataclass(frozen=True)
class StepLine:
    """One step, as the loop knows it."""

    step: int
    epoch: float
    tokens: int
    """Since the beginning of the run."""
    loss: float
    grad_norm: float
    lr: float
    step_tokens: int
    step_time_s: float
    """Waiting for data included; checkpoints and validation not."""
    data_time_s: float
    checkpoint_time_s: float = 0.0
    """How long the loop stood still for checkpoints since the line before."""
    validation_time_s: float = 0.0
    """Spent on validation since the line before."""
    epochs: Mapping[str, float] = field(default_factory=dict)
    """How often each source was seen, where the data is a mixture."""

    @property
    def skipped(self) -> bool:
        """Whether the step changed nothing, for its loss or gradient was not a number."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


class Spikes:
    """Flags a loss far above those before: more than ``SIGMAS`` standard deviations over the mean of ``WINDOW`` steps."""

    WINDOW = 128
    ENOUGH = 32
    SIGMAS = 6.0

    def __init__(self, before: Iterable[float] = ()):
        self._losses: deque[float] = deque(before, maxlen=self.WINDOW)

    def is_one(self, loss: float) -> bool:
        """Whether ``loss``, which is remembered, is a spike."""
        found = False
        if len(self._losses) >= self.ENOUGH:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            found = loss > mean + self.SIGMAS * max(deviation, 1e-3 * abs(mean))
        self._losses.append(loss)
        return found


@dataclass
class Metrics:
    """Where the numbers go; only rank 0 has one."""

    element: ElementDir
    device: torch.device
    ranks: int
    last_step: int
    flops_per_token: float
    peak: float | None
    wandb: Any = None
    tensorboard: Any = None
    skipped: int = 0
    """Steps that changed nothing, since the beginning of the run."""
    spikes: Spikes = field(default_factory=Spikes)
    heartbeat: Heartbeat = field(init=False)
    val_loss: float | None = None
    save_seconds: float | None = None
    """How long the newest save took, of this start or the one before: the driver goes by it near the time limit."""
    saved: int = 0
    """The step that a restart would go on from."""
    startup: dict[str, Any] = field(default_factory=dict)
    """From the start of this process to the end of its first step: ``seconds``, of which ``compile_seconds``; cache hits and misses."""
    newest: dict[str, Any] = field(default_factory=dict)
    """What the last heartbeat said, or would have, had it been due."""

    def __post_init__(self) -> None:
        self.heartbeat = Heartbeat(self.element.progress)
        self.save_seconds = read_object(self.element.progress).get("save_seconds")

    def resume_at(self, step: int) -> None:
        """Drop lines of steps that will be taken again, so that each appears once."""
        self.saved = step
        kept = [line for line in read_json_lines(self.element.metrics) if line["step"] <= step]
        write_text(self.element.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self.val_loss = next((line["val_loss"] for line in reversed(kept) if "val_loss" in line), None)
        self.skipped = next((line["skipped_steps"] for line in reversed(kept) if "skipped_steps" in line), 0)
        self.spikes = Spikes(line["loss"] for line in kept if line.get("loss") is not None)

    def has_validation(self, step: int) -> bool:
        """Whether the validation after ``step`` is written down."""
        return any(line["step"] == step and "val_loss" in line for line in read_json_lines(self.element.metrics))

    def step(self, line: StepLine) -> None:
        """A step is done: say so everywhere."""
        self.skipped += line.skipped
        rate = line.step_tokens / line.step_time_s
        mfu = rate * self.flops_per_token / (self.ranks * self.peak) if self.peak else None
        fields: dict[str, Any] = {
            "step": line.step,
            "epoch": round(line.epoch, 6),
            **{f"epoch/{name}": round(epoch, 6) for name, epoch in line.epochs.items()},
            "tokens": line.tokens,
            "loss": number(line.loss),
            "grad_norm": number(line.grad_norm),
            "lr": line.lr,
            "tokens_per_s": round(rate, 1),
            "tokens_per_s_per_gpu": round(rate / self.ranks, 1),
            "mfu": None if mfu is None else round(mfu, 4),
            "peak_memory_gib": round(peak_memory_gib(self.device), 3),
            "step_time_s": round(line.step_time_s, 6),
            "data_time_s": round(line.data_time_s, 6),
            "checkpoint_time_s": round(line.checkpoint_time_s, 6),
            "validation_time_s": round(line.validation_time_s, 6),
            "skipped_steps": self.skipped,
            "spike": not line.skipped and self.spikes.is_one(line.loss),
            "time": round(time.time(), 3),
        }
        if not self.startup:
            self.startup = started()
            fields["startup"] = self.startup
        append_json_line(self.element.metrics, fields)
        print(console_line(fields, self.last_step), flush=True)
        if "startup" in fields:
            print(startup_line(self.startup), flush=True)
        if line.skipped:
            print(
                f"warning: step {line.step} changed nothing: the loss is {line.loss}, the gradient norm {line.grad_norm}",
                flush=True,
            )
        if fields["spike"]:
            print(
                f"warning: the loss of step {line.step}, {line.loss:.4f}, is far above those of the steps before",
                flush=True,
            )
        self._beat(line, rate)
        self._elsewhere(line.step, fields)

    def _beat(self, line: StepLine, rate: float) -> None:
        self.newest = {
            "unit": "step",
            "done": line.step,
            "total": self.last_step,
            "rate": round(rate, 1),
            "eta_s": round((self.last_step - line.step) * line.step_time_s, 1),
            "loss": self.newest.get("loss") if line.skipped else line.loss,
            "saved": self.saved,
            "step_seconds": round(line.step_time_s, 3),
            "save_seconds": self.save_seconds,
        }
        self.heartbeat.beat(**self.newest, val_loss=self.val_loss)

    def checkpoint(self, step: int, seconds: float) -> None:
        """A checkpoint is whole, after ``seconds``: what a restart would go on from."""
        self.saved, self.save_seconds = step, round(seconds, 3)
        if self.newest:
            self.newest.update(saved=step, save_seconds=self.save_seconds)

    def validation(self, step: int, losses: Mapping[str, float], seconds: float) -> None:
        """A validation is done, after ``seconds``; the first of its ``losses`` is the one that counts, the name "" a single one's."""
        self.val_loss = next(iter(losses.values()))
        found = {"val_loss": self.val_loss, **{f"val_loss/{name}": loss for name, loss in losses.items() if name}}
        fields = {"step": step, **found, "validation_time_s": round(seconds, 6), "time": round(time.time(), 3)}
        append_json_line(self.element.metrics, fields)
        shown = ", ".join(f"{loss:.4f}" + (f" ({name})" if name else "") for name, loss in losses.items())
        print(f"step {step}/{self.last_step} | validation loss {shown}", flush=True)
        self._elsewhere(step, {"step": step, **found})

    def _elsewhere(self, step: int, fields: Mapping[str, Any]) -> None:
        """To wandb and TensorBoard, where the recipe has them."""
        if self.wandb is not None:
            self.wandb.log(dict(fields))
        if self.tensorboard is not None:
            for name, value in fields.items():
                if name not in ("step", "time", "startup") and value is not None:
                    self.tensorboard.add_scalar(name, float(value), step)

    def close(self) -> None:
        """The last heartbeat, of the last step and validation; wandb finishes its upload."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.newest:
            self.heartbeat.beat(**self.newest, val_loss=self.val_loss, last=True)
        if self.wandb is not None:
            self.wandb.finish()


def started() -> dict[str, Any]:
    """How long it took to get here, where the first step of a start has just ended."""
    made = compile_stats()
    return {
        "seconds": round(seconds_since_start(), 3),
        "compile_seconds": round(made.seconds, 3),
        "compile_cache_hits": made.hits,
        "compile_cache_misses": made.misses,
    }


def startup_line(startup: Mapping[str, Any]) -> str:
    """The same, for people."""
    text = f"the first step was done {startup['seconds']:.1f} s after the start of the process"
    graphs = startup["compile_cache_hits"] + startup["compile_cache_misses"]
    if graphs:
        text += f", of which torch.compile took {startup['compile_seconds']:.1f} s ({startup['compile_cache_hits']} of {graphs} graphs were in its cache)"
    return text


def number(value: float) -> float | None:
    """``value``; None where it is not finite, for which JSON has no word."""
    return value if math.isfinite(value) else None


def console_line(fields: dict[str, Any], last_step: int) -> str:
    """One step, for people."""
    mfu = "" if fields["mfu"] is None else f" | mfu {fields['mfu']:.1%}"
    loss, norm = (math.nan if fields[key] is None else fields[key] for key in ("loss", "grad_norm"))
    return (
        f"step {fields['step']}/{last_step} | loss {loss:.4f} | grad norm {norm:.3f} | "
        f"lr {fields['lr']:.2e} | {fields['tokens_per_s']:,.0f} tokens/s{mfu} | {fields['peak_memory_gib']:.2f} GiB"
    )


def open_wandb(section: dict[str, Any] | None, run_id: str) -> Any:
    """The wandb run, the same one after a resume; None without a section. Raises BadInput where wandb is not installed."""
    if section is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise BadInput(
            f"wandb cannot be imported here ({error}): pip install 'amlaunch[wandb]', or remove the section (--wandb null)"
        ) from None
    run = wandb.init(**{"id": run_id, "resume": "allow", **section})
    run.define_metric("*", step_metric="step")  # our own step: wandb's drops what goes back after a resume
    return run


def open_tensorboard(section: TensorBoard | None, element: ElementDir, step: int) -> Any:
    """A writer of TensorBoard's event files, without what an interrupted run wrote after ``step``; None without a section.

    Raises BadInput where TensorBoard is not installed.
    """
    if section is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadInput(
            f"TensorBoard cannot be imported here ({error}): pip install 'amlaunch[tensorboard]', or remove the section (--tensorboard null)"
        ) from None
    return SummaryWriter(section.log_dir or str(element.root / "tensorboard"), purge_step=step + 1 if step else None)


def summary(path: Path) -> dict[str, Any]:
    """First and last losses and the median speed of a run, from its ``metrics.jsonl``."""
    lines = read_json_lines(path)
    steps = [line for line in lines if line.get("loss") is not None]
    validations = [line["val_loss"] for line in lines if "val_loss" in line]
    found: dict[str, Any] = {}
    if steps:
        found["loss_first"], found["loss_last"] = steps[0]["loss"], steps[-1]["loss"]
        found["tokens_per_s"] = statistics.median(line["tokens_per_s"] for line in steps)
        found["skipped_steps"] = steps[-1].get("skipped_steps", 0)
        starts = [line["startup"] for line in steps if "startup" in line]
        if starts:
            found["startup"] = starts[-1]
    if validations:
        found["val_loss_first"], found["val_loss"] = validations[0], validations[-1]
    return found
