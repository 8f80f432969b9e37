"""The closing words of a run: what came out, where it lies, what to type next."""

from __future__ import annotations

from collections.abc import Iterable

from amlaunch.launcher.display import wording
from amlaunch.launcher.runs.element_state import ElementState, overall
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.errors import BAD_INPUT, OK, RESUMABLE
from amlaunch.recipes.errors import FAILED as EXIT_FAILED
from amlaunch.recipes.run_layout import RunDir


def exit_code(states: list[ElementState]) -> int:
    """0 all done, 2 some input cannot work, 1 something failed or was lost, 75 stopped or cancelled: the same command goes on."""
    if all(state.state == State.DONE for state in states):
        return OK
    failed = [state for state in states if state.state == State.FAILED]
    if failed:
        return BAD_INPUT if not any(state.retry for state in failed) else EXIT_FAILED
    return EXIT_FAILED if any(state.state in (State.DIED, State.UNKNOWN) for state in states) else RESUMABLE


HEADLINES = {
    State.DONE: "is done", State.FAILED: "has failed", State.DIED: "has died", State.CANCELLED: "was cancelled", State.STOPPED: "was stopped", State.UNKNOWN: "is in an unknown state",
}  # fmt: skip


def headline(run_dir: RunDir, plan: Plan, states: list[ElementState]) -> str:
    """How a run ended, and how long it took: the time in which any of its elements ran."""
    word = overall(states)
    took = wording.duration(took_seconds(run_dir, states))
    return f"{plan.run_id} {HEADLINES.get(word, f'is {word}')} ({took})"


def took_seconds(run_dir: RunDir, states: Iterable[ElementState]) -> float:
    """Seconds in which a run did anything; not those in which it lay stopped, nor what another run had made before."""
    since, until, total = _made(run_dir), 0.0, 0.0
    for begun, ended in sorted(span for state in states for span in state.ran):
        total += max(0.0, ended - max(begun, until, since))
        until = max(until, ended)
    return total


def _made(run_dir: RunDir) -> float:
    """When the run was first started: its locks are made then, and never written to again."""
    times = [path.stat().st_mtime for path in (run_dir.lock, run_dir.root / "submit.lock") if path.exists()]
    return min(times, default=0.0)


def closing(run_dir: RunDir, plan: Plan, states: list[ElementState]) -> list[str]:
    """Lines for the end of a run that is done."""
    lines = ["", headline(run_dir, plan, states)]
    for stage in ("verify", "train", "export"):
        lines += _results([state for state in states if state.stage == stage])
    lines += _sample(states)
    lines += ["", "where everything lies", *_places(run_dir, plan, states)]
    return [*lines, "", "what to type next", *_next(run_dir, plan)]


def stage_closing(run_dir: RunDir, states: list[ElementState]) -> list[str]:
    """Lines for the end of a single stage (``--stage``)."""
    name = wording.name_of(run_dir)
    return [
        "",
        f"stage {states[0].stage} is done",
        f"next: the same command without --stage; {wording.program()} status {name} shows the rest",
    ]


def _results(states: list[ElementState]) -> list[str]:
    lines = []
    for state in states:
        name = {"verify": "data", "train": "training", "export": "export"}[state.stage]
        which = f" {state.title}" if state.title else ""
        lines.append(f"  {name + which:<10} {wording.outcome(state)}")
    return lines


def _sample(states: list[ElementState]) -> list[str]:
    """What the first exported model wrote."""
    for state in states:
        text = state.result.get("sample")
        if text:
            return ["", "a sample that the model wrote", *(f"  | {line}" for line in text.strip("\n").splitlines())]
    return []


def _places(run_dir: RunDir, plan: Plan, states: list[ElementState]) -> list[str]:
    places = [("run", str(run_dir.root))]
    if plan.data:
        places.append(("shards", plan.data))
    train = [state for state in states if state.stage == "train"]
    for state in train:
        places += [("checkpoint", state.result["checkpoint"])] if state.result.get("checkpoint") else []
        places.append(("metrics", str(run_dir.element("train", state.name).metrics)))
    for state in states:
        if state.stage == "export":
            places.append(("model", str(run_dir.export(state.name))))
    return [f"  {name:<10} {path}" for name, path in places]


def _next(run_dir: RunDir, plan: Plan) -> list[str]:
    program = wording.program()
    commands = [
        (f"{program} status {wording.name_of(run_dir)}", "what happened, stage by stage"),
        (f"{program} logs {wording.name_of(run_dir)} --stage train", "every step"),
        (f"{program} recipes", "what else there is; copy one and change it"),
    ]
    width = max(len(command) for command, _ in commands)
    return [f"  {command:<{width}}  {why}" for command, why in commands]
