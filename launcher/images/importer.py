"""Fetch an image with the tools of the site and convert it once for all nodes: atomic, locked and resumable.

A download goes to the folder's ``.work``, layer by layer; after an interruption the same command continues with the
layers that are there. The converted file is made beside it and renamed, and its record is written last: an image with a
record is complete. A second import of the same image waits for the first and uses its result.
"""

from __future__ import annotations

import getpass
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlaunch.containers import disk_space
from amlaunch.containers.images import credentials, image_store, layers, registry
from amlaunch.containers.images.image_store import ImageFolder, StoredImage
from amlaunch.containers.images.layers import LayeredImage, NotAnImage
from amlaunch.containers.images.reference import BadReference, parse
from amlaunch.launcher.images.tools import (
    Say,
    ToolFailed,
    check_engine_space,
    check_free_space,
    content_of,
    need_program,
    registry_tool,
    require_tool,
    sif_program,
    stopped_on_error,
    version_of,
)
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import Lock, fsync_folder, sha256_file, write_json

MAX_OUTPUT_LINES = 6
"""Lines of a failed tool's output that an error quotes."""
ONE_STEP_TOOLS = {"enroot": "sqsh", "apptainer": "sif", "singularity": "sif"}
"""Tools that fetch and convert in one step, and the format that each makes."""
WORK_SPACE_FACTOR = 2
"""Free space in the work folder, over the size of the layers: at least the unpacked files and the converted image."""


@dataclass(frozen=True)
class ImportRequest:
    """An image to import, and the options of the import."""

    source: str
    folder: ImageFolder
    format: str
    architecture: str
    tool: str | None = None
    """None: the best tool that is installed."""
    work: Path | None = None
    """Folder for downloads and unfinished files; None: the image folder's own."""
    insecure: bool = False
    origin: str = ""
    """Recorded instead of ``source``: for a build, its base."""


@dataclass(frozen=True)
class ImageSource:
    """A request's source, resolved."""

    kind: str
    """``registry``, ``engine``, ``archive`` or ``layout``."""
    place: str
    """A canonical reference, or an absolute path."""
    tool: str = ""

    @property
    def reference(self) -> str:
        """The image's name in a registry; empty for an archive."""
        return self.place if self.kind in ("registry", "engine") else ""


# --- resolve the source ---------------------------------------------------------------------------------


def resolve_source(request: ImportRequest) -> ImageSource:
    """Resolve a request's source to a registry, an engine's storage or a path. Raises BadInput."""
    text = request.source.strip()
    if not text:
        raise BadInput(
            "no image given; name one in a registry, such as nvcr.io/nvidia/pytorch:26.06-py3, or a tar of docker save"
        )
    for prefix, kind in (("docker-archive:", "archive"), ("oci-archive:", "archive"), ("oci:", "layout")):
        if text.startswith(prefix):
            return _on_disk(Path(text.removeprefix(prefix)), kind)
    for prefix, tool in (
        ("containers-storage:", "podman"),
        ("podman://", "podman"),
        ("docker-daemon:", "docker"),
        ("dockerd://", "docker"),
    ):
        if text.startswith(prefix):
            if request.tool and request.tool not in disk_space.ENGINES:
                raise BadInput(f"--tool {request.tool} cannot save a local image; use {', '.join(disk_space.ENGINES)}")
            return ImageSource("engine", text.removeprefix(prefix), require_tool(request.tool or tool))

    path = Path(text).expanduser()
    if path.suffix in (".sqsh", ".sif"):
        raise BadInput(
            f"{text} needs no import: runtimes start it as it is. Set it in the recipe: "
            f"container.image: {path.absolute()}"
        )
    if text.startswith(("/", "./", "../", "~")) or path.exists() or path.suffix in (".tar", ".tgz"):
        return _on_disk(path, "layout" if path.is_dir() else "archive")
    try:
        reference = parse(text)
    except BadReference as error:
        raise BadInput(str(error)) from None
    if reference.path is not None:
        return _on_disk(reference.path, "archive")
    return ImageSource("registry", reference.name, require_tool(request.tool) if request.tool else registry_tool())


def _on_disk(path: Path, kind: str) -> ImageSource:
    path = path.expanduser().absolute()
    if not path.exists():
        raise BadInput(f"{path}: no such file")
    if kind == "layout" and not (path / "index.json").is_file():
        raise BadInput(f"{path} is a folder but not an OCI image layout (it has no index.json)")
    if kind == "archive" and not path.is_file():
        raise BadInput(f"{path} is a folder; give a .tar file, or oci:{path} for an OCI image layout")
    return ImageSource(kind, str(path))


# --- import it ------------------------------------------------------------------------------------------


def import_image(request: ImportRequest, say: Say, meter: Callable[..., Any]) -> tuple[StoredImage, bool]:
    """Fetch and convert an image unless it is stored already.

    Returns the stored image, and True if it was made now. Raises BadInput and ToolFailed.
    """
    source = resolve_source(request)
    name = image_store.file_slug(source.place)
    _make_image_folder(request.folder)
    lock = Lock(request.folder.lock(name))
    if not lock.acquire():
        say(f"another amlaunch process is importing {name} into {request.folder.root}; waiting for it")
        lock.acquire(wait=True)
    try:
        with suppress(OSError):
            # So that other users can lock it, too.
            os.chmod(lock.path, 0o666)
        return _Importer(request, source, name, lock, say, meter).run()
    except NotAnImage as error:
        raise BadInput(str(error)) from None
    finally:
        lock.release()


def _make_image_folder(folder: ImageFolder) -> None:
    try:
        (folder.root / ".work").mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            (folder.root / ".work").chmod(0o1777)
    except OSError as error:
        raise BadInput(
            f"{folder.root}: cannot create files: {error.strerror}. Choose another folder with --images DIR"
        ) from None
    if not os.access(folder.root, os.W_OK | os.X_OK):
        raise BadInput(f"{folder.root}: you have no write permission. Choose another folder with --images DIR")


@dataclass
class _Importer:
    """One import that holds the image's lock."""

    request: ImportRequest
    source: ImageSource
    name: str
    lock: Lock
    say: Say
    meter: Callable[..., Any]

    def __post_init__(self) -> None:
        self.folder = self.request.folder
        base = ImageFolder(self.request.work) if self.request.work else self.folder
        self.work = base.work_folder(self.name, os.getuid())

    def run(self) -> tuple[StoredImage, bool]:
        """Return the stored image; make it first if there is none."""
        is_one_step = self.source.kind == "registry" and self.source.tool in ONE_STEP_TOOLS
        self._check_tools(is_one_step)
        digest, size = self._query_registry()
        stored = self._find_stored(digest)
        if stored:
            return stored, False

        self.work.mkdir(parents=True, exist_ok=True)
        # An interrupted attempt leaves its files; only its downloads are reusable.
        shutil.rmtree(self.work / "rootfs", ignore_errors=True)
        if self.source.kind in ("registry", "engine"):
            self._check_space(size)
            self._check_engine_space(size)
        if is_one_step:
            return self._import_in_one_step(digest)

        with self._fetched_image(size) as image:
            digest = digest or image.digest
            stored = self._find_stored(digest)
            if stored:
                self._clean()
                return stored, False
            self._check_architecture((image.architecture,) if image.architecture else ())
            self._check_space(image.size)
            stored = self._convert(image, digest)
        self._clean()
        return stored, True

    def _check_tools(self, is_one_step: bool) -> None:
        """Raise BadInput if a tool is missing or makes another format, before anything is fetched."""
        tool, form = self.source.tool, self.request.format
        if is_one_step and form != ONE_STEP_TOOLS[tool]:
            raise BadInput(
                f"{tool} makes .{ONE_STEP_TOOLS[tool]} images, not .{form}. "
                f"Use --format {ONE_STEP_TOOLS[tool]} or another --tool"
            )
        if not is_one_step and form == "sif":
            sif_program()
        if not is_one_step and form == "sqsh":
            need_program("mksquashfs", "squashfs-tools")

    def _find_stored(self, digest: str) -> StoredImage | None:
        """Return the stored image of a digest. Raises BadInput if it is for another architecture."""
        stored = next((image for image in self._complete_images() if digest and image.digest == digest), None)
        if stored:
            self._check_architecture((stored.architecture,) if stored.architecture else ())
        return stored

    def _complete_images(self) -> Iterator[StoredImage]:
        """Yield the complete images of the requested format."""
        return (image for image in self.folder.images() if image.format == self.request.format and image.is_complete)

    def _clean(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def _check_architecture(self, available: Sequence[str]) -> None:
        """Raise BadInput if the image is for other architectures only; ``available`` is empty if that is unknown."""
        wanted = self.request.architecture
        if available and wanted not in available:
            raise BadInput(
                f"{self.request.source} is for {' and '.join(available)}, not for {wanted}. "
                f"To import it anyway, add --arch {available[0]}"
            )

    def _check_space(self, layer_bytes: int) -> None:
        """Raise BadInput if the work folder or the image folder is clearly too full; 0 is an unknown size."""
        work_bytes = WORK_SPACE_FACTOR * layer_bytes or disk_space.UNKNOWN_SIZE_FLOOR
        image_bytes = layer_bytes or disk_space.UNKNOWN_SIZE_FLOOR
        if self.request.work is None:
            check_free_space(self.folder.root, work_bytes, "--images DIR")
            return
        check_free_space(self.request.work, work_bytes, "--tmp DIR")
        if not disk_space.same_disk(self.request.work, self.folder.root):
            check_free_space(self.folder.root, image_bytes, "--images DIR")

    def _check_engine_space(self, layer_bytes: int) -> None:
        """Raise BadInput if the storage of docker, podman or buildah is clearly too full to pull an image."""
        if self.source.kind == "registry" and self.source.tool in disk_space.ENGINES:
            needed = layer_bytes or disk_space.UNKNOWN_SIZE_FLOOR
            check_engine_space(self.source.tool, self.source.place, needed)

    # --- fetch

    def _query_registry(self) -> tuple[str, int]:
        """Return the manifest's digest and the bytes of its layers, before anything is fetched.

        Both are empty if the registry does not say: the tool may still know a way to fetch the image. Raises
        ToolFailed.
        """
        if self.source.kind != "registry":
            return "", 0
        try:
            manifest = self._query_by_skopeo() if self.source.tool == "skopeo" else self._query_directly()
        except registry.RegistryError as error:
            self.say(f"the size of {self.source.place} is unknown ({error}); checking only that 1 GB is free")
            return "", 0
        self._check_architecture(manifest.architectures)
        return manifest.digest, manifest.size

    def _query_directly(self) -> registry.ImageManifest:
        return registry.fetch_manifest(
            parse(self.source.place), self.request.architecture, os.environ, insecure=self.request.insecure
        )

    def _query_by_skopeo(self) -> registry.ImageManifest:
        """Ask through skopeo, which knows its own credentials, certificates and mirrors. Raises ToolFailed."""
        repository = self.source.place.partition("@")[0]
        if ":" in repository.rpartition("/")[2]:
            repository = repository.rpartition(":")[0]
        return registry.parse_manifest(
            self._skopeo_inspect(self.source.place),
            self.request.architecture,
            lambda digest: self._skopeo_inspect(f"{repository}@{digest}"),
            parse(self.source.place).registry,
        )

    def _skopeo_inspect(self, place: str) -> bytes:
        command = image_store.skopeo_inspect(f"docker://{place}", insecure=self.request.insecure)
        try:
            result = subprocess.run(command, capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise ToolFailed(f"skopeo: no answer about {self.source.place} within 5 minutes") from None
        if result.returncode:
            raise self._failure(command, result.stderr.decode(errors="replace"))
        return result.stdout

    @contextmanager
    def _fetched_image(self, size: int) -> Iterator[LayeredImage]:
        """Fetch the image if it is not on disk, and open it. ``size``: bytes of its layers, 0 if unknown."""
        architecture = self.request.architecture
        path = Path(self.source.place)
        if self.source.kind in ("registry", "engine"):
            path = self._fetch_layout(size) if self.source.tool == "skopeo" else self._save_archive()
        is_layout = self.source.kind == "layout" or self.source.tool == "skopeo"
        with (layers.open_layout if is_layout else layers.open_archive)(path, architecture) as image:
            yield image

    def _fetch_layout(self, size: int) -> Path:
        """Copy an image by skopeo, which continues with the layers that are there."""
        layout = self.work / "layout"
        command = image_store.skopeo_copy(
            f"docker://{self.source.place}", layout, self.request.architecture, insecure=self.request.insecure
        )
        self._run_tool(command, "downloading", size, lambda: disk_space.used_bytes(layout))
        return layout

    def _save_archive(self) -> Path:
        """Pull an image with an engine unless it is in its storage, then save it as an archive."""
        tool, archive = self.source.tool, self.work / "image.tar"
        if self.source.kind == "registry":
            command = image_store.pull(
                tool, self.source.place, self.request.architecture, insecure=self.request.insecure
            )
            self._run_tool(command, f"{tool} pulls", 0, None)
        # An earlier attempt may have left part of one.
        archive.unlink(missing_ok=True)
        command = image_store.save(tool, self.source.place, archive)
        self._run_tool(command, f"{tool} saves", 0, lambda: disk_space.used_bytes(archive))
        return archive

    def _run_tool(
        self,
        command: Sequence[str],
        title: str,
        total: int,
        measure: Callable[[], int] | None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Run a tool and show its progress. Raises ToolFailed with the end of its output."""
        # The output goes to a temporary file, because the work folder may be full.
        with tempfile.TemporaryFile() as output, self.meter(title, total) as show:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(self.lock.fileno(),),
                env={**os.environ, **(env or {})},
            )
            with stopped_on_error(process):
                while process.poll() is None:
                    show(measure() if measure else 0)
                    time.sleep(0.2)
            if process.returncode:
                raise self._failure(command, content_of(output))

    def _failure(self, command: Sequence[str], output: str) -> ToolFailed:
        lines = [line for line in credentials.redact(output).splitlines() if line.strip()]
        explanation = credentials.explain_failure(command[0], self.source.place, "\n".join(lines), os.environ)
        end = "\n".join(lines[-MAX_OUTPUT_LINES:]) or "no output"
        if explanation:
            return ToolFailed(f"{explanation}\n{command[0]} printed: {end}")
        return ToolFailed(f"{command[0]} failed: {end}")

    # --- convert

    def _convert(self, image: LayeredImage, digest: str) -> StoredImage:
        unfinished = self._unfinished_file()
        if self.request.format == "sif":
            self._make_sif(unfinished)
        else:
            self._make_squashfs(image, unfinished)
        architecture = image.architecture or self.request.architecture
        return self._store(unfinished, digest, architecture, image.settings)

    def _unfinished_file(self) -> Path:
        path = self.work / f"image.{self.request.format}"
        path.unlink(missing_ok=True)
        return path

    def _make_squashfs(self, image: LayeredImage, target: Path) -> None:
        rootfs = self._unpack(image)
        command = image_store.mksquashfs(rootfs, target)
        self._run_tool(command, "compressing", 0, lambda: disk_space.used_bytes(target))

    def _unpack(self, image: LayeredImage) -> Path:
        rootfs = self.work / "rootfs"
        rootfs.mkdir()
        written = 0
        with self.meter("unpacking", 0) as show:

            def count(more: int) -> None:
                nonlocal written
                written += more
                show(written)

            try:
                layers.unpack(image, rootfs, count)
            except OSError as error:
                raise ToolFailed(
                    f"{error.filename or rootfs}: cannot unpack: {error.strerror}. "
                    "Choose another folder with --tmp DIR or --images DIR"
                ) from None
        return rootfs

    def _make_sif(self, target: Path) -> None:
        program = sif_program()
        command = image_store.apptainer_build(program, self._sif_source(), target)
        self._run_tool(
            command, f"{program} builds", 0, lambda: disk_space.used_bytes(target), self._apptainer_settings()
        )

    def _apptainer_settings(self) -> dict[str, str]:
        return {
            "APPTAINER_TMPDIR": str(self.work),
            "APPTAINER_CACHEDIR": str(self.work / "cache"),
            "SINGULARITY_TMPDIR": str(self.work),
        }

    def _sif_source(self) -> str:
        """Return what apptainer builds from; it reads layouts and archives itself."""
        if self.source.kind == "layout":
            return f"oci:{self.source.place}"
        if self.source.kind == "registry" and self.source.tool == "skopeo":
            return f"oci:{self.work / 'layout'}:image"
        path = Path(self.source.place) if self.source.kind == "archive" else self.work / "image.tar"
        return f"{layers.archive_layout(path)}-archive:{path}"

    def _import_in_one_step(self, digest: str) -> tuple[StoredImage, bool]:
        """Let enroot or apptainer fetch and convert; if the registry gave no digest, the file's own is recorded."""
        tool = self.source.tool
        stored = next((image for image in self._complete_images() if self._is_same_image(image)), None)
        if stored and not digest:
            return stored, False
        unfinished = self._unfinished_file()
        if tool == "enroot":
            for folder in ("layers", "tmp"):
                (self.work / folder).mkdir(exist_ok=True)
            command = image_store.enroot_import(self.source.place, unfinished, self.request.architecture)
            env = image_store.enroot_settings(self.work, insecure=self.request.insecure)
        else:
            source = f"docker://{self.source.place}"
            command = image_store.apptainer_build(tool, source, unfinished, insecure=self.request.insecure)
            env = self._apptainer_settings()
        self._run_tool(command, f"{tool} fetches and converts", 0, lambda: disk_space.used_bytes(self.work), env)
        digest = digest or f"sha256:{sha256_file(unfinished)}"
        stored = self._store(unfinished, digest, self.request.architecture, {})
        self._clean()
        return stored, True

    def _is_same_image(self, image: StoredImage) -> bool:
        return image.reference == self.source.place and image.architecture == self.request.architecture

    # --- store

    def _store(self, unfinished: Path, digest: str, architecture: str, settings: Mapping[str, Any]) -> StoredImage:
        """Move a finished file into the image folder, then write its record."""
        final = self.folder.image_file(self.name, digest, self.request.format)
        unfinished.chmod(0o644)
        _fsync(unfinished)
        self.folder.record(final).unlink(missing_ok=True)
        if disk_space.same_disk(unfinished, self.folder.root):
            os.replace(unfinished, final)
        else:
            copy = final.with_name(f".{final.name}.{os.getpid()}.tmp")
            shutil.copyfile(unfinished, copy)
            _fsync(copy)
            os.replace(copy, final)
        fsync_folder(self.folder.root)

        programs = [name for name in ("mksquashfs", self.source.tool) if name]
        stored = StoredImage(
            path=str(final),
            source=self.request.origin or self.request.source,
            reference=self.source.reference,
            digest=digest,
            format=self.request.format,
            size=final.stat().st_size,
            date=time.strftime("%Y-%m-%dT%H:%M:%S"),
            architecture=architecture,
            by=f"{_user()}@{platform.node()}",
            tools={name: version for name in programs if (version := version_of(name))},
            settings={key: settings[key] for key in ("Env", "Entrypoint", "Cmd", "WorkingDir") if settings.get(key)},
        )
        write_json(self.folder.record(final), stored.to_json())
        self.folder.record(final).chmod(0o644)
        return stored


def _fsync(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
