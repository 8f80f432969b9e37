"""Slurm's own containers (``srun --container``): the site's OCI runtime starts a bundle.

https://slurm.schedmd.com/containers.html. A bundle says itself what is mounted, so each attempt gets one of its own
beside the image's: the same root file system, our mounts and our variables (runtime-spec, config.md).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amlaunch.containers.runtimes.environment import carried, with_env
from amlaunch.containers.runtimes.launch import CannotLaunch, Image, Launch, root_of

KINDS = ("folder",)
NAMES_OF_HOSTS = ("/etc/hosts", "/etc/resolv.conf")
"""How the node finds other nodes: an image knows none of them, and other runtimes bring these files along unasked."""
NODES_VARIABLE = "AMLAUNCH_NODES"
"""The nodes of the job, in the order of their ranks."""


def launch(image: Image, command: Sequence[str]) -> Launch:
    """``bundle`` is written into a folder, whose path then stands in ``--container``. Raises CannotLaunch."""
    folder = image.of.file if image.of.kind in KINDS else None
    if folder is None or not (folder / "config.json").is_file():
        raise CannotLaunch(
            f"Slurm's own containers are OCI bundles (a folder with config.json and rootfs), which {image.of.name} is not"
        )
    config = _read(folder / "config.json")
    argv = ("sh", "-c", RANK, "sh", *with_env(image.env, command))
    # The OCI runtime dies of a SIGUSR1, and the task is not told.
    return Launch(argv, {}, (f"--container={BUNDLE}", *image.options), bundle=bundle(config, folder, image), deaf=True)


LISTS = (
    ("process", "env", str),
    ("", "mounts", dict),
    ("linux", "namespaces", dict),
    ("linux", "uidMappings", dict),
    ("linux", "gidMappings", dict),
)
"""Of a configuration: part, key, and what the list holds."""


def _read(file: Path) -> dict[str, Any]:
    """A bundle's configuration; what is null or missing there may be so. Raises CannotLaunch where something is of another kind."""
    try:
        config = _whole(json.loads(file.read_bytes()), file, "")
    except (OSError, ValueError, RecursionError) as error:
        raise (
            error
            if isinstance(error, CannotLaunch)
            else CannotLaunch(f"{file}: expected JSON, as runc spec writes it: {error}")
        ) from None
    for part in ("process", "linux"):
        config[part] = _whole(config.get(part, {}), file, part)
    for part, key, kind in LISTS:
        listed = (config[part] if part else config).get(key, [])
        if not isinstance(listed, list) or not all(isinstance(one, kind) for one in listed):
            raise CannotLaunch(
                f"{file}: {part}{'.' if part else ''}{key}: expected a list of {'text' if kind is str else 'objects'}; runc spec writes one that works"
            )
    return config


def _whole(value: Any, file: Path, key: str) -> dict[str, Any]:
    """An object without what is null in it."""
    if not isinstance(value, dict):
        raise CannotLaunch(f"{file}: {key or 'all of it'}: expected an object; runc spec writes one that works")
    return {name: child for name, child in value.items() if child is not None}


BUNDLE = "{bundle}"
"""Where the folder of the attempt's own bundle comes in."""


RANK = '''\
if [ -z "${SLURM_PROCID-}" ]; then
  case ${SLURM_STEP_TASKS_PER_NODE-1} in
    1 | "1(x"*) ;;
    *) echo "error: this Slurm does not tell a task in its containers which one it is; start one task a node (resources.train.tasks_per_node: 1), or take another runtime" >&2; exit 2 ;;
  esac
  read -r host </proc/sys/kernel/hostname
  rank=0
  for node in $AMLAUNCH_NODES; do
    if [ "$node" = "$host" ] || [ "$node" = "${host%%.*}" ]; then break; fi
    rank=$((rank + 1))
  done
  export SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 SLURMD_NODENAME=$node
fi
exec "$@"'''
"""Slurm 22.05 gives a container the variables of the step, not those of the task: with one task a node, the node's place in the
list is the rank."""


def bundle(config: Mapping[str, Any], folder: Path, image: Image) -> dict[str, Any]:
    """The image's ``config.json`` with our mounts, variables and folder to work in; Slurm itself puts the command there."""
    process = dict(config.get("process", {}))
    env = carried(image.env)  # Slurm would put the step's own HOME and SLURM_* over them
    before = [entry for entry in process.get("env", ()) if entry.partition("=")[0] not in env]
    process["env"] = [*before, *(f"{name}={value}" for name, value in sorted(env.items()))]
    process["cwd"] = image.workdir or process.get("cwd", "/")
    # Slurm has the root in the bundle itself, and nowhere else: an empty folder, over which the image is mounted.
    root = {"destination": "/", "type": "none", "source": str(root_of(folder)), "options": ["rbind", "ro"]}
    memory = {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
    # The node's shared memory, in which ranks exchange data; the namespace of the rest of IPC may be the container's own.
    shared = {
        "destination": "/dev/shm",
        "type": "none",
        "source": "/dev/shm",
        "options": ["rbind", "rw", "nosuid", "nodev"],
    }
    given = [mount for mount in config.get("mounts", ()) if mount.get("destination") != "/dev/shm"]
    mounts = [root, *given, shared, memory, *_names(root_of(folder)), *_mounts(image)]
    rest = {key: value for key, value in config.items() if key not in ("hostname", "domainname")}  # the node's own
    return {
        **rest,
        "process": process,
        "root": {"path": "rootfs", "readonly": False},
        "linux": _linux(config.get("linux", {})),
        "mounts": mounts,
    }


def _linux(config: Mapping[str, Any]) -> dict[str, Any]:
    """The node's own name; a bundle for one user is for whoever starts it."""
    kept = [space for space in config.get("namespaces", ()) if space.get("type") != "uts"]
    maps = {}
    for key, mine in (("uidMappings", os.getuid()), ("gidMappings", os.getgid())):
        given = config.get(key, [])
        maps[key] = [{**given[0], "hostID": mine}] if len(given) == 1 and given[0].get("size") == 1 else given
    return {**config, "namespaces": kept, **{key: value for key, value in maps.items() if value}}


def _names(root: Path) -> list[dict[str, Any]]:
    """Mounts of :data:`NAMES_OF_HOSTS`, over files that are there: the image is not to be written."""
    there = [name for name in NAMES_OF_HOSTS if os.path.exists(name) and (root / name[1:]).is_file()]
    return [{"destination": name, "type": "none", "source": name, "options": ["rbind", "ro"]} for name in there]


def _mounts(image: Image) -> list[dict[str, Any]]:
    return [
        {
            "destination": mount.target,
            "type": "none",
            "source": mount.source,
            "options": ["rbind", "ro" if mount.read_only else "rw"],
        }
        for mount in image.mounts
    ]
