"""Trace a window of steps with torch's profiler, and optionally record the CUDA allocator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from amlaunch.recipes.format.schema import ProfileSection

MAX_MEMORY_EVENTS = 100_000
"""Maximum number of allocator events in a memory snapshot."""


def trace_path(folder: Path, step: int, rank: int) -> Path:
    """Return the path of a trace that ends with ``step``."""
    return folder / f"to-step-{step:08d}.rank{rank}.json.gz"


class Profiler:
    """Traces ``section.steps`` steps of this start of the run into ``folder``; without a section it does nothing."""

    def __init__(self, section: ProfileSection | None, folder: Path, rank: int, device: torch.device):
        self._section = section
        self._folder = folder
        self._rank = rank
        self._cuda = device.type == "cuda"
        self._steps = 0
        self._tracer: Any = None
        if section is not None and section.memory_snapshot and not self._cuda and rank == 0:
            print("note: profile.memory_snapshot is ignored: it needs a CUDA GPU, and this run has none", flush=True)

    def step(self, step: int) -> None:
        """Start, continue or finish the trace; call this before each step."""
        if self._section is None:
            return
        self._steps += 1
        if self._steps == self._section.start_step:
            self._start()
        elif self._tracer is not None and self._steps == self._section.start_step + self._section.steps:
            self._write(step)
        elif self._tracer is not None:
            self._tracer.step()

    def close(self, step: int) -> None:
        """Write an unfinished trace when the run ends after ``step``."""
        if self._tracer is not None:
            self._write(step + 1)

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        if self._records_memory():
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        self._tracer = torch.profiler.profile(activities=activities)
        self._tracer.start()

    def _write(self, step: int) -> None:
        self._tracer.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = trace_path(self._folder, step - 1, self._rank)
        self._tracer.export_chrome_trace(str(trace))
        self._tracer = None
        if self._records_memory():
            snapshot = trace.with_name(trace.name.replace(".json.gz", ".memory.pickle"))
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._rank == 0:
            print(
                f"wrote a trace that ends with step {step - 1} to {self._folder}; open it at https://ui.perfetto.dev",
                flush=True,
            )

    def _records_memory(self) -> bool:
        return self._cuda and self._section is not None and self._section.memory_snapshot
