"""enroot without pyxis: each task runs ``enroot start`` on a container that each node unpacks once.

https://github.com/NVIDIA/enroot/tree/master/doc/cmd: import.md, create.md, start.md.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from amlaunch.containers.images.reference import Reference, for_enroot
from amlaunch.containers.runtimes.environment import prefixed, with_restored_names
from amlaunch.containers.runtimes.launch import CannotLaunch, ContainerSpec, Launch, check_mounts

KINDS = ("registry", "sqsh")

SCRIPTS = Path(__file__).with_name("enroot_scripts")
"""Shell scripts as files: enroot closes all other descriptors before it reads the one for ``--rc``, a pipe included."""
COMPLETE_MARKER = ".amlaunch-whole"
"""A file in a container that was unpacked completely."""


def nvidia_hook_variables(spec: ContainerSpec) -> dict[str, str]:
    """Return the variables that enroot's NVIDIA hook reads (conf/hooks/98-nvidia.sh); the recipe's own values win.

    Without them the image decides: one that asks for GPUs (NGC's do) does not start on a node without NVIDIA's tools,
    and one that does not ask sees no GPU.
    """
    if spec.gpus:
        variables = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    else:
        variables = {"NVIDIA_VISIBLE_DEVICES": "void"}
    return {name: spec.env.get(name, value) for name, value in variables.items()}


def check_single_line_values(env: Mapping[str, str], runtime: str) -> None:
    """Raise CannotLaunch for a value with a line break: enroot's file has one variable per line (runtime.sh)."""
    names = sorted(name for name, value in env.items() if "\n" in value)
    if names:
        raise CannotLaunch(
            f"{runtime} cannot set {', '.join(names)}: the value has a line break. "
            "Write it on one line, or in a file that the variable names"
        )


def launch(spec: ContainerSpec, command: Sequence[str]) -> Launch:
    """Return how ``enroot start`` starts the command. Raises CannotLaunch."""
    if spec.image.kind not in KINDS:
        raise CannotLaunch(f"enroot starts images of a registry and .sqsh files, not {spec.image.name}")
    check_mounts(spec, ": \t", "enroot")
    check_single_line_values(spec.env, "enroot")
    argv = []
    # The fields of fstab, separated by colons: bind, and make the target if the image lacks it (doc/image-format.md).
    for mount in spec.mounts:
        mode = "ro" if mount.read_only else "rw"
        argv += ["--mount", f"{mount.source}:{mount.target}:none:x-create=auto,rbind,{mode}:0:0"]
    env = prefixed(spec.env)
    for name in sorted(env):
        argv += ["--env", name]

    # enroot sets an unset name to the empty string, and an empty CUDA_VISIBLE_DEVICES hides every GPU.
    passed = "".join(f"${{{name}+--env {name}}} " for name in sorted(set(spec.passed) - set(spec.env)))
    argv += [] if spec.entrypoint else ["--rc", str(SCRIPTS / "exec.sh")]
    script = f'exec enroot start --rw {passed}"$@"'
    inner = list(with_restored_names(spec.env, command))
    if spec.workdir:
        inner = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", spec.workdir, *inner]
    return Launch(
        ("bash", "-c", script, "bash", *argv, *spec.options, container_name(spec.image), *inner),
        {**env, **nvidia_hook_variables(spec)},
        prepare=_prepare(spec.image),
    )


def container_name(reference: Reference) -> str:
    """Return a container's name: readable, with a digest that differs for each image and for each version of a file."""
    digest = hashlib.sha256(_image_state(reference).encode()).hexdigest()[:12]
    readable = re.sub(r"[^a-z0-9]+", "-", reference.name.lower()).strip("-")[-60:].strip("-")
    return f"amlaunch-{readable}-{digest}"


def _image_state(reference: Reference) -> str:
    """Return an image's name; for a file also its size and time."""
    try:
        status = reference.file.stat() if reference.path is not None else None
    except OSError:
        status = None
    return reference.name if status is None else f"{reference.name}\0{status.st_size}\0{status.st_mtime_ns}"


def _prepare(reference: Reference) -> tuple[tuple[str, ...], ...]:
    """Return the command that imports and unpacks an image unless the node has done so completely."""
    return (("bash", str(SCRIPTS / "prepare.sh"), container_name(reference), for_enroot(reference)),)


def folders(environ: Mapping[str, str]) -> list[Path]:
    """Return enroot's folders for containers and for temporary files, as enroot itself reads its settings."""
    command = ["enroot", "version"]
    env = {**environ, "ENROOT_LIBRARY_PATH": str(SCRIPTS)}
    try:
        output = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [Path(line) for line in output.splitlines() if line.startswith("/")]
