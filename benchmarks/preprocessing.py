"""Compare the preprocess pipeline, as whole processes, with the limit of its engine: tiktoken on text in memory.

Usage: python benchmarks/preprocessing.py [MEGABYTES] [ROUNDS]

Text from this machine (Python sources and documentation, manual pages,
/usr/share/doc) is cut into documents of a few kilobytes and written as Parquet
and as JSON lines. Rounds are interleaved, and ratios are taken within a round.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TOKENISE_ONLY = """\
import json, sys, time
from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
encode = load_tokenizer("gpt2").encoding.encode_to_numpy  # the fastest call for one document
wall, cpu = time.perf_counter(), time.process_time()
tokens = sum(len(encode(text, disallowed_special=())) + 1 for text in texts)
print(tokens, time.perf_counter() - wall, time.process_time() - cpu)
"""
ALL_BUT_TOKENISING = """\
import dataclasses, sys, tempfile, time
from pathlib import Path
import numpy as np
from amlaunch.preprocess.stages import element
from amlaunch.preprocess.progress import Progress
from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer
from amlaunch.preprocess.stages.verify import verify
from amlaunch.recipes.format.schema import Preprocess
ready_tokens = np.arange(1 << 20, dtype=np.uint32) % 50000
class FakeEncoding:
    def encode_to_numpy(self, text, disallowed_special=()):
        return ready_tokens[: len(text) // 2]  # about as many tokens as a real encoder returns
tokenizer = dataclasses.replace(load_tokenizer("gpt2"), encoding=FakeEncoding())
element.load_tokenizer = lambda name: tokenizer
options, progress, times = Preprocess(data_files=sys.argv[1], engine="tiktoken"), Progress(log=lambda text: None), []
for _ in range(3):
    with tempfile.TemporaryDirectory() as out:
        started = time.process_time()
        element.run_element(options, 0, Path(out), progress, 0)
        verify(options, Path(out), progress)
        times.append(time.process_time() - started)
print(min(times))
"""
TEXT_FOLDERS = (
    sysconfig.get_path("stdlib"),
    "/usr/share/doc",
    "/usr/share/man",
    "/usr/share/perl",
    "/usr/lib/python3",
    "/usr/include",
    "/usr/share/common-licenses",
    "/usr/src",
)
TEXT_SUFFIXES = (".py", ".txt", ".rst", ".md", ".html", ".gz", ".pm", ".pod", ".h", "README", "copyright", "changelog")
MAX_FILE_BYTES = 20e6
MAX_CUTS = 20
"""How often the same text is cut in other places to reach the requested size."""
ROW_GROUP_SIZE = 1000
SOURCES = ("parquet/*.parquet", "text.jsonl")

RunKey = tuple[str, str, int]
"""Source, engine, and number of workers."""


# --- the text -------------------------------------------------------------------------------------


def text_files() -> Iterator[Path]:
    """Yield the text files of this machine."""
    for folder in TEXT_FOLDERS:
        yield from (path for path in sorted(Path(folder).rglob("*")) if path.name.endswith(TEXT_SUFFIXES))


def documents(megabytes: int) -> Iterator[str]:
    """Yield distinct documents of ``megabytes`` in total; the same text may be cut several times."""
    rng, seen, size = random.Random(0), set(), 0
    for _ in range(MAX_CUTS):
        for path in text_files():
            text = read_text(path)
            start = rng.randrange(2000)
            while start < len(text):
                document = text[start : start + int(rng.lognormvariate(7.7, 0.9)) + 100]
                start += len(document)
                if hash(document) not in seen:
                    seen.add(hash(document))
                    size += len(document.encode())
                    yield document
            if size > megabytes * 1e6:
                return


def read_text(path: Path) -> str:
    """Return a file's text; empty if it is not a readable text file."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return ""
        raw = gzip.open(path).read() if path.name.endswith(".gz") else path.read_bytes()
        return raw.decode()
    except (OSError, UnicodeDecodeError, EOFError):
        return ""


def write_sources(folder: Path, megabytes: int) -> int:
    """Write the same documents to eight Parquet files and one file of JSON lines; return the bytes of text."""
    texts = list(documents(megabytes))
    random.Random(1).shuffle(texts)
    (folder / "parquet").mkdir()
    for i in range(8):
        part = texts[i::8]
        table = pa.table({"text": part, "id": [f"{i}-{j}" for j in range(len(part))], "score": [0.5] * len(part)})
        pq.write_table(table, folder / "parquet" / f"{i}.parquet", row_group_size=ROW_GROUP_SIZE)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} documents, {size / 1e6:.0f} MB of text", flush=True)
    return size


# --- the runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Tokens and seconds of one process with its children."""

    tokens: int
    wall: float
    cpu: float
    """Seconds of CPU time, which other work on the machine affects less than wall time."""

    def describe(self, size: int) -> str:
        """Describe the timing; ``size``: bytes of text."""
        return (
            f"{self.wall:7.2f} s, CPU {self.cpu:7.2f} s, {self.tokens / self.wall / 1e6:6.2f} M tokens/s, "
            f"{size / self.wall / 1e6:6.1f} MB/s"
        )


def run_script(script: str, source: Path) -> str:
    """Run one of the scripts above and return its stdout."""
    argv = [sys.executable, "-c", script, str(source)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def time_tokeniser(folder: Path) -> Timing:
    """Time tiktoken alone on one core, without start-up, reading and writing."""
    tokens, wall, cpu = run_script(TOKENISE_ONLY, folder / "text.jsonl").split()
    return Timing(int(tokens), float(wall), float(cpu))


def time_all_but_tokenising(folder: Path, source: str) -> float:
    """Return the CPU seconds of reading, parsing, writing, hashing and verifying.

    This hardly changes when the machine is busy.
    """
    return float(run_script(ALL_BUT_TOKENISING, folder / source))


def time_pipeline(folder: Path, source: str, engine: str, workers: int) -> Timing:
    """Time ``python -m amlaunch.preprocess`` from process start to verified shards."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    arguments = [
        f"--data-files={folder / source}",
        f"--engine={engine}",
        f"--num-workers={workers}",
        f"--output-dir={out}",
        "--json",
    ]
    argv = [sys.executable, "-m", "amlaunch.preprocess", *arguments]
    wall, cpu = time.perf_counter(), children_cpu_seconds()
    child = subprocess.run(argv, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    tokens = int(json.loads(child.stdout)["tokens"])
    return Timing(tokens, time.perf_counter() - wall, children_cpu_seconds() - cpu)


def children_cpu_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# --- the report -----------------------------------------------------------------------------------


def main() -> None:
    """Print every round, then the median ratios."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    engines = ["tiktoken"]
    if importlib.util.find_spec("gigatoken") is not None:
        engines.append("gigatoken")
    keys: list[RunKey] = [(source, engine, workers) for engine in engines for source in SOURCES for workers in (1, 2)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_sources(folder, megabytes)
        timings: dict[RunKey, list[Timing]] = {key: [] for key in keys}
        limits: list[Timing] = []
        for _ in range(rounds):
            limit = time_tokeniser(folder)
            limits.append(limit)
            print(f"{'tiktoken alone, 1 core':<40} {limit.describe(size)}, load {os.getloadavg()[0]:.1f}", flush=True)
            for key in keys:
                source, engine, workers = key
                timing = time_pipeline(folder, source, engine, workers)
                assert timing.tokens == limit.tokens, key
                timings[key].append(timing)
                print(f"{source:<18} {engine:<10} {workers} workers {timing.describe(size)}", flush=True)
        print_ratios(timings, limits)
        limit_cpu = min(limit.cpu for limit in limits)
        for source in SOURCES:
            seconds = time_all_but_tokenising(folder, source)
            print(
                f"{source}: everything but start-up and tokenising takes {seconds:.2f} s of CPU time, "
                f"{seconds / limit_cpu:.3f} of tiktoken's"
            )


def print_ratios(timings: dict[RunKey, list[Timing]], limits: list[Timing]) -> None:
    """Print the median over the rounds of each speed ratio within a round, by wall time and by CPU time."""
    for source in SOURCES:
        one_worker, two_workers = timings[source, "tiktoken", 1], timings[source, "tiktoken", 2]
        print(f"{source}: tiktoken, 1 worker, relative to tiktoken alone: {speed_ratio(limits, one_worker)}")
        print(f"{source}: tiktoken, 2 workers relative to 1: {speed_ratio(one_worker, two_workers)}")
        if (source, "gigatoken", 1) in timings:
            for workers in (1, 2):
                ratio = speed_ratio(timings[source, "tiktoken", workers], timings[source, "gigatoken", workers])
                print(f"{source}: gigatoken relative to tiktoken, {workers} workers: {ratio}")


def speed_ratio(reference: list[Timing], compared: list[Timing]) -> str:
    """Describe the median speed of ``compared`` relative to ``reference``."""
    pairs = list(zip(reference, compared, strict=True))
    wall = statistics.median(before.wall / after.wall for before, after in pairs)
    cpu = statistics.median(before.cpu / after.cpu for before, after in pairs)
    return f"{wall:.2f} by wall time, {cpu:.2f} by CPU time"


if __name__ == "__main__":
    main()
