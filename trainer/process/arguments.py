"""The arguments that ``python -m amlaunch.trainer``, ``python -m amlaunch.trainer.tools.export`` and ``python -m amlaunch.trainer.tools.generate`` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amlaunch.recipes.format.loader import LoadedRecipe, load
from amlaunch.recipes.run_layout import ElementDir
from amlaunch.recipes.shipped import find_recipe


@dataclass(frozen=True)
class Options:
    """A recipe, and where its files go."""

    loaded: LoadedRecipe
    element: ElementDir
    """Where metrics, heartbeat and result go."""
    checkpoints: Path
    data: Path | None
    run_id: str
    reports: bool = True
    """Whether an export writes its heartbeat and its result: to where it was told."""
    out: Path | None = None
    """The folder that an export writes."""
    step: int | None = None
    """Of the checkpoint that an export takes; None: the newest."""
    best: bool = False
    prompt: str = ""
    """What a sample begins with."""
    sample_seed: int | None = None


def parse(program: str, description: str, arguments: Sequence[str], *, kind: str = "train") -> Options:
    """Read the command line and the recipe; what argparse does not know is an override of the recipe.

    ``kind``: ``train``, ``export`` or ``generate``, of which each has options of its own.
    Raises BadInput as :func:`amlaunch.recipes.format.loader.load` does, SystemExit for a wrong command line.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=description, allow_abbrev=False, epilog="Any key of the recipe: --section.key value"
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with amlaunch")
    parser.add_argument("--element", type=Path, help="folder for metrics.jsonl, progress.json, result.json")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder of the checkpoints (default: the recipe's, or ./checkpoints)"
    )
    parser.add_argument(
        "--data", type=Path, help="folder of shards with a manifest, where the recipe has no file_pattern"
    )
    parser.add_argument("--run-id", help="name of the run (default: the recipe's)")
    parser.add_argument("--recipe-dir", type=Path, help="where file.py:object targets are relative to")
    parser.add_argument("--allow-target", action="append", default=[], metavar="NAME", help="let a _target_ reach NAME")
    if kind != "train":
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--step", type=int, help="the checkpoint after this step (default: the newest)")
        which.add_argument("--best", action="store_true", help="the checkpoint of the lowest validation loss")
    if kind == "export":
        parser.add_argument("--out", type=Path, required=True, help="the Hugging Face folder to write")
    if kind == "generate":
        parser.add_argument("--prompt", required=True, help="what the text begins with")
        parser.add_argument("--sample-seed", type=int, help="another seed, another text (default: the recipe's)")
    given, overrides = parser.parse_known_args(arguments)
    path = find_recipe(given.recipe)
    loaded = load(path, overrides, recipe_dir=given.recipe_dir, allow=given.allow_target, job_start=True)
    checkpoints = given.checkpoints or Path(loaded.recipe.checkpoint.checkpoint_dir or "checkpoints")
    return Options(
        loaded=loaded,
        element=ElementDir(given.element or Path(".")),
        reports=given.element is not None,
        checkpoints=checkpoints.resolve(),
        data=given.data,
        run_id=given.run_id or loaded.recipe.name,
        out=given.out.resolve() if kind == "export" else None,
        step=getattr(given, "step", None),
        best=getattr(given, "best", False),
        prompt=getattr(given, "prompt", ""),
        sample_seed=getattr(given, "sample_seed", None),
    )
