"""pyxis, NVIDIA's plugin of Slurm: flags of srun, and the tasks start inside.

https://github.com/NVIDIA/pyxis/wiki/Usage and args.c there. The container is
unnamed: a named one outlives its job, and its requeued self would find what it
left. Home is not mounted and the user stays who they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from amlaunch.containers.images.reference import for_pyxis
from amlaunch.containers.runtimes.enroot import check_lines, of_hook
from amlaunch.containers.runtimes.environment import carried, with_env
from amlaunch.containers.runtimes.launch import CannotLaunch, Image, Launch, check_mounts

KINDS = ("registry", "sqsh")
"""What enroot behind it can start: a name in a registry, or a squashfs file."""


def launch(image: Image, command: Sequence[str]) -> Launch:
    """srun's flags; the command itself is searched inside. Raises CannotLaunch."""
    if image.of.kind not in KINDS:
        raise CannotLaunch(f"pyxis starts images of a registry and .sqsh files, not {image.of.name}")
    check_mounts(image, ":, \t", "pyxis")
    check_lines(image.env, "pyxis")
    flags = [
        f"--container-image={for_pyxis(image.of)}",
        *_mounts(image),
        "--no-container-mount-home",
        "--no-container-remap-root",
    ]
    flags += ["--container-writable"]  # programs write to /tmp and caches; unnamed, it is thrown away
    flags += [f"--container-workdir={image.workdir}"] if image.workdir else []
    flags += ["--container-entrypoint" if image.entrypoint else "--no-container-entrypoint"]
    handed = carried(image.env)
    flags += [f"--container-env={','.join(sorted(handed))}"] if handed else []
    # srun looks for a command with a path on the host (pyxis#104); a shell inside finds it in the image.
    return Launch(
        ("sh", "-c", 'exec "$@"', "sh", *with_env(image.env, command)),
        {**handed, **of_hook(image)},
        (*flags, *image.options),
    )


def _mounts(image: Image) -> list[str]:
    mounts = [f"{mount.source}:{mount.target}{':ro' if mount.read_only else ''}" for mount in image.mounts]
    return [f"--container-mounts={','.join(mounts)}"] if mounts else []
