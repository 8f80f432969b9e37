"""Whether bfloat16, and a residual stream in bfloat16, hurt the loss: one recipe trained in float32 and in both, from one seed.

Usage: python benchmarks/loss_curves.py [STEPS] [SEEDS] [--section.key VALUE ...]

The recipe is char (real text, 0.8M parameters), on one rank; keys change it. Printed are the
losses on the validation set, the same batches for all, and how far each way of
computing lies from float32; beside it, how far SEEDS seeds of float32 lie apart,
which is what a difference has to be compared with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from amlaunch.recipes.files import read_json_lines

WAYS = {
    "float32": ["--distributed.dtype", "float32"],
    "bfloat16": ["--distributed.dtype", "bfloat16"],
    "bfloat16, residual stream too": ["--distributed.dtype", "bfloat16", "--distributed.bf16_residual", "true"],
}


def main() -> None:
    """Train all ways from the first seed, and float32 from the others; then print a table."""
    numbers = [word for word in sys.argv[1:3] if word.isdigit()]
    steps, seeds = (int(word) for word in (*numbers, *("200", "3")[len(numbers) :]))
    keys = sys.argv[1 + len(numbers) :]
    runs = [(way, 1) for way in WAYS] + [("float32", seed) for seed in range(2, seeds + 1)]
    found: dict[tuple[str, int], dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (way, seed) in enumerate(runs):
            found[way, seed] = train(Path(folder), f"curve-{number}", seed, steps, [*WAYS[way], *keys])
            print(
                f"{way}, seed {seed}: "
                + ", ".join(f"{loss:.4f} after {step}" for step, loss in found[way, seed].items()),
                flush=True,
            )
    report(found)


def train(folder: Path, name: str, seed: int, steps: int, words: list[str]) -> dict[int, float]:
    """One run; its validation losses by step."""
    every = max(1, steps // 8)
    more = [
        "--name",
        name,
        "--seed",
        str(seed),
        "--step_scheduler.max_steps",
        str(steps),
        "--step_scheduler.val_every_steps",
        str(every),
    ]
    more += [
        "--distributed.strategy",
        "none",
        "--resources.train.tasks_per_node",
        "1",
        "--export",
        "null",
        "--checkpoint.enabled",
        "false",
    ]
    command = [sys.executable, "-m", "amlaunch", "local", "char", "--gpus", "0", *more, *words]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent / "src")},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (metrics,) = (folder / "runs").glob(f"{name}-*/stages/train/0/metrics.jsonl")
    return {line["step"]: line["val_loss"] for line in read_json_lines(metrics) if "val_loss" in line}


def report(found: dict[tuple[str, int], dict[int, float]]) -> None:
    """The curves, and the differences from float32."""
    exact, seeds = found["float32", 1], [curve for (way, _), curve in found.items() if way == "float32"]
    print(f"\n{'validation loss after':<36}" + "".join(f"{step:>9}" for step in exact))
    for way in WAYS:
        print(f"{way:<36}" + "".join(f"{loss:>9.4f}" for loss in found[way, 1].values()))
        if way != "float32":
            print(f"{'  less float32':<36}" + "".join(f"{found[way, 1][step] - exact[step]:>+9.4f}" for step in exact))
    if len(seeds) > 1:
        print(
            f"{f'float32, {len(seeds)} seeds: largest less least':<36}"
            + "".join(
                f"{max(curve[step] for curve in seeds) - min(curve[step] for curve in seeds):>9.4f}" for step in exact
            )
        )


if __name__ == "__main__":
    main()
