"""Programs that fetch, convert and build images: find them, check their disk space, and leave none running."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from amlaunch.containers import disk_space
from amlaunch.containers.node_setup import ARCHITECTURES
from amlaunch.launcher.display import wording
from amlaunch.recipes.errors import BadInput

REGISTRY_TOOLS = ("skopeo", "podman", "docker", "buildah", "enroot", "apptainer", "singularity")
"""Tools that fetch from a registry, the one that resumes best first."""
BUILDERS = ("buildah", "podman", "docker")
QUERY_TIMEOUT_SECONDS = 20
STOP_TIMEOUT_SECONDS = 10

Say = Callable[[str], None]
"""Prints a message for the user."""


class ToolFailed(Exception):
    """A tool failed; the message quotes the end of its output and says what to do."""


# --- find tools -----------------------------------------------------------------------------------------


def this_architecture() -> str:
    """Return this machine's architecture by the name that images use, such as ``amd64``."""
    return ARCHITECTURES.get(platform.machine(), platform.machine())


def site_format(runtime: str = "") -> str:
    """Return the format that the site's runtime starts: ``sif`` if it is apptainer, or only apptainer is there."""
    if runtime:
        return "sif" if runtime in ("apptainer", "singularity") else "sqsh"
    has_apptainer = shutil.which("apptainer") or shutil.which("singularity")
    has_others = shutil.which("enroot") or shutil.which("srun")
    return "sif" if has_apptainer and not has_others else "sqsh"


def require_tool(tool: str) -> str:
    """Return the name of a tool. Raises BadInput if it is not installed."""
    if not shutil.which(tool):
        raise BadInput(f"{tool} is not in PATH; install it or choose another --tool")
    return tool


def registry_tool() -> str:
    """Return the best installed tool that fetches from a registry. Raises BadInput if there is none."""
    tool = next((name for name in REGISTRY_TOOLS if shutil.which(name) and is_usable(name)), None)
    if tool is None:
        raise BadInput(
            f"no tool to fetch an image is in PATH (looked for {', '.join(REGISTRY_TOOLS)}). Save the image on another "
            "machine, then import the file: docker save IMAGE -o image.tar; amlaunch image import image.tar"
        )
    return tool


def is_usable(tool: str) -> bool:
    """Return False for a docker command without a daemon that the user may use."""
    if tool != "docker":
        return True
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, timeout=QUERY_TIMEOUT_SECONDS).returncode == 0
    return False


def choose_builder(tool: str | None) -> str:
    """Return the tool to build an image with: the given one, else the first that is installed. Raises BadInput."""
    if tool and tool not in BUILDERS:
        raise BadInput(f"--tool {tool} cannot build images; use {', '.join(BUILDERS)}")
    if tool:
        return require_tool(tool)
    builder = next((name for name in BUILDERS if shutil.which(name) and is_usable(name)), None)
    if builder is None:
        raise BadInput(f"no tool to build an image is in PATH; install one of {', '.join(BUILDERS)}")
    return builder


def sif_program() -> str:
    """Return ``apptainer``, or ``singularity``, its former name. Raises BadInput if neither is installed."""
    program = next((name for name in ("apptainer", "singularity") if shutil.which(name)), None)
    if program is None:
        raise BadInput("a .sif image needs apptainer, which is not in PATH; use --format sqsh instead")
    return program


def need_program(program: str, package: str) -> None:
    """Raise BadInput, naming the package to install, if a program is missing."""
    if not shutil.which(program):
        raise BadInput(f"{program} is not in PATH; install the package {package}")


def version_of(tool: str) -> str:
    """Return the version that a tool prints; empty if it is missing or prints none."""
    option = "-version" if tool == "mksquashfs" else "--version"
    with suppress(OSError, subprocess.TimeoutExpired):
        result = subprocess.run([tool, option], capture_output=True, text=True, timeout=QUERY_TIMEOUT_SECONDS)
        words = (result.stdout or result.stderr).split()
        return next((word.strip(",") for word in words if word[:1].isdigit()), "")
    return ""


# --- check their space ----------------------------------------------------------------------------------


def check_free_space(folder: Path, needed: int, alternative: str) -> None:
    """Raise BadInput if a folder has fewer than ``needed`` bytes free; ``alternative`` says how to choose another."""
    for shortage in disk_space.shortages([folder], needed):
        raise BadInput(
            f"{shortage.folder}: {wording.size(shortage.free)} free, at least {wording.size(needed)} needed. "
            f"Free some space or choose {alternative}"
        )


def check_engine_space(engine: str, image: str, layer_bytes: int) -> None:
    """Raise BadInput if an engine's storage is clearly too full to pull an image that it does not have."""
    root = disk_space.storage_root(engine)
    if root is not None and not disk_space.has_image(engine, image):
        check_free_space(root, layer_bytes, f"another storage folder for {engine}")


# --- run them -------------------------------------------------------------------------------------------


@contextmanager
def stopped_on_error(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Stop the process if the block raises anything, Ctrl-C included."""
    try:
        yield
    except BaseException:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_SECONDS)
        process.kill()
        process.wait()
        raise


def content_of(file: IO[bytes]) -> str:
    """Return all that a tool wrote to a file."""
    file.seek(0)
    return file.read().decode(errors="replace")
