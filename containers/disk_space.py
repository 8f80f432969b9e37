"""How much room an image takes, and where each tool and runtime puts it, so that a lack of it is said before anything is fetched.

Sizes are estimates; each need also says what it comes to at least, and only a lack of that is certain. enroot's folders: its doc/configuration.md and
what ``enroot import`` and ``enroot create`` do there; pyxis': its config.c; apptainer's: its user guide, "Build Environment";
docker's and containers': what their own ``info`` says.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlaunch.containers.images.image_facts import of_table
from amlaunch.containers.images.reference import Reference
from amlaunch.containers.runtimes.enroot import name_of

UNPACKED = 2.5
"""The files of an image, over its compressed layers: the like of Debian's and NGC's images."""
AT_LEAST, NGC_AT_LEAST = 1.0, 2.0
"""The same at least: some images are full of weights, which compress to nothing, NGC's PyTorch images are not."""
SPARE = 1.15
"""The converted image, over the same: zstd makes it about as large."""
NGC_BYTES, OTHER_BYTES = 8 * 10**9, 8 * 10**8
"""The compressed layers of an image whose size nobody said: of NGC's PyTorch images, which unpacked are 20 GB, and of another."""
ENROOT_CONFIGS = ("/etc/enroot/enroot.conf", "/usr/local/etc/enroot/enroot.conf")
PLUGSTACKS = (
    "/etc/slurm/plugstack.conf",
    "/etc/slurm/plugstack.conf.d/*",
    "/run/slurm/conf/plugstack.conf",
    "/run/slurm/conf/plugstack.conf.d/*",
)
"""Where Slurm is told of pyxis."""
TO_PYXIS = re.compile("HOME|PATH|ENROOT_CONFIG_PATH|SLURM_(JOB|STEP)_.*")
"""Of the environment of a job, what enroot's folders can depend on where pyxis starts it (its config of ``enroot_want_env``); not USER."""
UNCOMPRESSED_DATA = 0x2
"""In the flags of a squashfs image; enroot makes them so (-noD)."""


@dataclass(frozen=True)
class Need:
    """What will be written into a folder."""

    folder: Path
    size: float
    what: str
    instead: str = ""
    """How another folder is named."""
    least: float | None = None
    """What it comes to at least, where ``size`` is a guess."""


def unpacked(folder: Path, size: float, image: str, what: str, instead: str = "") -> Need:
    """The files of an image whose compressed layers are of that size."""
    return Need(folder, UNPACKED * size, what, instead, (NGC_AT_LEAST if of_table(image).source else AT_LEAST) * size)


@dataclass(frozen=True)
class Lack:
    """A file system that has not enough for what will be written there."""

    needs: Sequence[Need]
    free: int

    @property
    def size(self) -> float:
        """Bytes that are needed, about."""
        return sum(need.size for need in self.needs)

    @property
    def certain(self) -> bool:
        """Whether there is no room for the least of it."""
        return sum(need.size if need.least is None else need.least for need in self.needs) > self.free

    @property
    def what(self) -> str:
        """For people: what will be written."""
        return _listed(need.what for need in self.needs)

    @property
    def folders(self) -> str:
        """Where."""
        return _listed(str(need.folder) for need in self.needs)


def _listed(given: Iterable[str]) -> str:
    """``a, b and c``, each once."""
    *before, last = dict.fromkeys(given)
    return f"{', '.join(before)} and {last}" if before else last


Phase = Sequence[Need]
"""What is there at one time."""


def lacks(phases: Sequence[Phase]) -> list[Lack]:
    """For each file system that has no room for a phase the first, the certain ones before others."""
    found: dict[int, list[Lack]] = {}
    for phase in phases:
        disks: dict[int, list[Need]] = {}
        for need in phase:
            if need.size > 0:
                disks.setdefault(os.stat(nearest(need.folder)).st_dev, []).append(need)
        for disk, needs in disks.items():
            found.setdefault(disk, []).append(Lack(needs, shutil.disk_usage(nearest(needs[0].folder)).free))
    there = [[lack for lack in lacking if lack.size > lack.free] for lacking in found.values()]
    return [min(lacking, key=lambda lack: not lack.certain) for lacking in there if lacking]


def nearest(path: Path) -> Path:
    """The path, or what of it is there."""
    path = Path(os.path.abspath(path))
    return next(one for one in (path, *path.parents) if os.path.exists(one))


def same_disk(one: Path, other: Path) -> bool:
    """Whether both will lie on one file system."""
    return os.stat(nearest(one)).st_dev == os.stat(nearest(other)).st_dev


def used(folder: Path) -> int:
    """Bytes of the files below a folder, as they are now."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # renamed meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
    return total


# --- engines --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """Where docker, podman or buildah has its images, and its files while it works."""

    program: str
    root: Path
    temporary: Path
    instead: Sequence[str]
    """How the two are named."""
    download: float = 1.0
    """Of the compressed layers, what lies in the temporary folder while they are fetched."""
    copy: float = 1.0
    """The same while an image is saved as an archive."""

    def to_pull(self, size: float, image: str) -> list[Need]:
        """For an image whose compressed layers are of that size: what stays, and what is gone again afterwards."""
        kept = unpacked(self.root, size, image, f"the unpacked image in {self.program}'s storage", self.instead[0])
        return [kept, Need(self.temporary, self.download * size, "the download", self.instead[1])]

    def to_save(self, size: float) -> list[Need]:
        """While it is saved."""
        return [
            Need(
                self.temporary,
                self.copy * size,
                f"{self.program}'s copy of it while it is saved",
                self.instead[1],
                min(self.copy, AT_LEAST) * size,
            )
        ]


def storage_of(program: str, environ: Mapping[str, str]) -> Storage | None:
    """As the engine itself says; None where it does not, or is on another machine."""
    temporary = Path(environ.get("TMPDIR") or "/var/tmp")
    if program == "docker":
        return _of_docker()
    said = _said([program, "info", *(["--format", "json"] if program == "podman" else [])])
    store = {str(key).lower(): value for key, value in (said.get("store") or {}).items()}
    if not store.get("graphroot"):
        return None
    return Storage(
        program,
        Path(store["graphroot"]),
        Path(store.get("imagecopytmpdir") or temporary),
        ("graphroot in storage.conf", "TMPDIR"),
    )


def _of_docker() -> Storage | None:
    said = _said(["docker", "info", "--format", "{{json .}}"])
    host = _words(["docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"]).strip()
    own = ["driver-type", "io.containerd.snapshotter.v1"] in (said.get("DriverStatus") or [])
    root = "/var/lib/containerd" if own else str(said.get("DockerRootDir") or "")
    # A daemon in a virtual machine (Docker Desktop) speaks of folders that are not here.
    if not host.startswith("unix://") or not root or not os.path.isdir(root):
        return None
    where = "data-root in docker's daemon.json"
    return Storage("docker", Path(root), Path(root), (where, where), 0.0, 0.0 if own else UNPACKED)


def has(program: str, name: str) -> bool:
    """Whether an engine has an image in its storage."""
    asked = {
        "docker": ["docker", "image", "inspect", name],
        "podman": ["podman", "image", "exists", name],
        "buildah": ["buildah", "inspect", "--type", "image", name],
        "charliecloud": ["ch-image", "list", name],
    }.get(program)
    try:
        return asked is not None and subprocess.run(asked, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _words(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _said(command: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(_words(command))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


# --- enroot and pyxis -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folders:
    """enroot's."""

    cache: Path
    data: Path
    temp: Path
    doubt: str = ""
    """Why they may be others."""


def enroot_folders(environ: Mapping[str, str]) -> Folders:
    """As the environment, its enroot.conf (a shell's words, which know those before them and XDG's folders), or its own defaults have them."""
    home = environ.get("HOME", "/")
    own = {
        "XDG_CACHE_HOME": f"{home}/.cache",
        "XDG_DATA_HOME": f"{home}/.local/share",
        "XDG_CONFIG_HOME": f"{home}/.config",
        "XDG_RUNTIME_DIR": "/run",
    }
    known = {**own, **{name: value for name, value in environ.items() if value}}
    doubts = []
    for name, value in _configured():
        if not known.get(name):
            known[name], doubt = _expanded(value, known)
            doubts += [f"unless {name} {value} of its enroot.conf means another folder here ({doubt})"] if doubt else []
    default = {
        "CACHE": f"{known['XDG_CACHE_HOME']}/enroot",
        "DATA": f"{known['XDG_DATA_HOME']}/enroot",
        "TEMP": known.get("TMPDIR") or "/tmp",
    }
    cache, data, temp = (Path(known.get(f"ENROOT_{name}_PATH") or path) for name, path in default.items())
    return Folders(cache, data, temp, next(iter(doubts), ""))


def _configured() -> Iterator[tuple[str, str]]:
    """The folders that enroot.conf names, in its order, each with its words."""
    config = next((path for path in ENROOT_CONFIGS if os.path.isfile(path)), None)
    for file in [*sorted(glob.glob(f"{config}.d/*.conf")), config] if config else []:
        with suppress(OSError):
            yield from re.findall(
                r"^[ \t]*(ENROOT_[A-Z_]+_PATH)[ \t=]+(.*\S)", Path(file).read_text(errors="replace"), re.MULTILINE
            )


def _expanded(value: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """What bash, which is enroot's own, makes of a value: ``/raid/user-$(id -u)``; and why it makes nothing of it."""
    try:
        found = subprocess.run(
            ["bash", "-uc", f"echo {value}"],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    said = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1].removeprefix("bash: line 1: ")
    folder = found.stdout.strip()
    if found.returncode or found.stderr.strip():
        return "", said
    return (folder, "") if folder.startswith("/") else ("", f"it comes to {folder!r}")


def pyxis_options() -> dict[str, str] | None:
    """What Slurm's plugstack.conf gives to pyxis (``runtime_path=…``); None where no such line is seen here."""
    for path in sorted(path for pattern in PLUGSTACKS for path in glob.glob(pattern)):
        with suppress(OSError):
            found = re.search(
                r"^[ \t]*(?:required|optional)[ \t]+\S*spank_pyxis\.so\b(.*)",
                Path(path).read_text(errors="replace"),
                re.MULTILINE,
            )
            if found:
                return dict(word.split("=", 1) for word in found[1].split() if "=" in word)
    return None


def _is_on(options: Mapping[str, str], name: str) -> bool:
    return options.get(name) in ("1", "true", "yes", "y")


def _of_squashfs(path: Path, folder: Path) -> list[Phase]:
    """``enroot create`` of a squashfs image."""
    try:
        with open(path, "rb") as handle:
            flags = int.from_bytes(handle.read(26)[24:], "little")
        size = path.stat().st_size
    except OSError:
        return []
    ratio = 1.0 if flags & UNCOMPRESSED_DATA else UNPACKED
    return [[Need(folder, size * ratio, "the unpacked image", "ENROOT_DATA_PATH", size)]]


def _of_import(folders: Folders, size: float, image: str, squashed: Path) -> list[Phase]:
    """``enroot import`` into a file in ``squashed``, then ``enroot create``. What lies in the cache may be of this image."""
    cache = Need(folders.cache, max(0.0, size - used(folders.cache)), "the download", "ENROOT_CACHE_PATH")
    file = Need(squashed, size, "the image as one file", "")
    layers = unpacked(folders.temp, size, image, "the unpacked layers", "ENROOT_TEMP_PATH")
    return [
        [cache, file, layers],
        [cache, file, unpacked(folders.data, size, image, "the unpacked image", "ENROOT_DATA_PATH")],
    ]


# --- when a job starts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What a runtime will write to start an image."""

    phases: Sequence[Phase] = ()
    doubt: str = ""
    """Why it may need less after all: a lack is then said, and nothing refused."""


def at_start(runtime: str, image: Reference, layers: int | None, environ: Mapping[str, str]) -> Look:
    """What is written on a node that does not have the image. ``layers``: bytes of its compressed layers, where a registry said."""
    if image.path is None:
        size = float(layers or (NGC_BYTES if of_table(image.name).source else OTHER_BYTES))
    else:
        size = float(image.path.stat().st_size) if image.path.is_file() else 0.0
    if runtime == "pyxis":
        return _pyxis(image, size, environ)
    if runtime == "enroot":
        folders = enroot_folders(environ)
        if os.path.isdir(folders.data / name_of(image)):
            return Look()
        phases = (
            _of_import(folders, size, image.name, folders.temp)
            if image.path is None
            else _of_squashfs(image.path, folders.data)
        )
        return Look(phases, folders.doubt)
    if runtime in ("apptainer", "singularity") and image.kind in ("registry", "archive"):
        return _apptainer(runtime, size, image.name, environ)
    if runtime in ("docker", "podman"):
        storage = storage_of(runtime, environ)
        return Look(
            [storage.to_pull(size / (UNPACKED if image.path else 1), image.name)] if storage else []
        )  # an archive's layers may be unpacked already
    if runtime == "charliecloud" and image.kind == "registry":
        images = environ.get("CH_IMAGE_STORAGE") or f"/var/tmp/{environ.get('USER', os.getuid())}.ch"
        return Look(
            [[Need(Path(images), size, "the download"), unpacked(Path(images), size, image.name, "the unpacked image")]]
        )
    return Look()


def _pyxis(image: Reference, size: float, environ: Mapping[str, str]) -> Look:
    """An unnamed container is unpacked anew at each start, also of a squashfs file. Of the job's own variables enroot sees few."""
    folders = enroot_folders({name: value for name, value in environ.items() if TO_PYXIS.fullmatch(name)})
    seen = pyxis_options()
    options = seen or {}
    doubt = (
        ""
        if seen is not None
        else "unless pyxis is set up otherwise (its line in Slurm's plugstack.conf is not seen here)"
    )
    if image.path is not None:
        phases = _of_squashfs(image.path, folders.data)
    elif options.get("importer"):
        phases, doubt = (
            _of_import(folders, size, image.name, folders.temp),
            f"unless {options['importer']}, which the site imports with, needs less",
        )
    else:
        phases = _of_import(folders, size, image.name, Path(options.get("runtime_path") or "/run/pyxis"))
        if _is_on(options, "use_enroot_load"):  # straight from the cache to where it is unpacked
            phases = [[need for need in phases[1] if need.folder in (folders.cache, folders.data)]]
    if _is_on(options, "use_squashfuse"):  # mounted, not unpacked
        phases = [] if image.path is not None else phases[:1]
    return Look(phases, doubt or folders.doubt)


def _apptainer(program: str, size: float, image: str, environ: Mapping[str, str]) -> Look:
    """Layers and the converted image in the cache, unpacked files in the temporary folder."""
    prefix = program.upper()
    cache = Path(environ.get(f"{prefix}_CACHEDIR") or f"{environ.get('HOME', '/')}/.{program}", "cache")
    temporary = environ.get(f"{prefix}_TMPDIR") or environ.get("TMPDIR") or "/tmp"
    blobs = max(0.0, size - used(cache / "blob"))
    kept = Need(cache, blobs + size, "the download and the converted image", f"{prefix}_CACHEDIR")
    files = unpacked(Path(temporary), size, image, "the unpacked files", f"{prefix}_TMPDIR")
    return Look([[kept, files]], "unless the image is in its cache" if used(cache / "oci-tmp") else "")
