"""Apptainer, formerly Singularity: each task runs ``exec`` as an ordinary user.

https://apptainer.org/docs/user/main: cli/apptainer_exec, environment_and_metadata, gpu.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from amlaunch.containers.images.reference import Reference, for_apptainer
from amlaunch.containers.runtimes.environment import prefixed, with_restored_names
from amlaunch.containers.runtimes.launch import (
    CannotLaunch,
    ContainerSpec,
    Launch,
    check_mounts,
    image_variables,
    root_of,
)

KINDS = ("registry", "sif", "sqsh", "archive", "folder")
PASS_ON = (
    'prefix=$1 names=$2; shift 2; for name in $names; do eval "[ -z \\"\\${$name+x}\\" ] || '
    'export $prefix$name=\\"\\$$name\\""; done; exec "$@"'
)
"""Shell that exports each task's own variables under apptainer's names for them; unset ones stay unset."""


def launch(spec: ContainerSpec, command: Sequence[str], program: str = "apptainer") -> Launch:
    """Return a launch whose process passes signals on and ends with the command's exit code. Raises CannotLaunch."""
    if spec.image.kind not in KINDS:
        raise CannotLaunch(f"{program} cannot start {spec.image.name}")
    check_mounts(spec, ":,", program)
    prefix = f"{program.upper()}ENV_"

    # With --cleanenv only the terminal's variables, proxies and prefixed names enter from the host.
    argv = ["sh", "-c", PASS_ON, "sh", prefix, " ".join(spec.passed), program, "run" if spec.entrypoint else "exec"]
    argv += ["--cleanenv", "--no-home", "--writable-tmpfs", *(["--nv"] if spec.gpus else [])]
    for mount in spec.mounts:
        argv += ["--bind", f"{mount.source}:{mount.target}:{'ro' if mount.read_only else 'rw'}"]
    argv += ["--pwd", spec.workdir] if spec.workdir else []
    argv += [*spec.options, _source(spec.image)]

    # apptainer does not read the variables that an image sets from a plain file system.
    image_env = {name: value for name, value in image_variables(spec.image).items() if name not in spec.passed}
    spec = replace(spec, env={**image_env, **spec.env})

    # APPTAINERENV_NAME overrides the image's variables. It goes into the environment, because others can read an argv.
    env = {f"{prefix}{name}": value for name, value in prefixed(spec.env).items()}
    return Launch(
        (*argv, *with_restored_names(spec.env, command)),
        # NO_EVAL: a $(…) in a value is not for a shell.
        {**env, f"{program.upper()}_NO_EVAL": "1"},
        prepare=_prepare(spec.image, program),
        # Some Slurms signal all processes of a step, squashfuse_ll included.
        ignores_signals=spec.on_slurm,
    )


def _source(reference: Reference) -> str:
    return str(root_of(reference.file)) if reference.kind == "folder" else for_apptainer(reference)


def _prepare(reference: Reference, program: str) -> tuple[tuple[str, ...], ...]:
    """Return the command that fetches and converts into apptainer's cache once per node, not once per task."""
    if reference.kind not in ("registry", "archive"):
        return ()
    return ((program, "exec", _source(reference), "true"),)


singularity = partial(launch, program="singularity")
