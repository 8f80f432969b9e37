"""Runs one element on its host: starts its ranks, passes on "stop soon", waits, and says how it ended.

This is what submitit starts on this machine, and what :mod:`amlaunch.launcher.execution.slurm_job` runs
in a job of Slurm. It knows processes and files, and nothing of what the stage
does.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from amlaunch.containers.node_setup import verdict_of
from amlaunch.containers.runtimes.catalog import CannotLaunch
from amlaunch.containers.start_failures import advice
from amlaunch.containers.start_failures import failure_of as failure_of_container
from amlaunch.launcher.execution.attempt import GRACE_SECONDS, Assignment, Attempt
from amlaunch.launcher.execution.rank_processes import check_here, free_ports, start_local
from amlaunch.launcher.execution.retry_policy import goes_again
from amlaunch.launcher.planning.stage_container import runtime_here
from amlaunch.launcher.runs.element_state import missing_output, read_done
from amlaunch.launcher.runs.failure_causes import TAIL_BYTES, cause_of, tail_of
from amlaunch.launcher.runs.find import read_plan
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.errors import BAD_INPUT, HANG, RESUMABLE
from amlaunch.recipes.files import Lock, is_locked, read_json, read_json_lines, read_object, write_json
from amlaunch.recipes.format.placeholders import UnsetVariable
from amlaunch.recipes.run_layout import ElementDir, RunDir

POLL_SECONDS = 0.05
SIBLING_SECONDS = 5.0
"""How long the other ranks may take to notice that one has failed."""
LOOK_SECONDS = 1.0
"""Between two looks for a sign of life."""
LEAD = 2.0
"""So many times a step and a save before the time limit, the ranks are told to stop; Slurm's own warning may come later."""
SPARE_SECONDS = 15.0
"""Of the time before the limit, what is kept for the driver's own last words."""
UNHEARD = (-signal.SIGTERM, -signal.SIGUSR1)
"""How a rank ends that is asked to stop before it listens."""
PORT_TAKEN = ("EADDRINUSE", "address already in use")
"""What rank 0 says when somebody else has the port that its peers were told."""


StartRanks = Callable[[Attempt, ExitStack, int], list["subprocess.Popen[bytes]"]]
"""Starts what is to be waited for: the ranks themselves, or the one srun that starts them on other nodes."""
CheckNodes = Callable[[Attempt, ExitStack], list["subprocess.Popen[bytes]"]]
"""Starts what looks at the nodes before the ranks do; an empty list where nothing has to be looked at."""
ExplainEnd = Callable[[Attempt, dict[str, Any]], dict[str, Any]]
"""Adds what only the starter of the ranks can know to how they ended."""


class Stopping:
    """Whether the ranks should leave, since when, and why."""

    def __init__(
        self, folder: ElementDir, watch: Path | None = None, grace: float = GRACE_SECONDS, ends: float | None = None
    ):
        self.folder = folder
        self.watch = watch
        self.grace = grace
        self.ends = ends
        self.most = (ends - time.time()) / 2 if ends else 0.0
        """However long a step and a save take, half of the job is for work."""
        self.looked = 0.0
        self.since: float | None = None
        self.signal: int | None = None
        """The signal that asked; None where somebody asked through the file."""

    def ask(self, number: int | None = None, *_: Any) -> None:
        """Leave word for the ranks (also a signal handler)."""
        if self.since is None:
            self.since = time.monotonic()
            self.signal = number
            self.folder.stop.touch()

    def look(self) -> bool:
        """Whether to stop: asked by signal, by the stop file, or because the starter is gone."""
        gone = self.watch is not None and not is_locked(self.watch)
        if self.since is None and gone:
            self.ask()
        now = time.monotonic()
        if (
            self.since is None and now - self.looked >= LOOK_SECONDS
        ):  # it may lie on a file system that thousands of jobs share
            self.looked = now
            self._look_at_files()
        return self.since is not None

    def _look_at_files(self) -> None:
        if self.folder.stop.exists():
            self.ask()
        elif self.ends is not None and self.ends - time.time() < (lead := min(lead_seconds(self.folder), self.most)):
            self.grace = max(self.grace, lead - SPARE_SECONDS)
            self.ask(signal.SIGUSR1)

    def overdue(self) -> bool:
        """Whether the ranks have had all the time that they were given to save."""
        return self.since is not None and time.monotonic() - self.since > self.grace

    def reason(self) -> str:
        """Why it stopped, for people."""
        words = {signal.SIGUSR1: "the time limit is near", signal.SIGTERM: "told to end (preempted, or cancelled)"}
        return words.get(signal.Signals(self.signal), "stopped on request") if self.signal else "stopped on request"


def lead_seconds(folder: ElementDir) -> float:
    """How long before the time limit the ranks have to be told, by what the newest heartbeat says of a step and of a save."""
    beat = read_object(folder.progress)
    told = [beat.get(name) for name in ("step_seconds", "save_seconds")]
    return LEAD * sum(seconds for seconds in told if isinstance(seconds, (int, float)))


def run_element(
    run_root: str,
    stage_name: str,
    element_name: str,
    given: Assignment,
    start: StartRanks = start_local,
    explain_more: ExplainEnd | None = None,
    told: Sequence[int] = (),
    plan: Plan | None = None,
    check: CheckNodes = check_here,
) -> str:
    """Carry out one attempt; returns its outcome, which is also the last line of ``attempts.jsonl``.

    An element that another live driver has is left to it (``"pending"``).
    ``told``: signals that came before this was called; ``plan``: what to go by instead of the run's ``plan.json``.
    """
    run = RunDir(Path(run_root))
    plan = plan or read_plan(run)
    stage = plan.stage(stage_name)
    element = next(element for element in stage.elements if element.name == element_name)
    folder = run.element(stage_name, element_name)
    lock = Lock(folder.lock)
    if not _acquire(lock, given.patience):
        return State.PENDING
    done = read_done(folder)
    if done is not None and missing_output(done) is None:  # whoever asked for it again did not know yet
        return State.DONE
    stopping = Stopping(folder, Path(given.watch) if given.watch else None, given.grace, given.ends)
    for leftover in (folder.stop, folder.result, folder.done):
        leftover.unlink(missing_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, stopping.ask)
    if told:
        stopping.ask(told[0])
    number = 1 + sum(line.get("event") == "start" for line in read_json_lines(folder.attempts))
    return carry_out(Attempt(run, plan, stage, element, given, lock, number), stopping, start, explain_more, check)


def _acquire(lock: Lock, patience: float) -> bool:
    """Take an element's lock; on a network file system the lock of a host that crashed may live on for minutes."""
    deadline = time.monotonic() + patience
    while not lock.acquire():
        if time.monotonic() >= deadline:
            return False
        time.sleep(1.0)
    return True


def carry_out(
    attempt: Attempt,
    stopping: Stopping,
    start: StartRanks = start_local,
    explain_more: ExplainEnd | None = None,
    check: CheckNodes = check_here,
) -> str:
    """Start the ranks, wait for them, and write down how it ended and whether it goes on by itself."""
    started = time.monotonic()
    job = attempt.given.job or os.environ.get("SUBMITIT_LOCAL_JOB_ID")
    attempt.record(
        "start",
        host=node_name(),
        pid=os.getpid(),
        job=job,
        budget=attempt.given.budget,
        done=attempt.progress(),
        **attempt.given.facts,
    )
    try:
        refused = not_ready(attempt, stopping, check)
        if refused is not None:
            attempt.record("end", seconds=round(time.monotonic() - started, 3), **_with_policy(attempt, refused))
            return str(refused["outcome"])
        codes, first, hung = _run_ranks(attempt, stopping, start)
    except (OSError, ValueError, UnsetVariable) as error:  # no such program, a full disk, a variable that is not set
        what = (
            f"the variable {error.name} is not set (container.env)" if isinstance(error, UnsetVariable) else str(error)
        )
        attempt.record(
            "end",
            outcome=State.FAILED,
            retry=not isinstance(error, CannotLaunch),
            reason=f"the ranks could not be started: {what}",
        )
        return State.FAILED
    if any(codes) and attempt.folder.stop.exists():
        stopping.ask()  # the ranks may have seen the file before we did
    result = read_json(attempt.folder.result)
    end = explain(attempt, codes, classify(codes, first, result, stopping if stopping.since is not None else None))
    if hung:
        end = {**end, **hang_of(attempt)}
    elif end["outcome"] == State.FAILED and stopping.overdue():
        end = {**end, **overdue_of(attempt, stopping)}
    end = with_cause(attempt, explain_more(attempt, end) if explain_more else end)
    seconds = round(time.monotonic() - started, 3)
    if end["outcome"] == State.DONE:
        write_json(
            attempt.folder.done, {"time": time.time(), "attempt": attempt.number, "seconds": seconds, **(result or {})}
        )
    attempt.record("end", seconds=seconds, exit_codes=codes, **_with_policy(attempt, end))
    return str(end["outcome"])


def not_ready(attempt: Attempt, stopping: Stopping, check: CheckNodes) -> dict[str, Any] | None:
    """Why containers cannot start on the nodes of this attempt, or that it was told to stop meanwhile; None: they can.

    To bring an image to a node may take minutes; "stop soon" ends that.
    """
    verdicts = attempt.folder.verdicts
    shutil.rmtree(verdicts, ignore_errors=True)
    with ExitStack() as files:
        if attempt.stage.container is not None:
            verdicts.mkdir()
        looking = check(attempt, files)
        codes, _ = wait_for(looking, stopping)
    if stopping.since is not None and looking:
        return {"outcome": State.STOPPED, "reason": stopping.reason(), "again": stopping.signal is not None}
    if not any(codes):
        return None
    verdict = verdict_of(verdicts) or {
        "reason": f"a node could not be looked at before the containers start (exit code {codes[0]})",
        "again": True,
    }
    return {"outcome": State.FAILED, "retry": True, "rank": 0, "exit_codes": codes, **verdict}


def hang_of(attempt: Attempt) -> dict[str, Any]:
    """The verdict on ranks that were ended because nothing came from them any more."""
    reason = (
        f"no sign of life for {attempt.stage.needs.hang_seconds:.0f} s (resources.{attempt.stage.name}.hang_minutes)"
    )
    return {
        "outcome": State.FAILED,
        "kind": "hang",
        "reason": reason,
        "retry": True,
        "again": True,
        "elsewhere": True,
        "host": node_name(),
    }


def overdue_of(attempt: Attempt, stopping: Stopping) -> dict[str, Any]:
    """The verdict on ranks that did not save in the time that was left to them."""
    reason = f"{stopping.reason()}, and the ranks did not save and leave within {stopping.grace:.0f} s; what was saved before is there"
    return {"kind": "overdue", "reason": reason, "retry": True, "again": stopping.signal is not None}


def node_name() -> str:
    """What this host is called by whoever gives it out: Slurm's name for it, where a job runs."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def with_cause(attempt: Attempt, end: dict[str, Any]) -> dict[str, Any]:
    """Say what the failed rank's log says of the cause, and whether another try, or another node, can help."""
    if end["outcome"] != State.FAILED or end.get("retry") is False or "kind" in end:
        return end
    text = "\n".join(tail_of(attempt.folder.log(attempt.number, rank)) for rank in (end.get("rank") or 0, None))
    if attempt.stage.container is not None:
        runtime = runtime_here(attempt.stage.container)
        spoken = failure_of_container(text)
        if spoken is not None:
            failure, line = spoken
            reason = f"{failure.kind}: {line}; {advice(failure, runtime, attempt.stage.container.image)}"
            return {
                **end,
                "kind": failure.kind,
                "again": failure.again,
                "elsewhere": failure.elsewhere,
                "reason": reason,
            }
    cause = cause_of(text)
    if cause is None:
        return end
    return {
        **end,
        "kind": cause.kind,
        "again": cause.again,
        "elsewhere": cause.elsewhere,
        "reason": cause.explain(str(end["reason"]), attempt.stage.name),
    }


def _with_policy(attempt: Attempt, end: dict[str, Any]) -> dict[str, Any]:
    again, why = goes_again(read_json_lines(attempt.folder.attempts), end, attempt.progress())
    if not why:
        return end
    return {**end, "again": again, "reason": f"{end.get('reason', '')}; {why}", "retry": end.get("retry", True)}


def _run_ranks(attempt: Attempt, stopping: Stopping, start: StartRanks) -> tuple[list[int], int | None, bool]:
    """:func:`wait_for` what ``start`` starts, and whether it hung; with another port where the one that the ranks were told turned out taken."""
    for port in free_ports(attempt.given.port_seed or os.getpid()):
        before = _size(attempt.log(0))
        watch = RankWatch(attempt)
        with ExitStack() as files:
            codes, first = wait_for(start(attempt, files, port), stopping, watch)
        if not any(codes) or stopping.since is not None or not _said(attempt.log(0), before, PORT_TAKEN):
            break
    return codes, first, watch.hung


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _said(log: Path, offset: int, words: tuple[str, ...]) -> bool:
    """Whether any of ``words`` is in what was written to ``log`` since ``offset`` (its last 64 KB)."""
    if not log.exists():
        return False
    with open(log, "rb") as handle:
        handle.seek(max(offset, _size(log) - TAIL_BYTES))
        text = handle.read().decode(errors="replace")
    return any(word in text for word in words)


def explain(attempt: Attempt, codes: list[int], end: dict[str, Any]) -> dict[str, Any]:
    """Bad input is said by one rank for all: take its words, and point to its log."""
    if BAD_INPUT not in codes:
        return end
    for rank in range(attempt.ranks):
        said = (
            _errors(attempt.folder.log(attempt.number, rank)) if rank >= len(codes) or codes[rank] == BAD_INPUT else []
        )
        if said:
            return {**end, "rank": rank, "reason": said[-1].removeprefix("error: ")}
    return end


def _errors(log: Path) -> list[str]:
    if not log.exists():
        return []
    return [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]


class RankWatch:
    """Looks whether ranks still do anything: a heartbeat, or a line in any of their logs."""

    def __init__(self, attempt: Attempt):
        self.limit = attempt.stage.needs.hang_seconds
        self.files = [
            attempt.folder.progress,
            attempt.folder.metrics,
            *(attempt.log(rank) for rank in range(attempt.ranks)),
        ]
        self.seen: list[float] = []
        self.since = self.looked = time.monotonic()
        self.hung = False

    def look(self) -> bool:
        """Whether nothing has changed for as long as the stage may take for one step."""
        now = time.monotonic()
        if self.limit is None or now - self.looked < LOOK_SECONDS:
            return self.hung
        self.looked = now
        signs = [_changed(path) for path in self.files]
        if signs != self.seen:
            self.seen, self.since = signs, now
        self.hung = now - self.since > self.limit
        return self.hung


def _changed(path: Path) -> float:
    try:
        found = path.stat()
    except OSError:
        return 0.0
    return found.st_mtime + found.st_size


def wait_for(
    ranks: list[subprocess.Popen[bytes]], stopping: Stopping, watch: RankWatch | None = None
) -> tuple[list[int], int | None]:
    """``(exit codes, the rank that failed first)``, once all have ended.

    One rank that fails takes the others with it, "stop soon" has a time limit,
    and so has silence.
    """
    forwarded = False
    failed_at = 0.0
    first: int | None = None
    while None in [rank.poll() for rank in ranks]:  # a list: every rank is asked each time
        now = time.monotonic()
        if stopping.look() and not forwarded:
            _signal(ranks, signal.SIGTERM)
            forwarded = True
        if first is None and any(rank.poll() for rank in ranks):
            first, failed_at = _culprit([rank.poll() for rank in ranks]), now
        hung = watch is not None and watch.look()
        if stopping.overdue() or hung or (first is not None and now - failed_at > SIBLING_SECONDS):
            _signal(ranks, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    codes = [rank.poll() or 0 for rank in ranks]
    return codes, _culprit(codes) if first is None else first


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _culprit(codes: Sequence[int | None]) -> int | None:
    """Of ranks that ended within one poll, the one to look at: bad input, then one that says it hung, then killed from outside, then an error.

    A rank that loses its peer fails with an error of its own a moment later.
    """
    kinds = (lambda c: c == BAD_INPUT, lambda c: c == HANG, lambda c: c < 0, lambda c: c not in (0, RESUMABLE))
    for is_kind in kinds:
        for rank, code in enumerate(codes):
            if code is not None and is_kind(code):
                return rank
    return None


def classify(
    codes: list[int], first: int | None, result: dict[str, Any] | None, asked: Stopping | None = None
) -> dict[str, Any]:
    """``outcome``, ``reason``, the ``rank`` to look at and whether it may go ``again`` by itself, from exit codes (negative: a signal's number).

    ``asked``: to stop. A rank that our own signal ended had not begun to listen, and so had nothing to save.
    """
    if all(code == 0 for code in codes):
        if result is None:
            return {"outcome": State.FAILED, "reason": "exited 0 but left no result", "rank": 0}
        return {"outcome": State.DONE}
    if first is None or all(code in (0, RESUMABLE) or (asked and code in UNHEARD) for code in codes):
        if asked is None:  # the ranks heard it, we did not: a signal to all processes of the job
            return {
                "outcome": State.STOPPED,
                "reason": "the ranks were told to end (preempted, or cancelled)",
                "again": True,
            }
        return {"outcome": State.STOPPED, "reason": asked.reason(), "again": asked.signal is not None}
    return {"outcome": State.FAILED, **failure_of(codes[first], first)}


def signal_name(number: int) -> str:
    """``SIGKILL``; real-time signals have numbers alone."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def failure_of(code: int, rank: int) -> dict[str, Any]:
    """The ``reason`` for one rank's exit code, and whether another try can end otherwise."""
    if code == BAD_INPUT:
        return {"retry": False, "reason": "the recipe or its input cannot work", "rank": rank}
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return {
            "retry": True,
            "again": True,
            "reason": f"rank {rank} was killed by {signal_name(-code)}{hint}",
            "rank": rank,
        }
    return {"retry": True, "reason": f"rank {rank} exited with code {code}", "rank": rank}
