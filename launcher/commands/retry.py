"""``amlaunch retry``: restart the elements of a run that failed, were cancelled or were lost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from amlaunch.launcher.commands._shared import (
    accept_overrides,
    add_json_option,
    add_run_argument,
    add_verbose_option,
    add_wait_option,
    build_request,
)
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.output import counted

if TYPE_CHECKING:
    from amlaunch.launcher.planning.run_sources import RetriedRun
    from amlaunch.launcher.runs.element_state import ElementState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch retry``."""
    add_run_argument(parser)
    add_wait_option(parser)
    add_verbose_option(parser)
    add_json_option(parser, "print the result as JSON on stdout")
    # Accepted only to be answered with a hint at resume.
    accept_overrides(parser, "RUN")
    parser.usage = f"{parser.prog} RUN [options]"


def run(options: argparse.Namespace) -> int:
    """Start the unfinished elements of a run, as its plan describes them, on its cluster or on this machine."""
    from amlaunch.launcher.planning.run_sources import RetriedRun
    from amlaunch.launcher.runs.find import find_run, read_plan, roots
    from amlaunch.launcher.submission.pipeline import start_run
    from amlaunch.launcher.submission.preflight import nothing_left
    from amlaunch.launcher.submission.slurm_submission import known_states
    from amlaunch.recipes.files import is_locked

    if options.overrides:
        raise BadInput(f"retry changes no settings; use amlaunch resume {options.run} {' '.join(options.overrides)}")
    run_dir = find_run(roots(options.runs), options.run)
    source = RetriedRun(build_request(options), run_dir, read_plan(run_dir))
    states = known_states(run_dir, source.stored_plan)
    if is_locked(run_dir.lock) or nothing_left(states):
        return _report_nothing_left(source, states)
    return start_run(source)


def _report_nothing_left(source: RetriedRun, states: list[ElementState]) -> int:
    """Explain why nothing is started, and suggest the next command; return the exit code."""
    from amlaunch.launcher.display import wording
    from amlaunch.launcher.runs.element_state import is_driven, overall_state
    from amlaunch.launcher.runs.states import ACTIVE_STATES
    from amlaunch.launcher.submission.pipeline import message_printer
    from amlaunch.launcher.submission.slurm_run import finish
    from amlaunch.recipes.errors import OK

    run_dir, plan, request = source.run_dir, source.stored_plan, source.request
    name, program = wording.name_of(run_dir), wording.program()
    driven = is_driven(run_dir, states)
    active = sum(state.state in ACTIVE_STATES for state in states)
    say = message_printer(request)
    if driven:
        activity = f"{counted(active, 'element')} active" if active else "it is running"
        say(f"{plan.run_id}: nothing to retry: {activity}")
        say(f"next: {program} logs {name} -f, or stop it first: {program} cancel {name}")
    else:
        say(f"{plan.run_id}: nothing to retry: every element is done\nnext: {program} status {name}")

    if plan.cluster is not None and (request.wait or request.json):
        return finish(run_dir, plan, [], request, say)
    if request.json:
        print(wording.to_json(wording.as_json(run_dir, plan, states, overall_state(states, driven))))
    return OK
