"""A stage program for tests of the driver and the local executor: behaves as its arguments say, in milliseconds.

Usage: python -m stand_in --element DIR [--do ok|fail|bad|sleep|linger|hang] [--rank R]: what rank R does (all: -1).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from recipes.files import write_json
from recipes.process import die_with_parent
from recipes.rundir import ElementDir, Heartbeat


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--element")
    parser.add_argument("--do", default="ok")
    parser.add_argument("--rank", type=int, default=-1)
    parser.add_argument("--print", dest="variable")
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    folder = ElementDir(Path(options.element))
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} in {os.getcwd()} threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    if options.variable:
        print(f"{options.variable}={os.environ[options.variable]}", flush=True)
    (folder.root / f"pid{rank}").write_text(str(os.getpid()))
    if rank == 0:
        Heartbeat(folder.progress).beat(unit="step", done=3, total=9, rate=1234.5, eta_s=6.0, loss=2.5)
    what = options.do if options.rank in (-1, rank) else "ok"
    if what == "fail":
        raise RuntimeError("the disk is full of bees")
    if what == "bad":
        print("error: r.yaml:3: model.n_layer: expected int", file=sys.stderr)
        return 2
    if what == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if what in ("sleep", "linger"):
        deadline = time.time() + (600 if what == "sleep" else 1.5)
        while time.time() < deadline:
            if asked or folder.stop.exists():
                return 75
            time.sleep(0.02)
    if rank == 0:
        output = folder.root / "output"
        output.write_text("made")
        write_json(folder.result, {"outputs": {str(output): 4}, "tokens": 7})
    return 0


if __name__ == "__main__":
    sys.exit(main())
