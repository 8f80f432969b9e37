"""Slurm's own containers (``srun --container``): the site's OCI runtime starts a bundle.

https://slurm.schedmd.com/containers.html. A bundle itself describes its mounts, so each attempt gets its own one: the
image's root file system with our mounts and variables (runtime-spec, config.md).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amlaunch.containers.runtimes.environment import prefixed, with_restored_names
from amlaunch.containers.runtimes.launch import CannotLaunch, ContainerSpec, Launch, root_of

KINDS = ("folder",)
HOST_NAME_FILES = ("/etc/hosts", "/etc/resolv.conf")
"""Files by which a node finds other nodes; other runtimes mount them automatically."""
NODES_VARIABLE = "AMLAUNCH_NODES"
"""The job's nodes in the order of their ranks."""
BUNDLE = "{bundle}"
"""Placeholder in srun's flags for the folder of the attempt's own bundle."""
CONFIG_LISTS = (
    ("process", "env", str),
    ("", "mounts", dict),
    ("linux", "namespaces", dict),
    ("linux", "uidMappings", dict),
    ("linux", "gidMappings", dict),
)
"""Lists in a bundle's configuration: section, key and type of the entries."""
SET_RANK = '''\
if [ -z "${SLURM_PROCID-}" ]; then
  case ${SLURM_STEP_TASKS_PER_NODE-1} in
    1 | "1(x"*) ;;
    *) echo "error: this version of Slurm does not pass SLURM_PROCID into its containers; \
set resources.train.tasks_per_node: 1, or choose another runtime (container.runtime)" >&2; exit 2 ;;
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
"""Shell that derives a task's rank.

Slurm 22.05 gives a container the variables of the step but not of the task. With one task per node, the node's place in
the list is the rank.
"""


def launch(spec: ContainerSpec, command: Sequence[str]) -> Launch:
    """Return srun's flags and the bundle to write; ``--container`` then names its folder. Raises CannotLaunch."""
    folder = spec.image.file if spec.image.kind in KINDS else None
    if folder is None or not (folder / "config.json").is_file():
        raise CannotLaunch(
            f"{spec.image.name} is not an OCI bundle (a folder with config.json and rootfs), "
            "which Slurm's own containers need"
        )
    config = _read_config(folder / "config.json")
    argv = ("sh", "-c", SET_RANK, "sh", *with_restored_names(spec.env, command))
    return Launch(
        argv,
        {},
        (f"--container={BUNDLE}", *spec.options),
        bundle=bundle(config, folder, spec),
        # SIGUSR1 kills the OCI runtime and does not reach the task.
        ignores_signals=True,
    )


def _read_config(file: Path) -> dict[str, Any]:
    """Read a bundle's configuration, in which anything may be null or missing. Raises CannotLaunch for wrong types."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CannotLaunch(f"{file}: invalid JSON: {error}. Write a valid one with runc spec") from None
    config = _without_nulls(value, file, "")
    for section in ("process", "linux"):
        config[section] = _without_nulls(config.get(section, {}), file, section)
    for section, key, kind in CONFIG_LISTS:
        entries = (config[section] if section else config).get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, kind) for entry in entries):
            name = f"{section}.{key}" if section else key
            expected = "strings" if kind is str else "objects"
            raise CannotLaunch(f"{file}: {name}: expected a list of {expected}. Write a valid file with runc spec")
    return config


def _without_nulls(value: Any, file: Path, key: str) -> dict[str, Any]:
    """Return an object without its null values. Raises CannotLaunch for anything else."""
    if not isinstance(value, dict):
        place = f"{file}: {key}" if key else str(file)
        raise CannotLaunch(f"{place}: expected a JSON object. Write a valid file with runc spec")
    return {name: child for name, child in value.items() if child is not None}


def bundle(config: Mapping[str, Any], folder: Path, spec: ContainerSpec) -> dict[str, Any]:
    """Return the image's ``config.json`` with our mounts, variables and working directory; Slurm adds the command."""
    process = dict(config.get("process", {}))
    # Prefixed, because Slurm overrides HOME and SLURM_* by the step's own.
    env = prefixed(spec.env)
    inherited = [entry for entry in process.get("env", ()) if entry.partition("=")[0] not in env]
    process["env"] = [*inherited, *(f"{name}={value}" for name, value in sorted(env.items()))]
    process["cwd"] = spec.workdir or process.get("cwd", "/")

    # Slurm wants the root in the bundle itself: an empty folder, over which the image is mounted.
    root = _mount("/", "none", str(root_of(folder)), ["rbind", "ro"])
    # Ranks exchange data in the node's shared memory; other IPC may be the container's own.
    shared_memory = _mount("/dev/shm", "none", "/dev/shm", ["rbind", "rw", "nosuid", "nodev"])
    temporary = _mount("/tmp", "tmpfs", "tmpfs", ["nosuid", "nodev", "mode=1777"])
    image_mounts = [mount for mount in config.get("mounts", ()) if mount.get("destination") != "/dev/shm"]
    spec_mounts = [
        _mount(mount.target, "none", mount.source, ["rbind", "ro" if mount.read_only else "rw"])
        for mount in spec.mounts
    ]

    # Without these the container has the node's own name.
    rest = {key: value for key, value in config.items() if key not in ("hostname", "domainname")}
    return {
        **rest,
        "process": process,
        "root": {"path": "rootfs", "readonly": False},
        "linux": _linux_section(config.get("linux", {})),
        "mounts": [root, *image_mounts, shared_memory, temporary, *_host_name_mounts(root_of(folder)), *spec_mounts],
    }


def _mount(destination: str, kind: str, source: str, options: list[str]) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": options}


def _linux_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the node's host name, and map a bundle that was made for one user to the user who starts it."""
    namespaces = [namespace for namespace in config.get("namespaces", ()) if namespace.get("type") != "uts"]
    mappings = {}
    for key, host_id in (("uidMappings", os.getuid()), ("gidMappings", os.getgid())):
        entries = config.get(key, [])
        is_single_user = len(entries) == 1 and entries[0].get("size") == 1
        mappings[key] = [{**entries[0], "hostID": host_id}] if is_single_user else entries
    return {**config, "namespaces": namespaces, **{key: value for key, value in mappings.items() if value}}


def _host_name_mounts(root: Path) -> list[dict[str, Any]]:
    """Mount the host's files over those that the image has; nothing can be added to a read-only image."""
    names = [name for name in HOST_NAME_FILES if os.path.exists(name) and (root / name[1:]).is_file()]
    return [_mount(name, "none", name, ["rbind", "ro"]) for name in names]
