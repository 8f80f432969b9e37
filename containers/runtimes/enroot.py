"""enroot without pyxis: ``enroot start`` by each task, of a squashfs file or of a container unpacked once on each node.

https://github.com/NVIDIA/enroot/tree/master/doc/cmd: import.md, create.md, start.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from amlaunch.containers.images.reference import Reference, for_enroot
from amlaunch.containers.runtimes.environment import carried, with_env
from amlaunch.containers.runtimes.launch import CannotLaunch, Image, Launch, check_mounts

KINDS = ("registry", "sqsh")


PLAIN = "<(echo 'exec \"$@\"')"
"""A command script without the image's entrypoint, which is its /etc/rc; enroot takes a pipe for it (runtime.sh)."""
WHOLE = "/.amlaunch-whole"
"""In a container that was unpacked to its end."""


def of_hook(image: Image) -> dict[str, str]:
    """What enroot's hook for NVIDIA's devices reads (conf/hooks/98-nvidia.sh), of the environment before the image's own.

    Left alone it goes by the image: one that asks for GPUs (NGC's do) does not start on a node without NVIDIA's tools, and one that
    says nothing sees no GPU. A recipe's own words win.
    """
    found = (
        {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
        if image.gpus
        else {"NVIDIA_VISIBLE_DEVICES": "void"}
    )
    return {name: image.env.get(name, value) for name, value in found.items()}


def check_lines(env: Mapping[str, str], runtime: str) -> None:
    """Raise CannotLaunch for a value of several lines: enroot's file of variables has one a line, and would read the second as another (runtime.sh)."""
    several = sorted(name for name, value in env.items() if "\n" in value)
    if several:
        raise CannotLaunch(
            f"{runtime} cannot set {', '.join(several)}: a value with a line break means something else to it; write it on one line, or in a file that the variable names"
        )


def launch(image: Image, command: Sequence[str]) -> Launch:
    """Raises CannotLaunch."""
    if image.of.kind not in KINDS:
        raise CannotLaunch(f"enroot starts images of a registry and .sqsh files, not {image.of.name}")
    check_mounts(image, ": \t", "enroot")
    check_lines(image.env, "enroot")
    argv = []
    # fstab's fields with colons between: bind, and make the place in the image where it is missing (doc/image-format.md)
    for mount in image.mounts:
        argv += [
            "--mount",
            f"{mount.source}:{mount.target}:none:x-create=auto,rbind,{'ro' if mount.read_only else 'rw'}:0:0",
        ]
    handed = carried(image.env)
    for name in sorted(handed):
        argv += ["--env", name]
    # A name that is not set would be set to nothing, and CUDA_VISIBLE_DEVICES of nothing hides every GPU.
    passed = "".join(f"${{{name}+--env {name}}} " for name in sorted(set(image.passed) - set(image.env)))
    script = f'exec enroot start --rw {"" if image.entrypoint else f"--rc {PLAIN} "}{passed}"$@"'
    command = with_env(image.env, command)
    inner = (
        ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", image.workdir, *command] if image.workdir else list(command)
    )
    return Launch(
        ("bash", "-c", script, "bash", *argv, *image.options, name_of(image.of), *inner),
        {**handed, **of_hook(image)},
        prepare=_prepare(image.of),
    )


def name_of(reference: Reference) -> str:
    """The container's name: what it is called, and a digest of all of it, so that two images never share one, nor a file that was made anew."""
    digest = hashlib.sha256(state_of(reference).encode()).hexdigest()[:12]
    return f"amlaunch-{re.sub(r'[^a-z0-9]+', '-', reference.name.lower()).strip('-')[-60:].strip('-')}-{digest}"


def state_of(reference: Reference) -> str:
    """An image's name, and of a file its size and time, too."""
    try:
        found = reference.file.stat() if reference.path is not None else None
    except OSError:
        found = None
    return reference.name if found is None else f"{reference.name}\0{found.st_size}\0{found.st_mtime_ns}"


def _prepare(reference: Reference) -> tuple[tuple[str, ...], ...]:
    """Import and unpack where the node has not done so to the end; one at a time, for the place may be a home that all nodes share."""
    script = (
        'set -eu; place=${ENROOT_DATA_PATH:-${XDG_DATA_HOME:-$HOME/.local/share}/enroot}; mkdir -p "$place"; exec 9>"$place/$1.lock"; flock 9; '
        f'enroot list | grep -qxF "$1" && enroot start --rc {PLAIN} "$1" test -e {WHOLE} && exit 0; image=$2; '
        'case $2 in docker://*) image=$(mktemp -u "${ENROOT_TEMP_PATH:-${TMPDIR:-/tmp}}/amlaunch-XXXXXXXX.sqsh"); '
        'trap \'rm -f "$image"\' EXIT; enroot import --output "$image" "$2" ;; esac; '
        f'enroot create --force --name "$1" "$image"; enroot start --rw --rc {PLAIN} "$1" touch {WHOLE}'
    )
    return (("bash", "-c", script, "bash", name_of(reference), for_enroot(reference)),)
