"""What a first run in a container would lack, before it costs an allocation: mounts, credentials, what lies in a home that is not mounted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from amlaunch.containers.images import credentials
from amlaunch.containers.runtimes.catalog import CannotLaunch, Mount, Reference, launch, parse
from amlaunch.containers.runtimes.environment import of_libraries
from amlaunch.launcher.checks.files_and_disk import brings, image_problems, is_online, is_shared
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.planning.stage_container import image_of, is_seen, may_mount
from amlaunch.launcher.specs.cluster_profile import ClusterProfile
from amlaunch.launcher.specs.plan import Plan, Stage, StageContainer
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.placeholders import expand_known, variables
from amlaunch.recipes.run_layout import RunDir

CERTIFICATES = ("SSL_CERT_FILE", "AWS_CA_BUNDLE")
"""Paths of the host whose like an image has itself."""


def check_containers(loaded: LoadedRecipe, plan: Plan, run: RunDir, profile: ClusterProfile | None) -> list[str]:
    """What containers of a run need, as far as it is seen from here; remarks. Raises BadInput with all that is missing.

    ``profile``: of the cluster whose nodes see what is below its shared_roots; None: this machine.
    """
    inside = {stage.name: stage.container for stage in plan.stages if stage.container}
    if loaded.recipe.container is None or not inside:
        return []
    problems, notes = ErrorCollector(), []
    problems.add(image_problems(loaded) if profile is None else ())
    for source in sorted({source for container in inside.values() for source, _, _ in container.mounts}):
        if os.path.exists(source):
            continue
        if profile is None or is_shared(Path(source), profile):
            problems.add(
                [
                    f"{loaded.lines.get(('container', 'mounts'), loaded.path)}: container.mounts (or those of the profile): there is no {source}"
                ]
            )
        else:
            notes.append(
                f"container.mounts: {source} is not on this machine; on a node that does not have it either, jobs end at once"
            )
    if "train" in inside and loaded.recipe.wandb is not None and is_online(loaded) and not _has_key_inside(loaded):
        problems.add(
            [
                f"{loaded.lines.get(('wandb',), loaded.path)}: the key of `wandb login` lies in your home, which containers do not see; export WANDB_API_KEY=…"
            ]
        )
    problems.add(_launch_problems(loaded, plan, run, profile))
    problems.refuse()
    for stage in plan.stages:
        if stage.container:
            notes += [
                *_credential_notes(parse(stage.container.image), stage.container.runtime, here=profile is None),
                *_home_notes(loaded, plan, stage, stage.container),
            ]
    return list(dict.fromkeys(notes))


def _has_key_inside(loaded: LoadedRecipe) -> bool:
    """Whether W&B finds its key in a container: the shell's own, or where the recipe says."""
    return bool(os.environ.get("WANDB_API_KEY")) or brings(loaded, "WANDB_API_KEY", "WANDB_MODE", "NETRC", "HOME")


def _launch_problems(loaded: LoadedRecipe, plan: Plan, run: RunDir, profile: ClusterProfile | None) -> Iterator[str]:
    """What a runtime cannot do of what is asked of it, with the stages that ask; asked as a job will."""
    env = expand_known({**(profile.env if profile else {}), **plan.env}, variables())
    found: dict[str, list[str]] = {}
    for stage in plan.stages:
        container = stage.container
        if container is None or container.runtime == "auto":
            continue
        try:
            launch(container.runtime, image_of(run, plan, stage, env, (), on_slurm=profile is not None), [])
        except CannotLaunch as error:
            found.setdefault(str(error), []).append(stage.name)
        except (OSError, ValueError) as error:  # a bundle whose config.json is no JSON
            found.setdefault(f"{container.image}: {error}", []).append(stage.name)
    for problem, stages in found.items():
        yield f"{loaded.lines.get(('container', 'image'), loaded.path)}: container of {' and '.join(stages)}: {problem}"


def _credential_notes(image: Reference, runtime: str, *, here: bool) -> Iterator[str]:
    """NVIDIA's own images are for everybody; those of an organisation are not. No secret is read, only whether there is one."""
    if image.kind != "registry" or image.registry != "nvcr.io" or image.repository.startswith("nvidia/"):
        return
    if not any(_names(file, image.registry) for file in credentials.files(runtime, os.environ, here=here)):
        yield f"{image.name}: no credentials for {image.registry} are found here; where they are needed: {credentials.where(runtime, image.registry, os.environ)}"


def _names(file: Path, registry: str) -> bool:
    """Whether a file of credentials has an entry of a registry."""
    with suppress(OSError):
        return registry in file.read_text(errors="replace")
    return False


def _home_notes(loaded: LoadedRecipe, plan: Plan, stage: Stage, container: StageContainer) -> Iterator[str]:
    """Folders of Hugging Face's, W&B's and others' libraries that a container would not see."""
    mounts = [Mount(*mount) for mount in container.mounts] + [
        Mount(path, path) for path in (plan.cwd, plan.data, plan.shared) if path and may_mount(Path(path))
    ]
    given = {
        name: value
        for name, value in of_libraries(os.environ).items()
        if name not in (*CERTIFICATES, *container.passed) and not brings(loaded, name)
    }
    hidden = {name: value for name, value in given.items() if not is_seen(name, value, mounts)}
    if hidden:
        named = ", ".join(f"{name}={value}" for name, value in hidden.items())
        yield f"{named}: containers do not see such a path, so it is not set there; container.mounts shows it to them"
    folder = Path(
        os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'}/huggingface"
    )
    if asks_hub(loaded, plan, stage) and folder.exists() and not is_seen("HF_HOME", str(folder), mounts):
        token = (
            ""
            if os.environ.get("HF_TOKEN") or brings(loaded, "HF_TOKEN") or not (folder / "token").exists()
            else "export HF_TOKEN=… for what is not public; "
        )
        yield f"stage {stage.name} asks the Hugging Face hub, and its container does not see {folder}: {token}what is downloaded lasts where HF_HOME names a folder that container.mounts shows"


def asks_hub(loaded: LoadedRecipe, plan: Plan, stage: Stage) -> bool:
    """Whether a stage reads what is on the Hugging Face hub, and not in a folder."""
    if stage.name == "preprocess":
        name = loaded.recipe.preprocess.dataset if loaded.recipe.preprocess else None
    elif stage.name in ("train", "export"):
        name = loaded.recipe.model.get("pretrained_model_name_or_path")
    else:
        name = None
    return isinstance(name, str) and not Path(plan.cwd, os.path.expanduser(name)).exists()
