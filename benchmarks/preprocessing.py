"""The preprocess pipeline as whole processes, against the limit of its engine: raw tiktoken over the same text in memory.

Text is gathered from this machine (Python sources and documentation, manual pages, /usr/share/doc), cut into documents
of a few kilobytes, and written as Parquet and as JSON lines. Rounds are interleaved; what is compared is compared
within a round.

Usage: python benchmarks/preprocessing.py [MEGABYTES] [ROUNDS]
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

RAW = """\
import json, sys, time
from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
encode = load_tokenizer("gpt2").encoding.encode_to_numpy  # its fastest call for a document
began, busy = time.perf_counter(), time.process_time()
tokens = sum(len(encode(text, disallowed_special=())) + 1 for text in texts)
print(tokens, time.perf_counter() - began, time.process_time() - busy)
"""
REST = """\
import dataclasses, sys, tempfile, time
from pathlib import Path
import numpy as np
from amlaunch.preprocess.stages import element
from amlaunch.preprocess.progress import Progress
from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer
from amlaunch.preprocess.stages.verify import verify
from amlaunch.recipes.format.schema import Preprocess
ready = np.arange(1 << 20, dtype=np.uint32) % 50000
class NoWork:
    def encode_to_numpy(self, text, disallowed_special=()):
        return ready[: len(text) // 2]  # about as many tokens as it would give
tokenizer = dataclasses.replace(load_tokenizer("gpt2"), encoding=NoWork())
element.load_tokenizer = lambda name: tokenizer
options, quiet, busy = Preprocess(data_files=sys.argv[1], engine="tiktoken"), Progress(log=lambda text: None), []
for _ in range(3):
    with tempfile.TemporaryDirectory() as out:
        began = time.process_time()
        element.run_element(options, 0, Path(out), quiet, 0)
        verify(options, Path(out), quiet)
        busy.append(time.process_time() - began)
print(min(busy))
"""
PLACES = (
    sysconfig.get_path("stdlib"),
    "/usr/share/doc",
    "/usr/share/man",
    "/usr/share/perl",
    "/usr/lib/python3",
    "/usr/include",
    "/usr/share/common-licenses",
    "/usr/src",
)
ENDINGS = (".py", ".txt", ".rst", ".md", ".html", ".gz", ".pm", ".pod", ".h", "README", "copyright", "changelog")
ROW_GROUP = 1000


def documents(megabytes: int) -> Iterator[str]:
    """Distinct pieces of text until there is enough; where the machine has less, other cuts of the same text."""
    rng, seen, size = random.Random(0), set(), 0
    for _ in range(20):
        for path in (
            path for place in PLACES for path in sorted(Path(place).rglob("*")) if path.name.endswith(ENDINGS)
        ):
            text = read(path)
            at = rng.randrange(2000)
            while at < len(text):
                piece = text[at : at + int(rng.lognormvariate(7.7, 0.9)) + 100]
                at += len(piece)
                if hash(piece) not in seen:
                    seen.add(hash(piece))
                    size += len(piece.encode())
                    yield piece
            if size > megabytes * 1e6:
                return


def read(path: Path) -> str:
    """A file's text; nothing where it has none."""
    try:
        if not path.is_file() or path.stat().st_size > 20e6:
            return ""
        raw = gzip.open(path).read() if path.name.endswith(".gz") else path.read_bytes()
        return raw.decode()
    except (OSError, UnicodeDecodeError, EOFError):
        return ""


def write_text(folder: Path, megabytes: int) -> int:
    """Eight Parquet files and one of JSON lines with the same documents; returns bytes of text."""
    texts = list(documents(megabytes))
    random.Random(1).shuffle(texts)
    (folder / "parquet").mkdir()
    for i in range(8):
        part = texts[i::8]
        table = pa.table({"text": part, "id": [f"{i}-{j}" for j in range(len(part))], "score": [0.5] * len(part)})
        pq.write_table(table, folder / "parquet" / f"{i}.parquet", row_group_size=ROW_GROUP)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} documents, {size / 1e6:.0f} MB of text", flush=True)
    return size


@dataclass(frozen=True)
class Run:
    """What one process, with its children, took."""

    tokens: int
    wall: float
    busy: float
    """Seconds of CPU; on a machine that others use too, the fairer measure of the cost."""

    def line(self, size: int) -> str:
        """In words; ``size``: bytes of text."""
        return f"{self.wall:7.2f} s, CPU {self.busy:7.2f} s, {self.tokens / self.wall / 1e6:6.2f} M tokens/s, {size / self.wall / 1e6:6.1f} MB/s"


def raw(folder: Path) -> Run:
    """tiktoken alone, on one core: neither start-up nor reading nor writing."""
    done = subprocess.run(
        [sys.executable, "-c", RAW, str(folder / "text.jsonl")], check=True, capture_output=True, text=True
    )
    tokens, wall, busy = done.stdout.split()
    return Run(int(tokens), float(wall), float(busy))


def children() -> float:
    """Seconds of CPU of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def pipeline(folder: Path, source: str, engine: str, workers: int) -> Run:
    """``python -m amlaunch.preprocess`` as a whole, from start to verified shards."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = [
        "--data-files",
        str(folder / source),
        "--engine",
        engine,
        "--num-workers",
        str(workers),
        "--output-dir",
        str(out),
        "--json",
    ]
    began, busy = time.perf_counter(), children()
    done = subprocess.run(
        [sys.executable, "-m", "amlaunch.preprocess", *words],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return Run(int(json.loads(done.stdout)["tokens"]), time.perf_counter() - began, children() - busy)


def rest(folder: Path, source: str) -> float:
    """Seconds of CPU of all but start-up and tokenising: reading, parsing, writing, digests, verifying. Hardly moves when a machine is busy."""
    done = subprocess.run(
        [sys.executable, "-c", REST, str(folder / source)], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def main() -> None:
    """Print every round, then medians and the ratios that the design aims at."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    engines = ["tiktoken"] + ["gigatoken"] * (importlib.util.find_spec("gigatoken") is not None)
    runs = [
        (source, engine, workers)
        for engine in engines
        for source in ("parquet/*.parquet", "text.jsonl")
        for workers in (1, 2)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_text(folder, megabytes)
        found: dict[tuple[str, str, int], list[Run]] = {run: [] for run in runs}
        limits: list[Run] = []
        for _ in range(rounds):
            limits.append(raw(folder))
            print(f"{'raw tiktoken, 1 core':<40} {limits[-1].line(size)}, load {os.getloadavg()[0]:.1f}", flush=True)
            for run in runs:
                found[run].append(pipeline(folder, *run))
                assert found[run][-1].tokens == limits[-1].tokens, run
                print(f"{run[0]:<18} {run[1]:<10} {run[2]} workers {found[run][-1].line(size)}", flush=True)
        report(found, limits)
        for source in ("parquet/*.parquet", "text.jsonl"):
            seconds = rest(folder, source)
            print(
                f"{source}: all but start-up and tokenising: {seconds:.2f} s of CPU, {seconds / min(run.busy for run in limits):.3f} of the limit's"
            )


def report(found: dict[tuple[str, str, int], list[Run]], limits: list[Run]) -> None:
    """Median over the rounds of each ratio within a round, by the wall and by CPU."""
    for source in ("parquet/*.parquet", "text.jsonl"):
        one, two = found[source, "tiktoken", 1], found[source, "tiktoken", 2]
        print(f"{source}: tiktoken, 1 worker, of the raw limit: {ratios(limits, one)}")
        print(f"{source}: tiktoken, 2 workers over 1: {ratios(one, two)}")
        if (source, "gigatoken", 1) in found:
            for workers in (1, 2):
                pair = found[source, "tiktoken", workers], found[source, "gigatoken", workers]
                print(f"{source}: gigatoken over tiktoken, {workers} workers: {ratios(*pair)}")


def ratios(above: list[Run], below: list[Run]) -> str:
    """Median of the quotients."""
    pairs = list(zip(above, below, strict=True))
    wall, busy = (statistics.median(getattr(a, name) / getattr(b, name) for a, b in pairs) for name in ("wall", "busy"))
    return f"{wall:.2f} by the clock, {busy:.2f} by CPU time"


if __name__ == "__main__":
    main()
