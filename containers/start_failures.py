"""Explain why a container did not start, from the runtime's output: the fix, and if and where to retry.

Only lines that a runtime wrote count: a trainer that prints "not found" means something else.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass

from amlaunch.containers.images import credentials
from amlaunch.containers.images.reference import BadReference, parse

RUNTIME_LINE = re.compile(
    r"^(slurmstepd(-\S+)?: error: (pyxis|container|execve|.*runc)|pyxis: |"
    r"srun: error: .*(pyxis|execve)|docker: |Error: |"
    r"Error response from daemon|FATAL: |ERROR: |ch-run\[|ch-image|\[ERROR\]|curl: |"
    r"enroot|OCI runtime|runc|crun: |time=\S+ level=(error|fatal)|container_linux|standard_init|exec \S+: |"
    r"unable to upgrade|nvidia-container-cli|Trying to pull|Emulate Docker|Unable to find image|"
    r"mksquashfs|unsquashfs|FATAL ERROR: |mkdir: |fuse|cannot |Cannot connect to the Docker daemon|"
    r"failed to connect to the docker API|(Got )?permission denied while trying to connect to the [dD]ocker|"
    r"newuidmap|sh: |open \S*/docker-import-)"
)
"""Start of a line that a container runtime writes, or Slurm about one."""

SLURM_LINE = re.compile(r"^(slurmstepd(-\S+)?|srun): ")
"""Start of a line that Slurm writes about a step; older versions put no node's name into it."""


@dataclass(frozen=True)
class StartFailure:
    """One kind of failure to start a container."""

    kind: str
    pattern: str
    """Regular expression for a runtime's line; case does not matter."""
    restart: bool
    """True if another attempt can succeed."""
    avoid_host: bool
    """True if that attempt should use another node."""
    advice: str
    """How to fix it; ``{space}`` and ``{credentials}`` stand for what depends on the runtime."""


SPACE_ADVICE = {
    "pyxis": (
        "the administrator can choose other folders in enroot.conf (ENROOT_CACHE_PATH, ENROOT_DATA_PATH, "
        "ENROOT_TEMP_PATH) and in plugstack.conf (runtime_path); pyxis does not pass your own variables to enroot"
    ),
    "enroot": "choose other folders with ENROOT_CACHE_PATH, ENROOT_DATA_PATH and ENROOT_TEMP_PATH",
    "apptainer": (
        "choose other folders with APPTAINER_CACHEDIR and APPTAINER_TMPDIR, or free some space: apptainer cache clean"
    ),
    "singularity": (
        "choose other folders with SINGULARITY_CACHEDIR and SINGULARITY_TMPDIR, or free some space: "
        "singularity cache clean"
    ),
    "docker": "free some space: docker image prune",
    "podman": (
        "choose other folders with graphroot in ~/.config/containers/storage.conf and with TMPDIR, "
        "or free some space: podman image prune"
    ),
    "charliecloud": "choose another folder with CH_IMAGE_STORAGE, or free some space: ch-image delete",
}
"""How to give each runtime more space."""
DEFAULT_SPACE_ADVICE = "choose another folder with TMPDIR"

FAILURES = (
    StartFailure(
        "no space for the image",
        r"no space left on device|disk quota exceeded|not enough space|write error: .*space",
        restart=True,
        avoid_host=True,
        advice=(
            "the runtime's cache or temporary folder is full: {space}. "
            "Or convert the image once to a file that all nodes share: amlaunch image import"
        ),
    ),
    StartFailure(
        "no daemon",
        r"cannot connect to the docker daemon|failed to connect to the docker api|"
        r"permission denied while trying to connect|is the docker daemon running|podman socket",
        restart=True,
        avoid_host=True,
        advice="docker is not running on that node, or you may not use it; choose another runtime (container.runtime)",
    ),
    StartFailure(
        "registry unreachable",
        r"could not resolve|no such host|connection (refused|timed out|reset)|i/o timeout|tls handshake|"
        r"network is unreachable|server misbehaving|toomanyrequests|too many requests|\b429\b|\b50[0234]\b|"
        r"operation timed out|ssl connection timeout|curl: \((5|6|7|16|18|28|35|52|55|56|92)\)|"
        r"(status|error|code|http)\S*:? 5\d\d\b",
        restart=True,
        avoid_host=False,
        advice=(
            "nodes often have no internet access; convert the image to a file that all nodes share: "
            "amlaunch image import (jobs look for it in the profile's image_folder)"
        ),
    ),
    StartFailure(
        "no credentials for the registry",
        r"\b401\b|unauthorized|authentication required|pull access denied|access to the resource is denied|"
        r"\b403\b|forbidden|no basic auth",
        restart=False,
        avoid_host=False,
        advice="to log in, {credentials}",
    ),
    StartFailure(
        "damaged image",
        r"filesystem corruption|file system corruption|failed to read/uncompress|valid squashfs superblock|"
        r"read on filesystem failed|uncompress failed|invalid image format",
        restart=False,
        avoid_host=False,
        advice="the image file is damaged or incomplete; make it again with amlaunch image import",
    ),
    StartFailure(
        "no such image",
        r"manifest unknown|manifest for .* not found|name unknown|\b404\b|no such image|image not known|"
        r"unable to find image|not find .*image|can't stat|could not open image|not a valid image|"
        r"no such file or directory: \S+\.sqsh|\.sqsh\S* no such file",
        restart=False,
        avoid_host=False,
        advice="check the name and the tag (container.image); try the image alone with amlaunch image check IMAGE",
    ),
    StartFailure(
        "no folder for the image",
        r"mkdir: cannot create directory",
        restart=True,
        avoid_host=True,
        advice="the runtime cannot create one of its folders on that node: {space}",
    ),
    StartFailure(
        "driver too old",
        r"unsatisfied condition: cuda|requirement error|driver version is insufficient|"
        r"forward compatibility was attempted|driver/library version mismatch",
        restart=False,
        avoid_host=True,
        advice=(
            "the node's NVIDIA driver is too old for the image's CUDA; use an image with an older CUDA, "
            "or set entrypoint: true if the image has NVIDIA's compatibility libraries"
        ),
    ),
    StartFailure(
        "no GPUs in the container",
        r"could not select device driver|unresolvable cdi|unresolved cdi|nvidia-container-cli|nvidia\.com/gpu|"
        r"libnvidia-ml|no nvidia driver",
        restart=False,
        avoid_host=True,
        advice=(
            "the node's runtime has no NVIDIA support; install the NVIDIA container toolkit, and for podman run "
            "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        ),
    ),
    StartFailure(
        "wrong architecture",
        r"exec format error|does not match the (detected|specified|expected)|image platform|no matching manifest for|"
        r"no image found in (manifest|image) (list|index)",
        restart=False,
        avoid_host=False,
        advice="the image is for another processor; use an image for the nodes' architecture",
    ),
    StartFailure(
        "mount failed",
        r"bind source path does not exist|can't bind|statfs .*no such file|mount source .* doesn't exist|"
        r"no such mount|failed to mount|error mounting|couldn't mount|mount point .*does(n't| not) exist|"
        r"destination .* doesn't exist|can't mkdir|no such file or directory.*mount|mount.*no such file or directory",
        restart=False,
        avoid_host=False,
        advice=(
            "a mount from container.mounts or the profile failed; "
            "make sure that the source exists on the node, and the target in an image that cannot be written"
        ),
    ),
    StartFailure(
        "no Python in the image",
        r"python3?\"?: (executable file not found|no such file|not found|command not found)|"
        r"execve\(2\): python|exec: python",
        restart=False,
        avoid_host=False,
        advice="use an image with python3 in its PATH",
    ),
    StartFailure(
        "no user namespaces",
        r"newuidmap|newgidmap|user namespace|subuid|subgid|cannot clone|unshare.*(not permitted|failed)|"
        r"operation not permitted.*namespace",
        restart=False,
        avoid_host=True,
        advice=(
            "the node does not let ordinary users start this runtime's containers (user namespaces, /etc/subuid); "
            "choose another runtime (container.runtime)"
        ),
    ),
    StartFailure(
        "image import failed",
        r"failed to import|initializing source|could not process json",
        restart=True,
        avoid_host=False,
        advice=(
            "the registry, or a proxy before it, sent something other than the image; "
            "make a file that all nodes share with amlaunch image import"
        ),
    ),
    StartFailure(
        "wrong archive layout",
        r"docker-import-\d+\S*: no such file",
        restart=False,
        avoid_host=False,
        advice=(
            "this archive is an OCI layout, but docker loads only archives from docker save; "
            "convert it with skopeo copy oci-archive:FILE docker-archive:NEW"
        ),
    ),
    StartFailure(
        "no runtime",
        r"executable file not found|command not found|execve.*no such file|no such file or directory",
        restart=False,
        avoid_host=True,
        advice="the program is not on that node; choose another runtime (container.runtime, or the profile's)",
    ),
    StartFailure(
        "container ended at its start",
        r"pyxis: container exited too soon",
        restart=True,
        avoid_host=True,
        advice=(
            "a hook of enroot on that node, or the image's entrypoint (entrypoint: true), ended it; "
            "the lines after this one in the log name the cause"
        ),
    ),
)
"""Kinds of failures, in the order of the search."""
FAILURES_BY_KIND = {failure.kind: failure for failure in FAILURES}
UNKNOWN_FAILURE = StartFailure(
    "container failed to start", "", restart=True, avoid_host=False, advice="see the last lines of the log"
)


def has_own_output(text: str) -> bool:
    """Return True if a log has a line that neither the runtime nor Slurm wrote: the command in the container began."""
    lines = (line.strip() for line in text.splitlines())
    return any(line and not RUNTIME_LINE.match(line) and not SLURM_LINE.match(line) for line in lines)


def failure_of(text: str) -> tuple[StartFailure, str] | None:
    """Return the failure that a runtime reports in ``text``, and its line; None if no runtime reports one."""
    lines = [line.strip() for line in text.splitlines() if RUNTIME_LINE.match(line.strip())]
    for failure in FAILURES:
        for line in lines:
            if re.search(failure.pattern, line, re.IGNORECASE):
                return failure, line
    return None


def advice(failure: StartFailure, runtime: str, image: str = "") -> str:
    """Return how to fix a failure with a runtime, and with the registry of an image if it has one."""
    replacements = {
        "credentials": credentials.login_advice(runtime, _registry_of(image), os.environ),
        "space": SPACE_ADVICE.get(runtime, DEFAULT_SPACE_ADVICE),
    }
    return re.sub(r"\{(\w+)\}", lambda match: replacements[match[1]], failure.advice)


def _registry_of(image: str) -> str:
    with suppress(BadReference):
        return parse(image).registry or "REGISTRY"
    return "REGISTRY"
