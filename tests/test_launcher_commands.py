"""Test cancel, clean, retry, resume, wait, logs and status on real files and processes, with a Slurm that is silent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_launcher_driver import HERE, ONE, ROOT, drive, make_run, only_state, pids, wait_until

from amlaunch.launcher.commands import cancel, clean
from amlaunch.launcher.commands.logs import LogSource
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.live_report import PlainReport
from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.execution.local_executor import LocalExecutor
from amlaunch.launcher.planning import partitions, resolve, run_sources
from amlaunch.launcher.planning.planner import Site, make_plan, run_id
from amlaunch.launcher.planning.run_request import RunRequest
from amlaunch.launcher.planning.run_sources import NewRun, ResumedRun, RetriedRun
from amlaunch.launcher.runs.element_state import ElementState, read_run
from amlaunch.launcher.runs.failure_causes import cause_of, exception_of
from amlaunch.launcher.runs.find import read_plan
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.runs.submissions import Submission, token_of
from amlaunch.launcher.slurm.client import JobInfo, Partition
from amlaunch.launcher.slurm.queue import Queue, cache_file
from amlaunch.launcher.specs.cluster_profile import Cluster, ClusterProfile
from amlaunch.launcher.specs.machine import Machine
from amlaunch.launcher.specs.plan import Plan
from amlaunch.launcher.submission.local_run import stopping_on_signals
from amlaunch.launcher.submission.preflight import check_files
from amlaunch.launcher.submission.run_writer import link_data, write_environment, write_run, write_start
from amlaunch.launcher.submission.slurm_submission import skipped_lines
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import append_json_line, is_locked, read_json_lines, read_object, write_json
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.run_layout import RunDir
from amlaunch.recipes.shipped import shipped_recipes

pytestmark = pytest.mark.slow

SILENT = 1 if shutil.which("squeue") else 2
"""The exit code where Slurm does not answer; without its commands, this is no machine of the cluster."""


@pytest.fixture(autouse=True)
def _silent_slurm(tmp_path, monkeypatch):
    """Slurm's own commands, with nobody at the controller's port; and a home that is empty."""
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=gone\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nMessageTimeout=3\nAuthType=auth/none\n"
    )
    for name, value in {
        "SLURM_CONF": conf,
        "XDG_CACHE_HOME": tmp_path / "cache",
        "XDG_CONFIG_HOME": tmp_path / "config",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([f"{ROOT}/src", HERE]))
    monkeypatch.delenv("COLUMNS", raising=False)


def start(folder: Path, *words: str, patch: str = "") -> subprocess.Popen:
    """amlaunch as a process of its own; ``patch``: lines of Python that run first, to shorten a pause."""
    code = f"import sys\n{patch}\nfrom amlaunch.launcher.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = dict(os.environ)  # and not what readline, which pytest loads, sets behind Python's back: COLUMNS
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=folder, env=env, **pipes)


def amlaunch(folder: Path, *words: str, patch: str = "") -> subprocess.CompletedProcess:
    process = start(folder, *words, patch=patch)
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def submitted(run: RunDir, plan: Plan, stage: str, job: str | None, home: Path | None = None) -> Submission:
    """The files of a stage that was handed to Slurm, and of a run that belongs there."""
    write_json(run.plan, {**plan.to_json(), "cluster": {"name": "slurm", "profile": {}}})
    folder = (home or run.root) / "jobs" / f"001-{stage}"
    names = tuple(element.name for element in plan.stage(stage).elements)
    one = Submission(folder, stage, names, str(run.root), "slurm", token_of(folder), time.time(), job=job)
    one.write()
    return one


def slurm_said(*jobs: JobInfo, seconds: float = 60.0) -> None:
    """What squeue answered another terminal a moment ago; good for ``seconds`` more."""
    kept = {"time": time.time(), "question": "", "problem": "", "jobs": [dataclasses.astuple(job) for job in jobs]}
    code = (
        "from amlaunch.launcher.slurm import queue; from amlaunch.recipes.files import fingerprint; "
        "print(queue.cache_file().with_name(f'squeue-{fingerprint(str())}.json'))"
    )
    path = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(path).parent == cache_file().parent
    write_json(Path(path), kept)


KEPT_LONGER = "import amlaunch.launcher.slurm.queue as q; q.Queue.__init__.__defaults__ = (60.0, None)"


class Holder:
    """Another process that holds a lock."""

    def __init__(self, lock: Path):
        code = (
            "import time; from pathlib import Path; from amlaunch.recipes.files import Lock; "
            f"lock = Lock(Path({str(lock)!r})); lock.acquire(); print(1, flush=True); time.sleep(600)"
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout and self.process.stdout.readline()

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class TestSlurmDoesNotAnswer:
    @pytest.mark.parametrize("job", ["123", None])
    def test_cancel_claims_nothing(self, tmp_path, job):
        run, plan = make_run(tmp_path, ("train", [[]], ONE))
        submitted(run, plan, "train", job)
        result = amlaunch(tmp_path, "cancel", "test-1")
        assert (
            result.returncode == SILENT
            and re.search("squeue|scontrol", result.stderr)
            and "nothing was cancelled" in result.stderr
        )
        assert "no running or pending" not in result.stdout and not result.stdout

    @pytest.mark.parametrize("job", ["123", None])
    def test_clean_removes_nothing(self, tmp_path, job):
        run, plan = make_run(tmp_path, ("train", [[]], ONE))
        submitted(run, plan, "train", job)
        result = amlaunch(tmp_path, "clean", "test-1", "--yes")
        assert result.returncode in (1, SILENT) and "nothing was removed" in result.stderr and run.plan.exists()

    @pytest.mark.parametrize("words", [("logs", "test-1", "-f"), ("status", "test-1", "--watch"), ("wait", "test-1")])
    def test_who_follows_goes_on(self, tmp_path, words):
        run, plan = make_run(tmp_path, ("train", [[]], ONE))
        submitted(run, plan, "train", "123")
        log = run.element("train", "0").log(1, 0)
        log.parent.mkdir(parents=True)
        log.write_text("one\n")
        patch = (
            "import amlaunch.launcher.commands.status as s; s.CLUSTER_WATCH_SECONDS = s.WATCH_SECONDS = 0.2; "
            "import amlaunch.launcher.display.following as f; f.MAX_PAUSE_SECONDS = 1.0"
        )
        process = start(tmp_path, *words, patch=patch)
        time.sleep(8)
        assert process.poll() is None, process.communicate()
        write_json(run.element("train", "0").done, {"outputs": {}})
        assert process.wait(timeout=30) == 0

    def test_status_itself_is_well(self, tmp_path):
        run, plan = make_run(tmp_path, ("train", [[]], ONE))
        submitted(run, plan, "train", "123")
        result = amlaunch(tmp_path, "status", "test-1")
        assert result.returncode == 0 and "unknown" in result.stdout and "once Slurm answers again" in result.stdout
        assert amlaunch(tmp_path, "status", "test-2").returncode == 2
        run.plan.write_text("{")
        assert amlaunch(tmp_path, "status", "test-1").returncode == 2 and amlaunch(tmp_path, "status").returncode == 0


BLIND = ("unshare", "--pid", "--fork", "--mount-proc")
"""Starts a command that sees none of the other processes, as on another host."""
needs_namespaces = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*BLIND, "true"], capture_output=True).returncode != 0,
    reason="no namespaces here",
)


class TestCancel:
    def test_it_waits_for_a_submit_in_progress(self, tmp_path):
        run, plan = make_run(tmp_path, ("train", [[]], ONE))
        with Holder(run.root / "submit.lock"):
            process = start(tmp_path, "cancel", "test-1")
            time.sleep(2)
            assert process.poll() is None, process.communicate()
            submitted(run, plan, "train", "123")
        assert process.wait(timeout=30) == SILENT, "what the submit has added is seen"

    def test_nothing_runs(self, tmp_path):
        make_run(tmp_path, ("train", [[]], ONE))
        result = amlaunch(tmp_path, "cancel", "test-1")
        assert result.returncode == 0 and "test-1 has no running or pending jobs" in result.stdout

    def test_what_was_requeued_meanwhile_is_cancelled(self, tmp_path, monkeypatch):
        """The driver was told to end by Slurm a moment before us, and went back into the queue."""
        run, plan = make_run(tmp_path, ("train", [["--do", "sleep"]], ONE))
        submitted(run, plan, "train", "123")
        slurm_said(JobInfo("123_0", "PENDING", "BeginTime"))
        monkeypatch.setattr(Queue.__init__, "__defaults__", (60.0, None))
        with pytest.raises(SlurmError, match="scancel"):  # which finds nobody to ask, here
            cancel._wait_until_saved(run, plan)

    def test_a_job_that_has_only_just_started_is_asked_too(self, tmp_path, monkeypatch):
        run, plan = make_run(tmp_path, ("train", [["--do", "sleep"]], ONE))
        submitted(run, plan, "train", "123")
        slurm_said(JobInfo("123_0", "RUNNING"))
        monkeypatch.setattr(cancel, "Queue", lambda **_: Queue(max_age=60.0))
        monkeypatch.setattr(cancel, "MAX_SAVE_SECONDS", 0.5)
        assert cancel._wait_until_saved(run, plan) == 1 and run.element("train", "0").stop.exists()

    @pytest.mark.parametrize("host", ["elsewhere", platform.node()])
    def test_a_pid_that_was_written_down_is_not_believed(self, tmp_path, host):
        """It is some other process by now, or always was: on this host."""
        run, _ = make_run(tmp_path, ("train", [["--do", "sleep"]], ONE))
        folder = run.element("train", "0")
        victim = subprocess.Popen(["sleep", "600"])
        append_json_line(
            folder.attempts, {"event": "start", "attempt": 1, "time": time.time(), "pid": victim.pid, "host": host}
        )
        try:
            with Holder(folder.lock) as driver:
                result = amlaunch(tmp_path, "cancel", "test-1")
                assert victim.poll() is None
                assert result.returncode == 0 and "killed 1 element" in result.stdout
                assert driver.process.wait(timeout=5) == -signal.SIGKILL
        finally:
            victim.kill()
            victim.wait()

    @needs_namespaces
    def test_what_runs_on_another_host_is_asked_to_leave(self, tmp_path):
        """Under another kernel, or, here, out of its sight: locks are seen, processes are not."""
        run, _ = make_run(tmp_path, ("train", [["--do", "sleep"]], ONE))
        folder = run.element("train", "0")
        command = [*BLIND, sys.executable, "-m", "amlaunch", "cancel", "test-1"]
        with Holder(folder.lock) as driver:
            append_json_line(
                folder.attempts,
                {"event": "start", "attempt": 1, "time": time.time(), "pid": driver.process.pid, "host": "elsewhere"},
            )
            result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
            assert (
                result.returncode == 0
                and "train 0 is running on elsewhere, where signals from here do not reach it" in result.stdout
            ), result.stderr
            assert folder.stop.exists() and driver.process.poll() is None
            with Holder(run.lock) as launcher:
                result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
                assert (
                    result.returncode == 0
                    and "running test-1 on another machine, where signals from here do not reach it: asked it to save"
                    in result.stdout
                )
                assert run.stop.exists() and launcher.process.poll() is None

    def test_it_ends_a_driver_at_once_or_has_it_save(self, tmp_path):
        run, plan = make_run(tmp_path, ("train", [["--do", "sleep"]], ONE))
        for words, state in ([], State.DIED), (["--checkpoint"], State.STOPPED):
            driver = drive(run)
            result = pids(run, 1)
            assert amlaunch(tmp_path, "cancel", "test-1", *words).returncode == 0
            driver.wait(timeout=10)
            wait_until(lambda result=result: not any(psutil.pid_exists(pid) for pid in result))
            assert only_state(run, plan).state == state
            (run.element("train", "0").root / "pid0").unlink()

    @pytest.mark.parametrize("words", [(), ("--checkpoint",)])
    def test_a_launcher_starts_nothing_more(self, tmp_path, words):
        """With more elements than fit side by side, and stages that follow."""
        run, plan = make_run(tmp_path, ("preprocess", [["--do", "sleep"]] * 3, ONE), ("train", [[]], ONE))
        launcher = launch(run)
        try:
            pids(run, 1, "preprocess")
            assert [state.state for state in read_run(run, plan)] == [
                State.RUNNING,
                State.PENDING,
                State.PENDING,
                State.PENDING,
            ]
            result = amlaunch(tmp_path, "cancel", "test-1", *words)
            assert result.returncode == 0, result.stdout + result.stderr
            if words:
                assert not is_locked(run.lock), "it says so only when nothing of the run goes on"
                assert "1 running element: saving finished work, then stopping\n" in result.stdout
                assert "preprocess 0: stopped" in result.stdout
            launcher.wait(timeout=15)
            first, *others = [state.state for state in read_run(run, plan)]
            assert first == State.STOPPED or (first == State.DIED and not words), (
                "the launcher may have been quicker to ask than we to kill"
            )
            assert others == [State.PENDING] * 3
        finally:
            launcher.kill()
            launcher.wait()

    def test_a_second_ctrl_c_believes_no_written_pid_either(self, tmp_path):
        run, plan = make_run(tmp_path, ("train", [["--do", "sleep"]], ONE))
        folder = run.element("train", "0")
        victim = subprocess.Popen(["sleep", "600"])
        append_json_line(
            folder.attempts,
            {"event": "start", "attempt": 1, "time": time.time(), "pid": victim.pid, "host": platform.node()},
        )
        try:
            with Holder(folder.lock) as driver:
                LocalExecutor(run, plan, Machine(1, ()), lambda states: None).kill()
                assert driver.process.wait(timeout=5) == -signal.SIGKILL and victim.poll() is None
        finally:
            victim.kill()
            victim.wait()

    @pytest.mark.parametrize(("stage", "work"), [("preprocess", "finished work"), ("train", "a checkpoint")])
    def test_ctrl_c_names_what_the_stage_saves(self, tmp_path, stage, work):
        run, plan = make_run(tmp_path, ("preprocess", [[]], ONE), ("train", [[]], ONE))
        lines: list[str] = []
        report = PlainReport(lines.append)
        executor = LocalExecutor(run, plan, Machine(1, ()), report)
        executor.stage = stage
        with stopping_on_signals(executor, report):
            signal.raise_signal(signal.SIGINT)
        assert lines == [f"saving {work}, then stopping (press Ctrl-C again to end at once)"] and executor.stopping

    @needs_namespaces
    def test_a_launcher_out_of_reach_hears_a_file(self, tmp_path):
        """On another host of a shared home: locks and files are seen there, processes are not."""
        run, plan = make_run(tmp_path, ("preprocess", [["--do", "sleep"]] * 2, ONE), ("train", [[]], ONE))
        launcher = launch(run)
        try:
            pids(run, 1, "preprocess")
            result = subprocess.run(
                [*BLIND, sys.executable, "-m", "amlaunch", "cancel", "test-1"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert result.returncode == 0 and "asked it to save and stop" in result.stdout, result.stderr
            launcher.wait(timeout=60)
            assert [state.state for state in read_run(run, plan)] == [
                State.STOPPED,
                State.PENDING,
                State.PENDING,
            ] and run.stop.exists()
        finally:
            launcher.kill()
            launcher.wait()

    def test_with_a_checkpoint_it_says_what_was_saved(self, tmp_path):
        run, _ = make_run(tmp_path, ("train", [["--do", "sleep"]], ONE))
        driver = drive(run)
        pids(run, 1)
        write_json(
            run.element("train", "0").progress,
            {"time": time.time(), "unit": "step", "done": 125, "total": 400, "saved": 120},
        )
        result = amlaunch(tmp_path, "cancel", "test-1", "--checkpoint")
        driver.wait(timeout=10)
        assert (
            result.returncode == 0
            and "train 0: stopped" in result.stdout
            and "· saved at step 120/400\n" in result.stdout
        ), result.stdout

    def test_what_another_run_makes_for_both_is_left_alone(self, tmp_path):
        run, plan = make_run(tmp_path, ("preprocess", [["--do", "sleep"]], ONE))
        shared = tmp_path / "data" / "shards"
        (shared / "stages" / "preprocess").mkdir(parents=True)
        other = RunDir(tmp_path / "runs" / "other-1")
        for one in (run, other):
            write_json(one.plan, {**plan.to_json(), "run_id": one.root.name})
            one.shared.symlink_to(shared)
        folder = run.element("preprocess", "0")
        plan_json = read_object(other.plan)
        plan_json["stages"][0]["elements"][0]["arguments"][-1] = str(folder.root)
        write_json(other.plan, plan_json)
        launcher = launch(other)
        try:
            (pid,) = pids(other, 1, "preprocess")
            result = amlaunch(tmp_path, "cancel", "test-1")
            assert result.returncode == 0 and "another run" in result.stdout and psutil.pid_exists(pid)
            assert "would remove" in amlaunch(tmp_path, "clean", "test-1").stdout, "nothing of its own runs"
            assert amlaunch(tmp_path, "clean", "other-1").returncode == 2
            assert amlaunch(tmp_path, "cancel", "other-1").returncode == 0
            launcher.wait(timeout=15)
            wait_until(lambda: not psutil.pid_exists(pid))
        finally:
            launcher.kill()
            launcher.wait()


def launch(run: RunDir) -> subprocess.Popen:
    """The heart of amlaunch local, one element at a time."""
    code = (
        "from pathlib import Path\n"
        "from amlaunch.launcher.submission.local_run import stopping_on_signals\n"
        "from amlaunch.launcher.execution.local_executor import LocalExecutor\n"
        "from amlaunch.launcher.specs.machine import Machine\n"
        "from amlaunch.launcher.display.live_report import PlainReport\n"
        "from amlaunch.launcher.runs.find import read_plan\n"
        "from amlaunch.recipes.files import Lock\n"
        "from amlaunch.recipes.run_layout import RunDir\n"
        f"run = RunDir(Path({str(run.root)!r}))\n"
        "plan = read_plan(run)\n"
        "lock = Lock(run.lock)\n"
        "assert lock.acquire()\n"
        "executor = LocalExecutor(run, plan, Machine(1, ()), lambda states: None)\n"
        "with stopping_on_signals(executor, PlainReport(print)):\n"
        "    executor.execute(plan.stages)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_what_is_left_alone_is_said_stage_by_stage(tmp_path):
    _, plan = make_run(tmp_path, ("preprocess", [[]] * 3, ONE), ("train", [[]], ONE))
    states = [
        ElementState("preprocess", str(i), "", state) for i, state in enumerate((State.DONE, State.RUNNING, State.DIED))
    ] + [ElementState("train", "0", "", State.QUEUED)]
    assert skipped_lines(plan.stages[0], states, {"2"}) == [
        "preprocess: 1 of 3 already done, skipped",
        "preprocess: 1 of 3 already queued or running, left unchanged",
    ]
    assert skipped_lines(plan.stages[1], states, {"0"}) == [], "it takes another's place in the queue"


def test_the_result_says_if_the_source_was_too_small():
    def outcome(tokens: int) -> str:
        result = {"tokens": tokens, "max_tokens": 5000, "documents": 1, "shards": 2}
        return wording.outcome(ElementState("verify", "0", "", State.DONE, result=result))

    assert outcome(5000) == "5,000 tokens from 1 document in 2 shards"
    assert outcome(40) == "40 tokens from 1 document in 2 shards · the source has fewer than max_tokens 5,000"


class TestWait:
    SOON = f"import amlaunch.launcher.display.following as f; f.LOST_SECONDS = 2.0\n{KEPT_LONGER}"

    def test_it_gives_up_on_what_sbatch_never_answered(self, tmp_path):
        run, plan = make_run(tmp_path, ("train", [[]], ONE))
        submitted(run, plan, "train", None)
        slurm_said()
        result = amlaunch(tmp_path, "wait", "test-1", patch=self.SOON)
        assert result.returncode == 1 and f"next: {wording.program()} retry test-1" in result.stdout
        assert json.loads(amlaunch(tmp_path, "wait", "test-1", "--json", patch=self.SOON).stdout)["state"] == "unknown"

    def test_not_while_slurm_is_silent_or_anything_runs(self, tmp_path):
        run, plan = make_run(tmp_path, ("preprocess", [[]], ONE), ("train", [[]], ONE))
        submitted(run, plan, "train", None)
        silent = start(tmp_path, "wait", "test-1", patch=self.SOON)
        time.sleep(9)
        assert silent.poll() is None
        silent.kill()
        slurm_said()
        with Holder(run.element("preprocess", "0").lock):
            going = start(tmp_path, "wait", "test-1", patch=self.SOON)
            time.sleep(4)
            assert going.poll() is None
        assert going.wait(timeout=20) == 1

    def test_a_cancelled_run_is_called_cancelled_with_all_that_waited_for_it(self, tmp_path):
        run, plan = make_run(tmp_path, ("preprocess", [[]], ONE), ("train", [[]], ONE))
        for stage, job in ("preprocess", "11"), ("train", "12"):
            submitted(run, plan, stage, job)
        start_line = {"event": "start", "attempt": 1, "time": time.time() - 90, "host": "n1", "job": "11_0"}
        append_json_line(run.element("preprocess", "0").attempts, start_line)
        write_json(
            run.element("preprocess", "0").progress, {"time": start_line["time"] + 61.5, "unit": "token", "done": 1}
        )
        slurm_said(JobInfo("11_0", "CANCELLED", nodes="n1"), JobInfo("12_0", "CANCELLED", "Dependency"))
        result = amlaunch(tmp_path, "wait", "test-1", patch=KEPT_LONGER)
        assert (
            result.returncode == 75
            and "\ntest-1 was cancelled (1:01)\n" in result.stdout
            and "retry test-1" in result.stdout
        )
        shown = amlaunch(tmp_path, "status", "test-1", patch=KEPT_LONGER).stdout
        assert "cancelled before it started" in shown and "did not finish" not in shown
        append_json_line(
            run.element("preprocess", "0").attempts,
            {"event": "end", "attempt": 1, "time": time.time(), "outcome": "failed", "reason": "x"},
        )
        assert "an earlier stage did not finish" in amlaunch(tmp_path, "status", "test-1", patch=KEPT_LONGER).stdout

    def test_the_time_it_tells_is_the_runs_own(self, tmp_path):
        """Not how long somebody watched, nor the pause between two starts, nor what another run had made before."""
        run, _ = make_run(tmp_path, ("preprocess", [[]], ONE), ("train", [[]] * 2, ONE))
        now = time.time()
        run.lock.touch()
        os.utime(run.lock, (now - 1000, now - 1000))
        for stage, name, *spans in (
            ("preprocess", "0", (-5000, -4000)),
            ("train", "0", (-900, -850), (-100, -70)),
            ("train", "1", (-880, -840)),
        ):
            for attempt, (begun, ended) in enumerate(spans, 1):
                append_json_line(
                    run.element(stage, name).attempts, {"event": "start", "attempt": attempt, "time": now + begun}
                )
                append_json_line(
                    run.element(stage, name).attempts,
                    {"event": "end", "attempt": attempt, "time": now + ended, "outcome": "done"},
                )
            write_json(run.element(stage, name).done, {"outputs": {}})
        result = amlaunch(tmp_path, "wait", "test-1")
        assert result.returncode == 0 and "test-1 is done (1:30)" in result.stdout, result.stdout


def test_one_line_of_notes_unless_all_are_asked_for():
    assert wording.note_lines(["a", "b", "a", "c"], verbose=False) == ["note: a (2 more notes: add -v)"]
    assert wording.note_lines(["a", "b", "a"], verbose=True) == ["note: a", "note: b"]
    assert wording.note_lines(["a", "a"], verbose=False) == ["note: a"] and not wording.note_lines([], verbose=False)


def test_an_old_heartbeat_shows_its_age_and_a_deleted_run_is_named(tmp_path):
    run, plan = make_run(tmp_path, ("train", [[]], ONE))
    folder = run.element("train", "0")
    beat = {"unit": "step", "done": 5, "total": 9, "rate": 100.0, "eta_s": 4.0, "time": time.time()}
    with Holder(folder.lock):
        write_json(folder.progress, beat)
        (state,) = read_run(run, plan)
        assert wording.progress(state) == "step 5/9 · ETA 4.0 s · 100 tokens/s"
        write_json(folder.progress, {**beat, "time": time.time() - 600})
        (state,) = read_run(run, plan)
        assert wording.progress(state) == "step 5/9 · last sign of life 10:00 ago"
    shutil.rmtree(run.root)
    with pytest.raises(BadInput, match=r"test-1 is no longer a run: it has no plan\.json; it was deleted or moved"):
        read_plan(run)


class TestLogs:
    def test_following_many_elements_is_no_burden(self, tmp_path):
        run, plan = make_run(tmp_path, ("train", [[]] * 5000, ONE))
        for element in plan.stages[0].elements:
            folder = run.element("train", element.name)
            folder.log(1, 0).parent.mkdir(parents=True)
            folder.attempts.write_text('{"event": "start", "attempt": 1, "time": 1.0}\n')
            if int(element.name) % 2:
                folder.log(1, 0).write_text("hello\n")
        with Holder(run.lock):
            process = start(tmp_path, "logs", "test-1", "-f")
            try:
                time.sleep(3)
                known = psutil.Process(process.pid)
                before = sum(known.cpu_times()[:2])
                time.sleep(6)
                assert (sum(known.cpu_times()[:2]) - before) / 6 < 0.25
            finally:
                process.kill()
                process.communicate()

    def test_a_run_without_any_log_yet_is_looked_at_as_rarely(self, tmp_path):
        run, plan = make_run(tmp_path, ("train", [[]] * 5000, ONE))
        for element in plan.stages[0].elements:
            run.element("train", element.name).root.mkdir(parents=True)
        with Holder(run.lock):
            process = start(tmp_path, "logs", "test-1", "-f")
            time.sleep(2)
            known = psutil.Process(process.pid)
            before = sum(known.cpu_times()[:2])
            time.sleep(4)
            used = sum(known.cpu_times()[:2]) - before
            process.kill()
            process.communicate()
        assert used / 4 < 0.25

    @pytest.mark.parametrize(
        ("content", "lines", "shown"),
        [
            ("a\nb\nc\n", 2, ["b", "c"]),
            ("a\nb\nc", 2, ["b", "c"]),
            ("a\nb\nc\n", 3, ["a", "b", "c"]),
            ("a\nb\nc\n", 9, ["a", "b", "c"]),
            ("a\nb\n", 0, []),
            ("\n\n\n", 2, ["", ""]),
            ("", 3, []),
            ("".join(f"{i:0100}\n" for i in range(5000)), 1000, [f"{i:0100}" for i in range(4000, 5000)]),
        ],
    )
    def test_the_last_lines_of_a_log(self, tmp_path, content, lines, shown):
        log = tmp_path / "a.log"
        log.write_text(content)
        source = LogSource(log, "")
        source.skip_to_last(lines)
        assert source.new_lines(final=True) == shown

    def test_following_begins_with_the_last_lines(self, tmp_path):
        run, _ = make_run(tmp_path, ("train", [[]], ONE))
        log = run.element("train", "0").log(1, 0)
        log.parent.mkdir(parents=True)
        log.write_text("".join(f"line {i}\n" for i in range(30)))
        assert amlaunch(tmp_path, "logs", "test-1").stdout.count("line") == 30
        assert amlaunch(tmp_path, "logs", "test-1", "-f").stdout.splitlines() == [
            f"[0:0] line {i}" for i in range(20, 30)
        ]
        assert amlaunch(tmp_path, "logs", "test-1", "--tail", "1").stdout == "[0:0] line 29\n"
        refused = amlaunch(tmp_path, "logs", "test-1", "--tail=-1")
        assert refused.returncode == 2 and "--tail -1: expected an integer of at least 0" in refused.stderr

    def test_it_prints_all_that_comes_and_ends_with_the_run(self, tmp_path):
        run, _ = make_run(tmp_path, ("train", [["--do", "linger"]], ONE))
        driver = drive(run)
        pids(run, 1)
        process = start(tmp_path, "logs", "test-1", "-f")
        out, err = process.communicate(timeout=20)
        driver.wait()
        assert process.returncode == 0 and out.count("rank 0 of 1") == 1, err


class TestStatus:
    def test_watch_ends_with_the_run(self, tmp_path):
        run, _ = make_run(tmp_path, ("train", [["--do", "linger"]], ONE))
        driver = drive(run)
        pids(run, 1)
        result = amlaunch(tmp_path, "status", "test-1", "--watch")
        driver.wait()
        assert result.returncode == 0 and "running" in result.stdout and "done" in result.stdout

    def test_a_failed_run_is_no_failure_of_status(self, tmp_path):
        run, _ = make_run(tmp_path, ("train", [["--do", "fail"]], ONE))
        drive(run).wait()
        for words in [], ["--watch"], ["--json"]:
            assert amlaunch(tmp_path, "status", "test-1", *words).returncode == 0

    def test_its_json_has_the_keys_that_are_documented(self, tmp_path):
        """Scripts read them: one that is renamed, left out or added without a word breaks them."""
        run, _ = make_run(tmp_path, ("train", [[]], ONE))
        ended(run, "train", "0", "x", "alpha")
        text = (Path(ROOT) / "docs" / "commands.md").read_text()
        (documented,) = [json.loads(block.partition("```")[0]) for block in text.split("```json\n")[1:]]
        (shown,) = json.loads(amlaunch(tmp_path, "status", "--json").stdout)
        assert list(shown) == list(documented) and list(shown["stages"][0]) == list(documented["stages"][0])
        assert list(shown["stages"][0]["elements"][0]) == list(documented["stages"][0]["elements"][0])

    def test_why_it_waits_and_until_when_is_said_in_words(self, tmp_path):
        run, plan = make_run(tmp_path, ("train", [[]], ONE))
        submitted(run, plan, "train", "11")
        slurm_said(JobInfo("11_0", "PENDING", "Resources", "2026-11-24T18:00:00"))
        assert (
            "waiting for free nodes · estimated start 2026-11-24 18:00:00"
            in amlaunch(tmp_path, "status", "test-1", patch=KEPT_LONGER).stdout
        )
        (shown,) = json.loads(amlaunch(tmp_path, "status", "test-1", "--json", patch=KEPT_LONGER).stdout)
        assert shown["stages"][0]["elements"][0]["start_estimate"] == "2026-11-24T18:00:00"

    def test_what_a_stage_says_of_its_own_is_not_touched(self, tmp_path):
        """The GPU check says with ``gpus`` what each did; an attempt, how many there were."""
        run, plan = make_run(tmp_path, ("train", [[]], ONE))
        write_json(run.element("train", "0").done, {"outputs": {}, "gpus": [{"rank": 0}], "seconds": "long"})
        (state,) = read_run(run, plan)
        assert state.result == {"outputs": {}, "gpus": [{"rank": 0}]} and state.seconds is None

    def test_a_run_that_cannot_be_read_hides_no_other(self, tmp_path):
        run, _ = make_run(tmp_path, ("train", [[]], ONE))
        shutil.copytree(run.root, run.root.with_name("other-2"))
        loop = RunDir(run.root.with_name("other-2")).element("train", "0").attempts
        loop.parent.mkdir(parents=True)
        loop.symlink_to(loop)
        result = amlaunch(tmp_path, "status")
        assert (
            result.returncode == 0
            and "test-1  pending" in result.stdout
            and f"warning: {loop}: Too many levels" in result.stderr
        )
        result = amlaunch(tmp_path, "status", "other-2")
        assert result.returncode == 1 and f"error: {loop}: Too many levels" in result.stderr

    def test_what_differs_in_numbers_and_hosts_alone_is_told_once(self, tmp_path):
        run, _ = make_run(tmp_path, ("preprocess", [[]] * 30, ONE))
        for i in range(25):
            ended(
                run,
                "preprocess",
                str(i),
                f"rank 0 exited with code 1 on {HOSTS[i % 2]} (pid {3000 + i}): no answer from 10.0.0.{i}:40{i}",
                HOSTS[i % 2],
            )
        ended(run, "preprocess", "25", "rank 0 exited with code 9", "alpha")
        result = amlaunch(tmp_path, "status", "test-1").stdout
        assert (
            "preprocess 0 failed on alpha: rank 0 exited with code 1 on alpha (pid 3000): no answer from 10.0.0.0:400\n"
            in result
        )
        assert "24 more failed for the same reason (numbers differ), on 2 hosts: 1, 2, 3, 4, 5, 6, 7, 8, …\n" in result
        assert "preprocess 25 failed on alpha: rank 0 exited with code 9\n" in result, (
            "another exit code is another failure"
        )
        assert result.count(" failed on ") == 2 and result.count("exited with code 1 on") == 2, (
            "in the table, one of them stands for all"
        )

    def test_many_kinds_of_failure_do_not_fill_the_screen(self, tmp_path):
        run, _ = make_run(tmp_path, ("preprocess", [[]] * 30, ONE))
        for i, word in enumerate("abcdefghijkl"):
            ended(run, "preprocess", str(i), f"the {word * 3} is missing", "alpha")
        result = amlaunch(tmp_path, "status", "test-1").stdout
        assert result.count(" failed on ") == 5 and "7 more elements failed for other reasons" in result

    def test_a_narrow_terminal_loses_columns_but_no_name_and_no_command(self, tmp_path, monkeypatch):
        run, _ = make_run(tmp_path, ("train", [[]] * 2, ONE))
        ended(run, "train", "0", "rank 0 exited with code 1: " + "far too long to fit " * 5, "alpha")
        words = ["local", "a-recipe-with-a-long-name.yaml", "--step_scheduler.max_steps", "40000"]
        write_json(run.provenance, {"command": ["amlaunch", *words], "cwd": str(tmp_path)})
        monkeypatch.setenv("COLUMNS", "60")
        lines = amlaunch(tmp_path, "status", "test-1").stdout.splitlines()
        table = lines[1:4]
        assert table[0].split() == ["stage", "element", "state", "what"], "neither time nor attempts"
        assert (
            table[1].startswith("train  0        failed   rank 0 exited")
            and table[1].rstrip().endswith("…")
            and all(len(line) <= 60 for line in table)
        )
        assert f"next: {wording.program()} {' '.join(words)}" in lines, "in one piece"
        monkeypatch.setenv("COLUMNS", "20")
        assert "test-1" in amlaunch(tmp_path, "status").stdout, "the terminal breaks the line, we do not cut the name"

    @pytest.mark.parametrize("saved", [0, 20])
    def test_an_exception_is_the_reason_and_must_be_fixed_first(self, tmp_path, saved):
        run, _ = make_run(tmp_path, ("train", [[]], ONE))
        ended(run, "train", "0", "NameError: name 'x' is not defined", "alpha", kind="exception")
        write_json(run.element("train", "0").progress, {"unit": "step", "done": saved, "total": 60, "saved": saved})
        result = amlaunch(tmp_path, "status", "test-1").stdout
        assert "train 0 failed on alpha: NameError: name 'x' is not defined\n" in result
        start = f"{wording.program()} local {run.recipe}"
        assert f"next: fix the cause, then run {start}" in result, "retry would take the stored code and recipe"
        assert ("(continues from the last saved state)" in result) == bool(saved)

    @pytest.mark.parametrize(
        ("kind", "fixed"),
        [
            ("exception", True),
            ("full disk", True),
            ("no environment", True),
            ("out of GPU memory", True),
            ("no such image", True),
            ("network", False),
            ("hang", False),
            ("overdue", False),
            ("registry unreachable", False),
            ("", False),
        ],
    )
    def test_on_a_cluster_a_retry_is_suggested_only_where_it_can_help(self, tmp_path, kind, fixed):
        run, plan = make_run(tmp_path, ("train", [[]], ONE))
        submitted(run, plan, "train", "11")
        ended(run, "train", "0", "so it was", "alpha", job="11_0", kind=kind)
        write_json(run.provenance, {"command": ["amlaunch", "submit", "r.yaml"], "cwd": str(tmp_path)})
        slurm_said(JobInfo("11_0", "FAILED", nodes="alpha"))
        result = amlaunch(tmp_path, "status", "test-1", patch=KEPT_LONGER).stdout
        start, retry = f"next: fix the cause, then run {wording.program()} submit r.yaml\n", "retry test-1\n"
        assert (start in result, retry in result) == (fixed, not fixed), result

    def test_the_exception_is_the_line_below_the_last_traceback(self):
        frames = 'Traceback (most recent call last):\n  File "m.py", line 3, in build\n    x\n'
        chained = f"{frames}KeyError: 'a'\n\nDuring handling of the above exception, another occurred:\n\n{frames}"
        assert exception_of(f"{chained}NameError: name 'x' is not defined\n") == "NameError: name 'x' is not defined"
        assert exception_of(f"{frames}my.module.Odd\nand then\n") == "my.module.Odd"
        assert exception_of(f"{frames}ValueError: {'x' * 1000}") == f"ValueError: {'x' * 288}…"
        assert exception_of(frames) == exception_of("ValueError: boom\n") == ""

    def test_what_ran_out_of_memory_is_told_once_with_a_command_that_can_be_pasted(self, tmp_path):
        run, plan = make_run(tmp_path, ("train", [[]], ONE))
        submitted(run, plan, "train", "11")
        slurm_said(JobInfo("11_0", "OUT_OF_MEMORY", nodes="n1"))
        result = amlaunch(tmp_path, "status", "test-1", patch=KEPT_LONGER).stdout
        command = f"{wording.program()} resume test-1 --resources.train.mem 64G"
        assert "train 0 failed on n1: job 11_0 on n1 ran out of memory; raise resources.train.mem\n" in result
        assert f"next: {command}\n" in result, "the same settings would fail again"
        cause = cause_of("oom_kill")
        reason = "rank 1 was killed by SIGKILL: out of memory; raise resources.train.mem"
        assert cause and cause.explain("rank 1 was killed by SIGKILL", "train") == reason


HOSTS = ("alpha", "beta")


def ended(run: RunDir, stage: str, name: str, reason: str, host: str, job: str = "", **more: object) -> None:
    """The record of an attempt that failed."""
    folder = run.element(stage, name)
    start = {"event": "start", "attempt": 1, "time": time.time() - 60, "host": host, "job": job}
    append_json_line(folder.attempts, start)
    append_json_line(
        folder.attempts,
        {
            "event": "end",
            "attempt": 1,
            "time": time.time(),
            "outcome": "failed",
            "reason": reason,
            "seconds": 60.0,
            **more,
        },
    )


def shards(folder: Path, name: str) -> Path:
    folder_of_shards = folder / "data" / name
    (folder_of_shards / "stages" / "preprocess" / "0").mkdir(parents=True)
    (folder_of_shards / "part.bin").write_bytes(b"x" * 100)
    return folder_of_shards


def empty_run(root: Path, name: str, data: Path | None = None) -> RunDir:
    run = RunDir(root / name)
    write_json(run.plan, Plan(name, [], str(data) if data else None, str(root)).to_json())
    if data:
        run.data.symlink_to(data)
    return run


def test_a_profile_with_a_typo_hides_no_other_profile(tmp_path):
    runs = tmp_path / "far" / "runs"
    empty_run(runs, "there-1")
    (tmp_path / "clusters.yaml").write_text(f"broken: {{partitoin: gpu}}\nlab: {{runs: {runs}}}\n")
    assert "there-1" in amlaunch(tmp_path, "clean", "there-1").stdout


class TestClean:
    def offered(self, folder: Path, *words: str) -> set[str]:
        result = amlaunch(folder, "clean", "--json", *words)
        assert result.returncode == 0, result.stderr
        paths = [row["path"] for row in json.loads(result.stdout)]
        assert len(paths) == len(set(paths))
        return {str(Path(path).relative_to(folder)) for path in paths}

    def test_shards_are_kept_for_runs_of_any_root(self, tmp_path):
        for name in ("mine", "theirs", "nobodys"):
            shards(tmp_path, name)
        empty_run(tmp_path / "runs", "a-1", tmp_path / "data" / "mine")
        empty_run(tmp_path / "more-runs", "b-1", tmp_path / "data" / "theirs")
        for words in [], ["--runs", "runs"], ["--runs", "more-runs"]:
            assert self.offered(tmp_path, *words) == {"data/nobodys"}
        result = amlaunch(tmp_path, "clean", "--yes")
        assert result.returncode == 0 and "removed" in result.stdout
        assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["mine", "theirs"]

    def test_older_checkpoints_but_not_the_best_the_regular_and_the_newest_intact_one(self, tmp_path):
        run, _ = make_run(tmp_path, ("train", [[]], ONE))
        write_json(run.recipe_json, {"checkpoint": {"keep_every_steps": 40}})
        root = run.root / "checkpoints" / "0"
        for step in range(10, 70, 10):
            folder = root / f"step-{step:08d}"
            write_json(folder / "meta.json", {"step": step, "val_loss": abs(step - 10)})
            content = (folder / "meta.json").read_bytes()
            entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            write_json(folder / "manifest.json", {"meta.json": entry})
        (root / "step-00000070.1.damaged").mkdir()
        with (root / "step-00000060" / "meta.json").open("r+") as handle:
            handle.write("[")
        offered = {Path(path).name for path in self.offered(tmp_path, "test-1", "--checkpoints")}
        assert offered == {"step-00000020", "step-00000030", "step-00000070.1.damaged"}
        result = amlaunch(tmp_path, "clean", "test-1", "--checkpoints")
        assert "step-00000060 is damaged (meta.json: checksum mismatch); older checkpoints are kept" in result.stderr
        for step in (10, 40, 50):
            (root / f"step-{step:08d}" / "manifest.json").unlink()
        for step in (20, 30):
            (root / f"step-{step:08d}" / "meta.json").unlink()
        assert not self.offered(tmp_path, "test-1", "--checkpoints"), "without an intact one all stay"

    def test_shards_of_a_run_that_was_removed_can_go(self, tmp_path):
        """The last run, too."""
        shards(tmp_path, "mine")
        empty_run(tmp_path / "runs", "a-1", tmp_path / "data" / "mine")
        assert amlaunch(tmp_path, "clean", "a-1", "--yes").returncode == 0
        assert self.offered(tmp_path) == {"data/mine"}

    def test_shards_that_are_being_made_are_kept(self, tmp_path):
        data = shards(tmp_path, "being-made")
        empty_run(tmp_path / "runs", "a-1")
        with Holder(data / "stages" / "preprocess" / "0" / "lock"):
            assert not self.offered(tmp_path)
        assert self.offered(tmp_path) == {"data/being-made"}
        with Holder(data / "submit.lock"):
            assert not self.offered(tmp_path)
        run, plan = make_run(tmp_path / "elsewhere", ("preprocess", [[]], ONE))
        submitted(run, plan, "preprocess", "123", home=data)
        assert not self.offered(tmp_path), "nobody knows what became of job 123"

    def test_shards_whose_jobs_are_over_can_go(self, tmp_path):
        data = shards(tmp_path, "made")
        run, plan = make_run(tmp_path / "elsewhere", ("preprocess", [[]], ONE))
        one = submitted(run, plan, "preprocess", "123", home=data)
        for job, kept in (
            (JobInfo("123_0", "PENDING"), True),
            (JobInfo("77_0", "RUNNING", comment=one.token), True),
            (JobInfo("123_0", "COMPLETED", comment=one.token), False),
            (JobInfo("1234_0", "RUNNING"), False),
        ):
            slurm_said(job)
            assert clean.in_use(data, Queue(60.0)) == kept, job

    def test_shards_know_their_readers_by_real_path(self, tmp_path):
        """Two projects link their data to one folder: neither lies beside the other's runs."""
        made = shards(tmp_path / "scratch", "made")
        for name in ("s1", "s2"):
            (tmp_path / name / "runs").mkdir(parents=True)
            (tmp_path / name / "data").symlink_to(tmp_path / "scratch" / "data")
        run = finished_run(tmp_path / "s1")
        link_data(run, dataclasses.replace(read_plan(run), data=str(tmp_path / "s1" / "data" / "made")))
        assert amlaunch(tmp_path / "s2", "clean", "--yes").returncode == 0 and made.is_dir()
        shutil.rmtree(run.root)
        assert amlaunch(tmp_path / "s2", "clean", "--yes").returncode == 0 and not made.exists()

    def test_what_a_process_has_open_is_kept(self, tmp_path):
        """A process that no run started, too."""
        made = shards(tmp_path, "made")
        (tmp_path / "runs").mkdir()
        code = f"import mmap, time; f = open({str(made / 'part.bin')!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1)"
        code += "; f.close(); print(1, flush=True); time.sleep(600)"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as reader:
            try:
                assert reader.stdout and reader.stdout.readline()
                result = amlaunch(tmp_path, "clean", "--yes")
                assert made.is_dir() and f"process {reader.pid} " in result.stdout
            finally:
                reader.kill()

    def test_an_ambiguous_name_deletes_nothing(self, tmp_path):
        runs = [empty_run(tmp_path / "runs", f"tiny-{number}") for number in (1, 2)]
        result = amlaunch(tmp_path, "clean", "tiny", "--yes")
        assert result.returncode == 2 and "tiny-1" in result.stderr and "tiny-2" in result.stderr
        assert all(run.root.exists() for run in runs)

    def test_the_doctors_old_runs_can_go(self, tmp_path):
        old, new, busy = (
            empty_run(tmp_path / "runs" / "doctor", f"gpu-check-{name}") for name in ("old", "new", "busy")
        )
        for run in (old, busy):
            os.utime(run.root, (time.time() - 2 * 24 * 3600,) * 2)
        with Holder(busy.lock):
            os.utime(busy.root, (time.time() - 2 * 24 * 3600,) * 2)
            assert self.offered(tmp_path) == {"runs/doctor/gpu-check-old"}
            assert amlaunch(tmp_path, "clean", "--yes").returncode == 0
        assert not old.root.exists() and new.root.exists() and busy.root.exists()


RECIPE = """\
name: tiny
model:
  _target_: amlaunch.trainer.models.gpt2.build_gpt2_model
  vocab_size: 50304
  n_positions: 32
  n_embd: 16
  n_layer: 2
  n_head: 2
dataset: {file_pattern: "*.bin", seq_len: 32}
step_scheduler: {global_batch_size: 8, local_batch_size: 2, max_steps: 4}
resources: {train: {tasks_per_node: 2, cpus: 2}}
export: null
"""


def finished_run(folder: Path, cluster: dict | None = None, recipe: str = RECIPE) -> RunDir:
    """A run whose training is done, as far as its files say."""
    (folder / "tiny.yaml").write_text(recipe)
    (folder / "tokens.bin").touch()
    before = os.getcwd()
    os.chdir(folder)  # where relative paths to data begin
    try:
        loaded = load(folder / "tiny.yaml")
        plan = make_plan(loaded, Site(folder / "runs", folder, 0, 2), run_id(loaded))
        plan = dataclasses.replace(plan, cluster=cluster)
        run = RunDir(folder / "runs" / plan.run_id)
        write_run(run, loaded, plan, ["amlaunch", "local", "tiny.yaml"], refresh_code=True)
    finally:
        os.chdir(before)
    write_json(run.element("train", "0").done, {"outputs": {}})
    return run


def unfinished(folder: Path, *argv: str, recipe: str = RECIPE) -> tuple[RunDir, Plan]:
    """A run whose training is not done, started by this command line."""
    run = finished_run(folder, recipe=recipe)
    run.element("train", "0").done.unlink()
    provenance = read_object(run.provenance)
    write_json(run.provenance, {**provenance, "command": ["amlaunch", "local", "tiny.yaml", *argv]})
    return run, read_plan(run)


class TestEveryStart:
    """A new run, a resumed and a retried one are resolved in different ways, and checked in the same."""

    COMMANDS = (["local", "tiny.yaml"], ["retry", "tiny"], ["resume", "tiny", "--step_scheduler.max_steps", "6"])

    @pytest.mark.parametrize("words", COMMANDS)
    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ("wandb: {project: x}\n", "wandb is enabled, but no API key was found"),
            ("checkpoint: {checkpoint_dir: /proc/checkpoints}\n", "/proc/checkpoints: not writable"),
            ("container: {image: /no/such.sif}\n", "file /no/such.sif does not exist"),
        ],
    )
    def test_secrets_disk_and_containers_are_checked(self, tmp_path, monkeypatch, words, section, message):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        run, _ = unfinished(tmp_path, recipe=RECIPE)
        for file in (tmp_path / "tiny.yaml", run.recipe):
            file.write_text(file.read_text() + section)
        before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
        result = amlaunch(tmp_path, *words)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
        assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before

    @pytest.mark.parametrize("source", [ResumedRun, RetriedRun])
    @pytest.mark.parametrize("target", [None, Cluster("lab", ClusterProfile(), "clusters.yaml", {})])
    def test_the_stage_of_the_first_start_is_remembered(self, tmp_path, monkeypatch, source, target):
        recipe = RECIPE.replace("export: null\n", "")
        run, plan = unfinished(tmp_path, "--stage", "train", recipe=recipe)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(
            partitions.client, "partitions", lambda: [Partition("cpu", True, True, None, 2, 8, 8000, 0)]
        )
        start = source(RunRequest(), run, plan)
        resolved = start.resolve(*start.load(target), target)
        assert [stage.name for stage in resolved.plan.stages] == ["train", "export"]
        assert [stage.name for stage in resolved.stages] == ["train"]

    @pytest.mark.parametrize(("name", "gpus"), [("lab", 2), ("other", None)])
    def test_gpus_of_the_first_start_count_unless_the_run_moves(self, tmp_path, monkeypatch, name, gpus):
        run, plan = unfinished(tmp_path, "--gpus", "2", recipe=RECIPE)
        plan = dataclasses.replace(plan, cluster={"name": "lab", "profile": {}})
        monkeypatch.chdir(tmp_path)
        asked = []
        monkeypatch.setattr(run_sources, "plan_run", lambda *arguments: asked.append(arguments[-1]) or plan)
        start = ResumedRun(RunRequest(cluster=name), run, plan)
        target = Cluster(name, ClusterProfile(), "clusters.yaml", {})
        start.resolve(*start.load(target), target)
        assert asked == [gpus]

    def test_a_resumed_run_keeps_its_container(self, tmp_path, monkeypatch):
        (tmp_path / "a.sif").touch()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(resolve, "installed", lambda: ("apptainer",))
        (tmp_path / "tiny.yaml").write_text(RECIPE + "container: {image: ./a.sif, runtime: apptainer}\n")
        (tmp_path / "tokens.bin").touch()
        first = NewRun(RunRequest("tiny.yaml", runs=str(tmp_path / "runs")))
        new = first.resolve(*first.load(None), None)
        write_run(new.run_dir, new.loaded, new.plan, ["amlaunch", "local", "tiny.yaml"], refresh_code=True)
        again = ResumedRun(RunRequest(overrides=("--step_scheduler.max_steps", "6")), new.run_dir, new.plan)
        resumed = again.resolve(*again.load(None), None)
        container = resumed.plan.stage("train").container
        assert container and container == new.plan.stage("train").container
        assert resumed.restarted_stages == {"train", "export"}

    def test_text_that_was_preprocessed_may_be_gone(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        loaded = load(shipped_recipes()["quickstart"], ["--preprocess.data_files", "text/*.txt"])
        with pytest.raises(BadInput, match=r"preprocess\.data_files: no file matches"):
            check_files(loaded)
        check_files(loaded, {"preprocess"})

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("--preprocess.data_files=text", "text is a folder; name its files, such as text/**/*.txt"),
            ("--preprocess.text_column=body", "text/a.jsonl has no column 'body'; its first record has: id, text"),
            ("--preprocess.tokenizer=./nosuch", "preprocess.tokenizer: ./nosuch does not exist"),
            ("--preprocess.tokenizer=char:nosuch.txt", "preprocess.tokenizer: nosuch.txt does not exist"),
            ("--checkpoint.restore_from=old/step-00000010", "old/step-00000010 does not exist"),
        ],
    )
    def test_what_the_first_look_at_the_inputs_shows(self, tmp_path, monkeypatch, override, expected):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "a.jsonl").write_text('\n{"id": 1, "text": "x"}\n{"id": 2}\n')
        files = "--preprocess={data_files: text/*.jsonl, tokenizer: byte}"
        recipe = shipped_recipes()["quickstart"]
        overrides = [files, "--dataset={seq_len: 8}", "--validation_dataset=null"]
        check_files(load(recipe, overrides), is_new=True)
        with pytest.raises(BadInput) as caught:
            check_files(load(recipe, [*overrides, override]), is_new=True)
        assert expected in str(caught.value)

    def test_a_second_start_while_jobs_run_is_the_one_that_is_remembered(self, tmp_path, monkeypatch):
        """But the code that they run stays, and what is known of it."""
        run, _ = unfinished(tmp_path, "--stage", "train")
        monkeypatch.chdir(tmp_path)
        before = read_object(run.provenance)
        start = NewRun(RunRequest("tiny.yaml", runs=str(run.root.parent)))
        active = [ElementState("train", "0", "", State.RUNNING)]
        write_start(start.resolve(*start.load(None), None), ["amlaunch", "submit", "tiny.yaml"], active, print)
        after = read_object(run.provenance)
        assert after["command"] == ["amlaunch", "submit", "tiny.yaml"] and after["time"] == before["time"]

    def test_secrets_of_the_first_start_need_not_be_exported_again(self, tmp_path, monkeypatch):
        run, _ = unfinished(tmp_path)
        loaded, profile = load(tmp_path / "tiny.yaml"), ClusterProfile(pass_env=["SITE_TOKEN"])
        with pytest.raises(BadInput, match="pass_env lists SITE_TOKEN, which is not set in this shell"):
            write_environment(run, loaded, profile)
        monkeypatch.setenv("SITE_TOKEN", "secret")
        assert "SITE_TOKEN" in write_environment(run, loaded, profile)
        monkeypatch.delenv("SITE_TOKEN")
        write_environment(run, loaded, profile)
        assert read_object(run.environment)["SITE_TOKEN"] == "secret"


class TestRetry:
    def test_it_starts_what_the_run_directory_holds(self, tmp_path):
        """The recipe's file may be another one by now, or be gone."""
        run = finished_run(tmp_path)
        run.element("train", "0").done.unlink()
        (tmp_path / "tiny.yaml").unlink()
        result = amlaunch(tmp_path, "retry", "tiny", "--json", "--wait")
        shown = json.loads(result.stdout)
        assert shown["run"] == run.root.name and shown["state"] == "failed", result.stderr
        assert read_json_lines(run.element("train", "0").attempts), "it started (and found no tokens in an empty file)"
        assert list(run.root.parent.iterdir()) == [run.root]

    def test_of_what_is_done_or_goes_on_nothing_is_started(self, tmp_path):
        run = finished_run(tmp_path)
        result = amlaunch(tmp_path, "retry", "tiny")
        assert result.returncode == 0 and "nothing to retry: every element is done" in result.stdout
        run.element("train", "0").done.unlink()
        with Holder(run.lock):
            result = amlaunch(tmp_path, "retry", "tiny")
            assert (
                result.returncode == 0
                and "nothing to retry: it is running" in result.stdout
                and "amlaunch cancel tiny" in result.stdout.replace(wording.program(), "amlaunch")
            )
            shown = amlaunch(tmp_path, "retry", "tiny", "--json")
            assert json.loads(shown.stdout)["state"] == "running" and "nothing to retry" in shown.stderr
        assert not read_json_lines(run.element("train", "0").attempts)

    def test_what_is_missing_here_is_said_before(self, tmp_path):
        run = finished_run(tmp_path)
        run.element("train", "0").done.unlink()
        plan = read_object(run.plan)
        plan["stages"][0]["needs"]["gpus_per_node"] = 64
        write_json(run.plan, plan)
        result = amlaunch(tmp_path, "retry", "tiny")
        assert result.returncode == 2 and "trains on 64 GPUs, but this machine has" in result.stderr
        run.recipe.unlink()
        result = amlaunch(tmp_path, "retry", "tiny")
        assert (
            result.returncode == 2
            and "recipe.yaml no longer exists" in result.stderr
            and "local tiny.yaml" in result.stderr
        )


class TestResume:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--step_scheduler.max_stepz", "9"], "unknown key"),
            (["--step_scheduler.max_steps", "many"], "max_steps"),
            (["--step_scheduler.global_batch_size", "9"], "global_batch_size"),
            (["--wandb.api_key", "abc123"], "the run directory would store this secret"),
            (["--dataset.file_pattern", "gone/*.bin"], "resume cannot change the dataset. Start a new run: "),
            (["--model.n_layer", "2"], "local tiny.yaml --model.n_layer 2"),
            (["--optimizer.lr", "${NOT_SET}"], "NOT_SET"),
            (["--resources.train.nodes", "2"], "nodes"),
        ],
    )
    def test_a_mistake_changes_nothing(self, tmp_path, words, message):
        run = finished_run(tmp_path)
        before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
        result = amlaunch(tmp_path, "resume", "tiny", *words)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
        assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before

    def test_not_what_is_being_run(self, tmp_path):
        """Between two stages, nothing but the launcher's lock says so."""
        run = finished_run(tmp_path)
        with Holder(run.lock):
            result = amlaunch(tmp_path, "resume", "tiny", "--step_scheduler.max_steps", "9")
        assert result.returncode == 2 and "cancel" in result.stderr and run.element("train", "0").done.exists()

    def test_not_on_a_cluster_what_is_being_run_here(self, tmp_path):
        run = finished_run(tmp_path, {"name": "slurm", "profile": {}})
        with Holder(run.lock):
            result = amlaunch(tmp_path, "resume", "tiny", "--step_scheduler.max_steps", "9")
        assert result.returncode == 2 and "already running in another amlaunch process" in result.stderr

    def test_what_jobs_would_miss_is_said_before(self, tmp_path, monkeypatch):
        finished_run(tmp_path, {"name": "slurm", "profile": {}})
        result = amlaunch(tmp_path, "resume", "tiny", "--container.image", "/no/such/image.sif")
        assert result.returncode == 2 and "file /no/such/image.sif does not exist" in result.stderr

    def test_what_is_right_goes_on(self, tmp_path):
        run = finished_run(tmp_path)
        before = read_object(run.plan)
        (tmp_path / "tiny.yaml").write_text(RECIPE.replace("n_layer: 2", "n_layer: 3"))
        result = amlaunch(tmp_path, "resume", "tiny", "--step_scheduler.max_steps", "6", "--json")
        shown = json.loads(result.stdout)
        assert shown["run"] == run.root.name and list(run.root.parent.iterdir()) == [run.root], (
            "what the run directory holds, not the file as it is now"
        )
        assert f"{run.root.name}: {run.root}" in result.stderr
        assert (
            "n_layer: 2" in run.recipe.read_text()
            and "max_steps: 6" in run.recipe.read_text()
            and read_object(run.plan)["data"] == before["data"]
        )
        assert read_object(run.provenance)["resumed"] == ["--step_scheduler.max_steps", "6"]
        assert read_json_lines(run.element("train", "0").attempts), (
            "training went on (and found no tokens in an empty file)"
        )
