"""``amlaunch export``: a checkpoint of a run as a Hugging Face folder, written by the trainer's own process."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
from pathlib import Path

from amlaunch.launcher.commands._shared import accept_overrides, add_checkpoint
from amlaunch.launcher.runs.find import find_run, read_plan, roots
from amlaunch.launcher.specs.plan import Element, Plan
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.python_process import python_command
from amlaunch.recipes.run_layout import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch export``."""
    add_checkpoint(parser)
    parser.add_argument("--out", metavar="DIR", help="the folder to write (default: in the run's export folder)")
    accept_overrides(parser, "RUN")


def run(options: argparse.Namespace) -> int:
    """Export, and return the trainer's exit code."""
    found = find_run(roots(options.runs), options.run)
    plan = read_plan(found)
    element = train_element(plan, options.element)
    which = f"step-{options.step:08d}" if options.step is not None else "best" if options.best else "newest"
    out = (
        Path(options.out).expanduser().absolute() if options.out else found.root / "export" / f"{element.name}-{which}"
    )
    return start(
        "amlaunch.trainer.tools.export",
        found,
        plan,
        [*arguments_of(element), *chosen(options), "--out", str(out), *options.overrides],
    )


def train_element(plan: Plan, name: str | None) -> Element:
    """The element of the train stage that is meant: the only one, or that called ``name``. Raises BadInput."""
    elements = plan.stage("train").elements
    found = [element for element in elements if name in (None, element.name)]
    if len(found) == 1:
        return found[0]
    there = "; ".join(f"{element.name} ({element.title})" if element.title else element.name for element in elements)
    raise BadInput(
        f"--element {name}: {plan.run_id} has {there}"
        if name
        else f"{plan.run_id} trained several models; add --element, one of {there}"
    )


def arguments_of(element: Element) -> list[str]:
    """What the element was trained with, less what only training needs."""
    words = list(element.arguments)
    for option in ("--element", "--run-id"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return words


def chosen(options: argparse.Namespace) -> list[str]:
    """Which checkpoint, as the trainer takes it."""
    if options.step is not None:
        return ["--step", str(options.step)]
    return ["--best"] if options.best else []


def start(module: str, found: RunDir, plan: Plan, words: list[str]) -> int:
    """Run a module of the trainer here, in the folder that the run's relative paths start from; its exit code.

    Raises BadInput where there is no torch, which login nodes often lack.
    """
    for package in ("torch", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise BadInput(
                f"{package} is not installed here: pip install 'amlaunch[train]', or run this on a node that has it"
            )
    folder = Path(plan.cwd) if Path(plan.cwd).is_dir() else found.root
    return subprocess.run([*python_command(module), *words], cwd=folder).returncode
