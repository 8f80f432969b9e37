"""Check a run before anything is written or submitted: what can never work is refused, what may not work is noted.

All starts (new, resumed, retried; on this machine or on a cluster) go through :func:`resolve_and_check`.
"""

from __future__ import annotations

import glob
import gzip
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from amlaunch.launcher.checks.containers import check_containers
from amlaunch.launcher.checks.files_and_disk import check_disk, check_prerequisites, check_python
from amlaunch.launcher.checks.slurm_limits import check_slurm_limits
from amlaunch.launcher.checks.torch_version import check_torch
from amlaunch.launcher.display import wording
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.planning.container_plan import container_notes, image_packages, profile_image_folder
from amlaunch.launcher.planning.resolve import local_notes
from amlaunch.launcher.planning.run_sources import ResolvedRun, RunSource
from amlaunch.launcher.runs.element_state import ElementState, read_run, read_stage
from amlaunch.launcher.runs.find import read_plan
from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.specs.cluster_profile import Cluster
from amlaunch.launcher.specs.machine import this_machine
from amlaunch.launcher.specs.plan import Stage
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import is_locked, reason_not_writable
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.schema import file_sections, is_own_tokenizer
from amlaunch.recipes.format.section_checks import raise_problems
from amlaunch.recipes.format.yaml_reader import KeyPath
from amlaunch.recipes.output import counted
from amlaunch.recipes.run_layout import RunDir

Say = Callable[[str], None]
MAX_BLANK_LINES = 100
"""Lines in which the first record of a file is searched."""

STAGE_PACKAGES = {
    "preprocess": ("numpy", "tiktoken"),
    "verify": ("numpy",),
    "train": ("torch", "numpy", "safetensors"),
    "export": ("torch", "numpy", "safetensors", "tiktoken"),
}
"""Packages that each stage imports."""


def resolve_and_check(source: RunSource, say: Say) -> tuple[ResolvedRun, list[str]]:
    """Resolve a start, and check recipe, cluster and disk; returns the run and notes.

    Raises BadInput with all problems together, and SlurmError. A check is skipped only if it depends on something that
    could not be resolved: there is no plan without a recipe.
    """
    problems = ErrorCollector()
    cluster = _find_cluster(source, problems)
    runs: list[ResolvedRun] = []
    notes: list[str] = []

    with problems.collected():
        loaded, root = source.load(cluster)
        with problems.collected():
            check_prerequisites(loaded)
        with problems.collected():
            finished = _finished_stages(root) - source.restarted_stages()
            check_files(loaded, finished, is_new=not root.exists())
        run = source.resolve(loaded, root, cluster)
        run, registry_notes = add_registry_facts(run, say, problems)
        runs.append(run)
        notes += [*_plan_notes(run), *registry_notes, *_check_run(run, problems)]

    if cluster is not None:
        site_notes: list[str] = []
        with problems.collected():
            site_notes += check_slurm_limits(cluster, runs[0].loaded if runs else None, runs[0].stages if runs else ())
        with problems.collected():
            site_notes += check_python(cluster)
        notes = [*site_notes, *filter(None, [cluster.shell_note()]), *notes]
    problems.raise_if_any()
    return runs[0], notes


def _find_cluster(source: RunSource, problems: ErrorCollector) -> Cluster | None:
    """Find the cluster. Raises BadInput; problems of the recipe are reported, too."""
    clusters: list[Cluster | None] = []
    with problems.collected():
        clusters.append(source.find_cluster())
    if not clusters:
        with problems.collected():
            loaded, _ = source.load(None)
            with problems.collected():
                check_prerequisites(loaded)
            check_files(loaded)
    problems.raise_if_any()
    return clusters[0]


def _plan_notes(run: ResolvedRun) -> list[str]:
    if run.cluster is None:
        return local_notes(run.loaded, run.plan)
    containers = container_notes(run.loaded, run.plan, f"cluster {run.cluster.name}")
    return [*run.loaded.notes, *containers]


def _check_run(run: ResolvedRun, problems: ErrorCollector) -> list[str]:
    """Check what a run needs, as far as this machine can see it; returns notes, and adds to ``problems``."""
    profile = run.cluster.profile if run.cluster else None
    notes: list[str] = []
    if run.cluster is None:
        with problems.collected():
            _check_machine(run)
    with problems.collected():
        notes += check_containers(run.loaded, run.plan, run.run_dir, profile)
    with problems.collected():
        notes += _check_images(run)
    if any(stage.name == "train" for stage in run.stages):
        with problems.collected():
            notes += check_torch(run.loaded, run.plan)
    with problems.collected():
        notes += check_disk(run.loaded, run.plan, run.run_dir.root.parent, profile)
    for folder, remedy in (
        (run.run_dir.root, "start another run with --name NAME"),
        (run.run_dir.shared.resolve(), "make your own shards with --runs DIR"),
    ):
        with problems.collected():
            _check_writable(folder, remedy)
    return notes


def _check_machine(run: ResolvedRun) -> None:
    """Raise BadInput if this machine lacks packages or GPUs for the stages of a run."""
    without_image = [stage for stage in run.stages if stage.container is None]
    packages = {package for stage in without_image for package in STAGE_PACKAGES[stage.name]}
    if run.loaded.recipe.wandb is not None and any(stage.name == "train" for stage in without_image):
        packages.add("wandb")
    missing = sorted(package for package in packages if importlib.util.find_spec(package) is None)
    if missing:
        extras = "wandb" if missing == ["wandb"] else "train,preprocess,hf"
        raise BadInput(f"{', '.join(missing)}: not installed; run pip install 'amlaunch[{extras}]'")

    needed, available = max(stage.needs.gpus_per_node for stage in run.stages), len(this_machine().gpus)
    if needed > available:
        raise BadInput(
            f"{run.plan.run_id} trains on {counted(needed, 'GPU')}, but this machine has {available}; "
            f"start its recipe with amlaunch local --gpus {available}"
        )


def check_files(loaded: LoadedRecipe, finished_stages: Iterable[str] = (), *, is_new: bool = False) -> None:
    """Check that the files a recipe reads exist, and the first record. Raises BadInput with all problems.

    ``finished_stages`` have read their files, which need not exist any more. Nor need the checkpoint from which a run
    began, unless it ``is_new``.
    """
    patterns: dict[KeyPath, Any] = {}
    if loaded.recipe.preprocess and "preprocess" not in finished_stages:
        patterns["preprocess", "data_files"] = loaded.recipe.preprocess.data_files
    if "train" not in finished_stages:
        for path, section in file_sections(loaded.recipe).items():
            key = (*path, "file_pattern")
            patterns[key] = section.get("file_pattern")

    def place(key: KeyPath) -> str:
        return f"{loaded.lines.get(key, loaded.path)}: {'.'.join(key)}"

    problems = []
    for key, value in patterns.items():
        for pattern in value if isinstance(value, list) else [value] if value else []:
            problems += [f"{place(at)}: {text}" for at, text in _problems_of_pattern(loaded, key, pattern)]
    for key, name in _named_files(loaded, finished_stages, is_new).items():
        if not os.path.exists(os.path.expanduser(name)):
            problems.append(f"{place(key)}: {name} does not exist (relative to {Path.cwd()})")
    raise_problems(problems)


def _problems_of_pattern(loaded: LoadedRecipe, key: KeyPath, pattern: str) -> Iterator[tuple[KeyPath, str]]:
    """Yield what is wrong with a glob: no match, a folder, or a first record without the text column."""
    expanded = os.path.expanduser(pattern)
    match = next(glob.iglob(expanded, recursive=True), None)
    section = loaded.recipe.preprocess if key[0] == "preprocess" else None
    if match is None:
        yield key, f"no file matches {pattern!r} (relative to {Path.cwd()})"
    elif match == expanded and os.path.isdir(match):
        yield key, f"{pattern} is a folder; name its files, such as {Path(pattern, '**/*.txt' if section else '*.bin')}"
    elif section and section.on_error == "fail":
        column, known = section.text_column, _first_json_keys(Path(match))
        if known and not {column, column.partition(".")[0]} & known:
            names = ", ".join(sorted(known))
            yield ("preprocess", "text_column"), f"{match} has no column {column!r}; its first record has: {names}"


def _named_files(loaded: LoadedRecipe, finished_stages: Iterable[str], is_new: bool) -> dict[KeyPath, str]:
    """Return the single files and folders that unfinished stages read, by key."""
    section, start = loaded.recipe.preprocess, loaded.recipe.checkpoint.restore_from
    files: dict[KeyPath, str] = {}
    if section and "preprocess" not in finished_stages and is_own_tokenizer(section.tokenizer):
        files["preprocess", "tokenizer"] = section.tokenizer.removeprefix("char:")
    if is_new and start not in ("auto", "latest", "best"):
        files["checkpoint", "restore_from"] = start
    return files


def _first_json_keys(path: Path) -> set[str]:
    """Return the keys of the first record of a file of JSON lines; empty if it is none, or cannot be read here."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return set()
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            line = next((line for line in islice(lines, MAX_BLANK_LINES) if line.strip()), b"")
        record = json.loads(line)
    except (OSError, EOFError, ValueError):
        # Damaged files are the stage's to judge, as preprocess.on_error says.
        return set()
    return set(record) if isinstance(record, dict) else set()


def _finished_stages(root: Path) -> frozenset[str]:
    """Return the stages of a run directory that are done; none if it is new or damaged."""
    run_dir = RunDir(root)
    try:
        plan = read_plan(run_dir)
    except BadInput:
        return frozenset()
    return frozenset(stage.name for stage in plan.stages if _is_done(run_dir, stage))


def _is_done(run_dir: RunDir, stage: Stage) -> bool:
    return all(state.state == State.DONE for state in read_stage(run_dir, stage))


def _check_images(run: ResolvedRun) -> list[str]:
    """Check the packages in the images of unfinished stages; returns notes. Raises BadInput with all problems."""
    stages = [
        stage
        for stage in run.stages
        if stage.container and (stage.name in run.restarted_stages or not _is_done(run.run_dir, stage))
    ]
    inside = image_packages(run.loaded, stages, profile_image_folder(run.plan))
    if inside is None:
        return []
    raise_problems(list(inside.problems))
    return list(inside.notes)


def _check_writable(folder: Path, remedy: str) -> None:
    """Raise BadInput if a folder that the run writes to is not writable, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; {remedy}")
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"{folder} is not writable ({reason_not_writable(folder)}); {remedy}")


def add_registry_facts(run: ResolvedRun, say: Say, problems: ErrorCollector) -> tuple[ResolvedRun, Sequence[str]]:
    """Add to the plan what registries report about its images; returns the run and notes, adds to ``problems``.

    Registries are asked only for a cluster, and only if something is left to submit.
    """
    if run.cluster is None or not any(stage.container for stage in run.plan.stages):
        return run, ()
    # HTTP takes a while to import.
    from amlaunch.launcher.images.registry_lookup import look_up_images, with_earlier_facts

    if run.run_dir.plan.exists() and nothing_left(read_run(run.run_dir, run.plan)):
        return _with_plan(run, with_earlier_facts(run.run_dir, run.plan)), ()
    seen = look_up_images(run.loaded, run.plan, say)
    problems.add(seen.problems)
    return _with_plan(run, seen.plan), seen.notes


def _with_plan(run: ResolvedRun, plan: Any) -> ResolvedRun:
    """Replace the plan of a run, and its stages by those of the new plan."""
    return replace(run, plan=plan, stages=[plan.stage(stage.name) for stage in run.stages])


def nothing_left(states: Sequence[ElementState]) -> bool:
    """Return True if every element is done or active."""
    return all(state.state in (State.DONE, *ACTIVE_STATES) for state in states)


def check_not_driven(run_dir: RunDir) -> None:
    """Raise BadInput if an amlaunch process drives the run on some machine."""
    if is_locked(run_dir.lock):
        raise already_running(run_dir)


def already_running(run_dir: RunDir) -> BadInput:
    """Return the error for a run that another process drives."""
    name, program = wording.name_of(run_dir), wording.program()
    return BadInput(
        f"{run_dir.root.name} is already running in another amlaunch process; "
        f"follow it with {program} logs {name} -f, or stop it first: {program} cancel {name} --checkpoint"
    )


def check_inputs(run: ResolvedRun, states: Sequence[ElementState], ready: Sequence[State]) -> None:
    """Raise BadInput if a single stage was chosen and the elements that it needs are not in a ``ready`` state.

    An elementwise stage can start with one of them.
    """
    chosen = {stage.name for stage in run.stages}
    missing = ""
    for stage in run.stages:
        for name in set(stage.after) - chosen:
            are_ready = [state.state in ready for state in states if state.stage == name]
            if not (any(are_ready) if stage.elementwise else all(are_ready)):
                missing = name
    if missing:
        name = ", ".join(chosen)
        condition = "done or queued" if State.QUEUED in ready else "done"
        raise BadInput(
            f"stage {name} needs stage {missing}, which is not {condition}; "
            f"omit --stage {name}, or run --stage {missing} first"
        )
