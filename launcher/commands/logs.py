"""``amlaunch logs``: print the logs of a run's ranks, each line with its origin."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from amlaunch.launcher.commands._shared import add_run_argument
from amlaunch.launcher.display.following import may_be_active, pause_seconds
from amlaunch.launcher.runs.element_state import read_run
from amlaunch.launcher.runs.find import find_run, read_plan, roots
from amlaunch.launcher.runs.submissions import Submission, newest_jobs, submissions_of
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.run_layout import RunDir
from amlaunch.recipes.suggestions import did_you_mean

READ_SECONDS = 0.3
"""Pause between two checks for new lines."""
LIST_SECONDS = 1.5
"""Pause between two checks for new log files and for the end of the run."""
FOLLOW_LINES = 10
"""Lines of each log with which ``-f`` begins."""
TAIL_BLOCK_BYTES = 65536
LOG_NAME = re.compile(r"attempt(\d+)\.rank(\d+)\.log")


@dataclass
class LogSource:
    """A log file, and how much of it was printed."""

    path: Path
    prefix: str
    offset: int = 0
    partial_line: bytes = b""

    def skip_to_last(self, lines: int) -> None:
        """Skip all but the last ``lines`` lines that the file has now."""
        with open(self.path, "rb") as handle:
            position = handle.seek(0, os.SEEK_END)
            tail = b""
            # One line break more, because the last line has its own.
            while position > 0 and tail.count(b"\n") <= lines:
                size = min(TAIL_BLOCK_BYTES, position)
                position = handle.seek(position - size)
                tail = handle.read(size) + tail
        ends = [i for i, byte in enumerate(tail) if byte == ord("\n")]
        kept = lines + 1 if tail.endswith(b"\n") else lines
        self.offset = position + (ends[-kept] + 1 if 0 < kept <= len(ends) else 0 if kept else len(tail))

    def new_lines(self, *, final: bool) -> list[str]:
        """Return the complete lines since the last call; a ``final`` call also returns the unfinished one."""
        with open(self.path, "rb") as handle:
            handle.seek(self.offset)
            data = handle.read()
        self.offset += len(data)
        *lines, self.partial_line = (self.partial_line + data).split(b"\n")
        if final and self.partial_line:
            lines.append(self.partial_line)
            self.partial_line = b""
        return [self.prefix + line.decode(errors="replace") for line in lines]


@dataclass(frozen=True)
class LogSelection:
    """The logs to print; None: all, or for the stage and the attempt the newest."""

    stage: str | None
    element: str | None
    rank: int | None
    attempt: int | None
    follow: bool

    def check(self, plan: Plan) -> None:
        """Raise BadInput if the plan has no such stage, or no such element in it."""
        stages = [plan.stage(self.stage)] if self.stage else plan.stages
        names = [element.name for stage in stages for element in stage.elements]
        if self.element is not None and self.element not in names:
            place = f" in stage {self.stage}" if self.stage else ""
            raise BadInput(f"{plan.run_id} has no element {self.element!r}{place}; {did_you_mean(self.element, names)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch logs``."""
    add_run_argument(parser)
    parser.add_argument("--stage", metavar="S", help="default: the newest that has logs")
    parser.add_argument("--element", metavar="E", help="default: all")
    parser.add_argument("--rank", type=int, metavar="R", help="default: all")
    parser.add_argument("--attempt", type=int, metavar="N", help="default: the newest of each element")
    parser.add_argument(
        "--tail", type=int, metavar="N", help=f"begin with the last N lines (default: {FOLLOW_LINES} with -f, else all)"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="print new lines until the run has ended")


def run(options: argparse.Namespace) -> int:
    """Print the selected logs; with ``-f`` continue until nothing of the run is active."""
    run_dir = find_run(roots(options.runs), options.run)
    plan = read_plan(run_dir)
    selection = LogSelection(options.stage, options.element, options.rank, options.attempt, options.follow)
    selection.check(plan)
    tail = FOLLOW_LINES if options.tail is None and options.follow else options.tail
    if tail is not None and tail < 0:
        raise BadInput(f"--tail {tail}: expected an integer of at least 0")

    sources: dict[Path, LogSource] = {}
    next_listing = 0.0
    is_active = True
    while True:
        started = time.monotonic()
        if started >= next_listing:
            is_active = may_be_active(run_dir, read_run(run_dir, plan))
            is_first = not next_listing
            for path, prefix in select_logs(run_dir, plan, selection):
                if path not in sources:
                    sources[path] = LogSource(path, prefix)
                    if is_first and tail is not None:
                        sources[path].skip_to_last(tail)
            listed = time.monotonic()
            next_listing = listed + pause_seconds(listed - started, LIST_SECONDS)
        follow = selection.follow and is_active
        reading_seconds = _print_new(sources.values(), final=not follow, flush=selection.follow)
        if not follow:
            break
        time.sleep(pause_seconds(reading_seconds, READ_SECONDS))

    if not sources:
        raise BadInput(
            f"{plan.run_id} has no logs for these options; "
            f"amlaunch status {plan.run_id} lists its stages, elements and attempts"
        )
    return 0


def _print_new(sources: Iterable[LogSource], *, final: bool, flush: bool) -> float:
    """Print new lines; return the seconds spent reading, without those spent waiting for a reader of stdout."""
    reading_seconds = 0.0
    for source in sources:
        started = time.monotonic()
        lines = source.new_lines(final=final)
        reading_seconds += time.monotonic() - started
        for line in lines:
            print(line, flush=flush)
    return reading_seconds


def select_logs(run_dir: RunDir, plan: Plan, selection: LogSelection) -> list[tuple[Path, str]]:
    """Return ``(file, line prefix)`` of every selected log."""
    if selection.stage:
        stages = [plan.stage(selection.stage)]
    elif selection.follow:
        # The next one may start.
        stages = plan.stages
    else:
        stages = _newest_stage(run_dir, plan)

    submissions = submissions_of(run_dir, plan)
    logs = []
    for stage in stages:
        place = f"{stage.name} " if len(stages) > 1 else ""
        jobs = newest_jobs(submissions[stage.name])
        for element in stage.elements:
            if selection.element not in (None, element.name):
                continue
            rank_logs = _rank_logs(run_dir, stage, element.name, selection.attempt)
            logs += [
                (path, _prefix(f"{place}{element.name}", rank, attempt))
                for attempt, rank, path in rank_logs
                if selection.rank in (None, rank)
            ]
            # The job's own output, for an element that failed before its ranks started.
            if not rank_logs and selection.rank is None and element.name in jobs:
                logs += _job_log(*jobs[element.name], place)
    return logs


def _prefix(element: str, rank: int, attempt: int) -> str:
    return f"[{element}:{rank}{f' attempt {attempt}' if attempt > 1 else ''}] "


def _job_log(submission: Submission, index: int, place: str) -> list[tuple[Path, str]]:
    log = submission.log(index)
    prefix = f"[{place}{submission.elements[index]}:job {submission.task(index)}] "
    return [(log, prefix)] if log.is_file() else []


def _newest_stage(run_dir: RunDir, plan: Plan) -> list[Stage]:
    """Return the last stage with logs of ranks, or else of jobs; an empty list if there is none."""
    with_rank_logs = [
        stage
        for stage in plan.stages
        if any(_rank_logs(run_dir, stage, element.name, None) for element in stage.elements)
    ]
    if with_rank_logs:
        return with_rank_logs[-1:]
    submissions = submissions_of(run_dir, plan)
    with_job_logs = [stage for stage in plan.stages if any(map(_has_job_log, submissions[stage.name]))]
    return with_job_logs[-1:]


def _has_job_log(submission: Submission) -> bool:
    return any(submission.log(index).is_file() for index in range(len(submission.elements)))


def _rank_logs(run_dir: RunDir, stage: Stage, element: str, attempt: int | None) -> list[tuple[int, int, Path]]:
    """Return ``(attempt, rank, file)`` of one attempt (None: the newest), by rank."""
    logs = []
    for path in (run_dir.element(stage.name, element).root / "logs").glob("attempt*.rank*.log"):
        match = LOG_NAME.fullmatch(path.name)
        if match:
            logs.append((int(match[1]), int(match[2]), path))
    selected = attempt if attempt is not None else max((number for number, _, _ in logs), default=0)
    return sorted(log for log in logs if log[0] == selected)
