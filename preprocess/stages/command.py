"""``amlaunch preprocess``: source to verified shards in one process, without a run directory."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from amlaunch.preprocess.progress import Progress, on_a_terminal
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.loader import data_name, load, places_of
from amlaunch.recipes.format.placeholders import variables
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.format.section_checks import Checker, refuse
from amlaunch.recipes.format.targets import Policy
from amlaunch.recipes.format.yaml_reader import KeyPath
from amlaunch.recipes.preprocess_options import PREPROCESS
from amlaunch.recipes.shipped import find_recipe


def run(arguments: argparse.Namespace) -> int:
    """Make the shards, or what is missing of them, verify them, and say what there is."""
    options, policy, out = settings(arguments)
    from amlaunch.preprocess.stages.element import run_element  # tiktoken comes in here, behind the signal handlers
    from amlaunch.preprocess.stages.verify import verify

    say = (lambda text: print(text, file=sys.stderr, flush=True)) if arguments.json else None
    progress = Progress(say=say, bar=on_a_terminal() and not arguments.json)
    try:
        run_element(options, 0, out, progress, policy=policy)
        whole = verify(options, out, progress, policy)
    finally:
        progress.close()
    print(
        json.dumps({"path": str(out), **brief(whole)}, indent=2) if arguments.json else report(whole, out), flush=True
    )
    return 0


def settings(arguments: argparse.Namespace) -> tuple[Preprocess, Policy, Path]:
    """The section that the command line means, what its target may reach, and the folder of the shards."""
    given = {key: value for key in (*PREPROCESS, "bos") if (value := getattr(arguments, key)) is not None}
    if arguments.recipe:
        overrides = [f"--preprocess.{key}={json.dumps(value)}" for key, value in given.items()]
        loaded = load(find_recipe(arguments.recipe), overrides, allow=arguments.allow_target, job_start=True)
        section, policy, places = loaded.recipe.preprocess, loaded.policy, loaded.places("preprocess")
        if section is None:
            raise BadInput(f"{arguments.recipe}: there is no preprocess section to run")
    else:
        section, policy = _typed(given), Policy()
        places = places_of(given)
    out = Path(section.output_dir) if section.output_dir else Path("data") / data_name(section, places)
    return dataclasses.replace(section, elements=1), policy, out.expanduser().absolute()


def _typed(given: dict[str, Any]) -> Preprocess:
    lines: dict[KeyPath, str] = {("preprocess", key): f"--{key.replace('_', '-')}" for key in given}
    lines["preprocess",] = "amlaunch preprocess"
    checker = Checker(lines, variables(), Policy(), job_start=True)
    section: Preprocess = checker.section(Preprocess, given, ("preprocess",))
    refuse(checker.problems)
    if not (section.dataset or section.data_files):
        raise BadInput(
            "amlaunch preprocess: give --dataset NAME, --data-files GLOB, or a recipe with a preprocess section"
        )
    return section


def brief(whole: dict[str, Any]) -> dict[str, Any]:
    """A manifest without its lists of shards."""
    return {key: value for key, value in whole.items() if key not in ("version", "splits")} | {
        "shards": {split: len(entries) for split, entries in whole["splits"].items()}
    }


def report(whole: dict[str, Any], out: Path) -> str:
    """A manifest in a few lines, and what to type next."""
    from amlaunch.preprocess.stages.inspect_data import statistics

    return "\n".join([*statistics(whole), f"{out}", f"next: amlaunch data peek {out}"])
