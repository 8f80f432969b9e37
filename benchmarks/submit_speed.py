"""How long `amlaunch submit` takes for a recipe whose preprocess stage has 1,000 elements: checks, snapshot, one sbatch a stage.

Usage: python benchmarks/submit_speed.py [ELEMENTS] [REPEATS]

Needs a machine with Slurm's commands. The jobs may not start within the hour
(sbatch's --begin), and are cancelled at the end. Beside it, as what cannot be
saved: four bare sbatch calls of the same size.
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
    """``(seconds, stdout)`` of one run."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    return seconds, done.stdout


def bare(folder: Path, elements: int) -> float:
    """Seconds of the four sbatch calls alone."""
    script = folder / "bare.sh"
    script.write_text("#!/bin/bash\n#SBATCH --begin=now+1hour\n#SBATCH --output=/dev/null\ntrue\n")
    total = 0.0
    jobs = []
    for array in (f"0-{elements - 1}", "0", "0", "0"):
        seconds, said = timed(["sbatch", "--parsable", f"--array={array}", str(script)], folder)
        total += seconds
        jobs.append(said.strip())
    subprocess.run(["scancel", *jobs], check=True)
    return total


def one_round(folder: Path, elements: int, seed: int) -> dict[str, float]:
    """One new run, dry and real, and the bare calls."""
    (folder / "many.yaml").write_text(RECIPE.format(elements=elements, seed=seed))
    program = [sys.executable, "-m", "amlaunch"]
    submit = [*program, "submit", "many.yaml", "--cluster", "bench.yaml", "--json"]
    shutil.rmtree(folder / "data", ignore_errors=True)
    dry, _ = timed([*submit, "--dry-run"], folder)
    real, said = timed(submit, folder)
    made = json.loads(said)
    assert [len(one["elements"]) for one in made["submitted"]] == [elements, 1, 1, 1], made["submitted"]
    again, _ = timed(submit, folder)
    timed([*program, "cancel", made["run"]], folder)
    return {
        "submit": real,
        "the same again (all on their way)": again,
        "submit --dry-run": dry,
        "four bare sbatch calls": bare(folder, elements),
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
    for name in rounds[0]:
        times = [found[name] for found in rounds]
        print(
            f"{name:<36} {elements:,} elements: median {statistics.median(times):.2f} s   {min(times):.2f} to {max(times):.2f}"
        )


if __name__ == "__main__":
    main()
