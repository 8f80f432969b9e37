"""Apptainer, and Singularity, which it was called before: ``exec`` by each task, as an ordinary user.

https://apptainer.org/docs/user/main: cli/apptainer_exec, environment_and_metadata, gpu.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from amlaunch.containers.images.reference import Reference, for_apptainer
from amlaunch.containers.runtimes.environment import carried, with_env
from amlaunch.containers.runtimes.launch import CannotLaunch, Image, Launch, check_mounts, own_settings, root_of

KINDS = ("registry", "sif", "sqsh", "archive", "folder")
HAND_ON = 'prefix=$1 names=$2; shift 2; for name in $names; do eval "[ -z \\"\\${$name+x}\\" ] || export $prefix$name=\\"\\$$name\\""; done; exec "$@"'
"""Variables that each task has of its own, under the names by which apptainer takes them inside; one that is not set stays so."""


def launch(image: Image, command: Sequence[str], program: str = "apptainer") -> Launch:
    """A process of the user's own, which passes signals on; exit codes are the command's. Raises CannotLaunch."""
    if image.of.kind not in KINDS:
        raise CannotLaunch(f"{program} cannot start {image.of.name}")
    check_mounts(image, ":,", program)
    prefix = f"{program.upper()}ENV_"
    # --cleanenv: of the host's environment nothing enters but terminal, proxies and what has the prefix
    argv = ["sh", "-c", HAND_ON, "sh", prefix, " ".join(image.passed), program, "run" if image.entrypoint else "exec"]
    argv += ["--cleanenv", "--no-home", "--writable-tmpfs", *(["--nv"] if image.gpus else [])]
    for mount in image.mounts:
        argv += ["--bind", f"{mount.source}:{mount.target}:{'ro' if mount.read_only else 'rw'}"]
    argv += ["--pwd", image.workdir] if image.workdir else []
    argv += [*image.options, _spelled(image.of)]
    # Of a plain file system it knows no variables that the image's makers set.
    own = {name: value for name, value in own_settings(image.of).items() if name not in image.passed}
    image = replace(image, env={**own, **image.env})
    # Over the image's own: APPTAINERENV_NAME. In the environment, where nobody reads it, not in the argv.
    env = {f"{prefix}{name}": value for name, value in carried(image.env).items()}
    # Values stand as they are: a $(…) in one is not for a shell. Some Slurms signal all processes of a step, squashfuse_ll with them.
    return Launch(
        (*argv, *with_env(image.env, command)),
        {**env, f"{program.upper()}_NO_EVAL": "1"},
        prepare=_prepare(image.of, program),
        deaf=image.on_slurm,
    )


def _spelled(reference: Reference) -> str:
    return str(root_of(reference.file)) if reference.kind == "folder" else for_apptainer(reference)


def _prepare(reference: Reference, program: str) -> tuple[tuple[str, ...], ...]:
    """Fetched and converted once a node, into the runtime's own cache; eight tasks at once would do it eight times."""
    if reference.kind not in ("registry", "archive"):
        return ()
    return ((program, "exec", _spelled(reference), "true"),)


singularity = partial(launch, program="singularity")
