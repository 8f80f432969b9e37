"""``amlaunch wait``: wait until a run has ended; the exit code tells how it ended."""

from __future__ import annotations

import argparse

from amlaunch.launcher.commands._shared import add_json_option, add_run_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch wait``."""
    add_run_argument(parser)
    add_json_option(parser, "print the run as JSON on stdout once it has ended")


def run(options: argparse.Namespace) -> int:
    """Wait for one run and return its exit code; Ctrl-C does not affect the run."""
    from amlaunch.launcher.display.following import wait_until_ended
    from amlaunch.launcher.runs.find import find_run, read_plan, roots

    run_dir = find_run(roots(options.runs), options.run)
    return wait_until_ended(run_dir, read_plan(run_dir), json=options.json)
