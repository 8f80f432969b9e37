"""A folder of converted images that all nodes see: the names of its files, what is written beside each, and which tool makes one.

<images>/nvidia-pytorch-25.08-py3-1a2b3c4d5e6f.sqsh          the image, under the start of its digest
<images>/nvidia-pytorch-25.08-py3-1a2b3c4d5e6f.json          where it comes from; its existence says that the image is whole
<images>/nvidia-pytorch-25.08-py3-1a2b3c4d5e6f.check.json    what amlaunch image check saw in it
<images>/checks/<name>.json                                  the same of images that are not in this folder
<images>/.work/                                              downloads and half-made images, to go on from
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from amlaunch.containers.images.image_facts import ImageFacts, of_check, of_table
from amlaunch.containers.images.reference import BadReference, for_enroot, parse

FORMATS = ("sqsh", "sif")
DIGEST_SHOWN = 12
ZSTD_LEVEL = 3
"""Of zstd's 22: mksquashfs' own 15 takes many times as long for a few per cent (docs/log.md)."""
BLOCK = "1M"


@dataclass(frozen=True)
class StoredImage:
    """An image in the folder, as its record has it."""

    path: str
    source: str
    """What it was made from, as it was typed."""
    reference: str
    """The same in one spelling; empty for an archive."""
    digest: str
    format: str
    size: int
    """Bytes of the file."""
    date: str
    architecture: str = ""
    by: str = ""
    """``user@host``."""
    tools: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The image's own Env, Entrypoint, Cmd and WorkingDir."""

    @property
    def whole(self) -> bool:
        """Whether its file is there at its size."""
        try:
            return Path(self.path).stat().st_size == self.size
        except OSError:
            return False

    def to_json(self) -> dict[str, Any]:
        """For the record; without the path, for the folder may be seen at another one elsewhere."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


@dataclass(frozen=True)
class ImageFolder:
    """The names in one folder of images."""

    root: Path

    def path(self, name: str, digest: str, form: str) -> Path:
        """The file of an image."""
        return self.root / f"{name}-{short(digest)}.{form}"

    def record(self, image: Path) -> Path:
        """What is known of where an image comes from."""
        return image.with_suffix(".json")

    def check(self, image: str) -> Path:
        """Where a check of an image is written down: beside its file where that is in the folder."""
        path = Path(image)
        if path.parent == self.root and path.suffix.lstrip(".") in FORMATS:
            return path.with_suffix(".check.json")
        return self.root / "checks" / f"{slug(image)}-{hashlib.sha256(plain(image).encode()).hexdigest()[:8]}.json"

    def work(self, name: str, user: int) -> Path:
        """What is half made; each user has his own, for nobody can write another's."""
        return self.root / ".work" / f"{name}.{user}"

    def lock(self, name: str) -> Path:
        """Held by whoever makes an image."""
        return self.root / ".work" / f"{name}.lock"

    def images(self) -> list[StoredImage]:
        """All images whose record can be read, the newest first."""
        found = []
        for record in sorted(self.root.glob("*.json")):
            image = None if record.name.endswith(".check.json") else _read(record)
            found += [image] if image else []
        return sorted(found, key=lambda image: image.date, reverse=True)

    def find(self, name: str) -> StoredImage | None:
        """An image by path, file name, the start of its digest, or by what it was made from; of several the newest."""
        wanted = plain(name)
        for image in self.images():
            path = Path(image.path)
            digest = image.digest.partition(":")[2]
            if name in (str(path), path.name, path.stem, path.stem.rpartition("-")[0], image.source) or (
                image.reference and wanted == image.reference
            ):
                return image
            if len(name.removeprefix("sha256:")) >= 7 and digest.startswith(name.removeprefix("sha256:")):
                return image
        return None

    def facts(self, image: str) -> ImageFacts:
        """What is known of an image: what its check saw, else what its name tells."""
        stored = self.find(image)
        for known in [stored.path, image] if stored else [image]:
            seen = read_json(self.check(known))
            if seen:
                return of_check(image, seen)
        return of_table(stored.reference if stored and stored.reference else plain(image))


def _read(record: Path) -> StoredImage | None:
    value = read_json(record)
    known = {one.name for one in fields(StoredImage)}
    try:
        return StoredImage(
            path=str(record.with_suffix(f".{value['format']}")),
            **{key: item for key, item in value.items() if key in known - {"path"}},
        )
    except (KeyError, TypeError):
        return None  # of another version, or somebody else's file


def read_json(path: Path) -> dict[str, Any]:
    """An object; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def short(digest: str) -> str:
    """The start of a digest, as it stands in names."""
    return digest.rpartition(":")[2][:DIGEST_SHOWN]


def plain(text: str) -> str:
    """One spelling of an image in a registry, complete: ``nvcr.io/nvidia/pytorch:25.08-py3``; of anything else, as it stands."""
    try:
        found = parse(text)
    except BadReference:
        return text
    return found.name if found.kind == "registry" else text


def slug(name: str) -> str:
    """A name for files, from a reference or a path: ``nvidia-pytorch-25.08-py3``."""
    if name.startswith(("/", ".", "~")):
        bare = re.sub(r"\.(tar|tar\.\w+|tgz|sqsh|sif)$", "", Path(name).name)
    else:
        bare = re.sub(r"^[^/]*[.:][^/]*/|^localhost/", "", plain(name).partition("@")[0]).removeprefix("library/")
    return re.sub(r"[^A-Za-z0-9._]+", "-", bare).strip("-.") or "image"


# --- commands of the tools ------------------------------------------------------------------------------


def skopeo_copy(source: str, layout: Path, architecture: str, *, insecure: bool = False) -> list[str]:
    """An image into an OCI layout; layers that are there already are not fetched again (skopeo-copy(1))."""
    return [
        "skopeo",
        f"--override-arch={architecture}",
        "copy",
        *_tls("--src-tls-verify", insecure),
        source,
        f"oci:{layout}:image",
    ]


def skopeo_inspect(source: str, *, insecure: bool = False) -> list[str]:
    """The manifest as the registry has it, byte for byte (skopeo-inspect(1))."""
    return ["skopeo", "inspect", "--raw", *_tls("--tls-verify", insecure), source]


def _tls(option: str, insecure: bool) -> list[str]:
    return [f"{option}=false"] if insecure else []


def pull(tool: str, reference: str, architecture: str, *, insecure: bool = False) -> list[str]:
    """Fetch an image into the tool's own storage (docker-pull(1), podman-pull(1), buildah-pull(1))."""
    if tool == "docker":
        return ["docker", "pull", "--platform", f"linux/{architecture}", reference]
    return [tool, "pull", f"--arch={architecture}", *_tls("--tls-verify", insecure), reference]


def save(tool: str, reference: str, archive: Path) -> list[str]:
    """Write an image of the tool's own storage as a tar (docker-save(1), podman-save(1), buildah-push(1))."""
    if tool == "docker":
        return ["docker", "save", "-o", str(archive), reference]
    if tool == "podman":
        return ["podman", "save", "--format", "oci-archive", "-o", str(archive), reference]
    return ["buildah", "push", reference, f"oci-archive:{archive}"]


def enroot_import(reference: str, target: Path, architecture: str) -> list[str]:
    """A squashfs image straight from a registry (enroot doc/cmd/import.md)."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(architecture, architecture)
    return ["enroot", "import", "--arch", machine, "--output", str(target), for_enroot(parse(reference))]


def enroot_settings(work: Path, *, insecure: bool = False) -> dict[str, str]:
    """enroot's compression, and places with room for it (enroot doc/configuration.md, conf/enroot.conf)."""
    plain = {"ENROOT_ALLOW_HTTP": "yes"} if insecure else {}
    return {
        "ENROOT_SQUASH_OPTIONS": f"-comp zstd -Xcompression-level {ZSTD_LEVEL} -b {BLOCK} -noappend",
        "ENROOT_CACHE_PATH": str(work / "layers"),
        "ENROOT_TEMP_PATH": str(work / "tmp"),
        **plain,
    }


def apptainer_build(program: str, source: str, target: Path, *, insecure: bool = False) -> list[str]:
    """A SIF image of an OCI layout (``oci:DIR:image``), an archive or a registry (apptainer build --help)."""
    return [program, "build", "--force", *(["--no-https"] if insecure else []), str(target), source]


def mksquashfs(source: str, target: Path, *, tar: bool) -> list[str]:
    """A squashfs image of a tar on stdin (``source`` is ``-``; squashfs-tools 4.5 and newer) or of a folder.

    All files are root's, as enroot makes them: a container's user is mapped to the one who starts it (mksquashfs(1)).
    """
    return [
        "mksquashfs", source, str(target), *(["-tar"] if tar else []), "-comp", "zstd", "-Xcompression-level", str(ZSTD_LEVEL),
        "-b", BLOCK, "-all-root", "-noappend", "-no-progress", "-quiet", "-no-recovery",
    ]  # fmt: skip


def untar(folder: Path) -> list[str]:
    """Unpack a tar on stdin where mksquashfs cannot read one; as an ordinary user, so that all can be removed again."""
    return ["tar", "-x", "-f", "-", "-C", str(folder), "--no-same-owner", "--delay-directory-restore", "--mode=u+rwX"]


def build(tool: str, context: Path, tag: str, arguments: Mapping[str, str]) -> list[str]:
    """Build ``context/Dockerfile``; a base that is there is not asked for again (docker-build(1), buildah-build(1))."""
    options = [word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")]
    return [
        tool,
        "build",
        *([] if tool == "docker" else ["--pull=false"]),
        "-t",
        tag,
        *options,
        "-f",
        str(context / "Dockerfile"),
        str(context),
    ]
