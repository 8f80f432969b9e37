"""The programs that fetch, convert and build images: which of them this machine has, and that none is left behind."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from amlaunch.containers.node_setup import ARCHITECTURES
from amlaunch.recipes.errors import BadInput

REGISTRY_TOOLS = ("skopeo", "podman", "docker", "buildah", "enroot", "apptainer", "singularity")
"""What can fetch from a registry, the one that resumes best first."""
BUILDERS = ("buildah", "podman", "docker")
Say = Callable[[str], None]


class ToolFailed(Exception):
    """A tool did not do its work; the message has its last words and what to do."""


def this_architecture() -> str:
    """This machine's, in the names of images."""
    return ARCHITECTURES.get(platform.machine(), platform.machine())


def site_format(runtime: str = "") -> str:
    """What the site's runtime starts: .sif for apptainer, where it is the only one there; else .sqsh."""
    sif = runtime in ("apptainer", "singularity")
    only = (
        not shutil.which("enroot")
        and not shutil.which("srun")
        and (shutil.which("apptainer") or shutil.which("singularity"))
    )
    return "sif" if sif or (not runtime and only) else "sqsh"


def there(tool: str) -> str:
    """The tool. Raises BadInput where this machine has none of that name."""
    if not shutil.which(tool):
        raise BadInput(f"{tool} is not in the search path here")
    return tool


def registry_tool() -> str:
    """What fetches from a registry here. Raises BadInput."""
    found = next((tool for tool in REGISTRY_TOOLS if shutil.which(tool) and works(tool)), None)
    if found is None:
        raise BadInput(
            f"nothing here can fetch an image: none of {', '.join(REGISTRY_TOOLS)} is in the search path. "
            "Import one that was saved elsewhere: docker save IMAGE -o image.tar, then amlaunch image import image.tar"
        )
    return found


def works(tool: str) -> bool:
    """docker's command is often there without a daemon that one may ask."""
    if tool != "docker":
        return True
    with suppress(OSError, subprocess.TimeoutExpired):
        return (
            subprocess.run(
                ["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, timeout=20
            ).returncode
            == 0
        )
    return False


def builder(tool: str | None) -> str:
    """What builds an image here. Raises BadInput."""
    if tool and tool not in BUILDERS:
        raise BadInput(f"--tool {tool}: an image is built by {', '.join(BUILDERS)}")
    found = there(tool) if tool else next((one for one in BUILDERS if shutil.which(one) and works(one)), None)
    if found is None:
        raise BadInput(f"nothing here can build an image: none of {', '.join(BUILDERS)} is in the search path")
    return found


def reads_tar() -> bool:
    """Whether mksquashfs takes a tar on its stdin (4.5 and newer)."""
    found = version_of("mksquashfs")
    numbers = [int(part) if part.isdigit() else 0 for part in found.split(".")[:2]] if found else []
    return numbers >= [4, 5]


def version_of(tool: str) -> str:
    """A tool's version, as it tells; empty where it is not there or does not say."""
    option = "-version" if tool == "mksquashfs" else "--version"
    with suppress(OSError, subprocess.TimeoutExpired):
        found = subprocess.run([tool, option], capture_output=True, text=True, timeout=20)
        words = (found.stdout or found.stderr).split()
        return next((word.strip(",") for word in words if word[:1].isdigit()), "")
    return ""


def sif_program() -> str:
    """apptainer, under either of its names. Raises BadInput."""
    found = next((name for name in ("apptainer", "singularity") if shutil.which(name)), None)
    if found is None:
        raise BadInput(
            "a .sif image is made by apptainer, which is not in the search path here; --format sqsh makes the other kind"
        )
    return found


def need_program(program: str, package: str) -> None:
    """Raises BadInput with the package that brings a program which is not here."""
    if not shutil.which(program):
        raise BadInput(f"{program} is not in the search path here; it comes with {package}")


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Whatever happens, the tool is not left behind."""
    try:
        yield
    except BaseException:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        raise


def content_of(file: IO[bytes]) -> str:
    """All that a tool wrote into a file."""
    file.seek(0)
    return file.read().decode(errors="replace")
