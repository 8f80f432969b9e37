"""``amlaunch data``: inspect, verify and peek into shards, by ``python -m amlaunch.preprocess data``."""

from __future__ import annotations

import argparse
from typing import NoReturn

from amlaunch.launcher.commands.preprocess import become
from amlaunch.recipes.preprocess_options import add_data_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch data``."""
    add_data_options(parser)


def run(options: argparse.Namespace) -> NoReturn:
    """Take the process's place."""
    become(options.argv[1:])
