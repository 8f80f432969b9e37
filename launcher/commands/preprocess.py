"""``amlaunch preprocess``: becomes ``python -m amlaunch.preprocess``, for the launcher never loads what tokenises."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from amlaunch.recipes.preprocess_options import add_preprocess_options
from amlaunch.recipes.python_process import python_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch preprocess``."""
    add_preprocess_options(parser)


def run(options: argparse.Namespace) -> NoReturn:
    """Take the process's place: signals, the terminal and the exit code are its own."""
    become(options.argv[2:])


def become(words: Sequence[str]) -> NoReturn:
    """Go on as ``python -m amlaunch.preprocess WORDS``."""
    command = [*python_command("amlaunch.preprocess"), *words]
    os.execve(command[0], command, {**os.environ, "PYTHONSAFEPATH": "1"})
