"""Command-line arguments shared by ``amlaunch.trainer`` and its tools ``export`` and ``generate``."""

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
    """A loaded recipe and the paths and choices of one trainer process."""

    loaded: LoadedRecipe
    element: ElementDir
    """Folder for metrics, heartbeat and result."""
    checkpoints: Path
    data: Path | None
    run_id: str
    writes_result: bool = True
    """True if ``--element`` was given: only then does an export write its heartbeat and result."""
    out: Path | None = None
    """Folder that an export writes."""
    step: int | None = None
    """Step of the checkpoint to load; None loads the newest."""
    best: bool = False
    prompt: str = ""
    """Text that a sample continues."""
    sample_seed: int | None = None


def parse(program: str, description: str, arguments: Sequence[str], *, kind: str = "train") -> Options:
    """Read the command line and load the recipe; arguments unknown to argparse override recipe keys.

    ``kind`` is ``train``, ``export`` or ``generate`` and selects the options that only that program has.
    Raises BadInput as :func:`amlaunch.recipes.format.loader.load` does, and SystemExit for a wrong command line.
    """
    parser = _parser(program, description, kind)
    namespace, overrides = parser.parse_known_args(arguments)
    loaded = load(
        find_recipe(namespace.recipe),
        overrides,
        recipe_dir=namespace.recipe_dir,
        allow=namespace.allow_target,
        job_start=True,
        has_shards=namespace.data is not None,
    )
    checkpoints = namespace.checkpoints or Path(loaded.recipe.checkpoint.checkpoint_dir or "checkpoints")
    return Options(
        loaded=loaded,
        element=ElementDir(namespace.element or Path(".")),
        writes_result=namespace.element is not None,
        checkpoints=checkpoints.resolve(),
        data=namespace.data,
        run_id=namespace.run_id or loaded.recipe.name,
        out=namespace.out.resolve() if kind == "export" else None,
        step=getattr(namespace, "step", None),
        best=getattr(namespace, "best", False),
        prompt=getattr(namespace, "prompt", ""),
        sample_seed=getattr(namespace, "sample_seed", None),
    )


def _parser(program: str, description: str, kind: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        allow_abbrev=False,
        epilog="To override any recipe key, add --section.key value.",
    )
    parser.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("--element", type=Path, help="folder for metrics.jsonl, progress.json and result.json")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        help="checkpoint folder (default: checkpoint.checkpoint_dir of the recipe, or ./checkpoints)",
    )
    parser.add_argument(
        "--data", type=Path, help="folder with shards and their manifest, used if the recipe has no file_pattern"
    )
    parser.add_argument("--run-id", help="run name (default: the recipe's name)")
    parser.add_argument("--recipe-dir", type=Path, help="folder that file.py:object targets are relative to")
    parser.add_argument(
        "--allow-target", action="append", default=[], metavar="NAME", help="allow a _target_ to load NAME"
    )
    if kind != "train":
        checkpoint = parser.add_mutually_exclusive_group()
        checkpoint.add_argument("--step", type=int, help="load the checkpoint of this step (default: the newest)")
        checkpoint.add_argument(
            "--best", action="store_true", help="load the checkpoint with the lowest validation loss"
        )
    if kind == "export":
        parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    if kind == "generate":
        parser.add_argument("--prompt", required=True, help="text that the sample continues")
        parser.add_argument(
            "--sample-seed", type=int, help="seed of the sample; change it for another text (default: the recipe's)"
        )
    return parser
