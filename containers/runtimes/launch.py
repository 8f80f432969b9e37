"""What a stage's container is made of, and what a runtime makes of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amlaunch.containers.images.reference import Reference


class BadMount(ValueError):
    """A mount that cannot be one."""


@dataclass(frozen=True)
class Mount:
    """A folder or file of the host, and where the container sees it."""

    source: str
    target: str
    read_only: bool = False

    @property
    def short(self) -> str:
        """``/host/path:/inside:ro``."""
        return f"{self.source}:{self.target}{':ro' if self.read_only else ''}"


def parse_mount(text: str, base: Path) -> Mount:
    """``/host/path[:/inside][:ro|rw]``; a relative source begins at ``base``. Raises BadMount."""
    parts = text.split(":")
    mode = parts.pop() if len(parts) > 1 and parts[-1] in ("ro", "rw") else "rw"
    if len(parts) > 2 or not parts[0]:
        raise BadMount(
            f"{text!r}: expected /host/path:/inside, with :ro after it where it is not to be written; a path with a colon is written as {{source: …, target: …}}, which docker and podman take"
        )
    return make_mount(parts[0], parts[1] if len(parts) == 2 else None, mode == "ro", base)


def make_mount(source: str, target: str | None, read_only: bool, base: Path) -> Mount:
    """A mount with a whole path on both sides; without a target it is the same path inside. Raises BadMount."""
    host = os.path.normpath(base / os.path.expanduser(source))
    inside = os.path.normpath(target) if target else host
    if not inside.startswith("/"):
        raise BadMount(f"{target!r}: the path inside the container begins with a /")
    if inside == "/":
        raise BadMount(f"{source!r} cannot take the place of the whole image (target /)")
    if any(sign in path for path in (host, inside) for sign in ("\n", ",", '"')):
        raise BadMount(
            f"{source!r}: a path with a comma, a quote or a line break cannot be mounted: several runtimes read it otherwise"
        )
    return Mount(host, inside, read_only)


@dataclass(frozen=True)
class Image:
    """An image, and what goes into the container beside it."""

    reference: Reference | None = None
    """None: no container."""
    mounts: tuple[Mount, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    """What the processes inside are told, over what the image itself sets. Values may be secret: none is put into an argv."""
    passed: tuple[str, ...] = ()
    """Names of variables whose values each task has of its own (SLURM_PROCID), taken from where the runtime is started."""
    workdir: str | None = None
    entrypoint: bool = False
    """Run the image's own entrypoint before the command."""
    gpus: bool = False
    on_slurm: bool = False
    """Whether srun starts the runtime, once for each task."""
    options: tuple[str, ...] = ()
    """Further arguments for the runtime, of the cluster profile."""

    @property
    def of(self) -> Reference:
        """The image. Raises ValueError where there is none."""
        if self.reference is None:
            raise ValueError("no image is named (container.image)")
        return self.reference


@dataclass(frozen=True)
class Launch:
    """How a command is started in an image: pure data, as ``submit --dry-run`` shows it."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """For the process that ``argv`` becomes; values that may be secret are here and nowhere else."""
    srun: tuple[str, ...] = ()
    """Flags for srun, where Slurm itself starts the container."""
    prepare: tuple[tuple[str, ...], ...] = ()
    """Commands that each node runs once before: they bring the image there, and do nothing where it is."""
    bundle: Mapping[str, Any] | None = None
    """The ``config.json`` of an OCI bundle that is made for this start, where the runtime wants one."""
    stdin: bool = False
    """Whether the container lives only as long as the standard input that it was given: a daemon started it, not we."""
    deaf: bool = False
    """Whether a signal would not reach the command, but end what holds its files; the stop file alone tells it to save."""


class CannotLaunch(ValueError):
    """An image that a runtime cannot start; the message says which can."""


def check_mounts(image: Image, signs: str, runtime: str) -> None:
    """Raise CannotLaunch where the path of a mount has a sign that ``runtime`` reads otherwise; ``signs`` in one string."""
    for mount in image.mounts:
        found = next((sign for path in (mount.source, mount.target) for sign in path if sign in f"{signs}\n"), None)
        if found is not None:
            what = {":": "a colon", " ": "a space", ",": "a comma", '"': "a quote", "\n": "a line break"}.get(
                found, repr(found)
            )
            raise CannotLaunch(
                f"{runtime} cannot mount {mount.source} at {mount.target}: {what} in a path means something else to it"
            )


def settings_of(folder: Path) -> dict[str, str]:
    """The variables that an OCI bundle sets (``process.env`` of its config.json); none of a plain root file system."""
    try:
        listed = json.loads((folder / "config.json").read_bytes())["process"]["env"]
        return dict(entry.split("=", 1) for entry in listed if "=" in entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def own_settings(reference: Reference) -> dict[str, str]:
    """The variables that an image sets, where they lie beside it: in an OCI bundle, or in the record of a .sqsh that was imported."""
    if reference.kind == "folder":
        return settings_of(reference.file)
    try:
        listed = (
            json.loads(reference.file.with_suffix(".json").read_bytes())["settings"]["Env"]
            if reference.kind == "sqsh"
            else []
        )
        return dict(entry.split("=", 1) for entry in listed if "=" in entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def root_of(folder: Path) -> Path:
    """The root file system of a folder: ``rootfs`` in an OCI bundle, else the folder itself."""
    return folder / "rootfs" if (folder / "rootfs").is_dir() else folder
