"""What ``amlaunch image check`` runs inside an image: says what is there, as one line of JSON.

Standard library only, Python 3.10 to 3.13, and no word of ours is imported: the
source is handed to the image's own Python as ``python3 -c SOURCE MOUNT ...``.
What cannot be found out is left out; nothing here fails.
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
"""Before the line, for an image's entrypoint may print pages of its own."""


def main(mounts: list[str]) -> None:
    """Print the facts; ``mounts`` are the folders to try."""
    found = {
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
    print(MARK + json.dumps(found), flush=True)


def listed(folder: str) -> list[str]:
    """The names in a folder; none where it is not there."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def first_line(error: Exception) -> str:
    """What an error says, without its traceback of C++."""
    return (str(error).splitlines() or [""])[0]


def system() -> str:
    """The distribution, as it calls itself."""
    try:
        with open("/etc/os-release", encoding="utf-8", errors="replace") as handle:
            match = re.search(r'^PRETTY_NAME="?([^"\n]*)', handle.read(), re.MULTILINE)
    except OSError:
        return ""
    return match.group(1) if match else ""


def packages() -> dict[str, str]:
    """Installed distributions, by the names that indexes compare, with their versions."""
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions():
        try:
            name, version = one.metadata["Name"], one.version
        except Exception:  # a damaged one hides no other
            continue
        if name and version:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return dict(sorted(found.items()))


def torch_facts() -> dict[str, Any]:
    """What torch says of itself and of the GPUs; the reason where it cannot be imported."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        return {"error": f"{type(error).__name__}: {first_line(error)}"}
    found: dict[str, Any] = {
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
            found[key] = ask()
        except Exception as error:
            found[key + "_error"] = first_line(error) or type(error).__name__
    return found


def gpu(torch: Any, number: int) -> dict[str, Any]:
    """One GPU, and whether a kernel runs on it."""
    facts = torch.cuda.get_device_properties(number)
    try:
        works = float(torch.ones(8, device=f"cuda:{number}").sum()) == 8.0
        problem = ""
    except Exception as error:
        works, problem = False, first_line(error)
    return {
        "name": facts.name,
        "memory_bytes": facts.total_memory,
        "capability": f"{facts.major}.{facts.minor}",
        "works": works,
        "problem": problem,
    }


def driver() -> dict[str, str]:
    """The kernel's NVIDIA driver, and the newest CUDA that the driver's library in the container can do."""
    found: dict[str, str] = {}
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as handle:
            match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", handle.read())
            found["version"] = match.group(1) if match else ""
    except OSError:
        pass
    try:
        library, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)) == 0:
            found["cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    except (OSError, AttributeError):
        pass
    if shutil.which("nvidia-smi"):
        found["nvidia_smi"] = str(shutil.which("nvidia-smi"))
    return found


def shm_bytes() -> int | None:
    """The size of /dev/shm, which data loaders and NCCL share memory through."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return None
    return space.f_blocks * space.f_frsize


def limits() -> dict[str, int | None]:
    """What NGC asks to be unlimited or large; None: unlimited."""
    found: dict[str, int | None] = {}
    for name in ("MEMLOCK", "STACK", "NOFILE"):
        soft = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[0]
        found[name.lower()] = None if soft == resource.RLIM_INFINITY else soft
    return found


def mount(path: str) -> dict[str, Any]:
    """Whether a folder is there, and a file can be made in it."""
    found: dict[str, Any] = {"path": path, "there": os.path.exists(path), "writable": False, "problem": ""}
    if not found["there"]:
        found["problem"] = "is not there"
        return found
    try:
        if os.path.isdir(path):
            found["free_bytes"] = shutil.disk_usage(path).free
            with tempfile.NamedTemporaryFile(dir=path, prefix=".amlaunch-probe-") as handle:
                handle.write(b"probe")
                handle.flush()
            found["writable"] = True
        else:
            found["writable"] = os.access(path, os.W_OK)
    except OSError as error:
        found["problem"] = error.strerror or str(error)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
