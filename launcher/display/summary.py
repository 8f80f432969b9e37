"""Closing summary of a run: its results, its files and the next commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from amlaunch.launcher.display import wording
from amlaunch.launcher.runs.element_state import ElementState, overall_state
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.errors import BAD_INPUT, OK, RESUMABLE
from amlaunch.recipes.errors import FAILED as EXIT_FAILED
from amlaunch.recipes.run_layout import RunDir

HEADLINES: dict[str, str] = {
    State.DONE: "is done",
    State.FAILED: "failed",
    State.DIED: "died",
    State.CANCELLED: "was cancelled",
    State.STOPPED: "was stopped",
    State.UNKNOWN: "is in an unknown state",
}
RESULT_STAGES = {"verify": "data", "train": "training", "export": "export"}
"""Stages whose results the summary shows, and their labels."""


def exit_code(states: list[ElementState]) -> int:
    """Return the exit code for the states of a run.

    0: all done. 1: something failed, died or is unknown. 2: only failures that a retry would repeat.
    75: stopped or cancelled; the same command continues.
    """
    if all(state.state == State.DONE for state in states):
        return OK
    failed = [state for state in states if state.state == State.FAILED]
    if failed:
        return EXIT_FAILED if any(state.retry for state in failed) else BAD_INPUT
    is_lost = any(state.state in (State.DIED, State.UNKNOWN) for state in states)
    return EXIT_FAILED if is_lost else RESUMABLE


def headline(run_dir: RunDir, plan: Plan, states: list[ElementState]) -> str:
    """Return one line with the run's end and the time in which any of its elements ran."""
    state = overall_state(states)
    time_taken = wording.duration(running_seconds(run_dir, states))
    return f"{plan.run_id} {HEADLINES.get(state, f'is {state}')} ({time_taken})"


def running_seconds(run_dir: RunDir, states: Iterable[ElementState]) -> float:
    """Return the seconds in which any element ran.

    Overlapping attempts count once; time while the run was stopped, and shared work that
    another run had done before, do not count.
    """
    created, covered_until, total = _created_at(run_dir), 0.0, 0.0
    for began, ended in sorted(span for state in states for span in state.ran):
        total += max(0.0, ended - max(began, covered_until, created))
        covered_until = max(covered_until, ended)
    return total


def _created_at(run_dir: RunDir) -> float:
    """Return when the run was first started: its lock files are created then and never written again."""
    locks = (run_dir.lock, run_dir.root / "submit.lock")
    return min((path.stat().st_mtime for path in locks if path.exists()), default=0.0)


def closing_lines(run_dir: RunDir, plan: Plan, states: list[ElementState]) -> list[str]:
    """Return the lines that end a finished run."""
    results = [_result_line(state) for stage in RESULT_STAGES for state in states if state.stage == stage]
    return [
        "",
        headline(run_dir, plan, states),
        *results,
        *_sample(states),
        "",
        "files",
        *_file_lines(run_dir, plan, states),
        "",
        "next steps",
        *_next_commands(run_dir),
    ]


def stage_closing_lines(run_dir: RunDir, states: list[ElementState]) -> list[str]:
    """Return the lines that end a single stage (``--stage``)."""
    status = f"{wording.program()} status {wording.name_of(run_dir)}"
    return [
        "",
        f"stage {states[0].stage} is done",
        f"next: run the same command without --stage; {status} shows the other stages",
    ]


def _result_line(state: ElementState) -> str:
    point = f"{state.title}: " if state.title else ""
    return f"  {RESULT_STAGES[state.stage]:<10} {point}{wording.outcome(state)}"


def _sample(states: Sequence[ElementState]) -> list[str]:
    """Return the text that the first exported model generated."""
    sample = next((state.result["sample"] for state in states if state.result.get("sample")), "")
    if not sample:
        return []
    return ["", "sample from the model", *(f"  | {line}" for line in sample.strip("\n").splitlines())]


def _file_lines(run_dir: RunDir, plan: Plan, states: Sequence[ElementState]) -> list[str]:
    paths = [("run", str(run_dir.root))]
    if plan.data:
        paths.append(("shards", plan.data))
    for state in states:
        if state.stage == "train":
            if state.result.get("checkpoint"):
                paths.append(("checkpoint", state.result["checkpoint"]))
            paths.append(("metrics", str(run_dir.element("train", state.name).metrics)))
    paths += [("model", str(run_dir.export(state.name))) for state in states if state.stage == "export"]
    return [f"  {label:<10} {path}" for label, path in paths]


def _next_commands(run_dir: RunDir) -> list[str]:
    program, run = wording.program(), wording.name_of(run_dir)
    commands = [
        (f"{program} status {run}", "show every stage and element"),
        (f"{program} logs {run} --stage train", "show every training step"),
        (f"{program} recipes", "list the other recipes; copy one and edit it"),
    ]
    width = max(len(command) for command, _ in commands)
    return [f"  {command:<{width}}  {purpose}" for command, purpose in commands]
