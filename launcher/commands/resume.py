"""``amlaunch resume``: continue a run with more steps, more nodes, or other settings that do not identify it."""

from __future__ import annotations

import argparse

from amlaunch.launcher.commands._shared import (
    accept_overrides,
    add_json_option,
    add_run_argument,
    add_verbose_option,
    add_wait_option,
    build_request,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch resume``."""
    add_run_argument(parser)
    parser.add_argument("--cluster", metavar="NAME", help="continue on this cluster (default: the previous one)")
    add_wait_option(parser)
    add_verbose_option(parser)
    add_json_option(parser, "print the result as JSON on stdout")
    accept_overrides(parser, "RUN")


def run(options: argparse.Namespace) -> int:
    """Change the run's recipe, and start what is not done; if settings changed, training continues."""
    from amlaunch.launcher.planning.run_sources import ResumedRun
    from amlaunch.launcher.runs.find import find_run, read_plan, roots
    from amlaunch.launcher.submission.pipeline import start_run
    from amlaunch.launcher.submission.preflight import check_not_driven

    run_dir = find_run(roots(options.runs), options.run)
    source = ResumedRun(build_request(options), run_dir, read_plan(run_dir))
    check_not_driven(run_dir)
    return start_run(source)
