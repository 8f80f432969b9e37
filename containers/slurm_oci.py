"""Slurm's own containers (``srun --container``): the site's OCI runtime starts a bundle.

https://slurm.schedmd.com/containers.html. A bundle says itself what is mounted, so each attempt gets one of its own
beside the image's: the same root file system, our mounts and our variables (runtime-spec, config.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from containers.image import CannotLaunch, Image, Launch, root_of

KINDS = ("folder",)


def launch(image: Image, command: Sequence[str]) -> Launch:
    """``bundle`` is written into a folder, whose path then stands in ``--container``. Raises CannotLaunch."""
    folder = image.of.file if image.of.kind in KINDS else None
    if folder is None or not (folder / "config.json").is_file():
        raise CannotLaunch(f"Slurm's own containers are OCI bundles (a folder with config.json and rootfs), which {image.of.name} is not")
    config = json.loads((folder / "config.json").read_text())
    return Launch(tuple(command), dict(image.env), (f"--container={BUNDLE}", *image.options), bundle=bundle(config, folder, image))


BUNDLE = "{bundle}"
"""Where the folder of the attempt's own bundle comes in."""


def bundle(config: Mapping[str, Any], folder: Path, image: Image) -> dict[str, Any]:
    """The image's ``config.json`` with our mounts, variables and folder to work in; Slurm itself puts the command there."""
    process = dict(config.get("process", {}))
    before = [entry for entry in process.get("env", ()) if entry.partition("=")[0] not in image.env]
    process["env"] = [*before, *(f"{name}={value}" for name, value in sorted(image.env.items()))]
    process["cwd"] = image.workdir or process.get("cwd", "/")
    return {**config, "process": process, "root": {"readonly": True, **config.get("root", {}), "path": str(root_of(folder))}, "mounts": [*config.get("mounts", ()), *_mounts(image)]}


def _mounts(image: Image) -> list[dict[str, Any]]:
    return [
        {"destination": mount.target, "type": "none", "source": mount.source, "options": ["rbind", "ro" if mount.read_only else "rw"]}
        for mount in image.mounts
    ]
