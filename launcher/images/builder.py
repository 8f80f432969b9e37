"""Build an image with the site's tools: ``containers/Dockerfile`` on a base image, with amlaunch and its packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from amlaunch.containers import disk_space
from amlaunch.containers.images import credentials, image_store, registry
from amlaunch.containers.runtimes.catalog import parse
from amlaunch.launcher.images.tools import (
    Say,
    ToolFailed,
    check_engine_space,
    stopped_on_error,
    this_architecture,
)
from amlaunch.recipes.errors import BadInput

MAX_EXAMINED_LINES = 40
"""Lines at the end of a build's output in which the reason of its failure is looked for."""


def write_context(folder: Path, dockerfile: Path, wheels: Path | None) -> None:
    """Write a build's context: the Dockerfile, amlaunch, and the wheels to install from. Raises BadInput."""
    from amlaunch.launcher.runs.snapshot import take_snapshot

    take_snapshot(folder / "amlaunch", None)
    (folder / "amlaunch" / ".digest").unlink()

    (folder / "wheels").mkdir()
    # Some tools do not copy an empty folder.
    (folder / "wheels" / ".keep").touch()
    wheel_files = sorted(wheels.glob("*.whl")) if wheels else []
    if wheels and not wheel_files:
        raise BadInput(
            f"--wheels {wheels}: no .whl files there. Download them on a machine with a network: "
            f"pip download -d {wheels} tiktoken ..."
        )
    for wheel in wheel_files:
        shutil.copyfile(wheel, folder / "wheels" / wheel.name)
    shutil.copyfile(dockerfile, folder / "Dockerfile")


def check_base(tool: str, base: str, say: Say) -> None:
    """Check that a tool's storage has space for a base image that it must fetch. Raises BadInput."""
    if disk_space.has_image(tool, base):
        return
    try:
        size = registry.fetch_manifest(parse(base), this_architecture(), os.environ).size
    except registry.RegistryError as error:
        say(f"the size of {base} is unknown ({error}); checking only that 1 GB is free")
        size = disk_space.UNKNOWN_SIZE_FLOOR
    check_engine_space(tool, base, size)


def default_base(dockerfile: Path) -> str:
    """Return the default base that a Dockerfile names as ``ARG BASE=…``; empty if it has no such line."""
    match = re.search(r"^ARG BASE=(\S+)$", dockerfile.read_text(), re.MULTILINE)
    return match[1] if match else ""


def build_image(tool: str, context: Path, tag: str, arguments: Mapping[str, str], say: Say) -> None:
    """Build an image and print the tool's output line by line. Raises ToolFailed."""
    command = image_store.build(tool, context, tag, arguments)
    lines: list[str] = []
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with stopped_on_error(process):
        assert process.stdout
        for line in process.stdout:
            lines = [*lines[-MAX_EXAMINED_LINES:], credentials.redact(line.rstrip())]
            say(f"  {lines[-1]}")
        process.wait()
    if process.returncode:
        advice = credentials.explain_failure(tool, arguments.get("BASE", ""), "\n".join(lines), os.environ)
        if not advice and tool != "docker":
            advice = "without user namespaces, inside a container for example, set BUILDAH_ISOLATION=chroot"
        raise ToolFailed(
            f"{tool} build failed with exit code {process.returncode}; see its output above"
            + (f". {advice}" if advice else "")
        )
