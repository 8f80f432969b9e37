"""Docker: a client that talks to a daemon of root's, which starts the container.

https://docs.docker.com/reference/cli/docker/container/run. The container is no child of ours and would outlive us:
it lives as long as its standard input, which the client holds open (amlaunch.recipes.python_process).
GPUs, shared memory and limits as https://docs.nvidia.com/deeplearning/frameworks/user-guide recommends.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from amlaunch.containers.images.reference import Reference, for_docker
from amlaunch.containers.runtimes.environment import carried, with_env
from amlaunch.containers.runtimes.launch import CannotLaunch, Image, Launch, check_mounts

KINDS = ("registry", "archive")
LIMITS = ("--ulimit", "memlock=-1", "--ulimit", "stack=67108864")
GPUS_OF_TASK = 'CUDA_VISIBLE_DEVICES=${SLURM_STEP_GPUS:-${CUDA_VISIBLE_DEVICES-}} exec "$@"'
"""The daemon sees all of the node's GPUs, not those of the job alone, and so their numbers must be the node's."""


def launch(image: Image, command: Sequence[str]) -> Launch:
    """Raises CannotLaunch."""
    if image.of.kind not in KINDS:
        raise CannotLaunch(f"docker starts images of a registry and docker archives (.tar), not {image.of.name}")
    argv = ["docker", "run", *common(image, "docker"), "--init", *LIMITS, "--user", f"{os.getuid()}:{os.getgid()}"]
    for group in sorted(set(os.getgroups()) - {os.getgid()}):
        argv += ["--group-add", str(group)]
    argv += ["--gpus", "all"] if image.gpus else []
    argv += [*image.options, tag_of(image.of), *with_env(image.env, command)]
    if image.gpus and image.on_slurm:
        argv = ["sh", "-c", GPUS_OF_TASK, "sh", *argv]
    return Launch(tuple(argv), carried(image.env), prepare=prepare("docker", image.of), stdin=True)


def common(image: Image, program: str) -> list[str]:
    """What docker and podman have in common: nothing is left behind, network and memory are the host's, values of variables are not in sight.

    Raises CannotLaunch for a path that cannot stand in the comma-separated values of ``--mount``.
    """
    check_mounts(image, ',"', program)
    argv = ["--rm", "--interactive", "--network=host", "--ipc=host"]
    for mount in image.mounts:
        argv += [
            "--mount",
            f"type=bind,source={mount.source},target={mount.target}{',readonly' if mount.read_only else ''}",
        ]
    for name in sorted({*carried(image.env), *image.passed}):
        argv += ["--env", name]
    argv += ["--workdir", image.workdir] if image.workdir else []
    return argv if image.entrypoint else [*argv, "--entrypoint", ""]


def tag_of(reference: Reference) -> str:
    """The name to start it by: of an archive the one that it is loaded under."""
    return f"localhost/amlaunch:{archive_tag(reference)}" if reference.kind == "archive" else for_docker(reference)


def archive_tag(reference: Reference) -> str:
    """A tag of an archive as it is on disk now: another file of that name is another image."""
    try:
        found = reference.file.stat()
        state = f"{reference.file}\0{found.st_size}\0{found.st_mtime_ns}"
    except OSError:
        state = str(reference.file)
    return hashlib.sha256(state.encode()).hexdigest()[:24]


def prepare(program: str, reference: Reference) -> tuple[tuple[str, ...], ...]:
    """Fetch or load it where the node does not have it."""
    tag = tag_of(reference)
    if reference.kind == "archive":
        script = (
            'set -eu; "$1" image inspect "$2" >/dev/null 2>&1 && exit 0; said=$("$1" load --input "$3"); '
            'id=$(printf "%s\\n" "$said" | sed -n "s/^Loaded image\\( ID\\|(s)\\)\\?: *//p" | tail -n 1); "$1" tag "$id" "$2"'
        )
        return (("sh", "-c", script, "sh", program, tag, str(reference.file)),)
    return (("sh", "-c", '"$1" image inspect "$2" >/dev/null 2>&1 || exec "$1" pull --quiet "$2"', "sh", program, tag),)
