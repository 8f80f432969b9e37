"""``python -m amlaunch.preprocess`` as the launcher and users run it: exit codes, signals, kills, locks, full disks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amlaunch.preprocess.shards.shard_format import open_tokens
from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer
from tests.preprocess_helpers import corpus, everything

ROOT = Path(__file__).parent.parent
RECIPE = """
preprocess:
  data_files: {folder}/**/*.txt
  val_tokens: 20000
  shard_tokens: 40000
  parts: 96
  elements: 2
  num_workers: 2
  engine: tiktoken
model: {{_target_: "parts.py:model"}}
dataset: {{_target_: "parts.py:data"}}
"""
PARTS = "def model(): ...\ndef data(): ...\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over about 5 M tokens: about a second of work an element."""
    folder = tmp_path_factory.mktemp("recipe")
    corpus(folder / "corpus", documents=1000, words=2000)
    return write_recipe(folder)


def write_recipe(folder: Path) -> Path:
    """Write a recipe and the file that its targets name."""
    (folder / "parts.py").write_text(PARTS)
    path = folder / "r.yaml"
    path.write_text(RECIPE.format(folder=folder / "corpus"))
    return path


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Collect the processes that a test starts, and kill those that are left."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def start_process(argv: list[str], processes: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-m", "amlaunch.preprocess", *argv], env=environment, stdout=pipe, stderr=pipe, text=True
    )
    processes.append(process)
    return process


def run_to_end(argv: list[str], processes: list[subprocess.Popen[str]]) -> tuple[int, str, str]:
    process = start_process(argv, processes)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_shards(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("*-*-*.json"))) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path, processes: list) -> None:
    recipe = str(write_recipe(tmp_path))
    argv = ["element", recipe, "--index=0", f"--out={tmp_path}", "--", "--preprocess.data_files", "/no/*.txt"]
    code, out, err = run_to_end(argv, processes)
    assert (code, out) == (2, "")
    assert err == f"error: preprocess.data_files: no file matches '/no/*.txt' (working directory: {Path.cwd()})\n"


@pytest.mark.slow
def test_elements_and_verify_as_the_launcher_runs_them(recipe: Path, tmp_path: Path, processes: list) -> None:
    out, stage = tmp_path / "out", tmp_path / "stage"
    small = ["--", "--preprocess.max_tokens", "100K", "--preprocess.val_tokens=5K"]
    base = [str(recipe), "--out", str(out), "--element"]
    code, _, err = run_to_end(["verify", *base, str(stage / "v"), *small], processes)
    assert code == 1 and "2 of 2 elements not finished: 0, 1" in err and "Traceback" not in err
    for index in ("0", "1"):
        code, stdout, err = run_to_end(["element", *base, str(stage / index), "--index", index, *small], processes)
        assert (code, err) == (0, "") and f"element {index}: " in stdout
        result = json.loads((stage / index / "result.json").read_text())
        assert result["tokens"] <= 200_000 and list(result["outputs"]) == [str(out / f"element-0000{index}.json")]
        beat = json.loads((stage / index / "progress.json").read_text())
        assert (beat["unit"], beat["done"], beat["total"]) == ("token", result["tokens"], result["tokens"])
    code, stdout, err = run_to_end(["verify", *base, str(stage / "v"), *small], processes)
    assert (code, err) == (0, "")
    verify_result = json.loads((stage / "v" / "result.json").read_text())
    assert verify_result["tokens"] == verify_result["max_tokens"] == 100_000 and verify_result["val_tokens"] >= 5000
    assert str(out / "manifest.json") in verify_result["outputs"]
    assert len(verify_result["outputs"]) == 1 + 2 * verify_result["shards"]
    assert all(Path(path).stat().st_size == size for path, size in verify_result["outputs"].items())


def children(pid: int) -> list[int]:
    """Return the worker processes of an element."""
    return [child.pid for child in psutil.Process(pid).children()]


def all_ended(pids: list[int], seconds: float = 10) -> bool:
    """Return True if processes end within ``seconds``; a zombie counts as ended."""
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        if time.monotonic() > deadline:
            return not alive
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Element 1's files, made in one go by one worker."""
    out, started = tmp_path_factory.mktemp("undisturbed"), []
    done = run_to_end(["element", str(recipe), "--index", "1", "--workers", "1", "--out", str(out)], started)
    assert done[0] == 0, done
    return everything(out)


@pytest.mark.slow
def test_killed_twenty_times_in_a_row_the_bytes_are_those_of_an_undisturbed_run(
    recipe: Path, tmp_path: Path, processes: list, uninterrupted: dict[str, bytes]
) -> None:
    """The element itself, or one of its workers alone, at random moments."""
    argv = ["element", str(recipe), "--index", "1", "--out", str(tmp_path)]
    rng = random.Random(7)
    killed = 0
    for attempt in range(20):
        process = start_process(argv, processes)
        wait_for_shards(
            tmp_path, len(list(tmp_path.glob("*-*-*.json"))) + 1, process
        )  # each attempt gets a little further
        time.sleep(rng.uniform(0, 0.02))
        workers = children(process.pid) if process.poll() is None else []
        if attempt % 4 == 3 and workers:
            os.kill(workers[0], signal.SIGKILL)
            _, err = process.communicate(timeout=30)
            killed += process.returncode == 1 and "was killed by SIGKILL (out of memory?) while it made part" in err
        elif process.poll() is None:
            process.kill()
            killed += 1
        process.communicate()
        assert all_ended(workers), "a worker outlived its element"
    assert killed == 20, "the corpus is too small to kill in"
    code, stdout, err = run_to_end(argv, processes)
    assert (code, err) == (0, "") and "resuming after" in stdout
    assert everything(tmp_path) == uninterrupted


@pytest.mark.slow
def test_signals_end_it_within_seconds_with_75_and_the_bytes_are_the_same(
    recipe: Path, tmp_path: Path, processes: list, uninterrupted: dict[str, bytes]
) -> None:
    argv = ["element", str(recipe), "--index", "1", "--out", str(tmp_path)]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = start_process(argv, processes)
        wait_for_shards(tmp_path, len(list(tmp_path.glob("*-*-*.json"))) + 1, process)  # one of its own: it listens
        workers = children(process.pid)
        process.send_signal(number)
        sent = time.monotonic()
        out, err = process.communicate(timeout=30)
        assert time.monotonic() - sent < 5
        assert (process.returncode, err) == (75, "") and f"stopped ({number.name})" in out
        assert not list(tmp_path.glob(".*.tmp")) and not list(tmp_path.glob("element-*")) and all_ended(workers)
    assert run_to_end(argv, processes)[0] == 0
    assert everything(tmp_path) == uninterrupted


@pytest.mark.slow
def test_on_a_terminal_there_is_a_bar_and_ctrl_c_leaves_nothing_behind(recipe: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the workers too; pressed again while it leaves, it changes nothing."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1", "TERM": "xterm", "COLUMNS": "200"}
        os.execv(
            sys.executable,
            [sys.executable, "-m", "amlaunch.preprocess", str(recipe), "--num-workers=2", f"--output-dir={tmp_path}"],
        )
    seen, workers, deadline = b"", [], time.monotonic() + 60
    while b"s left" not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 0.05)[0]:
            seen += os.read(terminal, 65536)
    workers = children(pid)
    os.write(terminal, b"\x03\x03")
    with contextlib.suppress(OSError):  # Linux' word for the end of a terminal
        while part := os.read(terminal, 65536):
            seen += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", seen.decode())
    assert "━" in text and re.search(
        r"[\d,]+ tokens, documents [\d,]+, workers 2, [\d,]+ tokens/s, [\d.]+ MB/s, [\d,]+ s left", text
    )
    assert "stopped (SIGINT)" in text and "Traceback" not in text
    assert len(workers) == 2 and all_ended(workers) and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
def test_a_recipe_s_section_and_the_options_mean_the_same(tmp_path: Path, processes: list) -> None:
    corpus(tmp_path / "corpus")
    (tmp_path / "parts.py").write_text(PARTS)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(folder=tmp_path / "corpus").replace("96", "5").replace("20000", "100") + "\n")
    files = [f"--data-files={tmp_path}/corpus/**/*.txt", "--val-tokens=100", "--shard-tokens=40K", "--parts=5"]
    for argv, out in (([str(path)], "section"), (files, "options"), ([str(path), "--max-tokens", "1K"], "both")):
        code, stdout, err = run_to_end([*argv, "--engine", "tiktoken", "--output-dir", str(tmp_path / out)], processes)
        assert (code, err) == (0, "") and "next: amlaunch data peek" in stdout
        assert f'dataset: {{"file_pattern": "{tmp_path / out}/train-*.bin"}}' in stdout
    outputs = [
        {name: raw for name, raw in everything(tmp_path / out).items() if "element" not in name}
        for out in ("section", "options")
    ]
    assert outputs[0] == outputs[1]
    assert json.loads((tmp_path / "both" / "manifest.json").read_text())["tokens"] == 1000


@pytest.mark.slow
def test_a_second_process_waits_for_the_first_and_finds_its_work_done(
    recipe: Path, tmp_path: Path, processes: list
) -> None:
    argv = ["element", str(recipe), "--index=0", f"--out={tmp_path}", "--workers=1", "--", "--preprocess.parts=2"]
    first = start_process(argv, processes)
    while not list(tmp_path.glob(".lock-*")) and first.poll() is None:
        time.sleep(0.01)
    (worker,) = children(first.pid)
    os.kill(worker, signal.SIGSTOP)
    second = start_process(argv, processes)
    assert second.stdout is not None
    assert any("another process is working on it" in line for line in second.stdout), "it ended without a word"
    os.kill(worker, signal.SIGCONT)
    _, err = second.communicate(timeout=60)
    assert (second.returncode, err, first.wait(timeout=60)) == (0, "", 0)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system of its own needs root")
def test_a_full_disk_is_said_and_afterwards_the_bytes_are_the_same(
    recipe: Path, tmp_path: Path, processes: list, uninterrupted: dict[str, bytes]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = ["element", str(recipe), "--index", "1", "--out", str(disk)]
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        code, _, err = run_to_end(argv, processes)
        assert code == 1 and "No space left on device" in err and "Traceback" not in err
        assert not list(disk.glob(".*.tmp")) and list(disk.glob("train-*.json")), "what was whole before is kept"
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert run_to_end(argv, processes)[0] == 0
        assert everything(disk) == uninterrupted
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def peak_memory_mb(argv: list[str], processes: list[subprocess.Popen[str]]) -> float:
    """Return the peak memory of a run's worker in MB, as the kernel recorded it: polling would miss peaks."""
    process = start_process([*argv, "--num-workers", "1"], processes)
    found = 0
    while process.poll() is None:
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                found = max(found, next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")))
        time.sleep(0.02)
    assert process.returncode == 0, process.communicate()
    return found * 1024 / 1e6


def random_words(seed: int, size: int) -> str:
    """Return ``size`` characters of random long words, each one GPT-2 token: they compress like text."""
    tokens = load_tokenizer("gpt2").vocabulary["mergeable_ranks"]
    long = sorted(
        token.decode()
        for token in tokens
        if len(token) > 7 and token[:1] == b" " and token[1:].isalpha() and token.isascii()
    )
    return "".join(random.Random(seed).choices(long, k=size // 8))[:size]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "limit_mb"), [("tiktoken", 200), ("gigatoken", 300)])
def test_memory_of_a_worker_stays_flat(tmp_path: Path, processes: list, engine: str, limit_mb: int) -> None:
    """More text in a row group and a shard does not increase it: 8, then 24 MB, in pages of 1 MB; nor as JSON lines."""
    pytest.importorskip(engine)
    text = random_words(0, 40_000)
    peaks_mb = {}
    for rows in (200, 600):
        folder = tmp_path / str(rows)
        folder.mkdir()
        texts = [f"{i} {text}" for i in range(rows)]
        pq.write_table(
            pa.table({"id": range(rows), "text": texts}), folder / "a.parquet", row_group_size=rows, write_batch_size=16
        )
        (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        for name in ("a.parquet", "a.jsonl"):
            options = [f"--data-files={folder}/{name}", "--parts=1", f"--engine={engine}"]
            peaks_mb[rows, name] = peak_memory_mb([*options, f"--output-dir={folder}/out-{name}"], processes)
    assert max(peaks_mb.values()) < limit_mb
    assert all(peaks_mb[600, name] < peaks_mb[200, name] + 15 for name in ("a.parquet", "a.jsonl")), peaks_mb


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "limit_mb"), [("tiktoken", 200), ("gigatoken", 300)])
def test_pages_of_forty_megabytes_fit_as_well(tmp_path: Path, processes: list, engine: str, limit_mb: int) -> None:
    """What pyarrow makes of rows of 40 KB by itself: a dictionary of 1,024 rows, then a plain page."""
    pytest.importorskip(engine)
    text = random_words(1, 12_000_000)
    texts = [text[i * 7000 : i * 7000 + 40_000] for i in range(1500)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=1500)
    sizes = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0)
    assert sizes.has_dictionary_page and sizes.total_uncompressed_size > 59e6
    argv = [f"--data-files={tmp_path}/a.parquet", "--parts=1", f"--engine={engine}", f"--output-dir={tmp_path}/out"]
    assert peak_memory_mb(argv, processes) < limit_mb


@pytest.mark.slow
def test_a_line_of_fifty_megabytes_is_in_memory_once_at_a_time(tmp_path: Path, processes: list) -> None:
    """Bytes, then text, then the parsed text; 209 MB when the line was copied to be split, or parsed from bytes."""
    huge = (random_words(2, 49_998) + "é") * 1000
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("before", huge, "behind")))
    argv = [f"--data-files={tmp_path}/a.jsonl", "--parts=1", "--engine=tiktoken", f"--output-dir={tmp_path}/out"]
    assert peak_memory_mb(argv, processes) < 190


@pytest.mark.slow
def test_documents_of_fifty_megabytes_and_a_million_of_one_character(tmp_path: Path, processes: list) -> None:
    """From start to verified shards, in each format; the tokens are those of the whole text."""
    encode, (unit, million) = load_tokenizer("gpt2").encode, (random_words(2, 49_998) + "é", "-" * 1_000_000)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    huge = unit * 1000
    assert len(huge.encode()) == 50_000_000
    (source / "a.txt").write_text(huge)
    with open(source / "b.jsonl", "w") as handle:
        for text in ("before", huge, million, "behind"):
            handle.write(json.dumps({"text": text}) + "\n")
    pq.write_table(pa.table({"text": ["before", huge, million, "behind"]}), source / "c.parquet")
    argv = [f"--data-files={source}/*", "--parts=3", "--num-workers=2", "--engine=tiktoken", f"--output-dir={out}"]
    assert run_to_end(argv, processes)[0] == 0
    tiled = np.concatenate([[50256], np.tile(encode(unit), 1000)])
    assert np.array_equal(encode(unit * 3), np.tile(encode(unit), 3)), "else a token would cross a seam"
    all_documents = np.concatenate(
        [[50256, *encode("before")], tiled, [50256, *encode(million)], [50256, *encode("behind")]]
    )
    files = {"a.txt": tiled, "b.jsonl": all_documents, "c.parquet": all_documents}
    expected = [files[name] for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())]
    assert np.array_equal(
        np.concatenate([open_tokens(path) for path in sorted(out.glob("train-*.bin"))]), np.concatenate(expected)
    )


# --- as people type it --------------------------------------------------------------------------------


def amlaunch(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-m", "amlaunch", *argv], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["preprocess"], "give --dataset NAME, --data-files GLOB"),
        (["preprocess", "--data-file", "x"], "unknown option --data-file; did you mean '--data-files'?"),
        (
            ["preprocess", "--data-files", "x", "--max-tokens", "1Q"],
            "--max-tokens: preprocess.max_tokens: expected a count such as 500M",
        ),
        (["preprocess", "--data-files", "no/*.txt"], "no file matches 'no/*.txt'"),
        (
            ["preprocess", "--data-files", "x", "--num-workers", "0"],
            "--num-workers: preprocess.num_workers: expected an integer of at least 1",
        ),
        (["preprocess", "--data-files", "x", "--engine", "fast"], "invalid choice: 'fast'"),
        (["preprocess", "quikstart"], "did you mean 'quickstart'"),
        (
            ["preprocess", "--data-files", f"{ROOT}/README.md", "--output-dir", f"{ROOT}/LICENSE"],
            "LICENSE is a file, not a folder",
        ),
        (["preprocess", "--data-files", "/dev/null/*"], "no file matches"),
        (
            ["preprocess", "--data-files", "x", "--max-length", "9"],
            "unknown option --max-length; did you mean '--max-tokens'?",
        ),
        (["data", "inspect", "nowhere"], "nowhere/manifest.json: no such file"),
        (["data", "look", "nowhere"], "unknown command 'data look'"),
    ],
)
def test_wrong_words_are_explained_with_exit_code_2(tmp_path: Path, argv: list[str], message: str) -> None:
    done = amlaunch(*argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_preprocess_then_inspect_peek_and_verify(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "corpus")
    argv = ["preprocess", "--data-files", "corpus/**/*.txt", "--max-tokens", "2K", "--val-tokens", "100", "--json"]
    summary = json.loads(amlaunch(*argv, cwd=tmp_path).stdout)
    folder = summary["path"]
    assert (summary["tokens"], folder) == (2000, str(next((tmp_path / "data").iterdir())))
    repeated = amlaunch(*argv, cwd=tmp_path)
    assert json.loads(repeated.stdout) == summary and "resuming after" in repeated.stderr

    def data_json(*words: str) -> Any:
        return json.loads(amlaunch("data", *words, "--json", cwd=tmp_path).stdout)

    manifest = data_json("inspect", folder)
    assert manifest["splits"]["val"][0]["tokens"] == summary["val_tokens"] >= 100
    document = data_json("peek", folder, "--split", "val", "--document", "0", "--tokens", "9999")
    assert document["text"].removeprefix("<|endoftext|>") in texts
    first_ten = data_json("peek", folder, "--tokens", "10")
    last_three = data_json("peek", folder, "--token", "7", "--tokens", "3")
    assert last_three["ids"] == first_ten["ids"][7:]

    reader, writer = os.pipe()
    os.close(reader)
    peek = [sys.executable, "-m", "amlaunch", "data", "peek", folder]
    unread = subprocess.run(peek, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path)
    assert (unread.returncode, unread.stderr) == (141, b""), "as of any program before `head`"

    entry = manifest["splits"]["train"][0]
    shard = Path(folder) / entry["file"]
    assert data_json("inspect", str(shard))["documents"] == entry["documents"]
    assert "verified: " in amlaunch("data", "verify", folder, cwd=tmp_path).stdout
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    damaged = amlaunch("data", "verify", folder, cwd=tmp_path)
    assert damaged.returncode == 1 and f"{shard.name}: checksum mismatch" in damaged.stderr
    assert amlaunch(*argv, cwd=tmp_path).returncode == 1, "set aside"
    assert json.loads(amlaunch(*argv, cwd=tmp_path).stdout) == summary, "and made again"


@pytest.mark.slow
def test_it_dies_with_its_parent(recipe: Path, tmp_path: Path, processes: list) -> None:
    """The launcher's driver is killed: its element must not go on unseen."""
    code = (
        "import os, subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-m', 'amlaunch.preprocess', *sys.argv[1:]],"
        " env={**os.environ, 'AMLAUNCH_PARENT_PID': str(os.getpid())}, stdout=subprocess.DEVNULL);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    argv = ["element", str(recipe), "--index", "0", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    parent = subprocess.Popen([sys.executable, "-c", code, *argv], env=environment, stdout=subprocess.PIPE, text=True)
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
    assert not list(tmp_path.glob("element-*"))
