"""``amlaunch show``: print the resolved recipe and the plan."""

from __future__ import annotations

import argparse

from amlaunch.launcher.checks.torch_version import torch_of_run
from amlaunch.launcher.commands._shared import add_recipe_arguments, build_request
from amlaunch.launcher.display import wording
from amlaunch.launcher.planning.resolve import local_notes, plan_to_show
from amlaunch.launcher.runs.element_state import read_run
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.recipes.output import counted

MAX_LISTED_TITLES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch show``."""
    add_recipe_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print what would run and what would be skipped; nothing is written."""
    loaded, plan, run_dir = plan_to_show(build_request(options))
    done = {(state.stage, state.name) for state in read_run(run_dir, plan) if state.state == State.DONE}
    notes = local_notes(loaded, plan)
    torch = torch_of_run(loaded, plan)
    if options.json:
        report = {"notes": notes, "recipe": loaded.tree, "plan": plan.to_json(), "done": sorted(done)}
        print(wording.to_json(report | {"torch": {"version": torch.version, "in": torch.place} if torch else None}))
        return 0

    for note in notes:
        print(f"note: {note}")
    print(f"# {loaded.path}")
    print(loaded.text())
    print_plan(plan, done)
    print(f"\nrun directory  {run_dir.root}")
    if plan.data:
        print(f"shards         {plan.data}")
    if torch:
        print(f"torch          {torch.describe()}")
    return 0


def print_plan(plan: Plan, done: set[tuple[str, str]]) -> None:
    """Print a table of the stages; ``done``: finished ``(stage, element)``."""
    from rich.table import Table

    columns = ("stage", "elements", "after", "resources per element", "skipped")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), title=f"plan of {plan.run_id}", title_justify="left")
    for stage in plan.stages:
        skipped = sum((stage.name, element.name) in done for element in stage.elements)
        note = f"{skipped} of {len(stage.elements)} done" if skipped else ""
        table.add_row(stage.name, describe_elements(stage), ", ".join(stage.after), describe_resources(stage), note)
    wording.console().print(table)


def describe_elements(stage: Stage) -> str:
    """Return the number of a stage's elements and the first titles."""
    titles = [element.title for element in stage.elements if element.title]
    if not titles:
        return str(len(stage.elements))
    more = "; …" if titles[MAX_LISTED_TITLES:] else ""
    return f"{len(stage.elements)} ({'; '.join(titles[:MAX_LISTED_TITLES])}{more})"


def describe_resources(stage: Stage) -> str:
    """Return the resources of one element as text."""
    needs = stage.needs
    parts = [
        counted(needs.nodes, "node"),
        counted(needs.gpus_per_node, "GPU") if needs.gpus_per_node else "CPU",
        counted(needs.tasks_per_node, "rank"),
        counted(needs.cpus, "core"),
        needs.mem or "",
        wording.duration(needs.time_minutes * 60) if needs.time_minutes else "",
    ]
    return ", ".join(part for part in parts if part)
