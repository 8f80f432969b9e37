"""Measure `amlaunch status` for a run of many elements: pending, running and completed.

Usage: python benchmarks/status_speed.py [ELEMENTS] [REPEATS]

Creates a run directory in a temporary folder, with a plan. Half of its elements
are done (done marker, attempts, heartbeat, one output each), the rest are
waiting. Times the whole process including start-up. If Slurm is installed, its
queue is queried; otherwise status reports that it is missing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from amlaunch.launcher.runs.submissions import Submission
from amlaunch.launcher.specs.plan import Element, Needs, Plan, Stage
from amlaunch.recipes.files import append_json_line, write_json
from amlaunch.recipes.run_layout import RunDir

ARRAY_SIZE = 1000


def make_run(folder: Path, count: int) -> RunDir:
    """Create a run of ``count`` preprocess elements, submitted in arrays of ``ARRAY_SIZE``, half of them done."""
    run = RunDir(folder / "runs" / "many-00000000")
    names = [str(i) for i in range(count)]
    elements = [Element(name, "preprocess", ["element", "--index", name], f"part {name} of {count}") for name in names]
    plan = Plan(
        run.root.name,
        [Stage("preprocess", elements, [], Needs(1, 0, 1, 1))],
        None,
        str(folder),
        cluster={"name": "slurm", "profile": {}},
    )
    write_json(run.plan, plan.to_json())
    for number, start in enumerate(range(0, count, ARRAY_SIZE)):
        Submission(
            run.jobs / f"{number + 1:03}-preprocess",
            "preprocess",
            tuple(names[start : start + ARRAY_SIZE]),
            str(run.root),
            "slurm",
            f"t{number}",
            time.time(),
            (),
            str(9_000_000 + number),
        ).write()
    for name in names[: count // 2]:
        complete_element(run, name)
    return run


def complete_element(run: RunDir, name: str) -> None:
    """Write the files of an element that is done."""
    element = run.element("preprocess", name)
    start = {"event": "start", "attempt": 1, "time": time.time(), "host": "n1", "pid": 1, "job": "1_1", "done": 0}
    end = {"event": "end", "attempt": 1, "time": time.time(), "outcome": "done", "seconds": 5.0}
    append_json_line(element.attempts, start)
    append_json_line(element.attempts, end)
    output = element.root / "shard.bin"
    output.write_bytes(b"1234")
    write_json(element.progress, {"time": time.time(), "unit": "token", "done": 10, "total": 10}, durable=False)
    marker = {"outputs": {str(output): 4}, "tokens": 10, "documents": 1, "shards": 1}
    write_json(element.done, marker, durable=False)


def timed(command: list[str], folder: Path) -> float:
    """Return the seconds that a command takes."""
    started = time.perf_counter()
    child = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    seconds = time.perf_counter() - started
    assert child.returncode == 0, child.stderr
    if "--json" in command:
        json.loads(child.stdout)
    return seconds


def main() -> None:
    """Print median and range for the list, one run, and one run as JSON."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parent.parent / "src"))
    program = [sys.executable, "-m", "amlaunch", "status"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder, count)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        commands = {
            "status": program,
            "status RUN": [*program, run.root.name],
            "status RUN --json": [*program, run.root.name, "--json"],
        }
        rounds = [{label: timed(command, folder) for label, command in commands.items()} for _ in range(repeats + 1)]
    for label in commands:
        # the first round fills caches
        times = [seconds[label] for seconds in rounds[1:]]
        print(
            f"{label:<20} {count:,} elements: median {statistics.median(times):.2f} s   "
            f"{min(times):.2f} to {max(times):.2f}"
        )


if __name__ == "__main__":
    main()
