"""The words for what happens: shared by the live display, ``status`` and the closing summary."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from amlaunch.launcher.runs.element_state import ElementState
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.run_layout import RunDir

STYLES: dict[str, str] = {
    State.DONE: "green", State.RUNNING: "cyan", State.QUEUED: "blue", State.FAILED: "bold red", State.DIED: "bold red", State.UNKNOWN: "magenta",
    State.CANCELLED: "yellow", State.STOPPED: "yellow", State.PENDING: "dim",
}  # fmt: skip
TAIL_LINES = 15


def program() -> str:
    """How to call amlaunch from here: an environment that is not activated has it outside the search path."""
    if shutil.which("amlaunch"):
        return "amlaunch"
    called = Path(sys.argv[0])
    return str(called.absolute()) if called.name == "amlaunch" else f"{os.path.basename(sys.executable)} -m amlaunch"


def name_of(run: RunDir) -> str:
    """What to type for a run: its id where that is found, else its folder."""
    here = Path(os.environ.get("AMLAUNCH_RUNS") or "runs").expanduser().absolute()
    return run.root.name if run.root.parent == here else shlex.quote(str(run.root))


def duration(seconds: float | None) -> str:
    """``4.2 s``, ``3:05``, ``2:14:09``."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(number: float | None) -> str:
    """``512``, ``1.25K``, ``2.00M``, ``1.50B``."""
    if number is None:
        return "?"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.2f}{suffix}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes: ``512 B``, ``4.82 MB``, ``7.10 GB``."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f} B"


def rate(tokens_a_second: float | None) -> str:
    """Tokens a second, in words."""
    return f"{count(tokens_a_second)} tokens/s" if tokens_a_second else ""


def progress(state: ElementState) -> str:
    """How far a running element is: ``step 120/200 · loss 5.12 · 3.41K tokens/s · ETA 0:40``."""
    beat = state.progress
    if not beat:
        return ""
    total = beat.get("total")
    unit = beat.get("unit", "")
    if unit == "token":
        parts = [f"{count(beat.get('done'))}{f'/{count(total)}' if total else ''} tokens"]
    else:
        parts = [f"{unit} {beat.get('done')}{f'/{total}' if total else ''}"]
    parts += [
        f"{name} {beat[key]:.4f}" for name, key in (("loss", "loss"), ("val", "val_loss")) if _is_number(beat.get(key))
    ]
    parts.append(rate(beat.get("rate")))
    if state.state == State.RUNNING and _is_number(beat.get("eta_s")):
        parts.append(f"ETA {duration(beat['eta_s'])}")
    return " · ".join(part for part in parts if part)


def saved(state: ElementState) -> str:
    """Up to where the work of an element that left is kept: ``saved at step 120/400``; empty where nobody says."""
    beat = state.progress
    if state.state == State.DONE or beat.get("unit") != "step" or not _is_number(beat.get("saved")):
        return ""
    total = f"/{beat['total']}" if beat.get("total") else ""
    return f"saved at step {beat['saved']}{total}" if beat["saved"] else "nothing saved yet"


def waiting(state: ElementState) -> str:
    """Why a queued element waits, and when Slurm thinks that it starts."""
    return " · ".join(
        part for part in (state.reason, f"starts about {state.start.replace('T', ' ')}" if state.start else "") if part
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def outcome(state: ElementState) -> str:
    """What a finished element made, or why an unfinished one is not."""
    if state.state == State.QUEUED:
        return waiting(state)
    if state.state in (State.STOPPED, State.CANCELLED, State.DIED):
        return " · ".join(filter(None, [state.reason or progress(state), saved(state)]))
    if state.state != State.DONE:
        return state.reason or progress(state)
    made = state.result
    parts: list[str] = []
    if state.stage in ("preprocess", "verify") and "tokens" in made:
        parts.append(
            f"{made['tokens']:,} tokens of {made.get('documents', 0):,} documents in {made.get('shards', 0)} shards"
        )
    if _is_number(made.get("loss_first")) and _is_number(made.get("loss_last")):
        parts.append(f"loss {made['loss_first']:.4f} -> {made['loss_last']:.4f}")
    if _is_number(made.get("val_loss")):
        parts.append(f"validation {made['val_loss']:.4f}")
    parts.append(rate(made.get("tokens_per_s")))
    if "parameters" in made:
        parts.append(f"{count(made['parameters'])} parameters")
    return " · ".join(part for part in parts if part)


def line(state: ElementState) -> str:
    """One plain line for one element."""
    name = f"{state.stage} {state.name}"
    if state.state == State.RUNNING:
        return f"{name}: {progress(state) or 'starting'}"
    took = f" ({duration(state.seconds)})" if state.seconds is not None else ""
    words = outcome(state)
    return f"{name}: {state.state}{took}{': ' + words if words else ''}"


def failure(run: RunDir, state: ElementState, next_command: str) -> list[str]:
    """What to read when an element failed: host, rank, the last lines of the right log, the next command."""
    folder = run.element(state.stage, state.name)
    rank = state.rank or 0
    log = folder.log(state.attempts, rank)
    reason, next_command = _with_names(run, state, next_command)
    lines = [f"{state.stage} {state.name} {state.state} on {state.host or state.nodes or 'this host'}: {reason}"]
    text, whose = tail(log) if state.retry else [], f"rank {rank}"
    if state.retry and not text and state.log is not None:  # it did not get as far as a rank
        log, text, whose = state.log, tail(state.log), f"job {state.job}"
    if text:
        lines += [f"last lines of {whose} ({log}):", *(f"  | {part}" for part in text)]
    if not state.retry:
        return [*lines, f"next: correct that, then {next_command}"]
    return [*lines, f"next: {next_command}", "(goes on from what is saved)"]


REMEDY = re.compile(r"amlaunch resume RUN (.+?)(?:, say)?$")
"""What a reason ends with where the same settings would fail again (amlaunch.launcher.runs.failure_causes)."""


def _with_names(run: RunDir, state: ElementState, next_command: str) -> tuple[str, str]:
    """The reason with a command that can be pasted, and of a job that command as the next one."""
    found = REMEDY.search(state.reason)
    if found is None:
        return state.reason, next_command
    remedy = f"{program()} resume {name_of(run)} {found[1]}"
    return state.reason[: found.start()] + remedy, remedy if state.job else next_command


def console() -> Any:
    """A rich console that, piped into a file, does not break lines at 80 columns."""
    from rich.console import Console

    class OurConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # which amlaunch handles for all commands alike; rich would exit with 1

    return OurConsole(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _asked_width())


def _asked_width() -> int:
    """``COLUMNS``, where somebody exports it; else enough for most lines."""
    asked = os.environ.get("COLUMNS", "")
    return int(asked) if asked.isdigit() and int(asked) else 160


def tail(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a text file; none where there is no such file."""
    try:
        with open(path, "rb") as handle:
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - 16_384))
            return handle.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def to_json(value: Any) -> str:
    """Indented JSON; a number that JSON does not have (a loss that is NaN) is null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(run: RunDir, plan: Plan, states: Iterable[ElementState], overall: str) -> dict[str, Any]:
    """A run for ``--json``: stable names, documented in docs/commands.md."""
    found = list(states)
    stages = []
    for stage in plan.stages:
        elements = [_element_json(state) for state in found if state.stage == stage.name]
        stages.append({"name": stage.name, "elements": elements})
    hours = round(sum(state.gpu_hours for state in found), 4)
    cluster = (plan.cluster or {}).get("name")
    return {
        "run": plan.run_id,
        "path": str(run.root),
        "cluster": cluster,
        "state": overall,
        "gpu_hours": hours,
        "stages": stages,
    }


def _element_json(state: ElementState) -> dict[str, Any]:
    return {
        "name": state.name,
        "title": state.title,
        "state": state.state,
        "attempts": state.attempts,
        "host": state.host,
        "job": state.job or None,
        "nodes": state.nodes or None,
        "start_estimate": state.start or None,
        "gpu_hours": state.gpu_hours,
        "rank": state.rank,
        "reason": state.reason,
        "seconds": state.seconds,
        "progress": state.progress,
        "result": state.result,
    }
