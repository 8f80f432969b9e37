"""Split the time of a step by activity, from a trace of torch's profiler, and compare it with the device's limits.

``python -m amlaunch.trainer.tools.roofline TRACE.json.gz STEPS`` prints the time
by activity for any trace that a run's ``profile`` section wrote. On a GPU,
kernels are counted by what they compute. On a CPU, the self time of operators
on the training thread is counted.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlaunch.recipes.errors import BAD_INPUT, OK
from amlaunch.trainer.performance.trace_regions import LOSS_REGION

PARTS = (
    "matrix products",
    "attention",
    "elementwise",
    "loss",
    "optimizer",
    "communication",
    "waiting for data",
    "gaps",
)
OPTIMIZER_REGION = re.compile(r"Optimizer\.(step|zero_grad)#")
MATRIX_OPERATORS = r"aten::(mm|addmm|bmm|addbmm|baddbmm|matmul|linear|_scaled_mm)\b"
PART_PATTERNS = (
    ("communication", re.compile(r"nccl|c10d::|gloo|all_?reduce|all_?gather|reduce_?scatter", re.I)),
    ("attention", re.compile(r"flash|fmha|sdpa|attention|cudnn_generated.*(fprop|bprop)", re.I)),
    ("optimizer", re.compile(r"multi_tensor_apply|fused_adam|_foreach_|LpNorm|linalg_vector_norm", re.I)),
    ("loss", re.compile(r"log_softmax|nll_loss|cross_entropy|logsumexp", re.I)),
    (
        "matrix products",
        re.compile(rf"gemm|nvjet|cutlass|cublas|{MATRIX_OPERATORS}|mkl(dnn)?_?linear|xmma|s16816|splitK", re.I),
    ),
)
"""The first pattern that matches a kernel's or operator's name decides; all others are elementwise."""
BACKEND_PATTERNS = (
    ("cudnn_attention", re.compile(r"cudnn.*(sdpa|flash|fprop|bprop)|_scaled_dot_product_cudnn", re.I)),
    ("flash_attention", re.compile(r"flash_(fwd|bwd)|pytorch_flash|_scaled_dot_product_flash_attention", re.I)),
    ("efficient_attention", re.compile(r"fmha_cutlass|_scaled_dot_product_efficient", re.I)),
    ("math", re.compile(r"_scaled_dot_product_attention_math", re.I)),
)
HOST_WAIT_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize")
"""Calls that block the host until the device has finished all its work; waiting for one event is not among them."""
OPTIMIZER_BYTES_PER_PARAMETER = 28.0
"""Bytes that AdamW in float32 reads and writes per parameter."""

Event = dict[str, Any]
"""One event of a trace; times are in microseconds."""
Span = tuple[float, float]


# --- reading a trace ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TraceSummary:
    """Seconds per step by part; communication counts only if no other kernel ran at the same time."""

    seconds: dict[str, float]
    step_seconds: float
    """Duration of a step in the trace, which profiling makes longer."""
    on_gpu: bool
    """True if the trace has GPU kernels."""
    backends: tuple[str, ...]
    """Attention backends, recognised by kernel names."""
    host_waits: float | None = None
    """Number of times per step that the host waited for the device; None on a CPU."""


def part_of(name: str) -> str:
    """Return the part (see ``PARTS``) that a kernel or operator belongs to."""
    return next((part for part, pattern in PART_PATTERNS if pattern.search(name)), "elementwise")


def read_trace(path: Path) -> list[Event]:
    """Read the events of a trace that have a duration."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("ph") == "X" and "dur" in event]


def summarise_trace(events: Sequence[Event], steps: int) -> TraceSummary:
    """Summarise the activity of the GPU, or of the CPU's training thread, during ``steps`` steps."""
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    names = {str(event["name"]) for event in events}
    backends = [backend for backend, pattern in BACKEND_PATTERNS if any(pattern.search(name) for name in names)]
    part_microseconds, total_microseconds = _summarise_gpu(kernels, events) if kernels else _summarise_cpu(events)
    return TraceSummary(
        seconds={part: duration / steps / 1e6 for part, duration in part_microseconds.items()},
        step_seconds=total_microseconds / steps / 1e6,
        on_gpu=bool(kernels),
        backends=tuple(backends),
        host_waits=count_host_waits(events) / steps if kernels else None,
    )


def count_host_waits(events: Sequence[Event]) -> int:
    """Count the host's waits between the first and last kernel launch, which leaves out the profiler's own waits."""
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = [event["ts"] for event in calls if "Launch" in event["name"]]
    if not launches:
        return 0
    first, last = min(launches), max(launches)
    return sum(event["name"] in HOST_WAIT_CALLS and first < event["ts"] < last for event in calls)


def _summarise_gpu(kernels: list[Event], events: Sequence[Event]) -> tuple[dict[str, float], float]:
    """Return the kernels' time by part, and the time from the first to the last kernel, in microseconds."""
    regions = Regions(events)
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    durations: dict[str, float] = defaultdict(float)
    communication: list[Span] = []
    computation: list[Span] = []
    for kernel in kernels:
        launch = launches.get(kernel.get("args", {}).get("correlation"))
        part = (launch and regions.part_at(launch)) or part_of(kernel["name"])
        span = (kernel["ts"], kernel["ts"] + kernel["dur"])
        if part == "communication":
            communication.append(span)
        else:
            computation.append(span)
            durations[part] += kernel["dur"]
    all_spans = [*communication, *computation]
    durations["communication"] = covered_time(all_spans) - covered_time(computation)
    return dict(durations), max(end for _, end in all_spans) - min(begin for begin, _ in all_spans)


def _summarise_cpu(events: Sequence[Event]) -> tuple[dict[str, float], float]:
    """Return the operators' self time by part on the busiest thread, and that thread's duration, in microseconds."""
    threads = Counter((event["pid"], event["tid"]) for event in events if event.get("cat") == "cpu_op")
    if not threads:
        return {}, 0.0
    training_thread = threads.most_common(1)[0][0]
    thread_events = [
        event
        for event in events
        if (event["pid"], event["tid"]) == training_thread and event.get("cat") in ("cpu_op", "user_annotation")
    ]
    regions = Regions(thread_events)
    durations: dict[str, float] = defaultdict(float)
    for event, self_time in self_times(thread_events):
        if event["cat"] == "cpu_op" or "Torch-Compiled Region" in event["name"]:
            durations[regions.part_at(event) or part_of(event["name"])] += self_time
    begin = min(event["ts"] for event in thread_events)
    end = max(event["ts"] + event["dur"] for event in thread_events)
    return dict(durations), end - begin


class Regions:
    """Time ranges of the loss and the optimizer on each thread of a trace."""

    def __init__(self, events: Iterable[Event]):
        regions: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
        for event in events:
            part = self._region_part(event)
            if part is not None:
                regions[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"], part))
        self._regions = {thread: sorted(ranges) for thread, ranges in regions.items()}

    @staticmethod
    def _region_part(event: Event) -> str | None:
        if event.get("cat") != "user_annotation":
            return None
        if event["name"] == LOSS_REGION:
            return "loss"
        return "optimizer" if OPTIMIZER_REGION.match(event["name"]) else None

    def part_at(self, event: Event) -> str | None:
        """Return the part of the region in which an event begins; None outside all regions."""
        ranges = self._regions.get((event["pid"], event["tid"]), [])
        index = bisect_right(ranges, (event["ts"], float("inf"), "")) - 1
        if index < 0:
            return None
        _, end, part = ranges[index]
        return part if event["ts"] < end else None


def self_times(events: Sequence[Event]) -> list[tuple[Event, float]]:
    """Return the events of one thread with their self times: duration without nested events."""
    ordered = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    times = [event["dur"] for event in ordered]
    open_events: list[int] = []
    for i, event in enumerate(ordered):
        while open_events and event["ts"] >= ordered[open_events[-1]]["ts"] + ordered[open_events[-1]]["dur"]:
            open_events.pop()
        if open_events:
            times[open_events[-1]] -= event["dur"]
        open_events.append(i)
    return [(event, max(0.0, self_time)) for event, self_time in zip(ordered, times, strict=True)]


def covered_time(spans: Iterable[Span]) -> float:
    """Return the length of the union of ``spans``."""
    total, covered_until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, covered_until))
        covered_until = max(covered_until, end)
    return total


# --- judging a step -------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepPart:
    """Time of one part of a step."""

    part: str
    seconds: float
    share: float
    """Fraction of the step."""
    least: float | None
    """Minimum seconds at the device's measured rates; None if unknown."""


def step_parts(
    summary: TraceSummary, step_seconds: float, data_seconds: float, least: dict[str, float]
) -> list[StepPart]:
    """Split a step of ``step_seconds``, measured without the profiler, into its parts.

    The profiler does not slow down kernels, so the rest of the step is gaps. It
    slows down CPU operators, so only their shares are used.
    """
    scale = 1.0
    if not summary.on_gpu and summary.step_seconds:
        scale = (step_seconds - data_seconds) / summary.step_seconds
    seconds = {part: summary.seconds.get(part, 0.0) * scale for part in PARTS}
    seconds["waiting for data"] = data_seconds
    seconds["gaps"] = max(0.0, step_seconds - sum(seconds.values()))
    return [StepPart(part, duration, duration / step_seconds, least.get(part)) for part, duration in seconds.items()]


def least_seconds(
    *,
    tokens: int,
    block_flops: float,
    attention_flops: float,
    head_flops: float,
    parameters: int,
    flops: float,
    bandwidth: float,
) -> dict[str, float]:
    """Return the minimum seconds of the countable parts for one rank's ``tokens`` of a step.

    ``…_flops``: operations per token, forward and backward. ``parameters``: the
    number that this rank updates. ``flops``, ``bandwidth``: operations and bytes per second.
    """
    return {
        "matrix products": tokens * block_flops / flops,
        "attention": tokens * attention_flops / flops,
        "loss": tokens * head_flops / flops,
        "optimizer": OPTIMIZER_BYTES_PER_PARAMETER * parameters / bandwidth,
    }


def advise(
    parts: Sequence[StepPart],
    *,
    compiled: bool,
    on_gpu: bool,
    backends: Sequence[str],
    micro_batch: int,
    accumulates: bool,
    has_float32_residual: bool = True,
    host_waits: float = 0.0,
) -> str:
    """Return the one change to make first.

    ``accumulates``: a step has several micro-batches. ``has_float32_residual``:
    the model computes in bfloat16, but its residual stream does not.
    """
    share = {part.part: part.share for part in parts}
    efficiency = {part.part: part.least / part.seconds for part in parts if part.least and part.seconds}
    if share["waiting for data"] > 0.05:
        return (
            f"{share['waiting for data']:.0%} of the step is spent waiting for data. "
            "Put the shards on a faster disk, or raise dataloader.prefetch_factor"
        )
    if on_gpu and "math" in backends:
        return (
            "attention uses torch's slowest kernel (math). Check sdpa_method, and the warning at the start of training"
        )
    if share["gaps"] > 0.05 and host_waits >= 1.0:
        return (
            f"the host waits for the device {host_waits:.0f} times per step, and the device is idle meanwhile. "
            "Find the code that reads numbers back (.item(), .cpu(), a mask as an index): "
            "it is in your own model or loss, or in an optimizer that is not fused"
        )
    if share["gaps"] > 0.15 and on_gpu:
        change = f"Raise step_scheduler.local_batch_size above {micro_batch}" if accumulates else "Use larger batches"
        if not compiled:
            change += ", or set compile.enabled to true"
        return f"the device is idle for {share['gaps']:.0%} of the step, because its kernels are too small. {change}"
    if share["communication"] > 0.1:
        return (
            f"{share['communication']:.0%} of the step is communication that does not overlap with computation. "
            "If memory allows, set distributed.strategy to ddp or distributed.reshard_after_forward to false; "
            "or use a larger global batch"
        )
    if not compiled and share["elementwise"] > 0.2:
        return f"{share['elementwise']:.0%} of the step is elementwise kernels. Set compile.enabled to true"
    if share["optimizer"] > 0.1:
        return (
            f"{share['optimizer']:.0%} of the step is the optimizer. "
            "Raise step_scheduler.global_batch_size to take fewer steps for the same number of tokens"
        )
    if share["loss"] > 0.3 and efficiency.get("loss", 1.0) < 0.5:
        return (
            f"{share['loss']:.0%} of the step is the loss, at {efficiency['loss']:.0%} of the rate of large matrix "
            "products. Try another loss_fn.chunk_tokens, or amlaunch.trainer.loss.MaskedCrossEntropy"
        )
    if share["elementwise"] > 0.25 and has_float32_residual:
        return (
            f"{share['elementwise']:.0%} of the step is elementwise kernels. "
            "Set distributed.bf16_residual to true to move fewer bytes"
        )
    text = "no bottleneck stands out"
    if "matrix products" in efficiency:
        text += f"; matrix products reach {efficiency['matrix products']:.0%} of the rate measured with a large one"
    return text


def format_table(parts: Sequence[StepPart]) -> str:
    """Format the parts of a step as a table."""
    lines = [f"{'part of a step':<18}{'ms':>10}{'share':>8}{'minimum ms':>12}"]
    for part in parts:
        least = "" if part.least is None else f"{part.least * 1e3:.2f}"
        lines.append(f"{part.part:<18}{part.seconds * 1e3:>10.2f}{part.share:>8.1%}{least:>12}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the parts of a step of a trace."""
    if len(arguments) != 2 or not arguments[1].isdigit():
        print("usage: python -m amlaunch.trainer.tools.roofline TRACE.json.gz STEPS", file=sys.stderr)
        return BAD_INPUT
    summary = summarise_trace(read_trace(Path(arguments[0])), int(arguments[1]))
    print(format_table(step_parts(summary, summary.step_seconds, 0.0, {})))
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
