"""Podman, of an ordinary user or of root: no daemon, yet a monitor of its own, which outlives whoever started it.

podman-run(1), podman 4.3 and newer; the NVIDIA devices by https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/cdi-support.html.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from amlaunch.containers.runtimes.docker import LIMITS, common, prepare, tag_of
from amlaunch.containers.runtimes.environment import carried, with_env
from amlaunch.containers.runtimes.launch import CannotLaunch, Image, Launch, root_of, settings_of

KINDS = ("registry", "archive", "folder")
GPUS_OF_STEP = (
    'devices=; visible=; n=0; for gpu in $(echo "${SLURM_STEP_GPUS:-all}" | tr , " "); do devices="$devices --device nvidia.com/gpu=$gpu"; '
    'visible="$visible${visible:+,}$n"; n=$((n + 1)); done; [ -z "${SLURM_STEP_GPUS-}" ] || export CUDA_VISIBLE_DEVICES="$visible"; exec podman run $devices "$@"'
)
"""The GPUs of the step by their numbers on the node, which the container counts from 0."""


def launch(image: Image, command: Sequence[str]) -> Launch:
    """Raises CannotLaunch."""
    if image.of.kind not in KINDS:
        raise CannotLaunch(
            f"podman starts images of a registry, archives (.tar) and folders (OCI bundles), not {image.of.name}"
        )
    own = settings_of(image.of.file) if image.of.kind == "folder" else {}
    image = replace(
        image, env={**{name: value for name, value in own.items() if name not in image.passed}, **image.env}
    )
    argv = ["podman", "run", *common(image, "podman"), *user(), "--pull=never", "--security-opt", "label=disable"]
    argv += ["--device", "nvidia.com/gpu=all"] if image.gpus and not image.on_slurm else []
    argv += list(image.options)
    command, env = with_env(image.env, command), carried(image.env)
    if image.of.kind == "folder":
        # It belongs to whoever unpacked it: what has to be made anew in it is made in memory.
        argv += ["--passwd=false", "--tmpfs", "/tmp:rw,mode=1777"]
        return Launch(_of_job(image, [*argv, "--rootfs", f"{root_of(image.of.file)}:O", *command]), env, stdin=True)
    return Launch(
        _of_job(image, [*argv, tag_of(image.of), *command]), env, prepare=prepare("podman", image.of), stdin=True
    )


def _of_job(image: Image, argv: list[str]) -> tuple[str, ...]:
    """With the job's GPUs alone: what an ordinary user's podman starts is outside of the job's control group, and could have all of the node's."""
    return ("sh", "-c", GPUS_OF_STEP, "sh", *argv[2:]) if image.gpus and image.on_slurm else tuple(argv)


def user() -> list[str]:
    """An ordinary user stays who they are, with their groups and the limits that they have; root needs nothing said, and may have any.

    The groups are kept by crun (podman-run(1), --group-add keep-groups), and runc, which cannot, does not mind being told so.
    """
    return (
        ["--userns=keep-id", "--annotation", "run.oci.keep_original_groups=1", "--ulimit", "host"]
        if os.getuid()
        else [*LIMITS]
    )
