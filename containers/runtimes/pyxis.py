"""pyxis, NVIDIA's Slurm plugin: srun gets flags, and tasks start inside the container.

https://github.com/NVIDIA/pyxis/wiki/Usage and args.c there. The container is unnamed, because a named one outlives its
job and a requeued job would find its remains. Home is not mounted, and the user keeps their ID.
"""

from __future__ import annotations

from collections.abc import Sequence

from amlaunch.containers.images.reference import for_pyxis
from amlaunch.containers.runtimes.enroot import check_single_line_values, nvidia_hook_variables
from amlaunch.containers.runtimes.environment import prefixed, with_restored_names
from amlaunch.containers.runtimes.launch import CannotLaunch, ContainerSpec, Launch, check_mounts

KINDS = ("registry", "sqsh")
"""What enroot, behind pyxis, can start."""


def launch(spec: ContainerSpec, command: Sequence[str]) -> Launch:
    """Return srun's flags and the command. Raises CannotLaunch."""
    if spec.image.kind not in KINDS:
        raise CannotLaunch(f"pyxis starts images of a registry and .sqsh files, not {spec.image.name}")
    check_mounts(spec, ":, \t", "pyxis")
    check_single_line_values(spec.env, "pyxis")

    flags = [f"--container-image={for_pyxis(spec.image)}", *_mount_flags(spec)]
    flags += ["--no-container-mount-home", "--no-container-remap-root"]
    # Programs write to /tmp and to caches; what they write is discarded with the unnamed container.
    flags += ["--container-writable"]
    flags += [f"--container-workdir={spec.workdir}"] if spec.workdir else []
    flags += ["--container-entrypoint" if spec.entrypoint else "--no-container-entrypoint"]
    env = prefixed(spec.env)
    flags += [f"--container-env={','.join(sorted(env))}"] if env else []

    # srun looks up a command with a path on the host (pyxis#104); a shell inside looks it up in the image.
    argv = ("sh", "-c", 'exec "$@"', "sh", *with_restored_names(spec.env, command))
    return Launch(
        argv,
        {**env, **nvidia_hook_variables(spec)},
        (*flags, *spec.options),
        # With use_squashfuse=1, which only the nodes know, a signal to the step ends the process that serves the files.
        ignores_signals=True,
    )


def _mount_flags(spec: ContainerSpec) -> list[str]:
    mounts = [f"{mount.source}:{mount.target}{':ro' if mount.read_only else ''}" for mount in spec.mounts]
    return [f"--container-mounts={','.join(mounts)}"] if mounts else []
