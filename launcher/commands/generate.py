"""``amlaunch generate``: text that a checkpoint of a run writes, by the trainer's own process."""

from __future__ import annotations

import argparse

from amlaunch.launcher.commands._shared import add_checkpoint
from amlaunch.launcher.commands.export import arguments_of, chosen, start, train_element
from amlaunch.launcher.runs.find import find_run, read_plan, roots


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch generate``."""
    add_checkpoint(parser)
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
    found = find_run(roots(options.runs), options.run)
    plan = read_plan(found)
    words = [*arguments_of(train_element(plan, options.element)), *chosen(options), f"--prompt={options.prompt}"]
    if options.seed is not None:
        words += ["--sample-seed", str(options.seed)]
    for key in ("max_new_tokens", "temperature", "top_k"):
        value = getattr(options, key)
        if value is not None:
            words.append(f"--export.{key}={value}")
    return start("amlaunch.trainer.tools.generate", found, plan, [*words, *options.overrides])
