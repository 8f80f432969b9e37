"""``amlaunch generate``: text that a checkpoint of a run writes, by the trainer's own process."""

from __future__ import annotations

import argparse

from amlaunch.launcher.commands.export import arguments_of, chosen, start, train_element
from amlaunch.launcher.runs.find import find_run, read_plan, roots


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
