"""``amlaunch show``: the resolved recipe, and the plan."""

from __future__ import annotations

import argparse

from amlaunch.launcher.commands._shared import add_new_run, request_of
from amlaunch.launcher.display import wording
from amlaunch.launcher.planning.resolve import local_notes, plan_to_show
from amlaunch.launcher.runs.element_state import read_run
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.specs.plan import Plan, Stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch show``."""
    add_new_run(parser)


def run(options: argparse.Namespace) -> int:
    """Print what would run and what would be skipped; nothing is written."""
    loaded, plan, run_dir = plan_to_show(request_of(options))
    done = {(state.stage, state.name) for state in read_run(run_dir, plan) if state.state == State.DONE}
    notes = local_notes(loaded, plan)
    if options.json:
        print(wording.to_json({"notes": notes, "recipe": loaded.tree, "plan": plan.to_json(), "done": sorted(done)}))
        return 0

    for note in notes:
        print(f"note: {note}")
    print(f"# {loaded.path}")
    print(loaded.text())
    print_plan(plan, done)
    print(f"\nrun directory  {run_dir.root}")
    if plan.data:
        print(f"shards         {plan.data}")
    return 0


def print_plan(plan: Plan, done: set[tuple[str, str]]) -> None:
    """A table of the stages."""
    from rich.table import Table

    table = Table(
        "stage",
        "elements",
        "after",
        "each element has",
        "skipped",
        box=None,
        padding=(0, 2, 0, 0),
        title=f"plan of {plan.run_id}",
        title_justify="left",
    )
    for stage in plan.stages:
        skipped = sum((stage.name, element.name) in done for element in stage.elements)
        words = f"{skipped} of {len(stage.elements)} done" if skipped else ""
        table.add_row(stage.name, elements(stage), ", ".join(stage.after), needs(stage), words)
    wording.console().print(table)


def elements(stage: Stage) -> str:
    """How many, and what sets them apart."""
    titles = [element.title for element in stage.elements if element.title]
    shown = "; ".join(titles[:4]) + ("; …" if len(titles) > 4 else "")
    return f"{len(stage.elements)}" + (f" ({shown})" if shown else "")


def needs(stage: Stage) -> str:
    """Resources of one element, in words."""
    given = stage.needs
    parts = [f"{given.nodes} node" + ("s" if given.nodes > 1 else "")]
    parts.append(f"{given.gpus_per_node} GPUs" if given.gpus_per_node else "CPU")
    parts.append(f"{given.tasks_per_node} rank" + ("s" if given.tasks_per_node > 1 else ""))
    parts.append(f"{given.cpus} core" + ("s" if given.cpus > 1 else ""))
    if given.mem:
        parts.append(given.mem)
    if given.time_minutes:
        parts.append(wording.duration(given.time_minutes * 60))
    return ", ".join(parts)
