"""Read from a run directory how the run was made: its recipe and its command line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_object, write_json
from amlaunch.recipes.format.loader import LoadedRecipe, file_targets, load
from amlaunch.recipes.run_layout import RunDir

RESUMED = "resumed"
"""Key of provenance.json: all overrides of ``amlaunch resume``, the oldest first."""


def stored_recipe(run: RunDir, overrides: Sequence[str], *, job_start: bool = False) -> LoadedRecipe:
    """Load the run's own recipe with overrides; its file targets are those of the code snapshot. Raises BadInput.

    ``job_start`` requires a value for every ``${VAR}``; jobs have theirs from the submission.
    """
    snapshot = run.code / "recipe"
    original = Path(str(read_object(run.provenance).get("recipe"))).parent
    loaded = load(
        run.recipe,
        list(overrides),
        recipe_dir=snapshot if snapshot.is_dir() else original,
        allow=option_values(command_of(run), "--allow-target"),
        job_start=job_start,
    )
    if file_targets(loaded.tree) and not snapshot.is_dir():
        raise BadInput(f"{snapshot}: the recipe's own code is missing; start the run again from {original}")
    return loaded


def command_of(run: RunDir) -> list[str]:
    """Return the command line that started the run; empty if it is not recorded."""
    argv = read_object(run.provenance).get("command")
    return [str(argument) for argument in argv] if isinstance(argv, list) else []


def option_values(argv: Sequence[str], option: str) -> list[str]:
    """Return all values of an option in a command line: ``--gpus 2``, ``--gpus=2``."""
    separate = [value for name, value in pairwise(argv) if name == option]
    joined = [argument.partition("=")[2] for argument in argv if argument.startswith(f"{option}=")]
    return separate + joined


def resumed_with(run: RunDir) -> list[str]:
    """Return the overrides with which a run was resumed."""
    overrides = read_object(run.provenance).get(RESUMED)
    return [str(override) for override in overrides] if isinstance(overrides, list) else []


def add_resumed(run: RunDir, overrides: Sequence[str]) -> None:
    """Record overrides of a resume; they belong to the run from now on."""
    if overrides:
        write_json(run.provenance, {**read_object(run.provenance), RESUMED: [*resumed_with(run), *overrides]})
