"""Check, before an allocation is spent, what a run's containers need: mounts, credentials, paths in an unmounted home.

Whether image files exist is checked in :mod:`amlaunch.launcher.checks.files_and_disk`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from amlaunch.containers.images import credentials
from amlaunch.containers.runtimes.catalog import CannotLaunch, Mount, Reference, launch, parse
from amlaunch.containers.runtimes.environment import library_variables
from amlaunch.launcher.checks.files_and_disk import image_problems, is_shared, sets_variable, uses_wandb
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.planning.container_start import container_spec, is_visible_inside, may_mount
from amlaunch.launcher.specs.cluster_profile import ClusterProfile
from amlaunch.launcher.specs.plan import Plan, Stage, StageContainer
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.placeholders import expand_known, variables
from amlaunch.recipes.run_layout import RunDir

CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "AWS_CA_BUNDLE")
"""Paths on the host; an image has its own certificates, so these need not be mounted."""


def check_containers(loaded: LoadedRecipe, plan: Plan, run: RunDir, profile: ClusterProfile | None) -> list[str]:
    """Check what the containers of a run need, as far as this machine can see it.

    ``profile``: the cluster's, whose nodes see what is below its shared_roots; None: this machine.
    Returns notes. Raises BadInput with all problems.
    """
    stages = [(stage, stage.container) for stage in plan.stages if stage.container]
    if loaded.recipe.container is None or not stages:
        return []
    problems, notes = ErrorCollector(), []

    if profile is None:
        problems.add(image_problems(loaded))
    sources = {source for _, container in stages for source, _, _ in container.mounts}
    for source in sorted(source for source in sources if not os.path.exists(source)):
        if profile is None or is_shared(Path(source), profile):
            where = loaded.lines.get(("container", "mounts"), loaded.path)
            problems.add([f"{where}: container.mounts (or the profile's): {source} does not exist"])
        else:
            notes.append(
                f"container.mounts: {source} does not exist on this machine; "
                "jobs fail at once on nodes that lack it too"
            )

    trains = any(stage.name == "train" for stage, _ in stages)
    if trains and uses_wandb(loaded) and not _container_has_wandb_key(loaded):
        where = loaded.lines.get(("wandb",), loaded.path)
        problems.add(
            [
                f"{where}: the key from `wandb login` is in your home folder, which containers do not see; "
                "export WANDB_API_KEY=…"
            ]
        )
    problems.add(_launch_problems(loaded, plan, run, profile))
    problems.raise_if_any()

    for stage, container in stages:
        notes += _credential_notes(parse(container.image), container.runtime, on_this_machine=profile is None)
        notes += _hidden_path_notes(loaded, plan, stage, container)
    return list(dict.fromkeys(notes))


def _container_has_wandb_key(loaded: LoadedRecipe) -> bool:
    """Return True if the shell or the recipe gives W&B its key inside a container."""
    names = ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "HOME")
    return bool(os.environ.get("WANDB_API_KEY")) or sets_variable(loaded, *names)


def _launch_problems(loaded: LoadedRecipe, plan: Plan, run: RunDir, profile: ClusterProfile | None) -> Iterator[str]:
    """List what the runtimes cannot do, by building the same command as a job; stages with one problem share a line."""
    env = expand_known({**(profile.env if profile else {}), **plan.env}, variables())
    stages_by_problem: dict[str, list[str]] = {}
    for stage in plan.stages:
        container = stage.container
        if container is None or container.runtime == "auto":
            continue
        try:
            launch(container.runtime, container_spec(run, plan, stage, env, (), on_slurm=profile is not None), [])
        except CannotLaunch as error:
            stages_by_problem.setdefault(str(error), []).append(stage.name)
        except (OSError, ValueError) as error:
            # For example a bundle whose config.json is not JSON.
            stages_by_problem.setdefault(f"{container.image}: {error}", []).append(stage.name)

    where = loaded.lines.get(("container", "image"), loaded.path)
    for problem, names in stages_by_problem.items():
        yield f"{where}: container of {' and '.join(names)}: {problem}"


def _credential_notes(image: Reference, runtime: str, *, on_this_machine: bool) -> Iterator[str]:
    """Warn if an organisation's image on nvcr.io has no credentials here. Secrets are looked for, never printed."""
    # NVIDIA's own images are public.
    if image.kind != "registry" or image.registry != "nvcr.io" or image.repository.startswith("nvidia/"):
        return
    files = credentials.credential_files(runtime, os.environ, here=on_this_machine)
    if not any(_mentions(file, image.registry) for file in files):
        advice = credentials.login_advice(runtime, image.registry, os.environ)
        yield (
            f"{image.name}: no credentials for {image.registry} found on this machine; "
            f"if the image needs them: {advice}"
        )


def _mentions(file: Path, registry: str) -> bool:
    """Return True if a file of credentials has an entry for a registry."""
    with suppress(OSError):
        return registry in file.read_text(errors="replace")
    return False


def _hidden_path_notes(loaded: LoadedRecipe, plan: Plan, stage: Stage, container: StageContainer) -> Iterator[str]:
    """Warn about folders of Hugging Face, W&B and other libraries that a container would not see."""
    own_folders = [path for path in (plan.cwd, plan.data, plan.shared) if path and may_mount(Path(path))]
    mounts = [Mount(*mount) for mount in container.mounts] + [Mount(path, path) for path in own_folders]
    yield from _hidden_variable_notes(loaded, container, mounts)
    yield from _hidden_cache_notes(loaded, plan, stage, mounts)


def _hidden_variable_notes(loaded: LoadedRecipe, container: StageContainer, mounts: list[Mount]) -> Iterator[str]:
    set_inside = (*CERTIFICATE_VARIABLES, *container.passed)
    hidden = [
        f"{name}={value}"
        for name, value in library_variables(os.environ).items()
        if name not in set_inside and not sets_variable(loaded, name) and not is_visible_inside(name, value, mounts)
    ]
    if hidden:
        yield (
            f"{', '.join(hidden)}: not set in containers, because they do not see the path; "
            "to keep it, add the path to container.mounts"
        )


def _hidden_cache_notes(loaded: LoadedRecipe, plan: Plan, stage: Stage, mounts: list[Mount]) -> Iterator[str]:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("HF_HOME") or f"{cache}/huggingface")
    if not _uses_hub(loaded, plan, stage) or not folder.exists() or is_visible_inside("HF_HOME", str(folder), mounts):
        return

    advice = "to keep downloads, set HF_HOME to a folder that container.mounts lists"
    has_token = os.environ.get("HF_TOKEN") or sets_variable(loaded, "HF_TOKEN")
    if not has_token and (folder / "token").exists():
        advice = f"export HF_TOKEN=… for anything that is not public; {advice}"
    yield f"stage {stage.name} uses the Hugging Face Hub, but its container does not see {folder}: {advice}"


def _uses_hub(loaded: LoadedRecipe, plan: Plan, stage: Stage) -> bool:
    """Return True if a stage reads a dataset or model from the Hugging Face Hub and not from a folder."""
    name = None
    if stage.name == "preprocess" and loaded.recipe.preprocess:
        name = loaded.recipe.preprocess.dataset
    elif stage.name in ("train", "export"):
        name = loaded.recipe.model.get("pretrained_model_name_or_path")
    return isinstance(name, str) and not Path(plan.cwd, os.path.expanduser(name)).exists()
