"""``python -m preprocess`` as the launcher runs it: exit codes, signals, kill -9, locks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.preprocess_helpers import corpus, everything

ROOT = Path(__file__).parent.parent
RECIPE = """
preprocess:
  data_files: {folder}/**/*.txt
  val_tokens: 20000
  shard_tokens: 40000
  elements: 2
model: {{_target_: "parts.py:model"}}
dataset: {{_target_: "parts.py:data"}}
"""
PARTS = "def model(): ...\ndef data(): ...\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over about 5 M tokens: about a second of work an element."""
    folder = tmp_path_factory.mktemp("recipe")
    corpus(folder / "corpus", documents=1000, words=2000)
    (folder / "parts.py").write_text(PARTS)
    path = folder / "r.yaml"
    path.write_text(RECIPE.format(folder=folder / "corpus"))
    return path


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Whatever a test starts and leaves is ended."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def start(words: list[str], processes: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-m", "preprocess", *words], env=environment, stdout=pipe, stderr=pipe, text=True
    )
    processes.append(process)
    return process


def finished(words: list[str], processes: list[subprocess.Popen[str]]) -> tuple[int, str, str]:
    process = start(words, processes)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for_shards(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("*-*-*.json"))) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def test_wrong_input_is_one_line_and_exit_code_2(recipe: Path, tmp_path: Path, processes: list) -> None:
    words = [
        "element",
        str(recipe),
        "--index",
        "0",
        "--out",
        str(tmp_path),
        "--",
        "--preprocess.data_files",
        "/no/*.txt",
    ]
    code, out, err = finished(words, processes)
    assert (code, out) == (2, "")
    assert err == f"error: preprocess.data_files: no file matches '/no/*.txt' (from {Path.cwd()})\n"


@pytest.mark.slow
def test_elements_and_verify_as_the_launcher_runs_them(recipe: Path, tmp_path: Path, processes: list) -> None:
    out, stage = tmp_path / "out", tmp_path / "stage"
    small = ["--", "--preprocess.max_tokens", "100K", "--preprocess.val_tokens=5K"]
    base = [str(recipe), "--out", str(out), "--element"]
    code, _, err = finished(["verify", *base, str(stage / "v"), *small], processes)
    assert code == 1 and "2 of 2 elements are not finished: 0, 1" in err and "Traceback" not in err
    for index in ("0", "1"):
        code, said, err = finished(["element", *base, str(stage / index), "--index", index, *small], processes)
        assert (code, err) == (0, "") and f"element {index}: " in said
        result = json.loads((stage / index / "result.json").read_text())
        assert result["tokens"] == 50_000 and result["val_tokens"] >= 2500
        beat = json.loads((stage / index / "progress.json").read_text())
        assert (beat["unit"], beat["done"], beat["total"]) == ("token", 50_000, 50_000)
    code, said, err = finished(["verify", *base, str(stage / "v"), *small], processes)
    assert (code, err) == (0, "")
    assert json.loads((stage / "v" / "result.json").read_text())["tokens"] == 100_000
    manifest = out / "manifest.json"
    assert json.loads((stage / "v" / "result.json").read_text())["outputs"] == {str(manifest): manifest.stat().st_size}
    started = time.monotonic()
    code, said, _ = finished(["element", *base, str(stage / "0"), "--index", "0", *small], processes)
    assert code == 0 and "already there" in said and time.monotonic() - started < 5


@pytest.mark.slow
def test_killed_again_and_again_the_bytes_are_those_of_an_undisturbed_run(
    recipe: Path, tmp_path: Path, processes: list
) -> None:
    words = ["element", str(recipe), "--index", "1", "--out"]
    assert finished([*words, str(tmp_path / "undisturbed")], processes)[0] == 0
    out, chance = tmp_path / "out", random.Random(7)
    killed = 0
    for attempt in range(8):
        process = start([*words, str(out)], processes)
        # the n-th attempt dies somewhere about its n-th shard, so that every attempt finds some more to do
        wait_for_shards(out, 2 * attempt, process)
        time.sleep(chance.uniform(0, 0.15))
        if process.poll() is None:
            process.kill()
            killed += 1
        process.communicate()
    assert killed >= 4, "the corpus is too small to kill in"
    code, said, err = finished([*words, str(out)], processes)
    assert (code, err) == (0, "") and "goes on after" in said
    assert everything(out) == everything(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_it_within_a_second_with_75(
    recipe: Path, tmp_path: Path, processes: list, number: signal.Signals
) -> None:
    process = start(["element", str(recipe), "--index", "0", "--out", str(tmp_path)], processes)
    wait_for_shards(tmp_path, 2, process)
    process.send_signal(number)
    sent = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - sent < 2
    assert (process.returncode, err) == (75, "") and f"stopped ({number.name})" in out
    assert not list(tmp_path.glob(".*.tmp")) and not list(tmp_path.glob("part-*"))


@pytest.mark.slow
def test_a_second_process_waits_for_the_first_and_finds_its_work_done(
    recipe: Path, tmp_path: Path, processes: list
) -> None:
    words = ["element", str(recipe), "--index", "0", "--out", str(tmp_path)]
    first = start(words, processes)
    wait_for_shards(tmp_path, 1, first)
    first.send_signal(signal.SIGSTOP)
    second = start(words, processes)
    assert second.stdout is not None
    assert "another process works on it" in second.stdout.readline()
    first.send_signal(signal.SIGCONT)
    said, err = second.communicate(timeout=60)
    assert (second.returncode, err, first.wait(timeout=60)) == (0, "", 0) and "already there" in said


@pytest.mark.slow
def test_it_dies_with_its_parent(recipe: Path, tmp_path: Path, processes: list) -> None:
    """The launcher's driver is killed: its element must not go on unseen."""
    code = (
        "import os, subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-m', 'preprocess', *sys.argv[1:]],"
        " env={**os.environ, 'AMLAUNCH_PARENT_PID': str(os.getpid())}, stdout=subprocess.DEVNULL);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    words = ["element", str(recipe), "--index", "0", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code, *words], env=environment, stdout=subprocess.PIPE, text=True)
    processes.append(parent)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_for_shards(tmp_path, 1, parent)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the element outlived its parent"
        time.sleep(0.02)
    assert not list(tmp_path.glob("part-*"))
