"""torch's profiler over a window of steps, and what the CUDA allocator did in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from amlaunch.recipes.format.schema import ProfileSection

MAX_ENTRIES = 100_000
"""Allocations that a memory snapshot remembers."""


def trace_path(folder: Path, step: int, rank: int) -> Path:
    """Where the trace of the steps up to ``step`` is."""
    return folder / f"to-step-{step:08d}.rank{rank}.json.gz"


class Profiler:
    """Traces ``section.steps`` steps of this start of the run into ``folder``; does nothing without a section."""

    def __init__(self, section: ProfileSection | None, folder: Path, rank: int, device: torch.device):
        self._section = section
        self._folder = folder
        self._rank = rank
        self._cuda = device.type == "cuda"
        self._steps = 0
        self._tracer: Any = None
        if section is not None and section.memory_snapshot and not self._cuda and rank == 0:
            print("note: profile.memory_snapshot is of CUDA's allocator, and there is no GPU here", flush=True)

    def step(self, step: int) -> None:
        """The step ``step`` is about to begin."""
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
        """The run ends after ``step``, perhaps within the window."""
        if self._tracer is not None:
            self._write(step + 1)

    def _start(self) -> None:
        activities = [
            torch.profiler.ProfilerActivity.CPU,
            *([torch.profiler.ProfilerActivity.CUDA] if self._cuda else []),
        ]
        if self._wants_memory():
            torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)
        self._tracer = torch.profiler.profile(activities=activities)
        self._tracer.start()

    def _write(self, step: int) -> None:
        self._tracer.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = trace_path(self._folder, step - 1, self._rank)
        self._tracer.export_chrome_trace(str(trace))
        self._tracer = None
        if self._wants_memory():
            torch.cuda.memory._dump_snapshot(str(trace.with_name(trace.name.replace(".json.gz", ".memory.pickle"))))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._rank == 0:
            print(
                f"a trace of the steps up to {step - 1} is in {self._folder} (https://ui.perfetto.dev shows it)",
                flush=True,
            )

    def _wants_memory(self) -> bool:
        return self._cuda and self._section is not None and self._section.memory_snapshot
