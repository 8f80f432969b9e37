"""``amlaunch plan-memory``: what a recipe needs of a GPU's memory, by the trainer's own process, without a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess

from amlaunch.launcher.commands._shared import RECIPE_HELP, accept_overrides, add_allow_target, add_json
from amlaunch.launcher.commands.bench import environment
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.python_process import python_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch plan-memory``."""
    parser.add_argument("recipe", help=RECIPE_HELP)
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks in total (default: the recipe's)")
    parser.add_argument(
        "--gpu-memory", default="80GB", metavar="SIZE", help="memory of each GPU, such as 80GB or 141GB (80GB)"
    )
    add_allow_target(parser)
    add_json(parser)
    accept_overrides(parser, "RECIPE")


def run(options: argparse.Namespace) -> int:
    """Predict, and return the exit code: 3 where it does not fit."""
    if importlib.util.find_spec("torch") is None:
        raise BadInput(
            "torch is not installed here: pip install 'amlaunch[train]' (its CPU build will do), or run this on a node that has it"
        )
    words = [options.recipe, f"--gpu-memory={options.gpu_memory}"]
    words += [f"--gpus={options.gpus}"] if options.gpus is not None else []
    words += [f"--allow-target={name}" for name in options.allow_target]
    words += ["--json"] if options.json else []
    return subprocess.run(
        [*python_command("amlaunch.trainer.tools.plan_memory"), *words, *options.overrides], env=environment(0)
    ).returncode
