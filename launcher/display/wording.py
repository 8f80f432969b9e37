"""Format runs, elements and numbers for people and for ``--json``.

Shared by the live report, ``status`` and the closing summary.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from amlaunch.launcher.runs.element_state import ElementState
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.output import counted
from amlaunch.recipes.run_layout import RunDir

STYLES: dict[str, str] = {
    State.DONE: "green",
    State.RUNNING: "cyan",
    State.QUEUED: "blue",
    State.FAILED: "bold red",
    State.DIED: "bold red",
    State.UNKNOWN: "magenta",
    State.CANCELLED: "yellow",
    State.STOPPED: "yellow",
    State.PENDING: "dim",
}
"""The rich style of each state."""
SILENCE_SECONDS = 180.0
"""Rate and ETA of an older heartbeat are not shown: a step, a save or a crashed node may be the cause."""
TAIL_LINES = 15
TAIL_BYTES = 16_384
REDIRECTED_WIDTH = 160
"""Columns for output that goes to a file or a pipe: enough for most lines."""


# --- commands that a user can paste


def program() -> str:
    """Return the command that starts amlaunch from this shell.

    An environment that is not activated is not in the search path.
    """
    if shutil.which("amlaunch"):
        return "amlaunch"
    program_path = Path(sys.argv[0])
    if program_path.name == "amlaunch":
        return str(program_path.absolute())
    return f"{os.path.basename(sys.executable)} -m amlaunch"


def name_of(run: RunDir) -> str:
    """Return the argument that names a run in a command: its ID if that is enough, else its folder."""
    default_root = Path(os.environ.get("AMLAUNCH_RUNS") or "runs").expanduser().absolute()
    return run.root.name if run.root.parent == default_root else shlex.quote(str(run.root))


# --- numbers


def duration(seconds: float | None) -> str:
    """Format seconds: ``4.2 s``, ``3:05``, ``2:14:09``; empty for None."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(number: float | None) -> str:
    """Format a count: ``512``, ``1.25K``, ``2.00M``, ``1.50B``; ``?`` for None."""
    if number is None:
        return "?"
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= unit:
            return f"{number / unit:.2f}{suffix}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Format bytes: ``512 B``, ``4.82 MB``, ``7.10 GB``."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f} B"


def rate(tokens_per_second: float | None) -> str:
    """Format a throughput: ``3.41K tokens/s``; empty if unknown."""
    return f"{count(tokens_per_second)} tokens/s" if tokens_per_second else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _join(*parts: str) -> str:
    return " · ".join(part for part in parts if part)


# --- one element


def progress(state: ElementState) -> str:
    """Describe an element's progress: ``step 120/200 · loss 5.1200 · ETA 0:40 · 3.41K tokens/s``."""
    newest = state.progress
    if not newest.record:
        return ""
    if state.is_starting:
        return f"continuing from {_position(newest.unit, newest.saved_position)}" if state.has_saved else ""

    if newest.unit == "token":
        position = f"{count(newest.done)}{f'/{count(newest.total)}' if newest.total else ''} tokens"
    else:
        position = f"{newest.unit} {newest.done}{f'/{newest.total}' if newest.total else ''}"

    losses = [
        f"{name} {value:.4f}" for name, value in (("loss", newest.loss), ("val", newest.val_loss)) if value is not None
    ]
    silence = time.time() - newest.time
    if state.state == State.RUNNING and newest.time and silence > SILENCE_SECONDS:
        return _join(position, *losses, f"last sign of life {duration(silence)} ago")
    shows_eta = state.state == State.RUNNING and newest.eta_seconds is not None
    eta = f"ETA {duration(newest.eta_seconds)}" if shows_eta else ""
    # The rate last: a narrow table cuts it first.
    return _join(position, *losses, eta, rate(newest.rate))


def _position(unit: str, number: float | None) -> str:
    return f"{count(number)} tokens" if unit == "token" else f"{unit} {number}"


def saved_progress(state: ElementState) -> str:
    """Describe the last checkpoint of an unfinished element: ``saved at step 120/400``; empty if unknown."""
    newest = state.progress
    if state.state == State.DONE or newest.unit != "step" or newest.saved is None:
        return ""
    if not newest.saved:
        return "no checkpoint yet"
    total = f"/{newest.total}" if newest.total else ""
    return f"saved at step {newest.saved}{total}"


def waiting_text(state: ElementState) -> str:
    """Describe why a queued element waits, and Slurm's estimate of its start."""
    estimate = f"estimated start {state.start.replace('T', ' ')}" if state.start else ""
    return _join(state.reason, estimate)


def outcome(state: ElementState) -> str:
    """Describe the result of a finished element, or the reason why it is unfinished."""
    if state.state == State.DONE:
        return _result(state)
    if state.state == State.QUEUED:
        return waiting_text(state)
    if state.state in (State.STOPPED, State.CANCELLED, State.DIED):
        return _join(state.reason or progress(state), saved_progress(state))
    return state.reason or progress(state)


def _result(state: ElementState) -> str:
    """Describe the done marker of an element."""
    result = state.result
    parts: list[str] = []
    if state.stage in ("preprocess", "verify") and "tokens" in result:
        documents, shards = counted(result.get("documents", 0), "document"), counted(result.get("shards", 0), "shard")
        parts.append(f"{counted(result['tokens'], 'token')} from {documents} in {shards}")
        max_tokens = result.get("max_tokens")
        if _is_number(max_tokens) and result["tokens"] < max_tokens:
            parts.append(f"the source has fewer than max_tokens {max_tokens:,}")
    if _is_number(result.get("loss_first")) and _is_number(result.get("loss_last")):
        parts.append(f"loss {result['loss_first']:.4f} -> {result['loss_last']:.4f}")
    if _is_number(result.get("val_loss")):
        parts.append(f"validation loss {result['val_loss']:.4f}")
    parts.append(rate(result.get("tokens_per_s")))
    if "parameters" in result:
        parts.append(f"{count(result['parameters'])} parameters")
    return _join(*parts)


def status_line(state: ElementState) -> str:
    """Describe an element in one plain line."""
    name = f"{state.stage} {state.name}"
    if state.state == State.RUNNING:
        return f"{name}: {progress(state) or 'starting'}"
    time_taken = f" ({duration(state.seconds)})" if state.seconds is not None else ""
    details = outcome(state)
    return f"{name}: {state.state}{time_taken}{': ' + details if details else ''}"


def stopping_text(stages: Iterable[str]) -> str:
    """Describe what running elements of these stages do when they are asked to stop; only training has checkpoints."""
    return f"saving {'a checkpoint' if 'train' in stages else 'finished work'}, then stopping"


# --- failures


def failure_report(run: RunDir, state: ElementState, retry: str, start: str) -> list[str]:
    """Explain a failed element: host, reason, the last lines of the right log, the next command.

    ``retry`` repeats the element with the run's own recipe, code and profile; ``start`` reads them again.
    """
    host = state.host or state.nodes or "this host"
    lines = [f"{state.stage} {state.name} {state.state} on {host}: {state.reason}"]
    if state.retry:
        lines += _log_excerpt(run, state)

    if state.resume_options and state.job:
        next_command = f"{program()} resume {name_of(run)} {state.resume_options}"
    elif state.needs_fix or not state.retry:
        next_command = f"fix the cause, then run {start}"
    else:
        next_command = retry
    return [*lines, f"next: {next_command}", *continuation_note([state])]


def continuation_note(states: Iterable[ElementState]) -> list[str]:
    """Return the line that says from where a run continues; none if it has saved nothing."""
    has_saved = any(state.state == State.DONE or state.has_saved for state in states)
    return ["(continues from the last saved state)"] if has_saved else []


def _log_excerpt(run: RunDir, state: ElementState) -> list[str]:
    """Return the end of the failed rank's log, or of the job's own output if no rank wrote one."""
    rank = state.rank or 0
    log, owner = run.element(state.stage, state.name).log(state.attempts, rank), f"rank {rank}"
    text = last_lines(log)
    if not text and state.log is not None:
        log, owner = state.log, f"job {state.job}"
        text = last_lines(log)
    return [f"last lines of {owner} ({log}):", *(f"  | {line}" for line in text)] if text else []


def last_lines(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a text file; empty if it cannot be read."""
    try:
        with open(path, "rb") as handle:
            handle.seek(0, os.SEEK_END)
            handle.seek(max(0, handle.tell() - TAIL_BYTES))
            return handle.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


# --- output


def note_lines(notes: Iterable[str], *, verbose: bool) -> list[str]:
    """Return the lines to print for notes: unless ``verbose``, one, with the number of the others."""
    unique = list(dict.fromkeys(notes))
    if verbose or len(unique) < 2:
        return [f"note: {note}" for note in unique]
    return [f"note: {unique[0]} ({counted(len(unique) - 1, 'more note')}: add -v)"]


def console() -> Any:
    """Return a rich console that does not wrap lines at 80 columns when its output is redirected."""
    from rich.console import Console

    class PipeSafeConsole(Console):
        def on_broken_pipe(self) -> None:
            # rich would exit with 1; amlaunch handles a closed pipe alike for all commands.
            raise BrokenPipeError

    width = None if sys.stdout.isatty() else _redirected_width()
    return PipeSafeConsole(highlight=False, soft_wrap=True, width=width)


def _redirected_width() -> int:
    """Return ``COLUMNS`` if it is exported, else a default."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdigit() and int(columns) else REDIRECTED_WIDTH


def to_json(value: Any) -> str:
    """Return indented JSON; numbers that JSON lacks, such as a NaN loss, become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(run: RunDir, plan: Plan, states: Iterable[ElementState], overall_state: str) -> dict[str, Any]:
    """Return a run for ``--json``; the names are stable and documented in docs/commands.md."""
    elements = list(states)
    stages = [
        {"name": stage.name, "elements": [_element_json(state) for state in elements if state.stage == stage.name]}
        for stage in plan.stages
    ]
    return {
        "run": plan.run_id,
        "path": str(run.root),
        "cluster": (plan.cluster or {}).get("name"),
        "state": overall_state,
        "gpu_hours": round(sum(state.gpu_hours for state in elements), 4),
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
        "progress": state.progress.record,
        "result": state.result,
    }
