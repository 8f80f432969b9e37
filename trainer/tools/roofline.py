"""Where the time of a step goes, from a trace of torch's profiler, against what the device can do.

``python -m amlaunch.trainer.tools.roofline TRACE.json.gz STEPS`` says the first half of any trace
that a run's ``profile`` section wrote. On a GPU the kernels are counted, each
under what it computes; on the CPU the time that operators spend themselves, on
the thread that trains.
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
RULES = (
    ("communication", re.compile(r"nccl|c10d::|gloo|all_?reduce|all_?gather|reduce_?scatter", re.I)),
    ("attention", re.compile(r"flash|fmha|sdpa|attention|cudnn_generated.*(fprop|bprop)", re.I)),
    ("optimizer", re.compile(r"multi_tensor_apply|fused_adam|_foreach_|LpNorm|linalg_vector_norm", re.I)),
    ("loss", re.compile(r"log_softmax|nll_loss|cross_entropy|logsumexp", re.I)),
    ("matrix products", re.compile(r"gemm|nvjet|cutlass|cublas|aten::(mm|addmm|bmm|addbmm|baddbmm|matmul|linear|_scaled_mm)\b|mkl(dnn)?_?linear|xmma|s16816|splitK", re.I)),
)  # fmt: skip
"""By the first that fits a kernel's or an operator's name; what fits none is elementwise."""
BACKENDS = (
    ("cudnn_attention", re.compile(r"cudnn.*(sdpa|flash|fprop|bprop)|_scaled_dot_product_cudnn", re.I)),
    ("flash_attention", re.compile(r"flash_(fwd|bwd)|pytorch_flash|_scaled_dot_product_flash_attention", re.I)),
    ("efficient_attention", re.compile(r"fmha_cutlass|_scaled_dot_product_efficient", re.I)),
    ("math", re.compile(r"_scaled_dot_product_attention_math", re.I)),
)

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize")
"""Calls in which the host stands still until the device has done all that it was given; a late number's event is none of them."""

Span = tuple[float, float]


@dataclass(frozen=True)
class Busy:
    """Seconds a step, by part; ``exposed`` communication only: what no other kernel ran beside."""

    parts: dict[str, float]
    wall: float
    """Of the trace, which profiling makes longer."""
    device: bool
    """Whether these are kernels of a GPU."""
    backends: tuple[str, ...]
    """Of attention, as the names of what ran say."""
    waits: float | None = None
    """How often a step the host waited for the device, between two kernels; None on a CPU."""


def part_of(name: str) -> str:
    """Under which of ``PARTS`` a kernel or operator is counted."""
    return next((part for part, rule in RULES if rule.search(name)), "elementwise")


def read(trace: Path) -> list[dict[str, Any]]:
    """The events of a trace that have a duration."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("ph") == "X" and "dur" in event]


def busy(events: Sequence[dict[str, Any]], steps: int) -> Busy:
    """What the device, or the training thread of the CPU, did in ``steps`` steps."""
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    names = {str(event["name"]) for event in events}
    backends = tuple(backend for backend, rule in BACKENDS if any(rule.search(name) for name in names))
    parts, wall = _of_gpu(kernels, events) if kernels else _of_cpu(events)
    waits = host_waits(events) / steps if kernels else None
    return Busy(
        {part: seconds / steps / 1e6 for part, seconds in parts.items()},
        wall / steps / 1e6,
        bool(kernels),
        backends,
        waits,
    )


def host_waits(events: Sequence[dict[str, Any]]) -> int:
    """How often the host waited while it was still giving work to a GPU: the profiler's own waiting is before and after that."""
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = [event["ts"] for event in calls if "Launch" in event["name"]]
    return (
        sum(event["name"] in WAITS and min(launches) < event["ts"] < max(launches) for event in calls)
        if launches
        else 0
    )


def _of_gpu(kernels: list[dict[str, Any]], events: Sequence[dict[str, Any]]) -> tuple[dict[str, float], float]:
    regions = Regions(events)
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    parts: dict[str, float] = defaultdict(float)
    spans: dict[bool, list[Span]] = {True: [], False: []}
    for kernel in kernels:
        launch = launches.get(kernel.get("args", {}).get("correlation"))
        part = (launch and regions.around(launch)) or part_of(kernel["name"])
        span = (kernel["ts"], kernel["ts"] + kernel["dur"])
        spans[part == "communication"].append(span)
        if part != "communication":
            parts[part] += kernel["dur"]
    parts["communication"] = length([*spans[True], *spans[False]]) - length(spans[False])
    everything = [*spans[True], *spans[False]]
    return dict(parts), max(end for _, end in everything) - min(begin for begin, _ in everything)


def _of_cpu(events: Sequence[dict[str, Any]]) -> tuple[dict[str, float], float]:
    """Self time of what runs on the thread that does most; time between operators is nobody's."""
    threads = Counter((event["pid"], event["tid"]) for event in events if event.get("cat") == "cpu_op")
    if not threads:
        return {}, 0.0
    main = threads.most_common(1)[0][0]
    mine = [
        event
        for event in events
        if (event["pid"], event["tid"]) == main and event.get("cat") in ("cpu_op", "user_annotation")
    ]
    regions = Regions(mine)
    parts: dict[str, float] = defaultdict(float)
    for event, own in self_times(mine):
        if event["cat"] == "cpu_op" or "Torch-Compiled Region" in event["name"]:
            parts[regions.around(event) or part_of(event["name"])] += own
    return dict(parts), max(event["ts"] + event["dur"] for event in mine) - min(event["ts"] for event in mine)


class Regions:
    """The loss and the optimizer as the trace has them: stretches of time on a thread."""

    def __init__(self, events: Iterable[dict[str, Any]]):
        found: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
        for event in events:
            part = (
                "loss"
                if event["name"] == LOSS_REGION
                else "optimizer"
                if OPTIMIZER_REGION.match(event["name"])
                else None
            )
            if part and event.get("cat") == "user_annotation":
                found[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"], part))
        self._found = {thread: sorted(regions) for thread, regions in found.items()}

    def around(self, event: dict[str, Any]) -> str | None:
        """The part in whose region an event begins."""
        regions = self._found.get((event["pid"], event["tid"]), [])
        at = bisect_right(regions, (event["ts"], float("inf"), "")) - 1
        return regions[at][2] if at >= 0 and event["ts"] < regions[at][1] else None


def self_times(events: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Each event of one thread with its duration less that of the events within it."""
    found: list[list[Any]] = []
    open_ones: list[int] = []
    for event in sorted(events, key=lambda one: (one["ts"], -one["dur"])):
        while open_ones and event["ts"] >= found[open_ones[-1]][0]["ts"] + found[open_ones[-1]][0]["dur"]:
            open_ones.pop()
        if open_ones:
            found[open_ones[-1]][1] -= event["dur"]
        open_ones.append(len(found))
        found.append([event, event["dur"]])
    return [(event, max(0.0, own)) for event, own in found]


def length(spans: Iterable[Span]) -> float:
    """How much time ``spans`` cover together."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


@dataclass(frozen=True)
class Row:
    """One part of a step."""

    part: str
    seconds: float
    share: float
    """Of the step."""
    least: float | None
    """Seconds that it would take at the device's measured rates; None where nobody can say."""


def rows(found: Busy, step_seconds: float, data_seconds: float, least: dict[str, float]) -> list[Row]:
    """The parts of a step of ``step_seconds``, as measured without the profiler.

    Kernels take as long with the profiler as without it, so what they leave of the
    step are gaps; operators on the CPU take longer, so there their shares are kept.
    """
    scale = 1.0 if found.device or not found.wall else (step_seconds - data_seconds) / found.wall
    parts = {part: found.parts.get(part, 0.0) * scale for part in PARTS}
    parts["waiting for data"] = data_seconds
    parts["gaps"] = max(0.0, step_seconds - sum(parts.values()))
    return [Row(part, seconds, seconds / step_seconds, least.get(part)) for part, seconds in parts.items()]


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
    """What the parts that can be counted would take at best, for one rank's ``tokens`` of a step.

    ``…_flops`` are of a token, forward and backward; ``parameters`` are those that
    this rank updates, each with 28 bytes moved (AdamW in float32). ``flops`` and
    ``bandwidth`` are a second's.
    """
    return {
        "matrix products": tokens * block_flops / flops,
        "attention": tokens * attention_flops / flops,
        "loss": tokens * head_flops / flops,
        "optimizer": 28.0 * parameters / bandwidth,
    }


def advice(
    found: Sequence[Row],
    *,
    compiled: bool,
    device: bool,
    backends: Sequence[str],
    micro_batch: int,
    accumulates: bool,
    narrow: bool = False,
    waits: float = 0.0,
) -> str:
    """The one thing to change first. ``narrow``: the residual stream is in bfloat16 already, or nothing is."""
    share = {row.part: row.share for row in found}
    least = {row.part: row.least / row.seconds for row in found if row.least and row.seconds}
    if share["waiting for data"] > 0.05:
        return f"{share['waiting for data']:.0%} of the step waits for data: put the shards on a faster disk, or raise dataloader.prefetch_factor"
    if device and "math" in backends:
        return "attention is computed by torch's slowest kernel (math): see sdpa_method, and the warning at the start"
    if share["gaps"] > 0.05 and waits >= 1.0:
        return (
            f"the host waits for the device {waits:.0f} times a step, which then stands still: something reads numbers back "
            "(.item(), .cpu(), a mask as an index), in a model or loss of your own, or an optimizer that is not fused"
        )
    if share["gaps"] > 0.15 and device:
        larger = f"a larger step_scheduler.local_batch_size than {micro_batch}" if accumulates else "larger batches"
        fused = "" if compiled else ", or compile.enabled true"
        return f"the device stands still for {share['gaps']:.0%} of the step, for the kernels are too small: {larger}{fused}"
    if share["communication"] > 0.1:
        return f"{share['communication']:.0%} of the step is communication that nothing hides: distributed.strategy ddp or reshard_after_forward false where memory allows, or a larger global batch"
    if not compiled and share["elementwise"] > 0.2:
        return f"{share['elementwise']:.0%} of the step are elementwise kernels: compile.enabled true fuses them"
    if share["optimizer"] > 0.1:
        return f"{share['optimizer']:.0%} of the step is the optimizer: a larger step_scheduler.global_batch_size takes fewer steps for as many tokens"
    if share["loss"] > 0.3 and least.get("loss", 1.0) < 0.5:
        return f"{share['loss']:.0%} of the step is the loss, at {least['loss']:.0%} of what its products allow: try another loss_fn.chunk_tokens, or amlaunch.trainer.loss.MaskedCrossEntropy"
    if share["elementwise"] > 0.25 and not narrow:
        return f"{share['elementwise']:.0%} of the step are elementwise kernels: distributed.bf16_residual true moves fewer bytes"
    good = least.get("matrix products")
    return "nothing stands out" + (
        f": matrix products reach {good:.0%} of the rate that was measured for large ones" if good else ""
    )


def table(found: Sequence[Row]) -> str:
    """The parts, for people."""
    lines = [f"{'part of a step':<18}{'ms':>10}{'share':>8}{'at best ms':>12}"]
    for row in found:
        best = "" if row.least is None else f"{row.least * 1e3:.2f}"
        lines.append(f"{row.part:<18}{row.seconds * 1e3:>10.2f}{row.share:>8.1%}{best:>12}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the parts of a trace."""
    if len(arguments) != 2 or not arguments[1].isdigit():
        print("usage: python -m amlaunch.trainer.tools.roofline TRACE.json.gz STEPS", file=sys.stderr)
        return 2
    found = busy(read(Path(arguments[0])), int(arguments[1]))
    print(table(rows(found, found.wall, 0.0, {})))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
