"""Charliecloud: each task runs ``ch-run`` as an unprivileged process of the user.

ch-run(1), https://hpc.github.io/charliecloud/ch-run.html. Devices, network, shared memory and /tmp are the host's. It
adds no GPU libraries to an image; ``ch-fromhost --nvidia`` does that once.
"""

from __future__ import annotations

from collections.abc import Sequence

from amlaunch.containers.runtimes.environment import NAME_PREFIX
from amlaunch.containers.runtimes.launch import (
    CannotLaunch,
    ContainerSpec,
    Launch,
    check_mounts,
    image_variables,
    root_of,
)

KINDS = ("registry", "folder", "sqsh")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FETCH = 'ch-image list "$1" >/dev/null 2>&1 || exec ch-image pull "$1"'


def launch(spec: ContainerSpec, command: Sequence[str]) -> Launch:
    """Return how ``ch-run`` starts the command. Raises CannotLaunch."""
    image = spec.image
    if image.kind not in KINDS:
        raise CannotLaunch(f"charliecloud starts folders, .sqsh files and images of ch-image, not {image.name}")
    check_mounts(spec, ":", "charliecloud")
    if any(mount.read_only for mount in spec.mounts):
        raise CannotLaunch(
            "charliecloud has no read-only mounts; remove :ro (container.mounts), or choose another runtime"
        )
    source = str(root_of(image.file)) if image.kind == "folder" else image.name

    # ch-run passes on all that it inherits. The glob (fnmatch(3) with FNM_EXTMATCH) first unsets every other name.
    # TMPDIR is unset because ch-run would mount it over /tmp and hide what is mounted below /tmp.
    argv = [
        "env",
        "-u",
        "TMPDIR",
        "ch-run",
        f"--unset-env=!({'|'.join([f'{NAME_PREFIX}*', *spec.passed])})",
        f"--set-env=PATH={PATH}",
    ]
    has_environment = image.kind == "folder" and (root_of(image.file) / "ch" / "environment").is_file()
    if image.kind == "registry" or has_environment:
        # Sets the variables of the image itself.
        argv.append("--set-env")

    # The image's own variables override what ch-run inherits, so ours come last, each from a prefixed name.
    image_env = {name: value for name, value in image_variables(image).items() if name not in spec.passed}
    env = {**image_env, **spec.env}
    argv += [f"--set-env={name}=${NAME_PREFIX}{name}" for name in sorted(env)]
    argv += [f"--unset-env={NAME_PREFIX}*"] if env else []
    argv += [f"--bind={mount.source}:{mount.target}" for mount in spec.mounts]
    argv += [f"--cd={spec.workdir}"] if spec.workdir else []
    argv += [*spec.options, source, "--", *command]

    return Launch(
        tuple(argv),
        {f"{NAME_PREFIX}{name}": value for name, value in env.items()},
        prepare=(("sh", "-c", FETCH, "sh", source),) if image.kind == "registry" else (),
        # ch-run itself serves the files of a .sqsh (FUSE), and the command is its child.
        ignores_signals=image.kind == "sqsh",
    )
