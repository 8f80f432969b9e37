"""Measure the start-up of `amlaunch` commands next to a bare Python, in interleaved rounds.

Usage: python benchmarks/cli_start.py [REPEATS]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "amlaunch --help": [sys.executable, "-m", "amlaunch", "--help"],
    "amlaunch status": [sys.executable, "-m", "amlaunch", "status"],
    "amlaunch show quickstart": [sys.executable, "-m", "amlaunch", "show", "quickstart"],
}


def timed(command: list[str], folder: str) -> float:
    """Return the milliseconds that a command takes."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Print median and range of each command."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as folder:
        rounds = [{name: timed(command, folder) for name, command in COMMANDS.items()} for _ in range(repeats + 1)]
    for name in COMMANDS:
        # the first round fills caches
        times = [milliseconds[name] for milliseconds in rounds[1:]]
        print(f"{name:<26} median {statistics.median(times):5.0f} ms   {min(times):.0f} to {max(times):.0f}")


if __name__ == "__main__":
    main()
