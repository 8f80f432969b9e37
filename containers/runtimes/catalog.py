"""In which image a stage's command runs: one module a runtime, each turning image, mounts, variables and command into an argv."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from amlaunch.containers.images.reference import BadReference, Reference, parse
from amlaunch.containers.runtimes import apptainer, charliecloud, docker, enroot, none, podman, pyxis, slurm_oci
from amlaunch.containers.runtimes.launch import BadMount, CannotLaunch, Image, Launch, Mount, make_mount, parse_mount

__all__ = [
    "RUNTIMES",
    "BadMount",
    "BadReference",
    "CannotLaunch",
    "Image",
    "Launch",
    "Mount",
    "Reference",
    "choose",
    "launch",
    "make_mount",
    "parse",
    "parse_mount",
]

RUNTIMES: dict[str, Callable[[Image, Sequence[str]], Launch]] = {
    "none": none.launch,
    "pyxis": pyxis.launch,
    "enroot": enroot.launch,
    "apptainer": apptainer.launch,
    "singularity": apptainer.singularity,
    "podman": podman.launch,
    "docker": docker.launch,
    "charliecloud": charliecloud.launch,
    "slurm": slurm_oci.launch,
}
"""One module a runtime."""
KINDS: dict[str, tuple[str, ...]] = {
    "pyxis": pyxis.KINDS,
    "enroot": enroot.KINDS,
    "apptainer": apptainer.KINDS,
    "singularity": apptainer.KINDS,
    "podman": podman.KINDS,
    "docker": docker.KINDS,
    "charliecloud": charliecloud.KINDS,
    "slurm": slurm_oci.KINDS,
}
"""The kinds of images that each can start."""
PROGRAMS = {name: name for name in KINDS} | {"charliecloud": "ch-run", "pyxis": "srun", "slurm": "srun"}
"""What each runtime's command is called."""
DAEMONS = ("docker", "podman")
"""Runtimes whose containers are no children of who starts them: they live as long as the input that they were given."""
OF_SRUN = ("pyxis", "slurm")
"""Runtimes that are flags of srun, and so start nothing but steps of a job."""
WORDS = {
    "registry": "images of a registry",
    "sqsh": ".sqsh files",
    "sif": ".sif files",
    "archive": "archives (.tar)",
    "folder": "folders",
}


def choose(image: Reference, found: Sequence[str]) -> str | None:
    """The first runtime of ``found`` that can start ``image``; None: none of them."""
    return next((name for name in KINDS if name in found and image.kind in KINDS[name]), None)


def installed() -> list[str]:
    """The runtimes whose programs are in the search path of this machine, in the order of :data:`KINDS`."""
    return [name for name in KINDS if name not in OF_SRUN and shutil.which(PROGRAMS[name])]


def able(image: Reference) -> list[str]:
    """The runtimes that can start such an image."""
    return [name for name, kinds in KINDS.items() if image.kind in kinds]


def launch(runtime: str, image: Image, command: Sequence[str]) -> Launch:
    """What runs ``command`` in ``image`` with ``runtime``.

    Raises ValueError for a runtime that is not known, CannotLaunch for an image that it cannot start.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown container runtime {runtime!r}; known: {', '.join(RUNTIMES)}")
    return RUNTIMES[runtime](image, command)
