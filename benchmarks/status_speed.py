"""How long `amlaunch status` takes for a run of many elements: pending, running and done ones, as their files would be.

Usage: python benchmarks/status_speed.py [ELEMENTS] [REPEATS]

The run directory is made in a temporary folder, with a plan, half of its
elements done (marker, attempts, heartbeat, one output each) and the rest
waiting. The whole process is timed, start-up included. The queue is asked for
real where Slurm is; else status says that it is missing and goes on.
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

ARRAY = 1000


def make_run(folder: Path, count: int) -> RunDir:
    """A run of ``count`` preprocess elements, submitted in arrays of 1,000."""
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
    for number, start in enumerate(range(0, count, ARRAY)):
        part = tuple(names[start : start + ARRAY])
        Submission(
            run.jobs / f"{number + 1:03}-preprocess",
            "preprocess",
            part,
            str(run.root),
            "slurm",
            f"t{number}",
            time.time(),
            (),
            str(9_000_000 + number),
        ).write()
    for name in names[: count // 2]:
        element = run.element("preprocess", name)
        append_json_line(
            element.attempts,
            {"event": "start", "attempt": 1, "time": time.time(), "host": "n1", "pid": 1, "job": "1_1", "done": 0},
        )
        append_json_line(
            element.attempts, {"event": "end", "attempt": 1, "time": time.time(), "outcome": "done", "seconds": 5.0}
        )
        output = element.root / "shard.bin"
        output.write_bytes(b"1234")
        write_json(element.progress, {"time": time.time(), "unit": "token", "done": 10, "total": 10}, durable=False)
        write_json(
            element.done, {"outputs": {str(output): 4}, "tokens": 10, "documents": 1, "shards": 1}, durable=False
        )
    return run


def timed(command: list[str], folder: Path) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    if "--json" in command:
        json.loads(done.stdout)
    return seconds


def main() -> None:
    """Print median and range of the list, of one run, and of its JSON."""
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
        rounds = [{name: timed(command, folder) for name, command in commands.items()} for _ in range(repeats + 1)][1:]
    for name in commands:
        times = [found[name] for found in rounds]
        print(
            f"{name:<20} of {count:,} elements: median {statistics.median(times):.2f} s   {min(times):.2f} to {max(times):.2f}"
        )


if __name__ == "__main__":
    main()
