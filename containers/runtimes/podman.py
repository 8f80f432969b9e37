"""Podman, as an ordinary user or as root: it has no daemon, but its monitor process outlives whoever started it.

podman-run(1), podman 4.3 and newer; NVIDIA's devices follow
https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/cdi-support.html.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from amlaunch.containers.runtimes.docker import LIMITS, common_options, local_tag, prepare
from amlaunch.containers.runtimes.environment import prefixed, with_restored_names
from amlaunch.containers.runtimes.launch import CannotLaunch, ContainerSpec, Launch, bundle_variables, root_of

KINDS = ("registry", "archive", "folder")
RUN_WITH_STEP_GPUS = (
    'devices=; visible=; n=0; for gpu in $(echo "${SLURM_STEP_GPUS:-all}" | tr , " "); do '
    'devices="$devices --device nvidia.com/gpu=$gpu"; '
    'visible="$visible${visible:+,}$n"; n=$((n + 1)); done; '
    '[ -z "${SLURM_STEP_GPUS-}" ] || export CUDA_VISIBLE_DEVICES="$visible"; exec podman run $devices "$@"'
)
"""Shell that adds the step's GPUs by their numbers on the node; the container counts them from 0."""


def launch(spec: ContainerSpec, command: Sequence[str]) -> Launch:
    """Return how ``podman run`` starts the command. Raises CannotLaunch."""
    image = spec.image
    if image.kind not in KINDS:
        raise CannotLaunch(
            f"podman starts images of a registry, archives (.tar) and folders (OCI bundles), not {image.name}"
        )
    image_env = bundle_variables(image.file) if image.kind == "folder" else {}
    image_env = {name: value for name, value in image_env.items() if name not in spec.passed}
    spec = replace(spec, env={**image_env, **spec.env})

    argv = ["podman", "run", *common_options(spec, "podman"), *_user_options()]
    argv += ["--pull=never", "--security-opt", "label=disable"]
    argv += ["--device", "nvidia.com/gpu=all"] if spec.gpus and not spec.on_slurm else []
    argv += list(spec.options)
    command, env = with_restored_names(spec.env, command), prefixed(spec.env)
    if image.kind == "folder":
        # The folder belongs to whoever unpacked it, so files that podman must add are made in memory.
        argv += ["--passwd=false", "--tmpfs", "/tmp:rw,mode=1777"]
        argv += ["--rootfs", f"{root_of(image.file)}:O", *command]
        return Launch(_with_step_gpus(spec, argv), env, stdin=True)
    argv += [local_tag(image), *command]
    return Launch(_with_step_gpus(spec, argv), env, prepare=prepare("podman", image), stdin=True)


def _with_step_gpus(spec: ContainerSpec, argv: list[str]) -> tuple[str, ...]:
    """Restrict a container in a job to the job's GPUs: rootless podman leaves the job's control group and sees all."""
    return ("sh", "-c", RUN_WITH_STEP_GPUS, "sh", *argv[2:]) if spec.gpus and spec.on_slurm else tuple(argv)


def _user_options() -> list[str]:
    """Return the options that keep an ordinary user's ID, groups and limits; root gets Docker's limits.

    crun keeps the groups (podman-run(1), --group-add keep-groups); runc cannot, and ignores the annotation.
    """
    if not os.getuid():
        return [*LIMITS]
    return ["--userns=keep-id", "--annotation", "run.oci.keep_original_groups=1", "--ulimit", "host"]
