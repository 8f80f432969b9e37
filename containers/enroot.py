"""enroot without pyxis: ``enroot start`` by each task, of a squashfs file or of a container unpacked once on each node.

https://github.com/NVIDIA/enroot/tree/master/doc/cmd: import.md, create.md, start.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from containers.environment import in_sight, with_env
from containers.image import CannotLaunch, Image, Launch
from containers.reference import Reference, for_enroot

KINDS = ("registry", "sqsh")


PLAIN = "<(echo 'exec \"$@\"')"
"""A command script without the image's entrypoint, which is its /etc/rc; enroot takes a pipe for it (runtime.sh)."""
WHOLE = "/.amlaunch-whole"
"""In a container that was unpacked to its end."""


def launch(image: Image, command: Sequence[str]) -> Launch:
    """Raises CannotLaunch."""
    if image.of.kind not in KINDS:
        raise CannotLaunch(f"enroot starts images of a registry and .sqsh files, not {image.of.name}")
    argv = []
    # fstab's fields with colons between: bind, and make the place in the image where it is missing (doc/image-format.md)
    for mount in image.mounts:
        argv += ["--mount", f"{mount.source}:{mount.target}:none:x-create=auto,rbind,{'ro' if mount.read_only else 'rw'}:0:0"]
    handed = {name: value for name, value in image.env.items() if name not in in_sight(image.env)}
    for name in sorted(handed):
        argv += ["--env", name]
    # A name that is not set would be set to nothing, and CUDA_VISIBLE_DEVICES of nothing hides every GPU.
    passed = "".join(f"${{{name}+--env {name}}} " for name in sorted(set(image.passed) - set(image.env)))
    script = f'exec enroot start --rw {"" if image.entrypoint else f"--rc {PLAIN} "}{passed}"$@"'
    command = with_env(image.env, command)
    inner = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", image.workdir, *command] if image.workdir else list(command)
    return Launch(("bash", "-c", script, "bash", *argv, *image.options, name_of(image.of), *inner), handed, prepare=_prepare(image.of))


def name_of(reference: Reference) -> str:
    """The container's name: what it is called, and a digest of all of it, so that two images never share one."""
    digest = hashlib.sha256(reference.name.encode()).hexdigest()[:12]
    return f"amlaunch-{re.sub(r'[^a-z0-9]+', '-', reference.name.lower()).strip('-')[-60:].strip('-')}-{digest}"


def _prepare(reference: Reference) -> tuple[tuple[str, ...], ...]:
    """Import and unpack where the node has not done so to the end."""
    script = (
        f'set -eu; enroot list | grep -qxF "$1" && enroot start --rc {PLAIN} "$1" test -e {WHOLE} && exit 0; image=$2; '
        'case $2 in docker://*) image=$(mktemp -u "${ENROOT_TEMP_PATH:-${TMPDIR:-/tmp}}/amlaunch-XXXXXXXX.sqsh"); '
        'trap \'rm -f "$image"\' EXIT; enroot import --output "$image" "$2" ;; esac; '
        f'enroot create --force --name "$1" "$image"; enroot start --rw --rc {PLAIN} "$1" touch {WHOLE}'
    )
    return (("bash", "-c", script, "bash", name_of(reference), for_enroot(reference)),)
