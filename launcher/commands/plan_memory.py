"""``amlaunch plan-memory``: predict a recipe's GPU memory without a GPU, in a process of the trainer."""

from __future__ import annotations

import argparse
import subprocess

from amlaunch.launcher.commands._shared import (
    RECIPE_HELP,
    accept_overrides,
    add_allow_target_option,
    add_json_option,
    process_environment,
    require_packages,
)
from amlaunch.recipes.python_process import python_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch plan-memory``."""
    parser.add_argument("recipe", help=RECIPE_HELP)
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks in total (default: the recipe's)")
    parser.add_argument(
        "--gpu-memory", default="80GB", metavar="SIZE", help="memory of each GPU, such as 80GB or 141GB (default: 80GB)"
    )
    add_allow_target_option(parser)
    add_json_option(parser)
    accept_overrides(parser, "RECIPE")


def run(options: argparse.Namespace) -> int:
    """Predict, and return the exit code: 3 if the training does not fit."""
    require_packages("torch")
    arguments = [options.recipe, f"--gpu-memory={options.gpu_memory}"]
    if options.gpus is not None:
        arguments.append(f"--gpus={options.gpus}")
    arguments += [f"--allow-target={name}" for name in options.allow_target]
    if options.json:
        arguments.append("--json")
    command = [*python_command("amlaunch.trainer.tools.plan_memory"), *arguments, *options.overrides]
    return subprocess.run(command, env=process_environment(gpus=0)).returncode
