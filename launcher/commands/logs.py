"""``amlaunch logs``: what the ranks wrote, each line with its origin."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from amlaunch.launcher.commands._shared import add_run
from amlaunch.launcher.commands.status import goes_on, rest
from amlaunch.launcher.runs.element_state import read_run
from amlaunch.launcher.runs.find import find_run, read_plan, roots
from amlaunch.launcher.runs.submissions import Submission, newest_jobs, submissions_of
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.run_layout import RunDir

FOLLOW_SECONDS = 0.3
LOOK_SECONDS = 1.5
"""Between two looks for new logs, and for the end of the run."""
NAME = re.compile(r"attempt(\d+)\.rank(\d+)\.log")


@dataclass
class Source:
    """One log file, and how far it was printed."""

    path: Path
    prefix: str
    offset: int = 0
    rest: bytes = field(default=b"")

    def new_lines(self, *, last: bool = False) -> list[str]:
        """Complete lines since the last call; with ``last`` the unfinished one too."""
        with open(self.path, "rb") as handle:
            handle.seek(self.offset)
            data = handle.read()
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        if last and self.rest:
            lines, self.rest = [*lines, self.rest], b""
        return [self.prefix + line.decode(errors="replace") for line in lines]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch logs``."""
    add_run(parser)
    parser.add_argument("--stage", metavar="S", help="default: the newest that has logs")
    parser.add_argument("--element", metavar="E", help="default: all")
    parser.add_argument("--rank", type=int, metavar="R", help="default: all")
    parser.add_argument("--attempt", type=int, metavar="N", help="default: the newest of each element")
    parser.add_argument("-f", "--follow", action="store_true", help="print new lines until the run has ended")


def run(options: argparse.Namespace) -> int:
    """Print the logs that the options choose; with ``-f`` go on until nothing runs any more."""
    run_dir = find_run(roots(options.runs), options.run)
    plan = read_plan(run_dir)
    _check_names(plan, options)
    sources: dict[Path, Source] = {}
    look_again = 0.0
    while True:
        began = time.monotonic()
        if began >= look_again:
            alive = goes_on(run_dir, read_run(run_dir, plan))
            for path, prefix in choose(run_dir, plan, options):
                sources.setdefault(path, Source(path, prefix))
            now = time.monotonic()
            look_again = now + rest(now - began, LOOK_SECONDS)
        follow = options.follow and alive
        reading = _print_new(sources.values(), follow=follow, flush=options.follow)
        if not follow:
            break
        time.sleep(rest(reading, FOLLOW_SECONDS))
    if not sources:
        raise BadInput(
            f"{plan.run_id} has no logs of that; amlaunch status {plan.run_id} says which stages, elements and attempts there are"
        )
    return 0


def _check_names(plan: Plan, options: argparse.Namespace) -> None:
    """Raises BadInput where there is no such stage, or no such element in it."""
    stages = [plan.stage(options.stage)] if options.stage else plan.stages
    names = [element.name for stage in stages for element in stage.elements]
    if options.element is not None and options.element not in names:
        raise BadInput(
            f"{plan.run_id} has no element {options.element!r}{f' in {options.stage}' if options.stage else ''}; {did_you_mean(options.element, names)}"
        )


def _print_new(sources: Iterable[Source], *, follow: bool, flush: bool) -> float:
    """Print what was written since; the seconds that looking for it took, without those that the reader of our lines took."""
    reading = 0.0
    for source in sources:
        began = time.monotonic()
        lines = source.new_lines(last=not follow)
        reading += time.monotonic() - began
        for line in lines:
            print(line, flush=flush)
    return reading


def choose(run_dir: RunDir, plan: Plan, options: argparse.Namespace) -> list[tuple[Path, str]]:
    """``(file, line prefix)`` of every log that the options ask for."""
    stages = [plan.stage(options.stage)] if options.stage else _newest_stage(run_dir, plan, options.follow)
    several = len(stages) > 1
    jobs = submissions_of(run_dir, plan)
    found = []
    for stage in stages:
        own = newest_jobs(jobs[stage.name])
        for element in stage.elements:
            if options.element not in (None, element.name):
                continue
            where = f"{stage.name} " if several else ""
            logs = _logs_of(run_dir, stage, element.name, options.attempt)
            for attempt, rank, path in logs:
                if options.rank in (None, rank):
                    again = f" attempt {attempt}" if attempt > 1 else ""
                    found.append((path, f"[{where}{element.name}:{rank}{again}] "))
            if not logs and options.rank is None and element.name in own:
                found += _job_log(*own[element.name], where)
    return found


def _job_log(submission: Submission, index: int, where: str) -> list[tuple[Path, str]]:
    """The job's own output, for an element that did not get as far as its ranks."""
    log = submission.log(index)
    return [(log, f"[{where}{submission.elements[index]}:job {submission.task(index)}] ")] if log.is_file() else []


def _newest_stage(run_dir: RunDir, plan: Plan, follow: bool) -> list[Stage]:
    """The last stage that has logs; all of them when following, since the next may begin."""
    if follow:
        return plan.stages
    with_logs = [
        stage
        for stage in plan.stages
        if any(_logs_of(run_dir, stage, element.name, None) for element in stage.elements)
    ]
    if with_logs:
        return with_logs[-1:]
    submitted = submissions_of(run_dir, plan)
    return [
        stage
        for stage in plan.stages
        if any(one.log(i).is_file() for one in submitted[stage.name] for i in range(len(one.elements)))
    ][-1:]


def _logs_of(run_dir: RunDir, stage: Stage, element: str, attempt: int | None) -> list[tuple[int, int, Path]]:
    """``(attempt, rank, file)`` of one attempt (None: the newest), by rank."""
    folder = run_dir.element(stage.name, element).root / "logs"
    found = []
    for path in folder.glob("attempt*.rank*.log"):
        match = NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), int(match[2]), path))
    wanted = attempt if attempt is not None else max((number for number, _, _ in found), default=0)
    return sorted(item for item in found if item[0] == wanted)
