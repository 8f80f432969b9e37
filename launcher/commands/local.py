"""``amlaunch local``: run a recipe on this machine."""

from __future__ import annotations

import argparse

from amlaunch.launcher.commands._shared import add_recipe_arguments, add_verbose_option, build_request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch local``."""
    add_recipe_arguments(parser)
    add_verbose_option(parser)


def run(options: argparse.Namespace) -> int:
    """Run all stages that are not done; return the exit code (see ``amlaunch --help``)."""
    from amlaunch.launcher.planning.run_sources import NewRun
    from amlaunch.launcher.submission.pipeline import start_run

    return start_run(NewRun(build_request(options)))
