"""``amlaunch submit``: check a recipe and a cluster, then submit all stages to Slurm."""

from __future__ import annotations

import argparse

from amlaunch.launcher.commands._shared import add_recipe_arguments, add_verbose_option, add_wait_option, build_request
from amlaunch.recipes.errors import BadInput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch submit``."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--cluster",
        default="slurm",
        metavar="NAME",
        help="a profile in clusters.yaml, a file, or a built-in profile: slurm (asks Slurm), local",
    )
    parser.add_argument("--dry-run", action="store_true", help="print exactly the scripts that would be submitted")
    add_wait_option(parser)
    add_verbose_option(parser)


def run(options: argparse.Namespace) -> int:
    """Submit what is not done; the exit code is 0 once Slurm has accepted it (with ``--wait``: how the run ended)."""
    from amlaunch.launcher.planning.run_sources import NewRun
    from amlaunch.launcher.submission.pipeline import start_run

    if not options.recipe:
        raise BadInput(
            "no recipe given; write amlaunch submit RECIPE --cluster NAME (amlaunch recipes lists those that come "
            "with amlaunch)"
        )
    return start_run(NewRun(build_request(options)))
