"""Build an image with what the site has: ``containers/Dockerfile`` over a base, with our packages in it."""

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
from amlaunch.launcher.images.disk_space import check
from amlaunch.launcher.images.tools import Say, ToolFailed, ended, this_architecture
from amlaunch.recipes.errors import BadInput

LAST_LINES = 40
"""Of a build's output, what is looked through for the reason of its failure."""


def write_context(folder: Path, dockerfile: Path, wheels: Path | None) -> None:
    """What a build sees: the Dockerfile, our packages, and the wheels to install from. Raises BadInput."""
    from amlaunch.launcher.runs.snapshot import take_snapshot

    take_snapshot(folder / "amlaunch", None)
    (folder / "amlaunch" / ".digest").unlink()
    (folder / "wheels").mkdir()
    (folder / "wheels" / ".keep").touch()  # a folder without files is not copied by all tools
    found = sorted(wheels.glob("*.whl")) if wheels else []
    if wheels and not found:
        raise BadInput(
            f"--wheels {wheels}: there are no .whl files; pip download -d {wheels} tiktoken ... brings them, on a machine with a network"
        )
    for wheel in found:
        shutil.copyfile(wheel, folder / "wheels" / wheel.name)
    shutil.copyfile(dockerfile, folder / "Dockerfile")


def check_base(tool: str, base: str, say: Say) -> None:
    """Whether there is room for a base that has to be fetched, where its registry says how large it is. Raises BadInput."""
    storage = None if disk_space.has(tool, base) else disk_space.storage_of(tool, os.environ)
    if storage is None:
        return
    try:
        found = registry.look(parse(base), this_architecture(), os.environ)
    except registry.Unanswered as error:
        say(f"how large {base} is, is not known ({error}); room for it is not looked for")
        return
    check([storage.to_pull(found.size, base)], say)


def base_in(dockerfile: Path) -> str:
    """The base that a Dockerfile itself names; empty where it does so in another way than ours."""
    found = re.search(r"^ARG BASE=(\S+)$", dockerfile.read_text(), re.MULTILINE)
    return found[1] if found else ""


def build_image(tool: str, context: Path, tag: str, arguments: Mapping[str, str], say: Say) -> None:
    """Build, showing the tool's own lines as they come. Raises ToolFailed."""
    command = image_store.build(tool, context, tag, arguments)
    lines: list[str] = []
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with ended(process):
        assert process.stdout
        for line in process.stdout:
            lines = [*lines[-LAST_LINES:], credentials.without_secrets(line.rstrip())]
            say(f"  {lines[-1]}")
        process.wait()
    if process.returncode:
        meaning = credentials.explain(tool, arguments.get("BASE", ""), "\n".join(lines), os.environ)
        chroot = (
            "; without user namespaces (inside a container, say) BUILDAH_ISOLATION=chroot helps"
            if tool != "docker"
            else ""
        )
        raise ToolFailed(
            f"{tool} build failed with exit code {process.returncode}, its last lines are above{f': {meaning}' if meaning else chroot}"
        )
