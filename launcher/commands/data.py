"""``amlaunch data``: inspect, verify and peek into shards."""

from __future__ import annotations

import argparse
from typing import NoReturn

from amlaunch.launcher.commands._shared import become_preprocess
from amlaunch.recipes.preprocess_options import add_data_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch data``."""
    add_data_options(parser)


def run(options: argparse.Namespace) -> NoReturn:
    """Become ``python -m amlaunch.preprocess data``."""
    become_preprocess(options.argv[1:])
