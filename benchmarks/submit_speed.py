"""Measure `amlaunch submit` for a recipe with 1,000 preprocess elements: checks, code snapshot, one sbatch per stage.

Usage: python benchmarks/submit_speed.py [ELEMENTS] [REPEATS]

Needs Slurm's commands. The jobs cannot start within an hour (sbatch's --begin)
and are cancelled at the end. For comparison, four bare sbatch calls of the same
size show the time that cannot be saved.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """\
name: many
preprocess: {{data_files: "text/*.txt", max_tokens: 1M, elements: {elements}}}
model: {{_target_: amlaunch.trainer.models.gpt2.build_gpt2_model, n_embd: 64, n_layer: 2, n_head: 2, n_positions: 64}}
dataset: {{seq_len: 64}}
step_scheduler: {{max_steps: 10}}
seed: {seed}
resources: {{train: {{gpus_per_node: 0}}}}
"""
PROFILE = "bench: {signal_seconds: 60, sbatch: {begin: now+1hour}}\n"


def timed(command: list[str], folder: Path) -> tuple[float, str]:
    """Run a command and return ``(seconds, stdout)``."""
    started = time.perf_counter()
    child = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    seconds = time.perf_counter() - started
    assert child.returncode == 0, child.stderr
    return seconds, child.stdout


def bare_sbatch(folder: Path, elements: int) -> float:
    """Return the seconds of four bare sbatch calls."""
    script = folder / "bare.sh"
    script.write_text("#!/bin/bash\n#SBATCH --begin=now+1hour\n#SBATCH --output=/dev/null\ntrue\n")
    total = 0.0
    job_ids = []
    for array in (f"0-{elements - 1}", "0", "0", "0"):
        seconds, stdout = timed(["sbatch", "--parsable", f"--array={array}", str(script)], folder)
        total += seconds
        job_ids.append(stdout.strip())
    subprocess.run(["scancel", *job_ids], check=True)
    return total


def one_round(folder: Path, elements: int, seed: int) -> dict[str, float]:
    """Return the seconds of a new submission, dry and real, of a repeated one, and of bare sbatch calls."""
    (folder / "many.yaml").write_text(RECIPE.format(elements=elements, seed=seed))
    program = [sys.executable, "-m", "amlaunch"]
    submit = [*program, "submit", "many.yaml", "--cluster", "bench.yaml", "--json"]
    shutil.rmtree(folder / "data", ignore_errors=True)
    dry, _ = timed([*submit, "--dry-run"], folder)
    real, stdout = timed(submit, folder)
    report = json.loads(stdout)
    assert [len(array["elements"]) for array in report["submitted"]] == [elements, 1, 1, 1], report["submitted"]
    repeated, _ = timed(submit, folder)
    timed([*program, "cancel", report["run"]], folder)
    return {
        "submit": real,
        "submit again (all elements active)": repeated,
        "submit --dry-run": dry,
        "four bare sbatch calls": bare_sbatch(folder, elements),
    }


def main() -> None:
    """Print median and range."""
    elements = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parent.parent / "src"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        (folder / "text" / "a.txt").write_text("text " * 1000)
        (folder / "bench.yaml").write_text(PROFILE)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        rounds = [one_round(folder, elements, seed) for seed in range(repeats)]
    for label in rounds[0]:
        times = [seconds[label] for seconds in rounds]
        print(
            f"{label:<36} {elements:,} elements: median {statistics.median(times):.2f} s   "
            f"{min(times):.2f} to {max(times):.2f}"
        )


if __name__ == "__main__":
    main()
