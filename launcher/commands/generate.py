"""``amlaunch generate``: print text that the model of a checkpoint generates, in a process of the trainer."""

from __future__ import annotations

import argparse

from amlaunch.launcher.commands._shared import add_checkpoint_arguments, run_on_checkpoint

SAMPLING_OPTIONS = ("max_new_tokens", "temperature", "top_k")
"""Options that override keys of the recipe's export section."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch generate``."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the beginning of the text")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="number of tokens to generate (default: the recipe's)"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 always takes the most likely token (default: the recipe's)"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K most likely tokens (default: the recipe's)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="seed of the sampling (default: the recipe's)")


def run(options: argparse.Namespace) -> int:
    """Print prompt and continuation, and return the trainer's exit code."""
    arguments = [f"--prompt={options.prompt}"]
    if options.seed is not None:
        arguments += ["--sample-seed", str(options.seed)]
    for name in SAMPLING_OPTIONS:
        value = getattr(options, name)
        if value is not None:
            arguments.append(f"--export.{name}={value}")
    return run_on_checkpoint("amlaunch.trainer.tools.generate", options, arguments)
