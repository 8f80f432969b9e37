"""Compare the loss of a recipe in float32, in bfloat16, and in bfloat16 with a bfloat16 residual stream.

Usage: python benchmarks/loss_curves.py [STEPS] [SEEDS] [--section.key VALUE ...]

Trains the recipe char (real text, 0.8M parameters) on one rank; overrides change
it. Prints the losses on the validation set, the same batches for all runs, and
each precision's difference from float32. The spread of SEEDS seeds in float32
shows how large a difference must be to matter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from amlaunch.recipes.files import read_json_lines

PRECISIONS = {
    "float32": ["--distributed.dtype", "float32"],
    "bfloat16": ["--distributed.dtype", "bfloat16"],
    "bfloat16, also residual stream": ["--distributed.dtype", "bfloat16", "--distributed.bf16_residual", "true"],
}
Curve = dict[int, float]
"""Validation losses by step."""


def main() -> None:
    """Train every precision from seed 1, and float32 from the other seeds; then print a table."""
    numbers = [argument for argument in sys.argv[1:3] if argument.isdigit()]
    overrides = sys.argv[1 + len(numbers) :]
    steps = int(numbers[0]) if numbers else 200
    seeds = int(numbers[1]) if len(numbers) > 1 else 3
    runs = [(precision, 1) for precision in PRECISIONS] + [("float32", seed) for seed in range(2, seeds + 1)]
    curves: dict[tuple[str, int], Curve] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (precision, seed) in enumerate(runs):
            curve = train(Path(folder), f"curve-{number}", seed, steps, [*PRECISIONS[precision], *overrides])
            curves[precision, seed] = curve
            losses = ", ".join(f"{loss:.4f} after {step}" for step, loss in curve.items())
            print(f"{precision}, seed {seed}: {losses}", flush=True)
    print_table(curves)


def train(folder: Path, name: str, seed: int, steps: int, overrides: list[str]) -> Curve:
    """Train one run and return its validation losses."""
    common = {
        "name": name,
        "seed": seed,
        "step_scheduler.max_steps": steps,
        "step_scheduler.val_every_steps": max(1, steps // 8),
        "distributed.strategy": "none",
        "resources.train.tasks_per_node": 1,
        "export": "null",
        "checkpoint.enabled": "false",
    }
    arguments = [f"--{key}={value}" for key, value in common.items()]
    command = [sys.executable, "-m", "amlaunch", "local", "char", "--gpus", "0", *arguments, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent / "src")}
    child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if child.returncode:
        sys.exit(child.stdout + child.stderr)
    (metrics,) = (folder / "runs").glob(f"{name}-*/stages/train/0/metrics.jsonl")
    return {line["step"]: line["val_loss"] for line in read_json_lines(metrics) if "val_loss" in line}


def print_table(curves: dict[tuple[str, int], Curve]) -> None:
    """Print the curves and their differences from float32."""
    reference = curves["float32", 1]
    print(f"\n{'validation loss after':<36}" + "".join(f"{step:>9}" for step in reference))
    for precision in PRECISIONS:
        curve = curves[precision, 1]
        print(f"{precision:<36}" + "".join(f"{loss:>9.4f}" for loss in curve.values()))
        if precision != "float32":
            differences = (curve[step] - loss for step, loss in reference.items())
            print(f"{'  minus float32':<36}" + "".join(f"{difference:>+9.4f}" for difference in differences))
    by_seed = [curve for (precision, _), curve in curves.items() if precision == "float32"]
    if len(by_seed) > 1:
        losses_by_step = {step: [curve[step] for curve in by_seed] for step in reference}
        label = f"float32, range of {len(by_seed)} seeds"
        print(f"{label:<36}" + "".join(f"{max(losses) - min(losses):>9.4f}" for losses in losses_by_step.values()))


if __name__ == "__main__":
    main()
