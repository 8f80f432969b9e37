"""Judge the report of an image probe: what works, what is restricted, and what must change."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from amlaunch.containers.images.image_facts import MIN_DRIVERS, facts_from_check
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.findings import BAD, OK, WARN, Finding
from amlaunch.launcher.runs.packages import PYTHONS, too_old

RECIPE_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "pyyaml",
    "tiktoken",
    "pyarrow",
    "datasets",
    "transformers",
    "wandb",
    "tensorboard",
)
"""Packages that recipes may need inside an image."""
MIN_SHM_BYTES = 1 << 30
"""Docker's default of 64 MB is too little for data loaders and NCCL
(https://docs.nvidia.com/deeplearning/frameworks/user-guide)."""


def findings(image: str, report: Mapping[str, Any], wants_gpus: bool) -> Iterator[Finding]:
    """Yield the findings about an image; ``wants_gpus``: the user asked for GPUs."""
    yield _python(report)
    yield from _torch(report)
    yield from _driver(report)
    yield _gpus(report, wants_gpus)
    yield _machine(report)
    yield from _memory(report)
    for mount in report.get("mounts") or []:
        yield _mount(mount)
    yield from _packages(image, report)


def _python(report: Mapping[str, Any]) -> Finding:
    version = str(report.get("python", ""))
    text = f"{version} ({report.get('executable')}), {report.get('system') or 'unknown distribution'}"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < PYTHONS[0]:
        return Finding("Python", BAD, text, "amlaunch needs Python 3.10 or newer; use a newer image")
    if numbers > PYTHONS[-1]:
        newest = ".".join(map(str, PYTHONS[-1]))
        return Finding("Python", WARN, text, f"amlaunch is tested with Python 3.10 to {newest}")
    return Finding("Python", OK, text)


def _torch(report: Mapping[str, Any]) -> Iterator[Finding]:
    torch = report.get("torch") or {}
    if "error" in torch:
        advice = "training needs torch; use an image with PyTorch, such as nvcr.io/nvidia/pytorch"
        yield Finding("torch", BAD, str(torch["error"]), advice)
        return
    minimum = too_old("torch", str(torch.get("version", "")))
    advice = f"amlaunch needs {minimum}; use a newer image" if minimum else ""
    yield Finding("torch", BAD if minimum else OK, str(torch.get("version")), advice)
    if torch.get("cuda"):
        nccl = torch.get("nccl") or torch.get("nccl_error", "missing")
        yield Finding("CUDA", OK, f"CUDA {torch['cuda']}, NCCL {nccl}, cuDNN {cudnn_version(torch.get('cudnn'))}")
    elif torch.get("hip"):
        yield Finding("ROCm", WARN, f"HIP {torch['hip']}", "amlaunch supports NVIDIA GPUs only")
    else:
        yield Finding("CUDA", WARN, "torch is built for CPUs only", "to train on GPUs, use another image")


def cudnn_version(number: Any) -> str:
    """Format cuDNN's version number: ``91002`` is 9.10.2, ``8902`` is 8.9.2 (cudnn_version.h)."""
    if not isinstance(number, int):
        return "missing"
    major, rest = (number // 10000, number % 10000) if number >= 90000 else (number // 1000, number % 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _driver(report: Mapping[str, Any]) -> Iterator[Finding]:
    torch, driver = report.get("torch") or {}, report.get("driver") or {}
    if not driver.get("version"):
        return
    advice = driver_advice(str(driver["version"]), str(torch.get("cuda") or ""), bool(torch.get("available")))
    supported = f", up to CUDA {driver['cuda']}" if driver.get("cuda") else ""
    yield Finding("driver", BAD if advice else OK, f"{driver['version']}{supported}", advice)


def driver_advice(version: str, cuda: str, available: bool) -> str:
    """Return what to do about a driver that is too old for an image's CUDA; empty if there is nothing to do.

    ``available``: torch uses the GPUs, which it can with an older driver, too (forward compatibility).
    """
    major = cuda.split(".")[0]
    if available or not major.isdigit() or int(major) not in MIN_DRIVERS:
        return ""
    installed = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    minimum = MIN_DRIVERS[int(major)]
    if installed >= minimum:
        return ""
    supported = max((cuda_major for cuda_major, driver in MIN_DRIVERS.items() if installed >= driver), default=None)
    choice = f"use an image with CUDA {supported}" if supported else "use an older image"
    return f"CUDA {cuda} needs driver {minimum[0]}.{minimum[1]} or newer; {choice}, or ask for a driver update"


def _gpus(report: Mapping[str, Any], wants_gpus: bool) -> Finding:
    torch, driver = report.get("torch") or {}, report.get("driver") or {}
    gpus = torch.get("gpus") or []
    broken = [gpu for gpu in gpus if not gpu["works"]]
    text = f"{len(gpus)} x {', '.join(dict.fromkeys(str(gpu['name']) for gpu in gpus))}"
    if broken:
        problem = f"{text}; {len(broken)} of them fail: {broken[0]['problem']}"
        return Finding("GPUs", BAD, problem, "torch in this image may not be built for these GPUs; use another image")
    if gpus:
        return Finding("GPUs", OK, text)
    if torch.get("cuda") and (report.get("devices") or driver.get("version")):
        advice = "let the runtime pass them in: nvidia-container-toolkit, or --nv, or CDI (docs/containers.md)"
        return Finding("GPUs", BAD, "the machine has GPUs, but torch in the image sees none", advice)
    advice = "to check on a node with GPUs: --cluster NAME --gpus 1" if wants_gpus or torch.get("cuda") else ""
    return Finding("GPUs", WARN if wants_gpus else OK, f"none on {report.get('host', 'this machine')}", advice)


def _machine(report: Mapping[str, Any]) -> Finding:
    machine = str(report.get("architecture"))
    if machine != platform.machine():
        text = f"{machine}, but this machine is {platform.machine()}"
        return Finding("machine", WARN, text, f"use it on {machine} nodes only")
    return Finding("machine", OK, f"{machine}, {report.get('host')}, Linux {report.get('kernel')}")


def _memory(report: Mapping[str, Any]) -> Iterator[Finding]:
    size, limits = report.get("shm_bytes"), report.get("limits") or {}
    if isinstance(size, int):
        is_small = size < MIN_SHM_BYTES
        advice = "data loaders and NCCL need more; use the host's (--ipc=host)" if is_small else ""
        yield Finding("/dev/shm", WARN if is_small else OK, wording.size(size), advice)
    if report.get("infiniband") and limits.get("memlock") is not None:
        advice = "InfiniBand needs it unlimited; set ulimit -l on the node, or --ulimit memlock=-1"
        yield Finding("memlock", WARN, wording.size(limits["memlock"]), advice)


def _mount(mount: Mapping[str, Any]) -> Finding:
    path, problem = str(mount.get("path")), str(mount.get("problem") or "")
    if not mount.get("there"):
        return Finding("mount", BAD, f"{path} does not exist in the container")
    if mount.get("writable"):
        free = f", {wording.size(mount['free_bytes'])} free" if mount.get("free_bytes") is not None else ""
        return Finding("mount", OK, f"{path} is writable{free}")
    reason = f": {problem}" if problem else ""
    return Finding("mount", WARN, f"{path} is not writable{reason}", "use it for input data only")


def _packages(image: str, report: Mapping[str, Any]) -> Iterator[Finding]:
    facts = facts_from_check(image, report)
    present = [f"{name} {facts.version(name)}" for name in RECIPE_PACKAGES if facts.has(name)]
    missing = [name for name in RECIPE_PACKAGES if not facts.has(name)]
    yield Finding("packages", OK, ", ".join(present) or "none that recipes need")
    if missing:
        advice = "pure Python packages are copied for each run; submit reports the others that a recipe needs"
        yield Finding("", OK, f"missing: {', '.join(missing)}", advice)


def as_json(results: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return findings for ``--json``."""
    return [dataclasses.asdict(finding) for finding in results]
