"""Check that an image has enough free space before a tool starts to write it.

The check is a floor, not an estimate: it refuses what cannot fit and leaves the rest to the tools, whose own "no space
left on device" :mod:`amlaunch.containers.start_failures` explains.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlaunch.containers.images.reference import Reference
from amlaunch.containers.runtimes import enroot
from amlaunch.containers.runtimes.docker import local_tag

UNKNOWN_SIZE_FLOOR = 10**9
"""Bytes that must be free for an image whose size no registry gave."""
INFO_TIMEOUT_SECONDS = 60
ENGINES = ("docker", "podman", "buildah")
"""Tools with their own image storage, whose folder they report."""


@dataclass(frozen=True)
class Shortage:
    """A folder with less free space than is needed in it, in bytes."""

    folder: Path
    free: int
    needed: int


def shortages(folders: Iterable[Path], needed: int) -> Iterator[Shortage]:
    """Yield each folder whose file system has fewer than ``needed`` bytes free; folders need not exist yet."""
    for folder in folders:
        free = shutil.disk_usage(nearest_existing(folder)).free
        if free < needed:
            yield Shortage(folder, free, needed)


def nearest_existing(path: Path) -> Path:
    """Return the path itself, or its nearest parent that exists."""
    path = Path(os.path.abspath(path))
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def same_disk(first: Path, second: Path) -> bool:
    """Return True if two paths are, or will be, on one file system."""
    return os.stat(nearest_existing(first)).st_dev == os.stat(nearest_existing(second)).st_dev


def used_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; files may disappear meanwhile."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def storage_root(engine: str) -> Path | None:
    """Return the folder of docker's, podman's or buildah's images; None if it is unknown or on another machine."""
    if engine == "docker":
        if not os.environ.get("DOCKER_HOST", "unix://").startswith("unix://"):
            return None
        root = _query(["docker", "info", "--format", "{{json .}}"]).get("DockerRootDir")
    else:
        options = ["--format", "json"] if engine == "podman" else []
        store = _query([engine, "info", *options]).get("store")
        # podman writes graphRoot, buildah GraphRoot.
        values = {key.lower(): value for key, value in store.items()} if isinstance(store, dict) else {}
        root = values.get("graphroot")

    if not isinstance(root, str):
        return None

    # A daemon in a virtual machine (Docker Desktop) reports a folder that is not on this machine.
    # podman and buildah create theirs when they first need it.
    return Path(root) if engine != "docker" or os.path.isdir(root) else None


def _query(command: Sequence[str]) -> Mapping[str, Any]:
    """Return the JSON object that a tool prints; empty if it prints none."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=INFO_TIMEOUT_SECONDS).stdout
        value = json.loads(output)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}
    return value if isinstance(value, dict) else {}


def has_image(tool: str, name: str) -> bool:
    """Return True if a tool has an image of that name in its storage."""
    commands = {
        "docker": ["docker", "image", "inspect", name],
        "podman": ["podman", "image", "exists", name],
        "buildah": ["buildah", "inspect", "--type", "image", name],
        "charliecloud": ["ch-image", "list", name],
    }
    command = commands.get(tool)
    if command is None:
        return False
    try:
        return subprocess.run(command, capture_output=True, timeout=INFO_TIMEOUT_SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def node_shortages(
    runtime: str, image: Reference, layer_bytes: int | None, environ: Mapping[str, str]
) -> Iterator[Shortage]:
    """Yield the folders of a node that are too full for a runtime to bring an image there.

    ``layer_bytes``: the size of the compressed layers if a registry gave it. An image that the node already has needs
    nothing.
    """
    folders = _node_folders(runtime, image, environ)
    if image.path is not None:
        needed = image.path.stat().st_size if image.path.is_file() else 0
    else:
        needed = layer_bytes or UNKNOWN_SIZE_FLOOR
    yield from shortages(folders, needed)


def _node_folders(runtime: str, image: Reference, environ: Mapping[str, str]) -> list[Path]:
    """List the folders in which a runtime would unpack an image; empty if it has the image or they are unknown."""
    if has_image(runtime, local_tag(image)):
        return []
    if runtime in ENGINES:
        root = storage_root(runtime)
        return [root] if root else []

    if runtime == "enroot":
        folders = enroot.folders(environ)
        marker = Path(enroot.container_name(image), enroot.COMPLETE_MARKER)
        return [] if any((folder / marker).exists() for folder in folders) else folders
    # pyxis runs enroot with an environment of its own, which only the node's slurmd knows.
    storage = environ.get("CH_IMAGE_STORAGE") if runtime == "charliecloud" else None
    return [Path(storage)] if storage else []
