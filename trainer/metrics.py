"""What a step was like: the console line, ``metrics.jsonl``, the heartbeat, wandb.

MFU follows nanoGPT's convention, 6N + 12·L·d·T operations a token, against the
dense bfloat16 peak that the maker states, not the one with sparsity.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recipes.errors import BadInput
from recipes.files import append_json_line, read_json_lines, write_text
from recipes.rundir import ElementDir, Heartbeat

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
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
    data_time_s: float


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
    heartbeat: Heartbeat = field(init=False)
    val_loss: float | None = None
    saved: int = 0
    """The step that a restart would go on from."""
    newest: dict[str, Any] = field(default_factory=dict)
    """What the last heartbeat said, or would have, had it been due."""

    def __post_init__(self) -> None:
        self.heartbeat = Heartbeat(self.element.progress)

    def resume_at(self, step: int) -> None:
        """Drop lines of steps that will be taken again, so that each appears once."""
        self.saved = step
        kept = [line for line in read_json_lines(self.element.metrics) if line["step"] <= step]
        write_text(self.element.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self.val_loss = next((line["val_loss"] for line in reversed(kept) if "val_loss" in line), None)

    def has_validation(self, step: int) -> bool:
        """Whether the validation after ``step`` is written down."""
        return any(line["step"] == step and "val_loss" in line for line in read_json_lines(self.element.metrics))

    def step(self, line: StepLine) -> None:
        """A step is done: say so everywhere."""
        rate = line.step_tokens / line.step_time_s
        mfu = rate * self.flops_per_token / (self.ranks * self.peak) if self.peak else None
        fields = {
            "step": line.step,
            "epoch": round(line.epoch, 6),
            "tokens": line.tokens,
            "loss": line.loss,
            "grad_norm": line.grad_norm,
            "lr": line.lr,
            "tokens_per_s": round(rate, 1),
            "tokens_per_s_per_gpu": round(rate / self.ranks, 1),
            "mfu": None if mfu is None else round(mfu, 4),
            "peak_memory_gib": round(peak_memory_gib(self.device), 3),
            "step_time_s": round(line.step_time_s, 6),
            "data_time_s": round(line.data_time_s, 6),
            "time": round(time.time(), 3),
        }
        append_json_line(self.element.metrics, fields)
        print(console_line(fields, self.last_step), flush=True)
        self._beat(line, rate)
        self._to_wandb(fields)

    def _beat(self, line: StepLine, rate: float) -> None:
        self.newest = {
            "unit": "step",
            "done": line.step,
            "total": self.last_step,
            "rate": round(rate, 1),
            "eta_s": round((self.last_step - line.step) * line.step_time_s, 1),
            "loss": line.loss,
            "saved": self.saved,
        }
        self.heartbeat.beat(**self.newest, val_loss=self.val_loss)

    def checkpoint(self, step: int) -> None:
        """A checkpoint is whole: what a restart would go on from."""
        self.saved = step
        if self.newest:
            self.newest["saved"] = step

    def validation(self, step: int, loss: float) -> None:
        """A validation is done."""
        self.val_loss = loss
        append_json_line(self.element.metrics, {"step": step, "val_loss": loss, "time": round(time.time(), 3)})
        print(f"step {step}/{self.last_step} | validation loss {loss:.4f}", flush=True)
        self._to_wandb({"step": step, "val_loss": loss})

    def _to_wandb(self, fields: dict[str, Any]) -> None:
        if self.wandb is not None:
            self.wandb.log(fields)

    def close(self) -> None:
        """The last heartbeat, of the last step and validation; wandb finishes its upload."""
        if self.newest:
            self.heartbeat.beat(**self.newest, val_loss=self.val_loss, last=True)
        if self.wandb is not None:
            self.wandb.finish()


def console_line(fields: dict[str, Any], last_step: int) -> str:
    """One step, for people."""
    mfu = "" if fields["mfu"] is None else f" | mfu {fields['mfu']:.1%}"
    return (
        f"step {fields['step']}/{last_step} | loss {fields['loss']:.4f} | grad norm {fields['grad_norm']:.3f} | "
        f"lr {fields['lr']:.2e} | {fields['tokens_per_s']:,.0f} tokens/s{mfu} | {fields['peak_memory_gib']:.2f} GiB"
    )


def open_wandb(section: dict[str, Any] | None, run_id: str) -> Any:
    """The wandb run, the same one after a resume; None without a section. Raises BadInput where wandb is not installed."""
    if section is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise BadInput(f"wandb cannot be imported here ({error}): pip install 'amlaunch[wandb]', or remove the section (--wandb null)") from None
    run = wandb.init(**{"id": run_id, "resume": "allow", **section})
    run.define_metric("*", step_metric="step")  # our own step: wandb's drops what goes back after a resume
    return run


def summary(path: Path) -> dict[str, Any]:
    """First and last losses and the median speed of a run, from its ``metrics.jsonl``."""
    lines = read_json_lines(path)
    steps = [line for line in lines if "loss" in line]
    validations = [line["val_loss"] for line in lines if "val_loss" in line]
    found: dict[str, Any] = {}
    if steps:
        found["loss_first"], found["loss_last"] = steps[0]["loss"], steps[-1]["loss"]
        found["tokens_per_s"] = statistics.median(line["tokens_per_s"] for line in steps)
    if validations:
        found["val_loss_first"], found["val_loss"] = validations[0], validations[-1]
    return found
