"""Advise on a run: which elements failed and why, and the command to type next."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence

from amlaunch.launcher.display import wording
from amlaunch.launcher.runs.element_state import ElementState, overall_state
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.files import read_object
from amlaunch.recipes.run_layout import RunDir

MAX_FAILURE_GROUPS = 5
"""Kinds of failure that are explained in full."""
MAX_LISTED_SIBLINGS = 8
"""Names of elements with the same failure that are listed."""
VARYING_TEXT = re.compile(r"(?<!code )(?<!SIG)(?:0x)?[0-9a-fA-F]*\d[0-9a-fA-F]*(?:[.:_-]\d+)*")
"""Numbers of jobs, processes, ports, addresses and times. Exit codes and signals identify a failure and are kept."""


def advice(run_dir: RunDir, plan: Plan, states: list[ElementState], driven: bool = False) -> list[str]:
    """Explain failed elements and suggest the next command, one block of text each.

    ``driven``: something of the run is active.
    """
    name, program = wording.name_of(run_dir), wording.program()
    restart = restart_command(run_dir, plan)
    groups = group_failures(states)
    blocks = [_explain_failures(run_dir, group, restart) for group in groups[:MAX_FAILURE_GROUPS]]
    others = sum(len(group) for group in groups[MAX_FAILURE_GROUPS:])
    if others:
        blocks.append(
            f"{others} more element{'s' * (others != 1)} failed for other reasons. "
            f"List them: {program} status {name} --all. Their logs: {program} logs {name}"
        )

    state = overall_state(states, driven)
    if state in (State.STOPPED, State.CANCELLED) or (state == State.PENDING and plan.cluster):
        blocks.append("\n".join([f"next: {restart}", *wording.continuation_note(states)]))
    if driven:
        blocks.append(f"next: {program} logs {name} -f")
    if state == State.UNKNOWN:
        blocks.append(_advise_on_unknown(run_dir, states, restart))
    return blocks


def _advise_on_unknown(run_dir: RunDir, states: Sequence[ElementState], restart: str) -> str:
    """Suggest the next command for a run with an element in an unknown state."""
    lost = [state for state in states if is_lost(state)]
    if not lost:
        return f"next: {wording.program()} status {wording.name_of(run_dir)} (once Slurm answers again)"
    first = lost[0]
    more = f" and {len(lost) - 1} more" if lost[1:] else ""
    return (
        f"{first.stage} {first.name}{more}: {first.reason}\nnext: {restart}\n(finds their jobs or submits them again)"
    )


def is_lost(state: ElementState) -> bool:
    """Return True if a submit was interrupted before it recorded the job ID; only another submit can find the job."""
    return state.state == State.UNKNOWN and not state.job


def group_failures(states: Iterable[ElementState]) -> list[list[ElementState]]:
    """Group failed elements by stage and reason; reasons that differ only in numbers and hosts are equal."""
    groups: dict[tuple[str, str], list[ElementState]] = {}
    for state in states:
        if state.state in (State.FAILED, State.DIED):
            groups.setdefault((state.stage, _normalise(state)), []).append(state)
    return list(groups.values())


def _normalise(state: ElementState) -> str:
    """Return an element's reason without numbers and host names."""
    reason = state.reason
    for host in filter(None, (state.host, state.nodes)):
        reason = reason.replace(host, "HOST")
    return VARYING_TEXT.sub("N", reason)


def _explain_failures(run_dir: RunDir, group: list[ElementState], restart: str) -> str:
    """Explain the first failure of a group, and list the others."""
    first, *lines = wording.failure_report(run_dir, group[0], restart, start_command(run_dir))
    return "\n".join([first, *_list_siblings(group), *lines])


def _list_siblings(group: list[ElementState]) -> list[str]:
    """List the other elements of a group, and say whether they failed on several hosts."""
    siblings = group[1:]
    if not siblings:
        return []
    names = ", ".join(state.name for state in siblings[:MAX_LISTED_SIBLINGS])
    more = ", …" if siblings[MAX_LISTED_SIBLINGS:] else ""
    numbers = " (numbers differ)" if len({state.reason for state in group}) > 1 else ""
    hosts = {state.host or state.nodes for state in group}
    places = f", on {len(hosts)} hosts" if len(hosts) > 1 else ""
    return [f"{len(siblings)} more failed for the same reason{numbers}{places}: {names}{more}"]


def restart_command(run_dir: RunDir, plan: Plan) -> str:
    """Return the command that continues a run: on a cluster ``retry``, on this machine the command that started it."""
    if plan.cluster:
        return f"{wording.program()} retry {wording.name_of(run_dir)}"
    return start_command(run_dir)


def start_command(run_dir: RunDir) -> str:
    """Return the command that started a run, to be typed in the current folder; it reads recipe and code again."""
    provenance = read_object(run_dir.provenance)
    argv = provenance.get("command")
    if not isinstance(argv, list):
        argv = ["amlaunch", "local", str(run_dir.recipe)]
    folder = str(provenance.get("cwd") or os.getcwd())
    change_folder = "" if folder == os.getcwd() else f"cd {shlex.quote(folder)} && "
    return f"{change_folder}{wording.program()} {shlex.join(map(str, argv[1:]))}"
