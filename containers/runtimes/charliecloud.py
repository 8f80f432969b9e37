"""Charliecloud: ``ch-run`` by each task, a process of the user's own without any privilege.

ch-run(1), https://hpc.github.io/charliecloud/ch-run.html. Devices, network, shared memory and /tmp are the host's; it
adds no GPU libraries to an image, which ``ch-fromhost --nvidia`` does once.
"""

from __future__ import annotations

from collections.abc import Sequence

from amlaunch.containers.images.reference import for_charliecloud
from amlaunch.containers.runtimes.environment import CARRIED
from amlaunch.containers.runtimes.launch import CannotLaunch, Image, Launch, check_mounts, own_settings, root_of

KINDS = ("registry", "folder", "sqsh")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def launch(image: Image, command: Sequence[str]) -> Launch:
    """Raises CannotLaunch."""
    if image.of.kind not in KINDS:
        raise CannotLaunch(f"charliecloud starts folders, .sqsh files and images of ch-image, not {image.of.name}")
    check_mounts(image, ":", "charliecloud")
    if any(mount.read_only for mount in image.mounts):
        raise CannotLaunch(
            "charliecloud cannot mount anything read-only; leave :ro out (container.mounts), or choose another runtime"
        )
    source = str(root_of(image.of.file)) if image.of.kind == "folder" else for_charliecloud(image.of)
    # ch-run hands on all that it inherits. A glob of fnmatch(3) with FNM_EXTMATCH: whatever has none of these names goes, first of all.
    # The host's /tmp is that of the container; a TMPDIR would take its place, and hide what of /tmp is mounted.
    argv = [
        "env",
        "-u",
        "TMPDIR",
        "ch-run",
        f"--unset-env=!({'|'.join([f'{CARRIED}*', *image.passed])})",
        f"--set-env=PATH={PATH}",
    ]
    if image.of.kind == "registry" or (
        image.of.kind == "folder" and (root_of(image.of.file) / "ch" / "environment").is_file()
    ):
        argv.append("--set-env")  # of the image itself
    # The image's own variables come over what ch-run inherits; ours come last, all of them from under other names.
    own = {name: value for name, value in own_settings(image.of).items() if name not in image.passed}
    env = {**own, **image.env}
    argv += [f"--set-env={name}=${CARRIED}{name}" for name in sorted(env)]
    argv += [f"--unset-env={CARRIED}*"] if env else []
    argv += [f"--bind={mount.source}:{mount.target}" for mount in image.mounts]
    argv += [f"--cd={image.workdir}"] if image.workdir else []
    argv += [*image.options, source, "--", *command]
    carried = {f"{CARRIED}{name}": value for name, value in env.items()}
    fetch = ("sh", "-c", 'ch-image list "$1" >/dev/null 2>&1 || exec ch-image pull "$1"', "sh", source)
    # Of a .sqsh ch-run itself shows the files (FUSE), and a child of it is the command.
    return Launch(
        tuple(argv), carried, prepare=(fetch,) if image.of.kind == "registry" else (), deaf=image.of.kind == "sqsh"
    )
