"""``amlaunch export``: write a checkpoint of a run as a Hugging Face folder, in a process of the trainer."""

from __future__ import annotations

import argparse
from pathlib import Path

from amlaunch.launcher.commands._shared import (
    accept_overrides,
    add_checkpoint_arguments,
    find_training,
    run_on_checkpoint,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch export``."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="the folder to write (default: in the run's export folder)")
    accept_overrides(parser, "RUN")


def run(options: argparse.Namespace) -> int:
    """Export, and return the trainer's exit code."""
    out = Path(options.out).expanduser().absolute() if options.out else _default_folder(options)
    return run_on_checkpoint("amlaunch.trainer.tools.export", options, ["--out", str(out)])


def _default_folder(options: argparse.Namespace) -> Path:
    """Return a folder in the run's export folder, named by element and checkpoint."""
    run_dir, _, element = find_training(options)
    if options.step is not None:
        checkpoint = f"step-{options.step:08d}"
    else:
        checkpoint = "best" if options.best else "newest"
    return run_dir.root / "export" / f"{element.name}-{checkpoint}"
