"""A stage program for tests of the driver and the local executor: behaves as its arguments say, in milliseconds.

Usage: python -m stand_in --element DIR [--do ACTION] [--rank R]

``--rank`` selects the rank that performs the action (default: all): ok, fail, bad (input), sleep, linger, hang;
``once`` fails the first time; ``steps`` counts to 24 in steps of 0.4 s, and continues where it stopped;
``port`` reports once that its port is taken; ``say`` prints ``--words`` and fails on the host ``--on`` (any);
``unpack`` is a runtime that has not started the rank when it is told to stop, and fails;
``lastword``: rank 0 takes three seconds longer to leave than the others when they are told to save and stop;
``eat`` takes memory until it is killed. ``--print NAME`` prints a variable; ``--touch PATH`` tries to create a file.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from pathlib import Path

from amlaunch.recipes.files import write_json
from amlaunch.recipes.python_process import die_with_parent
from amlaunch.recipes.run_layout import ElementDir, Heartbeat

STEPS = 24


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--element")
    parser.add_argument("--do", default="ok")
    parser.add_argument("--rank", type=int, default=-1)
    parser.add_argument("--print", dest="variables", action="append", default=[])
    parser.add_argument("--touch", type=Path)
    parser.add_argument("--words", default="")
    parser.add_argument("--on", default="")
    options = parser.parse_args()
    rank = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
    folder = ElementDir(Path(options.element))
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: signals.append(number))
    if options.do == "unpack":
        print("pyxis: importing docker image: nvcr.io#nvidia/pytorch:26.06-py3", flush=True)
        while not signals:
            time.sleep(0.02)
        print("slurmstepd-node-1: error: pyxis: child 12 terminated with signal 10")
        return 1
    size = os.environ.get("WORLD_SIZE") or os.environ["SLURM_NTASKS"]
    print(
        f"rank {rank} of {size} on {platform.node()} in {os.getcwd()} threads {os.environ['OMP_NUM_THREADS']}",
        flush=True,
    )
    for name in options.variables:
        print(f"{name}={os.environ.get(name)}", flush=True)
    if options.touch:
        try:
            options.touch.touch()
            print(f"wrote {options.touch}", flush=True)
        except OSError as error:
            print(f"could not write: {error}", flush=True)
    (folder.root / f"pid{rank}").write_text(str(os.getpid()))
    if rank == 0:
        Heartbeat(folder.progress).beat(unit="step", done=3, total=9, rate=1234.5, eta_s=6.0, loss=2.5)
    action = options.do if options.rank in (-1, rank) else "ok"
    first = rank == 0 and not (folder.root / "tried").exists()
    if action in ("once", "port") and first:
        (folder.root / "tried").touch()
        print(f"port {os.environ['MASTER_PORT']}: EADDRINUSE" if action == "port" else "not this time", flush=True)
        return 1
    if action == "steps":
        return count_steps(folder, rank, signals)
    if action == "say" and options.on in ("", platform.node()):
        print(options.words, file=sys.stderr)
        return 1
    if action == "eat":
        eaten = []
        while True:
            eaten.append(b"x" * 50_000_000)
            time.sleep(0.1)
    if action == "fail":
        raise RuntimeError("the disk is full of bees")
    if action == "bad":
        print("error: r.yaml:3: model.n_layer: expected int", file=sys.stderr)
        return 2
    if action == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if action == "lastword":
        while not signals and not folder.stop.exists():
            time.sleep(0.02)
        time.sleep(3 if rank == 0 else 0)
        return 75
    if action in ("sleep", "linger"):
        deadline = time.time() + (600 if action == "sleep" else 1.5)
        while time.time() < deadline:
            if signals or folder.stop.exists():
                return 75
            time.sleep(0.02)
    return leave_result(folder, rank)


def leave_result(folder: ElementDir, rank: int) -> int:
    """Write the result of a finished stage."""
    if rank == 0:
        output = folder.root / "output"
        output.write_text("made")
        write_json(folder.result, {"outputs": {str(output): 4}, "tokens": 7})
    return 0


def count_steps(folder: ElementDir, rank: int, signals: list[int]) -> int:
    """Count steps, save after each, and log which steps were made."""
    saved = folder.root / f"saved{rank}"
    for step in range(int(saved.read_text()) if saved.exists() else 0, STEPS):
        if signals or folder.stop.exists():
            return 75
        time.sleep(0.4)
        write_json(saved, step + 1)  # atomically: tests cut the power of nodes
        with open(folder.root / f"steps{rank}", "a") as log:
            log.write(f"{step + 1}\n")
        if rank == 0:
            Heartbeat(folder.progress, 0.0).beat(unit="step", done=step + 1, total=STEPS, rate=2.5)
    return leave_result(folder, rank)


if __name__ == "__main__":
    sys.exit(main())
