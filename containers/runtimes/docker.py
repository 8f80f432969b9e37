"""Docker: a client asks root's daemon to start the container.

https://docs.docker.com/reference/cli/docker/container/run. The container is no child of ours and would outlive us, so
it lives only as long as its standard input, which the client holds open (amlaunch.recipes.python_process). GPUs, shared
memory and limits follow https://docs.nvidia.com/deeplearning/frameworks/user-guide.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from amlaunch.containers.images.reference import Reference
from amlaunch.containers.runtimes.environment import prefixed, with_restored_names
from amlaunch.containers.runtimes.launch import CannotLaunch, ContainerSpec, Launch, check_mounts

KINDS = ("registry", "archive")
LIMITS = ("--ulimit", "memlock=-1", "--ulimit", "stack=67108864")
USE_STEP_GPUS = 'CUDA_VISIBLE_DEVICES=${SLURM_STEP_GPUS:-${CUDA_VISIBLE_DEVICES-}} exec "$@"'
"""Shell that sets the node's numbers of the step's GPUs: the daemon sees all GPUs of the node, not just the job's."""


def launch(spec: ContainerSpec, command: Sequence[str]) -> Launch:
    """Return how ``docker run`` starts the command. Raises CannotLaunch."""
    if spec.image.kind not in KINDS:
        raise CannotLaunch(f"docker starts images of a registry and docker archives (.tar), not {spec.image.name}")
    argv = ["docker", "run", *common_options(spec, "docker"), "--init", *LIMITS]
    argv += ["--user", f"{os.getuid()}:{os.getgid()}"]
    for group in sorted(set(os.getgroups()) - {os.getgid()}):
        argv += ["--group-add", str(group)]
    argv += ["--gpus", "all"] if spec.gpus else []
    argv += [*spec.options, local_tag(spec.image), *with_restored_names(spec.env, command)]
    if spec.gpus and spec.on_slurm:
        argv = ["sh", "-c", USE_STEP_GPUS, "sh", *argv]
    return Launch(tuple(argv), prefixed(spec.env), prepare=prepare("docker", spec.image), stdin=True)


def common_options(spec: ContainerSpec, program: str) -> list[str]:
    """Return the options that docker and podman share: remove the container at its end, use the host's network.

    Variables are passed by name, so that no value is visible in the argv. Raises CannotLaunch for a path that the
    comma-separated values of ``--mount`` cannot contain.
    """
    check_mounts(spec, ',"', program)
    argv = ["--rm", "--interactive", "--network=host", "--ipc=host"]
    for mount in spec.mounts:
        read_only = ",readonly" if mount.read_only else ""
        argv += ["--mount", f"type=bind,source={mount.source},target={mount.target}{read_only}"]
    for name in sorted({*prefixed(spec.env), *spec.passed}):
        argv += ["--env", name]
    argv += ["--workdir", spec.workdir] if spec.workdir else []
    return argv if spec.entrypoint else [*argv, "--entrypoint", ""]


def local_tag(reference: Reference) -> str:
    """Return the name to start an image by; for an archive the tag that it is loaded under."""
    return f"localhost/amlaunch:{_archive_tag(reference)}" if reference.kind == "archive" else reference.name


def _archive_tag(reference: Reference) -> str:
    """Return a tag for an archive as it is on disk now: when the file changes, so does the tag."""
    try:
        status = reference.file.stat()
        state = f"{reference.file}\0{status.st_size}\0{status.st_mtime_ns}"
    except OSError:
        state = str(reference.file)
    return hashlib.sha256(state.encode()).hexdigest()[:24]


def prepare(program: str, reference: Reference) -> tuple[tuple[str, ...], ...]:
    """Return the command that pulls or loads an image unless the node has it."""
    tag = local_tag(reference)
    if reference.kind == "archive":
        script = (
            'set -eu; "$1" image inspect "$2" >/dev/null 2>&1 && exit 0; output=$("$1" load --input "$3"); '
            'id=$(printf "%s\\n" "$output" | sed -n "s/^Loaded image\\( ID\\|(s)\\)\\?: *//p" | tail -n 1); '
            '"$1" tag "$id" "$2"'
        )
        return (("sh", "-c", script, "sh", program, tag, str(reference.file)),)
    return (("sh", "-c", '"$1" image inspect "$2" >/dev/null 2>&1 || exec "$1" pull --quiet "$2"', "sh", program, tag),)
