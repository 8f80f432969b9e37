"""``amlaunch preprocess``: source to verified shards in one process, without a run directory."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import sys
from pathlib import Path
from typing import Any

from amlaunch.preprocess.progress import Progress, stdout_is_terminal
from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.format.loader import data_paths_of, load, shards_folder_name
from amlaunch.recipes.format.placeholders import variables
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.format.section_checks import Checker, raise_problems
from amlaunch.recipes.format.targets import TargetPolicy
from amlaunch.recipes.format.yaml_reader import KeyPath
from amlaunch.recipes.preprocess_options import PREPROCESS_OPTIONS
from amlaunch.recipes.shipped import find_recipe


def run(arguments: argparse.Namespace) -> int:
    """Make the missing shards, verify all of them, and print a summary; return the exit code."""
    options, policy, out = resolve_options(arguments)

    # Imports tiktoken, which takes a while: only after the signal handlers are installed.
    from amlaunch.preprocess.stages.element import run_element
    from amlaunch.preprocess.stages.verify import verify

    log = (lambda text: print(text, file=sys.stderr, flush=True)) if arguments.json else None
    progress = Progress(log=log, bar=stdout_is_terminal() and not arguments.json)
    try:
        run_element(options, 0, out, progress, policy=policy)
        manifest = verify(options, out, progress, policy)
    finally:
        progress.close()

    if arguments.json:
        print(json.dumps({"path": str(out), **summarize_manifest(manifest)}, indent=2), flush=True)
    else:
        print(format_report(manifest, out), flush=True)
    return OK


def resolve_options(arguments: argparse.Namespace) -> tuple[Preprocess, TargetPolicy, Path]:
    """Return the preprocess section, the policy for its target and the output folder, as the command line says."""
    values = {key: getattr(arguments, key) for key in (*PREPROCESS_OPTIONS, "bos")}
    values = {key: value for key, value in values.items() if value is not None}
    if arguments.recipe:
        overrides = [f"--preprocess.{key}={json.dumps(value)}" for key, value in values.items()]
        loaded = load(find_recipe(arguments.recipe), overrides, allow=arguments.allow_target, job_start=True)
        section, policy, paths = loaded.recipe.preprocess, loaded.policy, loaded.data_paths("preprocess")
        if section is None:
            raise BadInput(f"{arguments.recipe}: this recipe has no preprocess section")
    else:
        section, policy = _check_options(values), TargetPolicy()
        paths = data_paths_of(values)

    out = Path(section.output_dir) if section.output_dir else Path("data") / shards_folder_name(section, paths)
    return dataclasses.replace(section, elements=1), policy, out.expanduser().absolute()


def _check_options(values: dict[str, Any]) -> Preprocess:
    """Return command-line options as a preprocess section. Raises BadInput that names the option."""
    lines: dict[KeyPath, str] = {("preprocess", key): f"--{key.replace('_', '-')}" for key in values}
    lines["preprocess",] = "amlaunch preprocess"
    checker = Checker(lines, variables(), TargetPolicy(), job_start=True)
    section: Preprocess = checker.section(Preprocess, values, ("preprocess",))
    raise_problems(checker.problems)
    if not (section.dataset or section.data_files):
        raise BadInput(
            "amlaunch preprocess: give --dataset NAME, --data-files GLOB, or a recipe with a preprocess section"
        )
    return section


def summarize_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the number of shards instead of their lists."""
    summary = {key: value for key, value in manifest.items() if key not in ("version", "splits")}
    summary["shards"] = {split: len(entries) for split, entries in manifest["splits"].items()}
    return summary


def format_report(manifest: dict[str, Any], out: Path) -> str:
    """Format a manifest in a few lines, with the next command to type and the lines to paste into a recipe."""
    from amlaunch.preprocess.stages.inspect_data import format_statistics

    folder = glob.escape(str(out))
    sections = {"train": "dataset", "val": "validation_dataset"}
    lines = [
        f"{sections[split]}: {json.dumps({'file_pattern': f'{folder}/{split}-*.bin'}, ensure_ascii=False)}"
        for split in sections
        if manifest["splits"].get(split)
    ]
    return "\n".join(
        [*format_statistics(manifest), f"{out}", f"next: amlaunch data peek {out}", "in a recipe:", *lines]
    )
