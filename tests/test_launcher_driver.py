"""Driver and local executor, with real processes: every end is classified, nothing outlives its parent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from image_helpers import leave_out
from test_e2e import TINY

from amlaunch.launcher.__main__ import main
from amlaunch.launcher.display.wording import status_line
from amlaunch.launcher.execution import stop_request
from amlaunch.launcher.execution.attempt import Assignment, Attempt
from amlaunch.launcher.execution.attempt_end import classify
from amlaunch.launcher.execution.local_executor import Capacity, LocalExecutor
from amlaunch.launcher.execution.rank_processes import PRIVATE_HOME, check_command, rank_start
from amlaunch.launcher.execution.rank_wait import RanksEnd
from amlaunch.launcher.execution.srun_step import SrunStep
from amlaunch.launcher.execution.stop_request import StopRequest
from amlaunch.launcher.runs.attempt_record import AttemptEnd, AttemptHistory, AttemptStart, append_attempt
from amlaunch.launcher.runs.element_state import is_driven, overall_state, read_run, read_stage
from amlaunch.launcher.runs.find import list_runs, read_plan
from amlaunch.launcher.runs.snapshot import take_snapshot, upgrade_snapshot
from amlaunch.launcher.runs.states import Outcome, State
from amlaunch.launcher.specs.cluster_profile import ClusterProfile
from amlaunch.launcher.specs.machine import Machine
from amlaunch.launcher.specs.plan import RENAMED_MODULES, Element, Needs, Plan, Stage, StageContainer
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import Lock, append_json_line, is_locked, read_json, read_json_lines, write_json
from amlaunch.recipes.run_layout import RunDir

HERE = str(Path(__file__).resolve().parent)
ROOT = str(Path(__file__).resolve().parent.parent)


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([f"{ROOT}/src", HERE]))


def make_run(folder: Path, *stages: tuple[str, list[list[str]], Needs]) -> tuple[RunDir, Plan]:
    """A run of stand-in stages, each after the one before."""
    run = RunDir(folder / "runs" / "test-1")
    built: list[Stage] = []
    for name, elements, needs in stages:
        after = [built[-1].name] if built else []
        parts = [
            Element(str(i), "stand_in", [*words, "--element", str(run.element(name, str(i)).root)])
            for i, words in enumerate(elements)
        ]
        built.append(Stage(name, parts, after, needs))
    plan = Plan("test-1", built, None, str(folder))
    write_json(run.plan, plan.to_json())
    return run, plan


ONE = Needs(1, 0, 1, 1)
TWO_RANKS = Needs(1, 0, 2, 2)


def drive(run: RunDir, stage: str = "train") -> subprocess.Popen:
    """The driver as a process of its own, as submitit starts it."""
    code = (
        "from amlaunch.launcher.execution.driver import *; "
        f"print(run_element({str(run.root)!r}, {stage!r}, '0', Assignment(1, ())))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def wait_until(test, seconds: float = 10.0):
    deadline = time.monotonic() + seconds
    while not (found := test()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found


def pids(run: RunDir, ranks: int, stage: str = "train") -> list[int]:
    files = [run.element(stage, "0").root / f"pid{rank}" for rank in range(ranks)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in files))
    return [int(path.read_text()) for path in files]


def only_state(run: RunDir, plan: Plan):
    return read_run(run, plan)[0]


def test_done_is_a_marker_with_outputs(tmp_path, monkeypatch):
    monkeypatch.delenv(
        "TORCHINDUCTOR_CACHE_DIR", raising=False
    )  # which torch sets where it has compiled in this process
    run, plan = make_run(tmp_path, ("train", [["--print", "TORCHINDUCTOR_CACHE_DIR"]], TWO_RANKS))
    assert only_state(run, plan).state == State.PENDING
    assert drive(run).communicate()[0].strip() == State.DONE
    state = only_state(run, plan)
    assert state.state == State.DONE and state.attempts == 1 and state.result["tokens"] == 7
    log = run.element("train", "0").log(1, 1).read_text()
    assert "rank 1 of 2" in log and f"in {tmp_path} threads 1" in log
    assert f"TORCHINDUCTOR_CACHE_DIR={run.root}/compile-cache\n" in log, (
        "kept with the run, where the next start finds it"
    )


@pytest.mark.parametrize("value", ["1", "007", "1e5", "1.10", "true", ""])
def test_a_variable_of_a_recipe_or_a_profile_has_the_text_that_the_shell_has(tmp_path, monkeypatch, value):
    monkeypatch.setenv("VALUE_X", value)
    run, plan = make_run(tmp_path, ("train", [[]], ONE))
    plan = replace(plan, env={"RECIPE": "${VALUE_X}", "BOTH": "${NOT_SET_X:-1}"})
    attempt = Attempt(run, plan, plan.stages[0], plan.stages[0].elements[0], Assignment(1, ()), Lock(run.lock), 1)
    env = SrunStep(ClusterProfile(env={"SITE": "${VALUE_X}", "BOTH": "site"})).command(attempt, {})[1].env
    assert {name: env[name] for name in ("RECIPE", "BOTH", "SITE")} == {"RECIPE": value, "BOTH": "1", "SITE": value}


def test_a_site_names_what_the_runtime_itself_is_left_with(tmp_path, monkeypatch):
    """It may determine the folder of images: the same for fetching and starting them, and not seen inside."""
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    run, plan = make_run(tmp_path, ("train", [[]], ONE))
    stage = replace(plan.stages[0], container=StageContainer("x/y:1", "podman", runtime_env=["SCRATCH", "NOT_SET_X"]))
    attempt = Attempt(
        run, replace(plan, stages=[stage]), stage, stage.elements[0], Assignment(1, ()), Lock(run.lock), 1
    )
    start = rank_start(attempt, {}, {}, on_slurm=False)
    assert start.env["SCRATCH"] == "/scratch/me" and "SCRATCH" not in start.launch.argv
    assert "SCRATCH" in json.loads(check_command(attempt, start)[-1])["passed"]


@pytest.mark.parametrize("there", ["nothing", "mine", "a link", "somebody else's", "a file"])
def test_the_home_inside_a_container_is_private(tmp_path, there):
    """It may lie in a shared /tmp, and compilers keep code below it: nobody else may have created it."""
    home = tmp_path / "home"
    if there in ("mine", "a link", "somebody else's"):
        (tmp_path / "made").mkdir(mode=0o777)
        home.symlink_to(tmp_path / "made") if there == "a link" else (tmp_path / "made").rename(home)
    if there == "a file":
        home.write_text("")
    if there == "somebody else's":
        if os.getuid():
            leave_out("only root can give a folder away")
        os.chown(home, 1234, 1234)
    command = [
        "sh",
        "-c",
        PRIVATE_HOME,
        "sh",
        "sh",
        "-c",
        'echo "$HOME"; stat -c "%a %u" "$HOME"; echo "$@"',
        "sh",
        "a  b",
    ]
    said = subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    place, mode, rest = said.stdout.splitlines()
    assert (
        (place == str(home)) == (there in ("nothing", "mine"))
        and mode == f"700 {os.getuid()}"
        and rest == "a  b"
        and not said.stderr
    )


def test_a_marker_is_not_believed_when_its_output_is_gone_or_short(tmp_path):
    run, plan = make_run(tmp_path, ("train", [[]], ONE))
    drive(run).wait()
    output = run.element("train", "0").root / "output"
    output.write_text("mad")
    assert only_state(run, plan).state == State.PENDING and "expected 4 bytes, got 3" in only_state(run, plan).reason
    output.unlink()
    assert "is missing" in only_state(run, plan).reason
    marker = run.element("train", "0").done
    kept = marker.rename(marker.with_name("kept"))
    assert only_state(run, plan).state == State.PENDING and "done marker is missing" in only_state(run, plan).reason
    kept.rename(marker)
    drive(run).wait()
    assert only_state(run, plan).state == State.DONE


@pytest.mark.parametrize(
    ("what", "retry", "words"),
    [("fail", True, "RuntimeError: the disk is full of bees"), ("bad", False, "r.yaml:3: model.n_layer: expected int")],
)
def test_one_rank_that_fails_takes_the_others_with_it(tmp_path, what, retry, words):
    run, plan = make_run(tmp_path, ("train", [["--do", what, "--rank", "1"]], TWO_RANKS))
    assert drive(run).communicate()[0].strip() == State.FAILED
    state = only_state(run, plan)
    end = read_json_lines(run.element("train", "0").attempts)[-1]
    assert (state.state, state.rank, end["retry"]) == (State.FAILED, 1, retry) and words in state.reason


FRAMES = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    call()\n'


@pytest.mark.parametrize(
    ("words", "kind", "reason"),
    [
        (
            f"wandb: WARNING Connection reset by peer\nrank 0 on n1 failed:\n{FRAMES}KeyError: 'txet'",
            "exception",
            "KeyError: 'txet'",
        ),
        (
            f"warning: No space left on device; training continues\n{FRAMES}"
            "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, ncclRemoteError: a remote process exited",
            "network",
            "lost their connection",
        ),
        (f"{FRAMES}OSError: [Errno 28] No space left on device", "full disk", "the disk or your quota is full"),
        (
            "wandb: Connection refused\nerror: ten steps in a row had a loss that is not a number",
            "exception",
            "ten steps in a row had a loss that is not a number",
        ),
        ("ncclRemoteError: a remote process exited", "network", "lost their connection"),
    ],
    ids=["warning and exception", "two causes", "disk", "error line", "words alone"],
)
def test_the_error_that_ended_the_rank_decides_and_not_an_earlier_warning(tmp_path, words, kind, reason):
    run, plan = make_run(tmp_path, ("train", [["--do", "say", "--words", words]], ONE))
    assert drive(run).communicate()[0].strip() == State.FAILED
    end = read_json_lines(run.element("train", "0").attempts)[-1]
    assert (end["kind"], bool(end.get("again"))) == (kind, kind == "network")
    assert reason in only_state(run, plan).reason


@pytest.mark.slow
def test_a_killed_rank_is_named_and_its_siblings_end(tmp_path, monkeypatch):
    run, plan = make_run(tmp_path, ("train", [["--do", "sleep"]], TWO_RANKS))
    driver = drive(run)
    found = pids(run, 2)
    os.kill(found[1], signal.SIGKILL)
    driver.communicate(timeout=20)
    state = only_state(run, plan)
    assert state.state == State.FAILED and state.rank == 1 and "SIGKILL" in state.reason
    assert not any(psutil.pid_exists(pid) for pid in found)


@pytest.mark.parametrize(("saved", "text"), [(5, "continuing from step 5"), (0, "starting")])
def test_a_new_attempt_does_not_show_the_progress_of_the_one_before(tmp_path, saved, text):
    run, plan = make_run(tmp_path, ("train", [[]], ONE))
    folder = run.element("train", "0")
    heartbeat = {"unit": "step", "done": 5, "total": 60, "saved": saved, "eta_s": 0.0}
    write_json(folder.progress, {**heartbeat, "time": time.time()})
    append_attempt(folder.attempts, AttemptStart(1, time.time() - 60))
    append_attempt(folder.attempts, AttemptEnd(Outcome.STOPPED, "stopped on request", attempt=1))
    lock = Lock(folder.lock)
    assert lock.acquire()
    assert status_line(only_state(run, plan)) == f"train 0: {text}", "the driver has only taken the lock"

    append_attempt(folder.attempts, AttemptStart(2))
    assert status_line(only_state(run, plan)) == f"train 0: {text}"

    write_json(folder.progress, {**heartbeat, "done": 6, "time": time.time()})
    assert status_line(only_state(run, plan)) == "train 0: step 6/60 · ETA 0.0 s"


def test_stop_soon_by_signal_and_by_file(tmp_path):
    run, plan = make_run(tmp_path, ("train", [["--do", "sleep"]], TWO_RANKS))
    for ask in (
        lambda driver: driver.send_signal(signal.SIGTERM),
        lambda driver: run.element("train", "0").stop.touch(),
    ):
        driver = drive(run)
        pids(run, 2)
        wait_until(lambda: only_state(run, plan).state == State.RUNNING)
        ask(driver)
        assert driver.communicate(timeout=10)[0].strip() == State.STOPPED
        assert only_state(run, plan).state == State.STOPPED
        for name in ("pid0", "pid1"):
            (run.element("train", "0").root / name).unlink()
    assert only_state(run, plan).attempts == 2


@pytest.mark.slow
def test_ranks_that_need_longer_to_save_than_slurm_warns_are_told_earlier(tmp_path):
    """Twice a step and a save before the time limit, by the newest heartbeat; never in the first half of the job."""
    folder = make_run(tmp_path, ("train", [[]], ONE))[0].element("train", "0")
    assert not StopRequest(folder, job_end=time.time() + 0.1).poll(), (
        "without a heartbeat, Slurm's own warning has to do"
    )
    write_json(folder.progress, {"step_seconds": 0.3, "save_seconds": 0.2})
    slow, patient = StopRequest(folder, job_end=time.time() + 2.5), StopRequest(folder, job_end=time.time() + 3.0)
    wait_until(slow.poll)
    assert slow.signal == signal.SIGUSR1 and "time limit" in slow.reason and 0.0 < slow.job_end - time.time() < 1.0
    write_json(folder.progress, {"step_seconds": 60.0, "save_seconds": 300.0})
    wait_until(patient.poll)
    assert patient.job_end - time.time() < 1.5


def test_a_stop_because_the_launcher_ended_says_so(tmp_path):
    folder = make_run(tmp_path, ("train", [[]], ONE))[0].element("train", "0")
    folder.stop.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(tmp_path / "launcher.lock")
    assert lock.acquire()
    stop = StopRequest(folder, lock.path)
    assert not stop.poll()

    looks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop_request, "is_locked", lambda path: looks.append(path) or True)
        assert not any(stop.poll() for _ in range(20)) and len(looks) <= 1, "each look is a call to the file system"
    lock.release()
    wait_until(stop.poll)
    assert stop.reason == "stopped because the amlaunch process ended" and not stop.came_by_signal


def test_a_signal_to_the_process_group_of_a_local_run_promises_nothing(tmp_path):
    """The launcher stops, too: nothing continues the element automatically."""
    run, plan = make_run(tmp_path, ("train", [["--do", "sleep"]], TWO_RANKS))
    launcher = Lock(run.lock)
    assert launcher.acquire()
    code = (
        "from amlaunch.launcher.execution.driver import *; "
        f"run_element({str(run.root)!r}, 'train', '0', Assignment(1, (), {str(run.lock)!r}))"
    )
    driver = subprocess.Popen([sys.executable, "-c", code])
    ranks = pids(run, 2)
    wait_until(lambda: only_state(run, plan).state == State.RUNNING)
    for pid in (*ranks, driver.pid):
        os.kill(pid, signal.SIGTERM)
    driver.wait(timeout=10)
    state = only_state(run, plan)
    assert state.state == State.STOPPED
    assert state.reason in ("terminated by a signal", "the ranks were terminated by a signal")


@pytest.mark.slow
def test_ranks_die_with_a_killed_driver_and_the_lock_with_them(tmp_path):
    run, plan = make_run(tmp_path, ("train", [["--do", "hang"]], TWO_RANKS))
    driver = drive(run)
    found = pids(run, 2)
    assert only_state(run, plan).state == State.RUNNING
    driver.kill()
    driver.wait()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in found))
    wait_until(lambda: not is_locked(run.element("train", "0").lock))
    state = only_state(run, plan)
    assert state.state == State.DIED and "without recording a result" in state.reason


@pytest.mark.slow
def test_a_second_driver_leaves_a_running_element_alone(tmp_path):
    run, plan = make_run(tmp_path, ("train", [["--do", "linger"]], ONE))
    first = drive(run)
    pids(run, 1)
    assert drive(run).communicate()[0].strip() == State.PENDING
    assert first.communicate()[0].strip() == State.DONE
    assert only_state(run, plan).attempts == 1


def test_an_element_stops_when_nobody_waits_for_it_any_more(tmp_path):
    run, plan = make_run(tmp_path, ("train", [["--do", "sleep"]], ONE))
    holder = Lock(run.lock)
    assert holder.acquire()
    code = (
        "from amlaunch.launcher.execution.driver import *; "
        f"run_element({str(run.root)!r}, 'train', '0', Assignment(1, (), {str(run.lock)!r}))"
    )
    driver = subprocess.Popen([sys.executable, "-c", code])
    pids(run, 1)
    time.sleep(0.3)
    assert driver.poll() is None
    holder.release()
    driver.wait(timeout=10)
    assert only_state(run, plan).state == State.STOPPED


def executor(run: RunDir, plan: Plan, cpus: int = 2, gpus: tuple[str, ...] = ()) -> LocalExecutor:
    return LocalExecutor(run, plan, Machine(cpus, gpus), lambda states: None)


@pytest.mark.slow
def test_stages_run_in_turn_and_only_what_is_not_done(tmp_path):
    run, plan = make_run(tmp_path, ("preprocess", [[], []], ONE), ("train", [[]], TWO_RANKS))
    lock = Lock(run.lock)
    lock.acquire()
    assert executor(run, plan).execute(plan.stages)
    assert [state.state for state in read_run(run, plan)] == [State.DONE] * 3
    (run.element("preprocess", "1").root / "output").unlink()
    assert executor(run, plan).execute(plan.stages)
    assert [state.attempts for state in read_run(run, plan)] == [1, 2, 1]


def test_a_failed_stage_never_lets_the_next_one_start(tmp_path):
    run, plan = make_run(tmp_path, ("preprocess", [[], ["--do", "fail"]], ONE), ("train", [[]], ONE))
    lock = Lock(run.lock)
    lock.acquire()
    assert not executor(run, plan).execute(plan.stages)
    states = read_run(run, plan)
    assert [state.state for state in states] == [State.DONE, State.FAILED, State.PENDING] and overall_state(
        states
    ) == State.FAILED


@pytest.mark.slow
def test_elements_whose_own_input_is_done_run_after_a_failure(tmp_path):
    run, plan = make_run(tmp_path, ("train", [["--do", "fail"], []], ONE), ("export", [[], []], ONE))
    plan = replace(plan, stages=[plan.stages[0], replace(plan.stages[1], elementwise=True)])
    write_json(run.plan, plan.to_json())
    lock = Lock(run.lock)
    lock.acquire()
    assert not executor(run, plan).execute(plan.stages)
    states = [(state.stage, state.state) for state in read_run(run, plan)]
    assert states == [
        ("train", State.FAILED),
        ("train", State.DONE),
        ("export", State.PENDING),
        ("export", State.DONE),
    ]


def test_what_a_killed_launcher_left_running_is_waited_for_then_finished(tmp_path):
    run, plan = make_run(tmp_path, ("train", [["--do", "linger"]], ONE))
    leftover = drive(run)
    pids(run, 1)
    lock = Lock(run.lock)
    lock.acquire()
    assert executor(run, plan).execute(plan.stages)
    leftover.wait()
    assert read_stage(run, plan.stages[0])[0].attempts == 1
    # and one that ends unfinished is started again, by us
    run.element("train", "0").done.unlink()
    (run.element("train", "0").root / "pid0").unlink()
    leftover = drive(run)
    pids(run, 1)
    run.element("train", "0").stop.touch()
    assert executor(run, plan).execute(plan.stages)
    leftover.wait()
    assert read_stage(run, plan.stages[0])[0].attempts == 3


def in_thread(run: RunDir, plan: Plan) -> tuple[LocalExecutor, threading.Thread, list[bool]]:
    made = executor(run, plan)
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(made.execute(plan.stages)))
    thread.start()
    return made, thread, ended


def test_stop_is_heard_by_an_element_that_is_just_being_started(tmp_path):
    """Between submit and the driver's first breath nobody holds the element's lock; the request must not be lost."""
    run, plan = make_run(tmp_path, ("train", [["--do", "sleep"]], ONE))
    lock = Lock(run.lock)
    lock.acquire()
    made, thread, ended = in_thread(run, plan)
    wait_until(lambda: made.jobs)
    assert not is_locked(run.element("train", "0").lock)
    made.stop()
    thread.join(timeout=15)
    assert ended == [False] and only_state(run, plan).state == State.STOPPED


def test_told_to_stop_while_an_image_is_unpacked_is_stopped(tmp_path):
    run, _ = make_run(tmp_path, ("train", [["--do", "unpack"]], TWO_RANKS))
    driver = drive(run)
    logs = [run.element("train", "0").log(1, rank) for rank in range(2)]
    wait_until(lambda: all(log.exists() and log.stat().st_size for log in logs))
    driver.send_signal(signal.SIGUSR1)
    assert driver.communicate()[0].strip() == Outcome.STOPPED
    end = AttemptHistory.read(run.element("train", "0").attempts).newest_end
    assert end.restart and "time limit" in end.reason


@pytest.mark.slow
def test_a_driver_that_never_starts_is_a_failure_with_a_reason(tmp_path):
    run, plan = make_run(tmp_path, ("train", [[]], ONE))
    lock = Lock(run.lock)
    lock.acquire()
    run.plan.write_text("{")
    assert not executor(run, plan).execute(plan.stages)
    state = only_state(run, plan)
    assert state.state == State.FAILED and "did not start in 3 tries" in state.reason and "plan.json" in state.reason


def test_a_run_between_two_stages_is_running(tmp_path):
    run, plan = make_run(tmp_path, ("preprocess", [[]], ONE), ("train", [[]], ONE))
    drive(run, "preprocess").wait()
    states = read_run(run, plan)
    assert overall_state(states, is_driven(run, states)) == State.STOPPED
    lock = Lock(run.lock)
    lock.acquire()
    assert overall_state(states, is_driven(run, states)) == State.RUNNING


def test_a_lock_is_seen_by_who_may_only_read_it():
    """A colleague who asks for the status must not be told that a running run has died."""
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which is closed to others
        os.chmod(folder, 0o755)
        lock = Lock(Path(folder) / "lock")
        lock.acquire()
        lock.path.chmod(0o444)
        child = os.fork()
        if child == 0:
            if os.geteuid() == 0:
                os.setuid(65534)
            os._exit(0 if is_locked(lock.path) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that is done, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([f"{ROOT}/src", HERE]))
        run, _ = make_run(tmp_path_factory.mktemp("finished"), ("train", [[]], ONE))
        drive(run).wait()
    return run


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("attempts.jsonl", b"3\n"),
        ("attempts.jsonl", b'{"event": "start"}\n'),
        ("attempts.jsonl", b"\xff\xfe\n"),
        ("attempts.jsonl", b'{"event": "start", "attempt": "x", "time": "y"}\n'),
        (
            "attempts.jsonl",
            b'{"event": "start", "attempt": 1, "time": 1.0, "gpus": "many", "host": 5}\n'
            b'{"event": "end", "attempt": 1, "outcome": "strange", "reason": 5}\n',
        ),
        ("done.json", b"[1]"),
        ("done.json", b'{"outputs": {}, "seconds": "long", "tokens": "x"}'),
        ("done.json", b'{"outputs": [1]}'),
        ("progress.json", b"[1]"),
        ("progress.json", b'{"unit": "step"}'),
        (
            "progress.json",
            b'{"unit": 5, "done": "x", "total": "y", "loss": "z", "rate": "fast", "eta_s": "soon", "time": "never"}',
        ),
        ("metrics.jsonl", b"\x00"),
    ],
)
def test_damaged_files_of_one_element_hide_nothing(tmp_path, monkeypatch, capsys, finished, name, content):
    run = RunDir(shutil.copytree(finished.root, tmp_path / "runs" / "test-1"))
    if name != "done.json":
        run.element("train", "0").done.unlink()
    (run.element("train", "0").root / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert main(["status", "test-1"]) == 0 and "test-1" in capsys.readouterr().out


def test_a_torn_line_does_not_take_the_next_one_with_it(tmp_path):
    path = tmp_path / "attempts.jsonl"
    append_json_line(path, {"a": 1})
    with open(path, "a") as handle:
        handle.write('{"torn": ')
    append_json_line(path, {"b": 2})
    assert read_json_lines(path) == [{"a": 1}, {"b": 2}]


def test_a_secret_of_the_containers_environment_reaches_the_ranks_and_no_file(tmp_path, monkeypatch):
    run, plan = make_run(tmp_path, ("train", [["--print", "MY_TOKEN"]], ONE))
    write_json(run.plan, {**plan.to_json(), "env": {"MY_TOKEN": "${SECRET_X}"}})
    monkeypatch.setenv("SECRET_X", "hunter2")
    assert drive(run).communicate()[0].strip() == State.DONE
    assert "MY_TOKEN=hunter2" in run.element("train", "0").log(1, 0).read_text()
    written = [path for path in run.root.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert written == [run.element("train", "0").log(1, 0)], "only where this test's program printed it"
    assert drive(run).communicate()[0].strip() == State.DONE and only_state(run, plan).attempts == 1, (
        "what is done is not made again"
    )
    run.element("train", "0").done.unlink()
    monkeypatch.delenv("SECRET_X")
    assert drive(run).communicate()[0].strip() == State.FAILED
    assert "SECRET_X is not set" in read_json_lines(run.element("train", "0").attempts)[-1]["reason"]


def test_an_image_that_is_left_to_a_node_without_a_runtime_is_not_done_without(tmp_path, monkeypatch):
    run, plan = make_run(tmp_path, ("train", [[]], ONE))
    image = StageContainer("nvcr.io/nvidia/pytorch:25.08-py3", "auto")
    write_json(run.plan, replace(plan, stages=[replace(plan.stages[0], container=image)]).to_json())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert drive(run).communicate()[0].strip() == State.FAILED
    state = only_state(run, plan)
    assert (
        "has no runtime for nvcr.io/nvidia/pytorch:25.08-py3 (tried " in state.reason
        and "container.runtime: none" in state.reason
        and not state.retry
    )
    assert not run.element("train", "0").log(1, 0).exists(), "no rank was started"


def test_gpus_are_given_out_once(tmp_path):
    capacity = Capacity(4, 4, ["0", "1", "2", "3"])
    needs = Needs(1, 2, 2, 1)
    first, second = capacity.acquire("a", needs, ""), capacity.acquire("b", needs, "")
    assert set(first.gpus) | set(second.gpus) == {"0", "1", "2", "3"}
    assert capacity.acquire("c", needs, "") is None
    capacity.release("a")
    assert capacity.acquire("c", needs, "").gpus == first.gpus
    assert Capacity(2, 2, []).acquire("d", Needs(1, 0, 1, 64), "").cpus == 2, (
        "an element may ask for more CPUs than there are"
    )


@pytest.mark.slow
def test_two_elements_of_four_gpus_run_together_on_eight(tmp_path):
    words = ["--do", "linger", "--print", "CUDA_VISIBLE_DEVICES"]
    run, plan = make_run(tmp_path, ("train", [words, words], Needs(1, 4, 1, 1)))
    lock = Lock(run.lock)
    lock.acquire()
    assert executor(run, plan, cpus=2, gpus=tuple("01234567")).execute(plan.stages)
    lines = [read_json_lines(run.element("train", name).attempts) for name in "01"]
    (first_start, first_end), (second_start, second_end) = ([line["time"] for line in attempt] for attempt in lines)
    assert first_start < second_end and second_start < first_end, "at the same time"
    shown = [
        next(line for line in run.element("train", name).log(1, 0).read_text().splitlines() if "CUDA" in line)
        for name in "01"
    ]
    assert {line.partition("=")[2] for line in shown} == {"0,1,2,3", "4,5,6,7"}
    for state in read_run(run, plan):
        assert state.gpu_hours == pytest.approx(4 * state.seconds / 3600, abs=4e-4)


@pytest.mark.slow
def test_the_rules_of_a_cluster_hold_here_a_killed_rank_is_tried_again(tmp_path):
    run, plan = make_run(tmp_path, ("train", [["--do", "steps"]], TWO_RANKS))
    lock = Lock(run.lock)
    lock.acquire()
    _, thread, ended = in_thread(run, plan)
    folder = run.element("train", "0").root
    wait_until(lambda: (folder / "steps0").exists() and len((folder / "steps0").read_text().split()) >= 3)
    os.kill(pids(run, 2)[1], signal.SIGKILL)
    thread.join(timeout=60)
    assert ended == [True] and only_state(run, plan).attempts == 2
    assert [int(step) for step in (folder / "steps0").read_text().split()] == list(range(1, 25)), (
        "it went on from what was saved"
    )


@pytest.mark.slow
def test_without_progress_it_is_not_tried_for_ever(tmp_path):
    needs = Needs(1, 0, 2, 2, hang_seconds=1.5)
    run, plan = make_run(tmp_path, ("train", [["--do", "hang"]], needs))
    lock = Lock(run.lock)
    lock.acquire()
    assert not executor(run, plan).execute(plan.stages)
    state = only_state(run, plan)
    assert (
        state.state == State.FAILED
        and "no sign of life for 2 s" in state.reason
        and "no progress in 3 attempts" in state.reason
    )
    assert state.attempts == 4, "the first one got to its heartbeat"


@pytest.mark.parametrize(
    ("codes", "first", "result", "outcome"),
    [
        ([0, 0], None, {}, Outcome.DONE),
        ([0, 0], None, None, Outcome.FAILED),
        ([75, 75], None, None, Outcome.STOPPED),
        ([0, 75], None, None, Outcome.STOPPED),
        ([1, -9], 0, {}, Outcome.FAILED),
        ([75, -9], 1, None, Outcome.FAILED),
        ([-6, 0], 0, {}, Outcome.FAILED),
    ],
)
def test_exit_codes(codes, first, result, outcome):
    assert classify(RanksEnd(tuple(codes), first), result).outcome == outcome


def test_a_stage_that_leaves_no_result_is_not_done(tmp_path):
    """Exit code 0 without a result is a failure: nothing is believed because it is absent."""
    run, _ = make_run(tmp_path, ("train", [[]], ONE))
    plan_json = read_json(run.plan)
    plan_json["stages"][0]["elements"][0].update(
        module="platform", arguments=["--element", str(run.element("train", "0").root)]
    )
    write_json(run.plan, plan_json)
    assert drive(run).communicate()[0].strip() == State.FAILED
    assert not run.element("train", "0").done.exists()


# --- runs that amlaunch made before it was one package


def to_old_layout(run: RunDir) -> None:
    """Give a run directory the plan and the snapshot of a run from before amlaunch was one package."""
    plan = read_json(run.plan)
    for stage in plan["stages"]:
        for element in stage["elements"]:
            element["module"] = {new: old for old, new in RENAMED_MODULES.items()}.get(
                element["module"], element["module"]
            )
    write_json(run.plan, plan)
    package = run.code / "amlaunch"
    for part in package.iterdir():
        if part.is_dir():
            part.rename(run.code / part.name)
    shutil.rmtree(package)


def test_a_plan_of_the_old_layout_names_the_modules_of_today(tmp_path):
    run, plan = make_run(tmp_path, ("train", [[]] * 4, ONE))
    elements = [replace(plan.stages[0].elements[0], module=module) for module in RENAMED_MODULES.values()]
    write_json(run.plan, replace(plan, stages=[replace(plan.stages[0], elements=elements)]).to_json())
    take_snapshot(run.code, None)
    to_old_layout(run)
    assert [element["module"] for element in read_json(run.plan)["stages"][0]["elements"]] == list(RENAMED_MODULES)
    assert read_plan(run).stages[0].elements == elements


def test_a_snapshot_of_the_old_layout_is_completed_once(tmp_path):
    run, _ = make_run(tmp_path, ("train", [[]], ONE))
    assert not upgrade_snapshot(run.code), "a run without a snapshot gets one when it is started"
    take_snapshot(run.code, None)
    assert not upgrade_snapshot(run.code), "complete"
    to_old_layout(run)
    queued = {path: path.read_bytes() for path in run.code.rglob("*") if path.is_file()}
    assert upgrade_snapshot(run.code) and not upgrade_snapshot(run.code)
    assert all(path.read_bytes() == content for path, content in queued.items()), "queued jobs still need these files"
    code = "import amlaunch.launcher.execution.slurm_job as job; print(job.__file__)"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(run.code)}
    place = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert place.stdout.startswith(f"{run.code}/amlaunch/launcher/")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"run_id": "x"}', '{"run_id": "x", "stages": [1], "data": 1, "cwd": 1}']
)
def test_a_plan_that_cannot_be_read_is_refused_with_the_remedy(tmp_path, content):
    run, _ = make_run(tmp_path, ("train", [[]], ONE))
    run.plan.write_text(content)
    with pytest.raises(BadInput, match=r"plan\.json: .*start the run again with the command in .*provenance\.json"):
        read_plan(run)


def test_attempts_of_older_versions_are_read_without_the_keys_they_lack():
    lines = [{"event": "start", "attempt": 1, "time": 5.0}, {"event": "end", "attempt": 1, "outcome": "failed"}]
    history = AttemptHistory.from_json(lines)
    assert history.newest_start == AttemptStart(1, 5.0)
    assert history.newest_end == AttemptEnd(Outcome.FAILED, attempt=1, time=0.0)
    failed = AttemptEnd(Outcome.FAILED, "x", 3, "n1", "network", False, True, True, False, (1, -9), 2.5, 4, 6.0)
    for end in (failed, AttemptEnd(Outcome.DONE, attempt=1, time=6.0)):
        assert AttemptEnd.from_json(json.loads(json.dumps(end.to_json()))) == end
    start = AttemptStart(1, 5.0, "n1", 7, "11_0", "11_0", 20, 8, "n[1-2]", 0)
    assert AttemptStart.from_json(json.loads(json.dumps(start.to_json()))) == start


@pytest.mark.slow
def test_a_run_of_the_old_layout_is_retried(tmp_path):
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text(f"some text for a few tokens {name} " * 2000)
    (tmp_path / "old.yaml").write_text(TINY.replace("name: tiny", "name: old"))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}/src", "TEXT": str(tmp_path / "text")}

    def amlaunch(*arguments: str) -> str:
        command = [sys.executable, "-m", "amlaunch", *arguments]
        process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    amlaunch("local", "old.yaml", "--stage", "preprocess")
    (run,) = list_runs(tmp_path / "runs")
    to_old_layout(run)
    run.element("preprocess", "0").done.unlink()
    assert "the code snapshot is from an earlier amlaunch; added the current version" in amlaunch("retry", "old")
    assert [state.attempts for state in read_stage(run, read_plan(run).stages[0])] == [2, 1]
