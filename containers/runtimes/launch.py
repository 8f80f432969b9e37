"""Data of a container launch: the image with its mounts and variables, and the command that a runtime makes of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amlaunch.containers.images.reference import Reference

RECORD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Exceptions that reading a file of unknown content raises."""
SIGN_NAMES = {":": "a colon", " ": "a space", ",": "a comma", '"': "a quote", "\n": "a line break"}


class BadMount(ValueError):
    """An invalid mount; the message says why."""


@dataclass(frozen=True)
class Mount:
    """A folder or file of the host, and its path in the container."""

    source: str
    target: str
    read_only: bool = False

    @property
    def short(self) -> str:
        """The mount as ``/host/path:/inside:ro``."""
        return f"{self.source}:{self.target}{':ro' if self.read_only else ''}"


def parse_mount(text: str, base: Path) -> Mount:
    """Parse ``/host/path[:/inside][:ro|rw]``; a relative source starts at ``base``. Raises BadMount."""
    parts = text.split(":")
    mode = parts.pop() if len(parts) > 1 and parts[-1] in ("ro", "rw") else "rw"
    if len(parts) > 2 or not parts[0]:
        raise BadMount(
            f"{text!r}: write /host/path:/inside, with :ro at the end for a read-only mount. "
            "For a path with a colon, which only docker and podman accept, write {source: …, target: …}"
        )
    return make_mount(parts[0], parts[1] if len(parts) == 2 else None, mode == "ro", base)


def make_mount(source: str, target: str | None, read_only: bool, base: Path) -> Mount:
    """Return a mount with absolute paths; without a target it has the same path inside. Raises BadMount."""
    host = os.path.normpath(base / os.path.expanduser(source))
    inside = os.path.normpath(target) if target else host
    if not inside.startswith("/"):
        raise BadMount(f"{target!r}: a path in the container must start with /")
    if inside == "/":
        raise BadMount(f"{source!r}: cannot mount over the image's root; choose another target than /")
    if any(sign in path for path in (host, inside) for sign in ("\n", ",", '"')):
        raise BadMount(
            f"{source!r}: cannot mount a path with a comma, a quote or a line break, which several runtimes misread; "
            "rename it or mount a link to it"
        )
    return Mount(host, inside, read_only)


@dataclass(frozen=True)
class ContainerSpec:
    """An image with its mounts, variables and options."""

    reference: Reference | None = None
    """None: no container."""
    mounts: tuple[Mount, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables to set inside, over the image's own. Values may be secret, so none is put into an argv."""
    passed: tuple[str, ...] = ()
    """Names of variables whose values differ between tasks (SLURM_PROCID); each task passes its own on."""
    workdir: str | None = None
    entrypoint: bool = False
    """Run the image's own entrypoint before the command."""
    gpus: bool = False
    on_slurm: bool = False
    """True if srun starts the runtime once per task."""
    options: tuple[str, ...] = ()
    """More arguments for the runtime, from the cluster profile."""

    @property
    def image(self) -> Reference:
        """The image. Raises ValueError if there is none."""
        if self.reference is None:
            raise ValueError("no image is set (container.image)")
        return self.reference


@dataclass(frozen=True)
class Launch:
    """The start of a command in a container: pure data, as ``submit --dry-run`` shows it."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment of the process that runs ``argv``; values that may be secret are only here."""
    srun: tuple[str, ...] = ()
    """Flags for srun if Slurm itself starts the container."""
    prepare: tuple[tuple[str, ...], ...] = ()
    """Commands that each node runs once to bring the image there; they do nothing if it is there."""
    bundle: Mapping[str, Any] | None = None
    """The ``config.json`` of an OCI bundle to make for this start, if the runtime needs one."""
    stdin: bool = False
    """True if a daemon starts the container: it lives only as long as its standard input stays open."""
    ignores_signals: bool = False
    """True if a signal would end the process that serves the files, not the command; only the stop file works."""


class CannotLaunch(ValueError):
    """An image that a runtime cannot start; the message says which runtimes can."""


def check_mounts(spec: ContainerSpec, signs: str, runtime: str) -> None:
    """Raise CannotLaunch if the path of a mount has one of the ``signs`` to which a runtime gives a meaning."""
    for mount in spec.mounts:
        misread = [sign for sign in mount.source + mount.target if sign in f"{signs}\n"]
        if misread:
            sign = SIGN_NAMES.get(misread[0], repr(misread[0]))
            raise CannotLaunch(f"{runtime} cannot mount {mount.source} at {mount.target}: it misreads {sign} in a path")


def bundle_variables(folder: Path) -> dict[str, str]:
    """Return the variables that an OCI bundle sets (``process.env`` of its config.json); none for other folders."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return _variables(config["process"]["env"])
    except RECORD_ERRORS:
        return {}


def image_variables(reference: Reference) -> dict[str, str]:
    """Return the variables that an image sets, from an OCI bundle or from the record of an imported .sqsh."""
    if reference.kind == "folder":
        return bundle_variables(reference.file)
    if reference.kind != "sqsh":
        return {}
    try:
        record = json.loads(reference.file.with_suffix(".json").read_bytes())
        return _variables(record["settings"]["Env"])
    except RECORD_ERRORS:
        return {}


def _variables(entries: Iterable[str]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def root_of(folder: Path) -> Path:
    """Return the root file system of a folder: ``rootfs`` in an OCI bundle, else the folder itself."""
    return folder / "rootfs" if (folder / "rootfs").is_dir() else folder
