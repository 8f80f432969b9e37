"""All container runtimes, one module each, and the choice between them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from amlaunch.containers.images.reference import BadReference, Reference, parse
from amlaunch.containers.runtimes import apptainer, charliecloud, docker, enroot, none, podman, pyxis, slurm_oci
from amlaunch.containers.runtimes.launch import (
    BadMount,
    CannotLaunch,
    ContainerSpec,
    Launch,
    Mount,
    make_mount,
    parse_mount,
)

__all__ = [
    "RUNTIMES",
    "BadMount",
    "BadReference",
    "CannotLaunch",
    "ContainerSpec",
    "Launch",
    "Mount",
    "Reference",
    "choose",
    "launch",
    "make_mount",
    "parse",
    "parse_mount",
]

RUNTIMES: dict[str, Callable[[ContainerSpec, Sequence[str]], Launch]] = {
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
"""The kinds of images that each runtime can start, in order of preference."""
PROGRAMS = {name: name for name in KINDS} | {"charliecloud": "ch-run", "pyxis": "srun", "slurm": "srun"}
"""Each runtime's command."""
DAEMON_RUNTIMES = ("docker", "podman")
"""Runtimes whose containers are no children of who starts them: they end when their standard input closes."""
SRUN_RUNTIMES = ("pyxis", "slurm")
"""Runtimes that are flags of srun, and so start only steps of a job."""
KIND_LABELS = {
    "registry": "images of a registry",
    "sqsh": ".sqsh files",
    "sif": ".sif files",
    "archive": "archives (.tar)",
    "folder": "folders",
}


def choose(image: Reference, available: Sequence[str]) -> str | None:
    """Return the preferred runtime of ``available`` that can start an image; None if none can."""
    return next((name for name in KINDS if name in available and image.kind in KINDS[name]), None)


def installed() -> list[str]:
    """List the runtimes whose programs are in PATH, except for srun's, in order of preference."""
    return [name for name in KINDS if name not in SRUN_RUNTIMES and shutil.which(PROGRAMS[name])]


def runtimes_for(image: Reference) -> list[str]:
    """List the runtimes that can start an image of this kind."""
    return [name for name, kinds in KINDS.items() if image.kind in kinds]


def launch(runtime: str, spec: ContainerSpec, command: Sequence[str]) -> Launch:
    """Return how ``runtime`` runs ``command`` in a container.

    Raises ValueError for an unknown runtime and CannotLaunch for an image that it cannot start.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown container runtime {runtime!r}; known runtimes: {', '.join(RUNTIMES)}")
    return RUNTIMES[runtime](spec, command)
