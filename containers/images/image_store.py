"""The folder of converted images that all nodes share: file names, records, and the commands that make an image.

<images>/nvidia-pytorch-26.06-py3-1a2b3c4d5e6f.sqsh          the image, named after the start of its digest
<images>/nvidia-pytorch-26.06-py3-1a2b3c4d5e6f.json          its record, written last: the image is complete
<images>/nvidia-pytorch-26.06-py3-1a2b3c4d5e6f.check.json    the findings of amlaunch image check
<images>/checks/<name>.json                                  findings about images that are not in this folder
<images>/.work/                                              downloads and unfinished images
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from amlaunch.containers.images.image_facts import ImageFacts, facts_from_check, facts_from_name
from amlaunch.containers.images.reference import BadReference, for_enroot, parse

FORMATS = ("sqsh", "sif")
DIGEST_LENGTH = 12
"""Characters of a digest in file names."""
MIN_DIGEST_LENGTH = 7
"""Characters of a digest that are enough to name an image."""
ZSTD_LEVEL = 3
"""Out of 22. mksquashfs' default of 15 takes many times as long to save a few per cent (docs/log.md)."""
BLOCK_SIZE = "1M"


@dataclass(frozen=True)
class StoredImage:
    """An image in the folder, as its record describes it."""

    path: str
    source: str
    """The source of the import as the user typed it."""
    reference: str
    """The canonical reference; empty for an archive."""
    digest: str
    format: str
    size: int
    """Bytes of the file."""
    date: str
    architecture: str = ""
    by: str = ""
    """``user@host``."""
    tools: Mapping[str, str] = field(default_factory=dict)
    """Versions of the tools that made it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The image's own Env, Entrypoint, Cmd and WorkingDir."""

    @property
    def is_complete(self) -> bool:
        """True if the file exists and has the recorded size."""
        try:
            return Path(self.path).stat().st_size == self.size
        except OSError:
            return False

    def to_json(self) -> dict[str, Any]:
        """Return the record's content; without the path, because other machines may mount the folder elsewhere."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


@dataclass(frozen=True)
class ImageFolder:
    """The paths in one folder of images."""

    root: Path

    def image_file(self, name: str, digest: str, form: str) -> Path:
        """Return the path of an image."""
        return self.root / f"{name}-{short_digest(digest)}.{form}"

    def record(self, image: Path) -> Path:
        """Return the path of an image's record."""
        return image.with_suffix(".json")

    def check_record(self, image: str) -> Path:
        """Return the path of an image's check: beside the image if it is in this folder, else in ``checks/``."""
        path = Path(image)
        if path.parent == self.root and path.suffix.lstrip(".") in FORMATS:
            return path.with_suffix(".check.json")
        digest = hashlib.sha256(canonical_name(image).encode()).hexdigest()[:8]
        return self.root / "checks" / f"{file_slug(image)}-{digest}.json"

    def work_folder(self, name: str, user: int) -> Path:
        """Return the folder for one user's downloads and unfinished files, which no other user could continue."""
        return self.root / ".work" / f"{name}.{user}"

    def lock(self, name: str) -> Path:
        """Return the path of the lock that is held while an image is made."""
        return self.root / ".work" / f"{name}.lock"

    def images(self) -> list[StoredImage]:
        """List all images with a readable record, newest first."""
        records = [path for path in sorted(self.root.glob("*.json")) if not path.name.endswith(".check.json")]
        images = [image for record in records if (image := _read_record(record))]
        return sorted(images, key=lambda image: image.date, reverse=True)

    def find(self, name: str) -> StoredImage | None:
        """Find an image by its path, file name, start of its digest, or source; the newest if several match."""
        return next((image for image in self.images() if _is_named(image, name)), None)

    def facts(self, image: str) -> ImageFacts:
        """Return what is known about an image: the record of its check, else what its name implies."""
        stored = self.find(image)
        for name in [stored.path, image] if stored else [image]:
            record = read_json(self.check_record(name))
            if record:
                return facts_from_check(image, record)
        return facts_from_name(stored.reference if stored and stored.reference else canonical_name(image))


def _is_named(image: StoredImage, name: str) -> bool:
    path = Path(image.path)
    if name in (str(path), path.name, path.stem, path.stem.rpartition("-")[0], image.source):
        return True
    if image.reference and canonical_name(name) == image.reference:
        return True
    start = name.removeprefix("sha256:")
    return len(start) >= MIN_DIGEST_LENGTH and image.digest.partition(":")[2].startswith(start)


def _read_record(path: Path) -> StoredImage | None:
    record = read_json(path)
    known = {item.name for item in fields(StoredImage)} - {"path"}
    try:
        image = str(path.with_suffix(f".{record['format']}"))
        return StoredImage(path=image, **{key: value for key, value in record.items() if key in known})
    except (KeyError, TypeError):
        # Another version's, or not a record.
        return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def short_digest(digest: str) -> str:
    """Return the start of a digest, as used in file names."""
    return digest.rpartition(":")[2][:DIGEST_LENGTH]


def canonical_name(text: str) -> str:
    """Return an image's canonical name, such as ``nvcr.io/nvidia/pytorch:26.06-py3``; a path stays as it is."""
    try:
        reference = parse(text)
    except BadReference:
        return text
    return reference.name if reference.kind == "registry" else text


def file_slug(name: str) -> str:
    """Return a file name for a reference or a path, such as ``nvidia-pytorch-26.06-py3``."""
    if name.startswith(("/", ".", "~")):
        bare = re.sub(r"\.(tar|tar\.\w+|tgz|sqsh|sif)$", "", Path(name).name)
    else:
        repository = canonical_name(name).partition("@")[0]
        bare = re.sub(r"^[^/]*[.:][^/]*/|^localhost/", "", repository).removeprefix("library/")
    return re.sub(r"[^A-Za-z0-9._]+", "-", bare).strip("-.") or "image"


# --- commands of the tools ------------------------------------------------------------------------------


def skopeo_copy(source: str, layout: Path, architecture: str, *, insecure: bool = False) -> list[str]:
    """Copy an image into an OCI layout; existing layers are not fetched again (skopeo-copy(1))."""
    return [
        "skopeo",
        f"--override-arch={architecture}",
        "copy",
        *_tls_option("--src-tls-verify", insecure),
        source,
        f"oci:{layout}:image",
    ]


def skopeo_inspect(source: str, *, insecure: bool = False) -> list[str]:
    """Print the registry's manifest, byte for byte (skopeo-inspect(1))."""
    return ["skopeo", "inspect", "--raw", *_tls_option("--tls-verify", insecure), source]


def _tls_option(option: str, insecure: bool) -> list[str]:
    return [f"{option}=false"] if insecure else []


def pull(tool: str, reference: str, architecture: str, *, insecure: bool = False) -> list[str]:
    """Fetch an image into the tool's own storage (docker-pull(1), podman-pull(1), buildah-pull(1))."""
    if tool == "docker":
        return ["docker", "pull", "--platform", f"linux/{architecture}", reference]
    return [tool, "pull", f"--arch={architecture}", *_tls_option("--tls-verify", insecure), reference]


def save(tool: str, reference: str, archive: Path) -> list[str]:
    """Save an image of the tool's own storage as a tar (docker-save(1), podman-save(1), buildah-push(1))."""
    if tool == "docker":
        return ["docker", "save", "-o", str(archive), reference]
    if tool == "podman":
        return ["podman", "save", "--format", "oci-archive", "-o", str(archive), reference]
    return ["buildah", "push", reference, f"oci-archive:{archive}"]


def enroot_import(reference: str, target: Path, architecture: str) -> list[str]:
    """Make a squashfs image straight from a registry (enroot doc/cmd/import.md)."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(architecture, architecture)
    return ["enroot", "import", "--arch", machine, "--output", str(target), for_enroot(parse(reference))]


def enroot_settings(work: Path, *, insecure: bool = False) -> dict[str, str]:
    """Return enroot's variables for compression and working folders (enroot doc/configuration.md, conf/enroot.conf)."""
    http = {"ENROOT_ALLOW_HTTP": "yes"} if insecure else {}
    return {
        "ENROOT_SQUASH_OPTIONS": f"-comp zstd -Xcompression-level {ZSTD_LEVEL} -b {BLOCK_SIZE} -noappend",
        "ENROOT_CACHE_PATH": str(work / "layers"),
        "ENROOT_TEMP_PATH": str(work / "tmp"),
        # enroot creates these two at each start, even if it needs neither; their defaults may not be writable.
        "ENROOT_DATA_PATH": str(work / "data"),
        "ENROOT_RUNTIME_PATH": str(work / "run"),
        **http,
    }


def apptainer_build(program: str, source: str, target: Path, *, insecure: bool = False) -> list[str]:
    """Make a SIF image from an OCI layout (``oci:DIR:image``), an archive or a registry (apptainer build --help)."""
    return [program, "build", "--force", *(["--no-https"] if insecure else []), str(target), source]


def mksquashfs(rootfs: Path, target: Path) -> list[str]:
    """Make a squashfs image from a folder (mksquashfs(1)).

    All files become root's, as enroot makes them: a container maps its root to the user who starts it.
    """
    return [
        "mksquashfs", str(rootfs), str(target), "-comp", "zstd", "-Xcompression-level", str(ZSTD_LEVEL),
        "-b", BLOCK_SIZE, "-all-root", "-noappend", "-no-progress", "-quiet", "-no-recovery",
    ]  # fmt: skip


def build(tool: str, context: Path, tag: str, arguments: Mapping[str, str]) -> list[str]:
    """Build ``context/Dockerfile``; a stored base is not fetched again (docker-build(1), buildah-build(1))."""
    build_arguments = [word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")]
    return [
        tool,
        "build",
        *([] if tool == "docker" else ["--pull=false"]),
        "-t",
        tag,
        *build_arguments,
        "-f",
        str(context / "Dockerfile"),
        str(context),
    ]
