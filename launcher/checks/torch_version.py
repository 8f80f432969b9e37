"""Which torch the train stage of a run will have, and whether it can do what the recipe asks for.

The image's torch is known from ``amlaunch image check`` or from the table of NGC's images; without a container it is
the torch beside this amlaunch. Only versions are read; torch is never imported.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from amlaunch.containers.images.reference import EXAMPLE
from amlaunch.launcher.planning.container_plan import image_text, profile_image_folder
from amlaunch.launcher.planning.image_folder import image_folder
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.section_checks import raise_problems
from amlaunch.recipes.version import NEWEST_TORCH, OLDEST_TORCH, is_torch_too_old, torch_release


@dataclass(frozen=True)
class RunTorch:
    """The torch of a run's train stage."""

    version: str
    """Empty if it is not known."""
    place: str
    """The image, or the Python, that has it."""
    is_in_image: bool

    def describe(self) -> str:
        """Return the version, its place, and whether it is in the tested range."""
        if torch_release(self.version) is None:
            return f"unknown version in {self.place}"
        return f"{self.version} in {self.place} ({range_verdict(self.version)})"


def range_verdict(version: str) -> str:
    """Say if a version of torch is in the tested range."""
    release = torch_release(version)
    oldest, newest = (".".join(map(str, end)) for end in (OLDEST_TORCH, NEWEST_TORCH))
    if is_torch_too_old(version):
        return f"too old: amlaunch needs torch {oldest} or newer"
    if release is not None and release > NEWEST_TORCH:
        return f"newer than the newest tested one, {newest}"
    return f"tested: {oldest} to {newest}"


def torch_of_run(loaded: LoadedRecipe, plan: Plan) -> RunTorch | None:
    """Return the torch of the train stage; None if this machine cannot know which Python the nodes will use."""
    train = next((stage for stage in plan.stages if stage.name == "train"), None)
    if train is None:
        return None
    section = loaded.recipe.container
    text = image_text(section, "train")[0] if section is not None and train.container is not None else None
    if text is not None:
        facts = image_folder(profile_folder=profile_image_folder(plan)).facts(text)
        return RunTorch(facts.version("torch"), text, is_in_image=True)
    profile_python = ((plan.cluster or {}).get("profile") or {}).get("python")
    if profile_python not in (None, sys.executable):
        return None
    version = installed_torch()
    return RunTorch(version, sys.executable, is_in_image=False) if version else None


def installed_torch() -> str:
    """Return the version of the torch that is installed for this Python; empty if there is none."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("torch")
    return ""


def check_torch(loaded: LoadedRecipe, plan: Plan) -> list[str]:
    """Return notes about the run's torch. Raises BadInput for what it cannot do, with the line to change.

    An image whose torch is too old is refused with its other packages (:mod:`amlaunch.launcher.runs.packages`).
    """
    torch = torch_of_run(loaded, plan)
    if torch is None or (torch.is_in_image and is_torch_too_old(torch.version)):
        return []
    release = torch_release(torch.version)
    if release is None:
        return [
            f"the torch in {torch.place} is unknown; the trainer refuses what it cannot do when it starts "
            f"(find out now: amlaunch image check {torch.place})"
        ]
    raise_problems(list(_problems(loaded, torch, release)))
    if release > NEWEST_TORCH:
        return [f"torch {torch.describe()}"]
    compiles_packed = loaded.recipe.packed_sequence.packed_sequence_size > 0 and loaded.recipe.compile.enabled
    if compiles_packed and release < (2, 9):
        return [
            f"torch {torch.version} computes packed rows with a slower attention kernel; "
            f"an image with torch 2.9 or newer, such as {EXAMPLE}, is faster"
        ]
    return []


def _problems(loaded: LoadedRecipe, torch: RunTorch, release: tuple[int, int]) -> Iterator[str]:
    if release < OLDEST_TORCH:
        yield f"torch {torch.describe()}; install a newer one"
    elif loaded.recipe.loss_fn.get("implementation") == "torch" and release < (2, 13):
        where = loaded.lines.get(("loss_fn", "implementation"), loaded.path)
        yield (
            f"{where}: loss_fn.implementation: torch needs torch 2.13 or newer, but {torch.place} has {torch.version}; "
            "write implementation: chunked"
        )
