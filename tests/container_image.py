"""The tests' own image: Debian with Python, torch for the CPU, numpy and safetensors, as an OCI bundle that is kept.

Without amlaunch, and without PyYAML, as a stock image of NVIDIA's has no amlaunch: what a run needs besides comes with
it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from image_helpers import leave_out

CACHE = Path("/var/cache/amlaunch-tests")
TORCH = ("torch", "numpy", "safetensors", "tiktoken")
"""Copied with their dependencies from where the tests run: compiled parts fit Debian's Python of the same version."""
DEBIAN = ("python3", "libstdc++6", "libgomp1")
WITHOUT = ("torch/test/", "torch/include", "torch/share", "torch/bin/test", "torch/bin/protoc", "nvidia", "triton")
ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "FROM_IMAGE": "image", "BOTH": "image"}
"""What the image itself sets."""
MOUNT_POINTS = ("work", "data", "readonly")
"""Empty folders: a runtime that makes none in an image that it may not write needs them."""


def obstacle() -> str | None:
    """What keeps the image from being made on this machine."""
    if os.geteuid():
        return "making a root file system needs root"
    missing = [name for name in ("mmdebstrap", "tar") if not shutil.which(name)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if sys.version_info[:2] != (3, 11):
        return f"the packages of Python {sys.version_info[0]}.{sys.version_info[1]} do not fit Debian 12's Python 3.11"
    return None


def wanted() -> Path:
    """:func:`bundle`, or the test is left out where it cannot be made."""
    why = obstacle()
    if why:
        leave_out(why)
    return bundle()


def bundle() -> Path:
    """The folder of the bundle: ``config.json`` and ``rootfs``. Whoever comes first makes it, the others wait."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / f"image-{_key()}"
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            aside = CACHE / "aside"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(mode=0o755)
            _make(aside)
            aside.rename(folder)
            for old in set(CACHE.glob("image-*")) - {folder}:
                shutil.rmtree(old)
    return folder


def _key() -> str:
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in _needed()]
    return hashlib.sha256(repr([versions, Path(__file__).read_bytes()]).encode()).hexdigest()[:16]


def _needed() -> list[str]:
    """The distributions, and what they need in turn."""
    import re

    found: list[str] = []
    waiting = list(TORCH)
    while waiting:
        name = waiting.pop(0)
        if name in found:
            continue
        found.append(name)
        for line in importlib.metadata.requires(name) or []:
            required = re.match(r"[A-Za-z0-9._-]+", line)
            if required and "extra ==" not in line and _installed(required[0]):
                waiting.append(required[0].lower())
    return sorted(found)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _make(folder: Path) -> None:
    rootfs = folder / "rootfs"
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=essential",
        f"--include={','.join(DEBIAN)}",
        "bookworm",
        str(rootfs),
        *_mirror(),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    for name in (
        "usr/share/doc",
        "usr/share/locale",
        "usr/share/man",
        "var/cache/apt",
        "var/lib/apt/lists",
        "dev",
        "usr/lib/python3/dist-packages",
    ):
        shutil.rmtree(rootfs / name, ignore_errors=True)
    for name in ("dev", "usr/lib/python3/dist-packages", *MOUNT_POINTS):
        (rootfs / name).mkdir(parents=True, exist_ok=True)
    (rootfs / "etc/mtab").symlink_to("../proc/self/mounts")  # podman would put it there, in a folder that is root's
    for name in ("etc/hosts", "etc/resolv.conf", "run/.containerenv"):  # and mount these
        (rootfs / name).touch()
    _copy_packages(rootfs / "usr/local/lib/python3.11/dist-packages")
    (rootfs / "ch").mkdir()
    (rootfs / "ch" / "environment").write_text("".join(f"{name}={value}\n" for name, value in ENV.items()))
    (folder / "config.json").write_text(json.dumps(_config(), indent=1))
    for path in (rootfs, rootfs / "tmp"):
        path.chmod(0o1777 if path.name == "tmp" else 0o755)


def _mirror() -> list[str]:
    """The mirror that apt has here."""
    asked = subprocess.run(["apt-get", "indextargets", "--format", "$(SITE)"], capture_output=True, text=True)
    sites = [line.strip() for line in asked.stdout.splitlines() if line.startswith("http") and "security" not in line]
    return sites[:1]


def _copy_packages(target: Path) -> None:
    """With their compiled Python, whose times must stay those of the sources."""
    for name in _needed():
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            source = Path(str(distribution.locate_file(file)))
            if (
                ".." in file.parts
                or str(file).startswith(WITHOUT)
                or file.suffix in (".a", ".pyi", ".h")
                or not source.is_file()
            ):
                continue
            copy = target / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, copy)  # hundreds of megabytes; nobody writes to the image
            except OSError:  # another disk
                shutil.copy2(source, copy)


def _config() -> dict[str, object]:
    """The least that runc and Slurm want of a bundle; see runtime-spec, config.md."""
    default = json.loads(
        subprocess.run(
            ["sh", "-c", "cd $(mktemp -d) && runc spec --rootless && cat config.json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    default["process"].update(
        {"terminal": False, "env": [f"{name}={value}" for name, value in ENV.items()], "args": ["/bin/true"]}
    )
    default["root"] = {"path": "rootfs", "readonly": True}
    return dict(default)


if __name__ == "__main__":
    print(bundle())
