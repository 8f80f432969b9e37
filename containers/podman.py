"""Podman, of an ordinary user or of root: no daemon, yet a monitor of its own, which outlives whoever started it.

podman-run(1), podman 4.3 and newer; the NVIDIA devices by https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/cdi-support.html.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from containers.docker import LIMITS, common, handed, prepare, tag_of
from containers.image import CannotLaunch, Image, Launch, root_of, settings_of

KINDS = ("registry", "archive", "folder")


def launch(image: Image, command: Sequence[str]) -> Launch:
    """Raises CannotLaunch."""
    if image.of.kind not in KINDS:
        raise CannotLaunch(f"podman starts images of a registry, archives (.tar) and folders (OCI bundles), not {image.of.name}")
    argv = ["podman", "run", *common(image), *user(), "--pull=never", "--security-opt", "label=disable"]
    argv += ["--device", "nvidia.com/gpu=all"] if image.gpus else []
    argv += list(image.options)
    if image.of.kind == "folder":
        for name, value in settings_of(image.of.file).items():
            argv += ["--env", f"{name}={value}"] if name not in {*image.env, *image.passed} else []
        # It belongs to whoever unpacked it: what has to be made anew in it is made in memory.
        argv += ["--passwd=false", "--tmpfs", "/tmp:rw,mode=1777"]
        return Launch((*argv, "--rootfs", f"{root_of(image.of.file)}:O", *command), handed(image), stdin=True)
    return Launch((*argv, tag_of(image.of), *command), handed(image), prepare=prepare("podman", image.of), stdin=True)


def user() -> list[str]:
    """An ordinary user stays who they are, with the limits that they have; root needs nothing said, and may have any."""
    return ["--userns=keep-id", "--ulimit", "host"] if os.getuid() else [*LIMITS]
