"""Why a container did not start, from the runtime's own words: what to do about it, and whether another try, or another node, can help.

Only lines that a runtime wrote are looked at: a trainer that says "not found" is another matter.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass

from amlaunch.containers.images import credentials
from amlaunch.containers.images.reference import BadReference, parse

SPOKEN = re.compile(
    r"^(slurmstepd: error: (pyxis|container|.*runc)|pyxis: |srun: error: .*(pyxis|execve)|docker: |Error: |Error response from daemon|FATAL: |ERROR: |ch-run\[|ch-image|\[ERROR\]|curl: |"
    r"enroot|OCI runtime|runc|crun: |time=\S+ level=(error|fatal)|container_linux|standard_init|exec \S+: |unable to upgrade|nvidia-container-cli|Trying to pull|Emulate Docker|Unable to find image|"
    r"slurmstepd: error: execve|mksquashfs|unsquashfs|fuse|cannot |Cannot connect to the Docker daemon|failed to connect to the docker API|(Got )?permission denied while trying to connect to the [dD]ocker|newuidmap|sh: |open \S*/docker-import-)"
)
"""How a line begins that a container runtime writes, or Slurm of one."""


@dataclass(frozen=True)
class Failure:
    """One kind of failure of a container."""

    kind: str
    pattern: str
    """A regular expression, whatever the case."""
    again: bool
    """Whether another try can end otherwise."""
    elsewhere: bool
    """Whether it should be on another node."""
    advice: str


SPACE = {
    "pyxis": "the administrator's enroot.conf (ENROOT_CACHE_PATH, ENROOT_DATA_PATH, ENROOT_TEMP_PATH) and plugstack.conf (runtime_path) name others, for pyxis hands none of your own variables on to enroot",
    "enroot": "ENROOT_CACHE_PATH, ENROOT_DATA_PATH and ENROOT_TEMP_PATH name others",
    "apptainer": "APPTAINER_CACHEDIR and APPTAINER_TMPDIR name others, apptainer cache clean makes room",
    "singularity": "SINGULARITY_CACHEDIR and SINGULARITY_TMPDIR name others, singularity cache clean makes room",
    "docker": "docker image prune makes room",
    "podman": "graphroot in ~/.config/containers/storage.conf and TMPDIR name others, podman image prune makes room",
    "charliecloud": "CH_IMAGE_STORAGE names another, ch-image delete makes room",
}
"""Where each runtime's folders are named."""

FAILURES = (
    Failure("no space for the image", r"no space left on device|disk quota exceeded|not enough space|write error: .*space", True, True,
            "its cache or temporary folder is full; {space}; amlaunch image import converts once, to a file that all nodes share"),
    Failure("no daemon", r"cannot connect to the docker daemon|failed to connect to the docker api|permission denied while trying to connect|is the docker daemon running|podman socket", True, True,
            "docker does not run on that node, or is not for you; another runtime may be"),
    Failure("registry out of reach", r"could not resolve|no such host|connection (refused|timed out|reset)|i/o timeout|tls handshake|network is unreachable|server misbehaving|toomanyrequests|too many requests|\b429\b|\b50[0234]\b|"
            r"operation timed out|ssl connection timeout|curl: \((5|6|7|16|18|28|35|52|55|56|92)\)|(status|error|code|http)\S*:? 5\d\d\b", True, False,
            "nodes often have no way out: amlaunch image import makes a file that they share (images in the profile names it)"),
    Failure("no credentials for the registry", r"\b401\b|unauthorized|authentication required|pull access denied|access to the resource is denied|\b403\b|forbidden|no basic auth", False, False,
            "give credentials: {credentials}"),
    Failure("no such image", r"manifest unknown|manifest for .* not found|name unknown|\b404\b|no such image|image not known|unable to find image|not find .*image|can't stat|could not open image|not a valid image|"
            r"invalid image format|no such file or directory: \S+\.sqsh|\.sqsh\S* no such file", False, False,
            "check the name (container.image), and its tag; amlaunch image check IMAGE starts it alone"),
    Failure("driver too old", r"unsatisfied condition: cuda|requirement error|driver version is insufficient|forward compatibility was attempted|driver/library version mismatch", False, True,
            "the node's NVIDIA driver is older than the image's CUDA wants; an image with an older CUDA, or entrypoint: true with NVIDIA's compatibility libraries, starts there"),
    Failure("no GPUs in the container", r"could not select device driver|unresolvable cdi|unresolved cdi|nvidia-container-cli|nvidia\.com/gpu|libnvidia-ml|no nvidia driver", False, True,
            "the node's runtime has no support of NVIDIA: the container toolkit, or for podman nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"),
    Failure("wrong architecture", r"exec format error|does not match the (detected|specified|expected)|image platform|no matching manifest for|no image found in (manifest|image) (list|index)", False, False,
            "the image is made for another kind of processor; ask for that of the nodes"),
    Failure("mount", r"bind source path does not exist|can't bind|statfs .*no such file|mount source .* doesn't exist|no such mount|failed to mount|error mounting|couldn't mount|mount point .*does(n't| not) exist|destination .* doesn't exist|"
            r"can't mkdir|no such file or directory.*mount|mount.*no such file or directory", False, False,
            "a mount (container.mounts, or of the profile) cannot be made on that node: both sides must exist where the image cannot be written"),
    Failure("Python is not in the image", r"python3?\"?: (executable file not found|no such file|not found|command not found)|execve\(2\): python|exec: python", False, False,
            "amlaunch starts python3 of the image; it must be in its PATH"),
    Failure("no user namespaces", r"newuidmap|newgidmap|user namespace|subuid|subgid|cannot clone|unshare.*(not permitted|failed)|operation not permitted.*namespace", False, True,
            "the node does not let users have containers of this runtime (user namespaces, /etc/subuid); another runtime may"),
    Failure("the image did not come", r"failed to import|initializing source|could not process json", True, False,
            "the registry, or what lies between, gave something else than the image; amlaunch image import makes a file that all nodes share"),
    Failure("an archive of the other kind", r"docker-import-\d+\S*: no such file", False, False,
            "that docker loads what docker save wrote, and this is an OCI layout: skopeo copy oci-archive:FILE docker-archive:NEW makes one of it"),
    Failure("no runtime", r"executable file not found|command not found|execve.*no such file|no such file or directory", False, True,
            "the program is not on that node; container.runtime, or the profile's container.runtime, names another one"),
)  # fmt: skip
"""Looked for in this order."""
UNKNOWN = Failure("container", "", True, False, "the last lines of the log say what its runtime met")


def failure_of(text: str) -> tuple[Failure, str] | None:
    """The failure that a runtime speaks of in ``text``, and its line; None where no runtime speaks."""
    lines = [line.strip() for line in text.splitlines() if SPOKEN.match(line.strip())]
    for failure in FAILURES:
        for line in lines:
            if re.search(failure.pattern, line, re.IGNORECASE):
                return failure, line
    return None


def advice(failure: Failure, runtime: str, image: str = "") -> str:
    """What to do, for a runtime, and for the registry of an image where it is named."""
    words = {
        "credentials": credentials.where(runtime, _registry(image), os.environ),
        "space": SPACE.get(runtime, "TMPDIR names another"),
    }
    return re.sub(r"\{(\w+)\}", lambda found: words[found[1]], failure.advice)


def _registry(image: str) -> str:
    with suppress(BadReference):
        return parse(image).registry or "REGISTRY"
    return "REGISTRY"
