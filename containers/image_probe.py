"""Report what an image contains, as one line of JSON; ``amlaunch image check`` runs this inside the image.

Standard library only, Python 3.10 to 3.13, without imports from amlaunch: the image's own Python gets the source as
``python3 -c SOURCE MOUNT ...``. What cannot be determined is left out; nothing here fails.
"""

import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
from typing import Any

MARK = "AMLAUNCH-PROBE "
"""Start of the line; an image's entrypoint may print other lines."""


def main(mounts: list[str]) -> None:
    """Print the facts; ``mounts`` are the folders to test."""
    facts = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "architecture": platform.machine(),
        "system": system(),
        "kernel": platform.release(),
        "host": platform.node(),
        "user": {"uid": os.getuid(), "gid": os.getgid(), "home": os.path.expanduser("~")},
        "packages": packages(),
        "torch": torch_facts(),
        "driver": driver(),
        "devices": sorted(name for name in listed("/dev") if re.fullmatch(r"nvidia\d+", name)),
        "infiniband": [name for name in listed("/dev/infiniband") if name.startswith("uverbs")],
        "shm_bytes": shm_bytes(),
        "limits": limits(),
        "mounts": [mount(path) for path in mounts],
    }
    print(MARK + json.dumps(facts), flush=True)


def listed(folder: str) -> list[str]:
    """List the names in a folder; none if there is no such folder."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def first_line(error: Exception) -> str:
    """Return the first line of an error, without the C++ traceback that torch appends."""
    return (str(error).splitlines() or [""])[0]


def system() -> str:
    """Return the name of the Linux distribution."""
    try:
        with open("/etc/os-release", encoding="utf-8", errors="replace") as handle:
            match = re.search(r'^PRETTY_NAME="?([^"\n]*)', handle.read(), re.MULTILINE)
    except OSError:
        return ""
    return match.group(1) if match else ""


def packages() -> dict[str, str]:
    """Return the installed distributions, by normalised name, with their versions."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:
            # A damaged one must not hide the others.
            continue
        if name and version:
            versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return dict(sorted(versions.items()))


def torch_facts() -> dict[str, Any]:
    """Return what torch reports about itself and the GPUs, or why it cannot be imported."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        return {"error": f"{type(error).__name__}: {first_line(error)}"}
    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": getattr(torch.version, "hip", None),
    }
    for key, ask in (
        ("nccl", lambda: ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None),
        ("cudnn", lambda: torch.backends.cudnn.version() if torch.version.cuda else None),
        ("distributed", lambda: torch.distributed.is_available()),
        ("architectures", lambda: torch.cuda.get_arch_list()),
        ("available", lambda: torch.cuda.is_available()),
        ("gpus", lambda: [gpu(torch, number) for number in range(torch.cuda.device_count())]),
    ):
        try:
            facts[key] = ask()
        except Exception as error:
            facts[key + "_error"] = first_line(error) or type(error).__name__
    return facts


def gpu(torch: Any, number: int) -> dict[str, Any]:
    """Return a GPU's properties, and whether a kernel runs on it."""
    device = torch.cuda.get_device_properties(number)
    try:
        works = float(torch.ones(8, device=f"cuda:{number}").sum()) == 8.0
        problem = ""
    except Exception as error:
        works, problem = False, first_line(error)
    return {
        "name": device.name,
        "memory_bytes": device.total_memory,
        "capability": f"{device.major}.{device.minor}",
        "works": works,
        "problem": problem,
    }


def driver() -> dict[str, str]:
    """Return the kernel's NVIDIA driver, and the newest CUDA that its library in the container supports."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as handle:
            match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", handle.read())
            facts["version"] = match.group(1) if match else ""
    except OSError:
        pass
    try:
        library, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)) == 0:
            facts["cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    except (OSError, AttributeError):
        pass
    if shutil.which("nvidia-smi"):
        facts["nvidia_smi"] = str(shutil.which("nvidia-smi"))
    return facts


def shm_bytes() -> int | None:
    """Return the size of /dev/shm, through which data loaders and NCCL share memory."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return None
    return space.f_blocks * space.f_frsize


def limits() -> dict[str, int | None]:
    """Return the limits that NGC wants large or unlimited; None means unlimited."""
    facts: dict[str, int | None] = {}
    for name in ("MEMLOCK", "STACK", "NOFILE"):
        soft = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[0]
        facts[name.lower()] = None if soft == resource.RLIM_INFINITY else soft
    return facts


def mount(path: str) -> dict[str, Any]:
    """Return whether a path exists and whether files can be written there."""
    facts: dict[str, Any] = {"path": path, "there": os.path.exists(path), "writable": False, "problem": ""}
    if not facts["there"]:
        facts["problem"] = "does not exist"
        return facts
    try:
        if os.path.isdir(path):
            facts["free_bytes"] = shutil.disk_usage(path).free
            with tempfile.NamedTemporaryFile(dir=path, prefix=".amlaunch-probe-") as handle:
                handle.write(b"probe")
                handle.flush()
            facts["writable"] = True
        else:
            facts["writable"] = os.access(path, os.W_OK)
    except OSError as error:
        facts["problem"] = error.strerror or str(error)
    return facts


if __name__ == "__main__":
    main(sys.argv[1:])
