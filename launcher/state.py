"""What happened to an element, from its files alone. Absent never means completed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.plan import Plan, Stage
from recipes.files import is_locked, read_json_lines, read_object
from recipes.rundir import ElementDir, RunDir

PENDING, RUNNING, DONE, STOPPED, FAILED, DIED = "pending", "running", "done", "stopped", "failed", "died"
"""``died``: an attempt that started and left no word of its end, such as one that was killed with its driver."""
SEVERITY = (FAILED, DIED, RUNNING, STOPPED, PENDING, DONE)


@dataclass(frozen=True)
class ElementState:
    """One element, now."""

    stage: str
    name: str
    title: str
    state: str
    attempts: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    rank: int | None = None
    retry: bool = True
    """Whether the same command can end otherwise."""
    host: str = ""
    seconds: float | None = None
    """How long the newest attempt took, or takes so far."""


def read_element(run: RunDir, stage: Stage, name: str, title: str) -> ElementState:
    """The state of one element: its marker, then the lock of a live driver, then its newest attempt."""
    folder = run.element(stage.name, name)
    lines = read_json_lines(folder.attempts)
    starts = [line for line in lines if line.get("event") == "start" and "attempt" in line and "time" in line]
    common: dict[str, Any] = {"stage": stage.name, "name": name, "title": title, "attempts": len(starts)}
    common["progress"] = read_object(folder.progress)
    if starts:
        common["host"] = starts[-1].get("host", "")
    end = _end_of(lines, starts[-1]["attempt"]) if starts else None
    done = read_done(folder)
    if done is not None:
        missing = missing_output(done)
        if missing is None:
            return ElementState(**common, state=DONE, result=done, seconds=done.get("seconds"))
        end = {"outcome": PENDING, "reason": f"was done, but {missing}"}
    if is_locked(folder.lock):
        since = starts[-1]["time"] if starts else time.time()
        return ElementState(**common, state=RUNNING, seconds=time.time() - since)
    if end is not None:
        known = {"reason": end.get("reason", ""), "rank": end.get("rank"), "retry": end.get("retry", True), "seconds": end.get("seconds")}
        return ElementState(**common, state=end.get("outcome", DIED), **known)
    if starts:
        return ElementState(**common, state=DIED, reason=f"attempt {starts[-1]['attempt']} ended without a word (killed, or the machine went down)")
    return ElementState(**common, state=PENDING)


def read_done(folder: ElementDir) -> dict[str, Any] | None:
    """The marker of a finished element; a damaged one does not count."""
    done = read_object(folder.done)
    return done if isinstance(done.get("outputs"), dict) else None


def missing_output(done: dict[str, Any]) -> str | None:
    """What is no longer as the marker says; None where all outputs are there at their sizes."""
    for name, size in done["outputs"].items():
        path = Path(name)
        if not path.is_file():
            return f"{path} is gone"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
    return None


def _end_of(lines: list[Any], attempt: int) -> dict[str, Any] | None:
    return next((line for line in reversed(lines) if line.get("event") == "end" and line.get("attempt") == attempt), None)


def read_stage(run: RunDir, stage: Stage) -> list[ElementState]:
    """All elements of a stage."""
    return [read_element(run, stage, element.name, element.title) for element in stage.elements]


def read_run(run: RunDir, plan: Plan) -> list[ElementState]:
    """All elements of a run, in the order of the plan."""
    return [state for stage in plan.stages for state in read_stage(run, stage)]


def is_driven(run: RunDir, states: list[ElementState]) -> bool:
    """Whether anybody works on the run: a launcher that is between two stages counts."""
    return is_locked(run.lock) or any(state.state == RUNNING for state in states)


def overall(states: list[ElementState], driven: bool = False) -> str:
    """One word for many elements: the one that most wants attention; done only if all are."""
    if driven:
        return RUNNING
    found = {state.state for state in states}
    if DONE in found and PENDING in found and not found & {FAILED, DIED, RUNNING}:
        return STOPPED
    return next(state for state in SEVERITY if state in found) if found else PENDING
