"""Whether bfloat16, and a residual stream in bfloat16, hurt the loss: one recipe trained in float32 and in both, from the same seeds.

Usage: python benchmarks/loss_curves.py [SEEDS] [STEPS]

The recipe is quickstart (real text, GPT-2's tokenizer), on one rank. Printed are
the losses on the validation set, the same batches for all, and how far each way
of computing lies from float32 of the same seed; beside it, how far two seeds of
float32 lie apart, which is what a difference has to be compared with.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from recipes.files import read_json_lines

WAYS = {
    "float32": ["--distributed.dtype", "float32"],
    "bfloat16": ["--distributed.dtype", "bfloat16"],
    "bfloat16, residual stream too": ["--distributed.dtype", "bfloat16", "--distributed.bf16_residual", "true"],
}


def main() -> None:
    """Train all ways from all seeds, then print a table."""
    seeds, steps = (int(word) for word in (*sys.argv[1:], *("2", "320")[len(sys.argv) - 1 :]))
    found: dict[str, list[dict[int, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, seeds + 1):
            for way, words in WAYS.items():
                found[way].append(train(Path(folder), f"{seed}-{len(found[way])}-{list(WAYS).index(way)}", seed, steps, words))
                print(f"seed {seed}, {way}: " + ", ".join(f"{loss:.4f} after {step}" for step, loss in found[way][-1].items()), flush=True)
    report(found)


def train(folder: Path, name: str, seed: int, steps: int, words: list[str]) -> dict[int, float]:
    """One run; its validation losses by step."""
    every = max(1, steps // 8)
    more = ["--name", name, "--seed", str(seed), "--step_scheduler.max_steps", str(steps), "--step_scheduler.val_every_steps", str(every)]
    more += ["--distributed.strategy", "none", "--resources.train.tasks_per_node", "1", "--export", "null", "--checkpoint.enabled", "false"]
    command = [sys.executable, "-m", "launcher", "local", "quickstart", "--gpus", "0", *more, *words]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (metrics,) = (folder / "runs").glob(f"{name}-*/stages/train/0/metrics.jsonl")
    return {line["step"]: line["val_loss"] for line in read_json_lines(metrics) if "val_loss" in line}


def report(found: dict[str, list[dict[int, float]]]) -> None:
    """The mean curves, and the differences from float32."""
    exact = found["float32"]
    print(f"\n{'validation loss after':<32}" + "".join(f"{step:>9}" for step in exact[0]))
    for way, curves in found.items():
        print(f"{way:<32}" + "".join(f"{statistics.fmean(curve[step] for curve in curves):>9.4f}" for step in exact[0]))
        if way != "float32":
            apart = {step: statistics.fmean(curve[step] - one[step] for curve, one in zip(curves, exact, strict=True)) for step in exact[0]}
            print(f"{'  less float32, same seed':<32}" + "".join(f"{apart[step]:>+9.4f}" for step in exact[0]))
    if len(exact) > 1:
        print(f"{'float32, largest less smallest':<32}" + "".join(f"{max(curve[step] for curve in exact) - min(curve[step] for curve in exact):>9.4f}" for step in exact[0]))


if __name__ == "__main__":
    main()
