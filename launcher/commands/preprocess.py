"""``amlaunch preprocess``: turn text into verified token shards, without a run."""

from __future__ import annotations

import argparse
from typing import NoReturn

from amlaunch.launcher.commands._shared import become_preprocess
from amlaunch.recipes.preprocess_options import add_preprocess_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch preprocess``."""
    add_preprocess_options(parser)


def run(options: argparse.Namespace) -> NoReturn:
    """Become ``python -m amlaunch.preprocess``, which then owns signals, the terminal and the exit code."""
    become_preprocess(options.argv[2:])
