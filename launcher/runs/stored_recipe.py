"""What a run directory says of how it was made: the recipe, and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_object, write_json
from amlaunch.recipes.format.loader import LoadedRecipe, file_targets, load
from amlaunch.recipes.run_layout import RunDir


def stored_recipe(run_dir: RunDir, overrides: Sequence[str], *, job_start: bool = False) -> LoadedRecipe:
    """The run's own recipe, changed; its file targets are those of its snapshot. Raises BadInput.

    ``job_start`` demands a value for every ``${VAR}``; jobs have theirs from the submit before.
    """
    code = run_dir.code / "recipe"
    original = read_object(run_dir.provenance).get("recipe")
    folder = code if code.is_dir() else Path(str(original)).parent
    loaded = load(
        run_dir.recipe,
        list(overrides),
        recipe_dir=folder,
        allow=option_values(command_of(run_dir), "--allow-target"),
        job_start=job_start,
    )
    if file_targets(loaded.tree) and not code.is_dir():
        raise BadInput(f"{run_dir.code}: the snapshot of the recipe's own code is gone")
    return loaded


def command_of(run_dir: RunDir) -> list[str]:
    """The command line that the run was started with; empty where nobody can say."""
    words = read_object(run_dir.provenance).get("command")
    return [str(word) for word in words] if isinstance(words, list) else []


def option_values(words: Sequence[str], option: str) -> list[str]:
    """What an option was given, each time: ``--gpus 2``, ``--gpus=2``."""
    return [value for name, value in pairwise(words) if name == option] + [
        word.partition("=")[2] for word in words if word.startswith(f"{option}=")
    ]


RESUMED = "resumed"
"""Key of provenance.json: the overrides that ``amlaunch resume`` added since, oldest first."""


def resumed_with(run: RunDir) -> list[str]:
    """The overrides that a run was resumed with."""
    words = read_object(run.provenance).get(RESUMED)
    return [str(word) for word in words] if isinstance(words, list) else []


def add_resumed(run: RunDir, overrides: Sequence[str]) -> None:
    """Remember overrides that the run goes on with: they are part of it from now on."""
    if overrides:
        write_json(run.provenance, {**read_object(run.provenance), RESUMED: [*resumed_with(run), *overrides]})
