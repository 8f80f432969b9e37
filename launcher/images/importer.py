"""Fetch an image with what the site has, and convert it once, for all nodes: atomic, locked, and resumable.

A download lands in the folder's ``.work``, layer by layer; whoever is interrupted or killed goes on from the layers
that are there. The converted file is made beside it and renamed, and its record comes last: an image with a record is
whole. Whoever comes second waits for the first, and finds the image done.
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

from amlaunch.containers.disk_space import same_disk, used
from amlaunch.containers.images import credentials, image_store, layers, registry
from amlaunch.containers.images.image_store import ImageFolder, StoredImage
from amlaunch.containers.images.layers import Layered, NotAnImage
from amlaunch.containers.images.reference import BadReference, parse
from amlaunch.launcher.images.disk_space import ONE_TOOL, Room, check
from amlaunch.launcher.images.tools import (
    Say,
    ToolFailed,
    content_of,
    ended,
    need_program,
    reads_tar,
    registry_tool,
    sif_program,
    there,
    version_of,
)
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import Lock, fsync_folder, sha256_file, write_json

LAST_WORDS = 6


@dataclass(frozen=True)
class Request:
    """What to import, and how."""

    source: str
    folder: ImageFolder
    format: str
    architecture: str
    tool: str | None = None
    """None: the best that is there."""
    work: Path | None = None
    """Where downloads and half-made files go; None: into the folder."""
    insecure: bool = False
    origin: str = ""
    """What the record says instead of ``source``: of a build, its base."""


@dataclass(frozen=True)
class Source:
    """What a request's source turned out to be."""

    kind: str
    """registry, engine, archive or layout."""
    place: str
    """A reference in one spelling, or an absolute path."""
    tool: str = ""

    @property
    def reference(self) -> str:
        """The image's name in a registry; empty for an archive."""
        return self.place if self.kind in ("registry", "engine") else ""


# --- what is asked for ----------------------------------------------------------------------------------


def look(request: Request) -> Source:
    """Say what a source is. Raises BadInput with what is missing, or how it is written."""
    text = request.source.strip()
    if not text:
        raise BadInput("which image? a name as nvcr.io/nvidia/pytorch:25.08-py3, or a tar of docker save")
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
            return Source("engine", text.removeprefix(prefix), there(request.tool or tool))
    path = Path(text).expanduser()
    if path.suffix in (".sqsh", ".sif"):
        raise BadInput(
            f"{text} is an image that runtimes start as it is: name it in the recipe, container.image: {path.absolute()}"
        )
    if text.startswith(("/", "./", "../", "~")) or path.exists() or path.suffix in (".tar", ".tgz"):
        return _on_disk(path, "layout" if path.is_dir() else "archive")
    try:
        reference = parse(text)
    except BadReference as error:
        raise BadInput(str(error)) from None
    if reference.path is not None:
        return _on_disk(reference.path, "archive")
    return Source("registry", reference.name, there(request.tool) if request.tool else registry_tool())


def _on_disk(path: Path, kind: str) -> Source:
    path = path.expanduser().absolute()
    if not path.exists():
        raise BadInput(f"there is no file {path}")
    if kind == "layout" and not (path / "index.json").is_file():
        raise BadInput(
            f"{path} is a folder, and not an OCI image layout (it has no index.json); a root file system is given as a tar: tar -C {path} -cf image.tar ."
        )
    if kind == "archive" and not path.is_file():
        raise BadInput(f"{path} is a folder; a tar was expected, or oci:{path} for an OCI image layout")
    return Source(kind, str(path))


# --- the way from a source to a file --------------------------------------------------------------------


def import_image(request: Request, say: Say, meter: Callable[..., Any]) -> tuple[StoredImage, bool]:
    """Fetch and convert; the image, and whether it had to be made. Raises BadInput and ToolFailed."""
    source = look(request)
    name = image_store.slug(source.place)
    _make_folder(request.folder)
    lock = Lock(request.folder.lock(name))
    if not lock.acquire():
        say(f"another amlaunch imports {name} into {request.folder.root}; waiting for it")
        lock.acquire(wait=True)
    try:
        with suppress(OSError):
            os.chmod(lock.path, 0o666)  # so that colleagues can take it, too
        return _Import(request, source, name, lock, say, meter).run()
    except NotAnImage as error:
        raise BadInput(str(error)) from None
    finally:
        lock.release()


def _make_folder(folder: ImageFolder) -> None:
    try:
        (folder.root / ".work").mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            (folder.root / ".work").chmod(0o1777)
    except OSError as error:
        raise BadInput(
            f"{folder.root}: cannot be written: {error.strerror}; --images DIR names another folder"
        ) from None
    if not os.access(folder.root, os.W_OK | os.X_OK):
        raise BadInput(f"{folder.root}: you may not write there; --images DIR names another folder")


@dataclass
class _Import:
    """One import, with the lock held."""

    request: Request
    source: Source
    name: str
    lock: Lock
    say: Say
    meter: Callable[..., Any]

    def __post_init__(self) -> None:
        self.folder = self.request.folder
        work = ImageFolder(self.request.work) if self.request.work else self.folder
        self.work = work.work(self.name, os.getuid())

    def run(self) -> tuple[StoredImage, bool]:
        """Everything, or nothing where it is there already."""
        one_tool = self.source.kind == "registry" and self.source.tool in ONE_TOOL
        makes = "sqsh" if self.source.tool == "enroot" else "sif"
        if one_tool and self.request.format != makes:
            raise BadInput(f"{self.source.tool} makes .{makes} images; --format {makes}, or another --tool")
        digest, size = self._in_registry()
        found = self._there(digest)
        if found:
            return found, False
        self.work.mkdir(parents=True, exist_ok=True)
        if size:
            check(self.room.to_fetch(self.source.tool, size, self._done(), os.environ), self.say)
        if one_tool:
            return self._by_one_tool(digest)
        with self._fetched(size) as image:
            digest = digest or image.digest
            found = self._there(digest)
            if found:
                self._clean()
                return found, False
            self._check_architecture((image.architecture,) if image.architecture else ())
            check([self.room.to_convert(image.size)], self.say)
            made = self._convert(image, digest)
        self._clean()
        return made, True

    def _there(self, digest: str) -> StoredImage | None:
        """The image of a digest, where it is in the folder. Raises BadInput for one that is made for another architecture."""
        found = next((one for one in self._stored() if digest and one.digest == digest), None)
        if found:
            self._check_architecture((found.architecture,) if found.architecture else ())
        return found

    def _stored(self) -> Iterator[StoredImage]:
        """Whole ones of the format that is asked for."""
        return (one for one in self.folder.images() if one.format == self.request.format and one.whole)

    def _clean(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def _check_architecture(self, made: Sequence[str]) -> None:
        """``made``: for which it is; empty: nobody says. Raises BadInput."""
        wanted = self.request.architecture
        if made and wanted not in made:
            raise BadInput(
                f"{self.request.source} is made for {' and '.join(made)}, not for {wanted}; --arch {made[0]} says that this is meant"
            )

    @property
    def room(self) -> Room:
        """Where its files go."""
        unpacks = self.request.format != "sqsh" or not reads_tar() or self.source.tool == "enroot"
        return Room(self.folder.root, self.request.work, unpacks, self.source.place)

    def _done(self) -> int:
        """Bytes of the layers that an earlier try left."""
        return sum(_size_of(self.work / name) for name in ("layout", "layers", "cache"))

    # --- fetching

    def _in_registry(self) -> tuple[str, int]:
        """Digest of the manifest for our architecture, and the bytes of its layers, before anything is fetched.

        Empty and 0 where nobody says: that is no reason to refuse, for the tool may know more than we do. Raises ToolFailed.
        """
        if self.source.kind != "registry":
            return "", 0
        try:
            found = self._asked_by_skopeo() if self.source.tool == "skopeo" else self._asked()
        except registry.Unanswered as error:
            then = "is not looked for" if self.source.tool in ONE_TOOL else "is looked for once it is here"
            self.say(f"how large {self.source.place} is, is not known ({error}); room for it {then}")
            return "", 0
        self._check_architecture(found.architectures)
        return found.digest, found.size

    def _asked(self) -> registry.Manifest:
        return registry.look(
            parse(self.source.place), self.request.architecture, os.environ, insecure=self.request.insecure
        )

    def _asked_by_skopeo(self) -> registry.Manifest:
        """By the tool itself, which knows its own credentials, certificates and mirrors. Raises ToolFailed."""
        bare = self.source.place.partition("@")[0]
        bare = bare.rpartition(":")[0] if ":" in bare.rpartition("/")[2] else bare
        raw = self._inspected(self.source.place)
        return registry.read(
            raw,
            self.request.architecture,
            lambda digest: self._inspected(f"{bare}@{digest}"),
            parse(self.source.place).registry,
        )

    def _inspected(self, place: str) -> bytes:
        return self._ask(image_store.skopeo_inspect(f"docker://{place}", insecure=self.request.insecure))

    def _ask(self, command: Sequence[str]) -> bytes:
        try:
            found = subprocess.run(command, capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise ToolFailed(f"{command[0]}: no answer in 5 minutes about {self.source.place}") from None
        if found.returncode:
            raise self._failure(command, found.stderr.decode(errors="replace"))
        return found.stdout

    @contextmanager
    def _fetched(self, size: int) -> Iterator[Layered]:
        """The image's layers on disk."""
        architecture = self.request.architecture
        if self.source.kind == "archive":
            with layers.open_archive(Path(self.source.place), architecture) as image:
                yield image
        elif self.source.kind == "layout":
            with layers.open_layout(Path(self.source.place), architecture) as image:
                yield image
        elif self.source.kind == "registry" and self.source.tool == "skopeo":
            layout = self.work / "layout"
            command = image_store.skopeo_copy(
                f"docker://{self.source.place}", layout, architecture, insecure=self.request.insecure
            )
            self._carry_out(command, "downloading", size, lambda: _size_of(layout))
            with layers.open_layout(layout, architecture) as image:
                yield image
        else:
            tool, archive = self.source.tool, self.work / "image.tar"
            if self.source.kind == "registry":
                self._carry_out(
                    image_store.pull(tool, self.source.place, architecture, insecure=self.request.insecure),
                    f"{tool} pulls",
                    0,
                    None,
                )
            archive.unlink(missing_ok=True)  # of an earlier try, and perhaps torn
            self._carry_out(
                image_store.save(tool, self.source.place, archive), f"{tool} saves", 0, lambda: _size_of(archive)
            )
            with layers.open_archive(archive, architecture) as image:
                yield image

    def _carry_out(
        self,
        command: Sequence[str],
        title: str,
        total: int,
        done: Callable[[], int] | None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Run a tool, showing how far it is. Raises ToolFailed with its last words."""
        with tempfile.TemporaryFile() as output, self.meter(title, total) as meter:  # not in a folder that may be full
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(self.lock.fileno(),),
                env={**os.environ, **(env or {})},
            )
            with ended(process):
                while process.poll() is None:
                    meter(done() if done else 0)
                    time.sleep(0.2)
            if process.returncode:
                raise self._failure(command, content_of(output))

    def _failure(self, command: Sequence[str], said: str) -> ToolFailed:
        lines = [line for line in credentials.without_secrets(said).splitlines() if line.strip()]
        meaning = credentials.explain(command[0], self.source.place, "\n".join(lines), os.environ)
        last = "\n".join(lines[-LAST_WORDS:]) or "no word"
        return ToolFailed(f"{meaning}\n{command[0]} said: {last}" if meaning else f"{command[0]} failed: {last}")

    # --- converting

    def _convert(self, image: Layered, digest: str) -> StoredImage:
        half = self.work / f"image.{self.request.format}"
        half.unlink(missing_ok=True)
        if self.request.format == "sif":
            self._make_sif(image, half)
        else:
            self._make_squashfs(image, half)
        return self._keep(half, digest, image.architecture or self.request.architecture, image.settings)

    def _make_squashfs(self, image: Layered, target: Path) -> None:
        need_program("mksquashfs", "squashfs-tools")
        if reads_tar():
            self._pour(image, image_store.mksquashfs("-", target, tar=True), "converting")
            return
        rootfs = self._unpack(image)
        self._carry_out(
            image_store.mksquashfs(str(rootfs), target, tar=False), "compressing", 0, lambda: _size_of(target)
        )

    def _unpack(self, image: Layered) -> Path:
        rootfs = self.work / "rootfs"
        shutil.rmtree(rootfs, ignore_errors=True)
        rootfs.mkdir()
        self._pour(image, image_store.untar(rootfs), "unpacking")
        return rootfs

    def _pour(self, image: Layered, command: Sequence[str], title: str) -> None:
        """The image's files as a tar into a tool's stdin. Raises NotAnImage and ToolFailed."""
        read = 0
        with tempfile.TemporaryFile() as output, self.meter(title, image.size) as meter:

            def count(more: int) -> None:
                nonlocal read
                read += more
                meter(read)

            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, pass_fds=(self.lock.fileno(),)
            )
            with ended(process):
                assert process.stdin
                with suppress(BrokenPipeError), process.stdin as pipe:  # else it has ended by itself, and says why
                    layers.merge(image, pipe, layers.runtime_files(image.settings), count)
                process.wait()
            if process.returncode:
                raise self._failure(command, content_of(output))

    def _make_sif(self, image: Layered, target: Path) -> None:
        program = sif_program()
        source = str(self._unpack(image)) if not image.config else self._sif_source()
        settings = {
            "APPTAINER_TMPDIR": str(self.work),
            "APPTAINER_CACHEDIR": str(self.work / "cache"),
            "SINGULARITY_TMPDIR": str(self.work),
        }
        self._carry_out(
            image_store.apptainer_build(program, source, target),
            f"{program} builds",
            0,
            lambda: _size_of(target),
            settings,
        )

    def _sif_source(self) -> str:
        if self.source.kind == "layout":
            return f"oci:{self.source.place}"
        if self.source.kind == "registry" and self.source.tool == "skopeo":
            return f"oci:{self.work / 'layout'}:image"
        path = Path(self.source.place) if self.source.kind == "archive" else self.work / "image.tar"
        return f"{layers.archive_layout(path)}-archive:{path}"

    def _by_one_tool(self, digest: str) -> tuple[StoredImage, bool]:
        """enroot and apptainer fetch and convert in one go; the digest is that of the file they make where the registry said none."""
        tool = self.source.tool
        found = next(
            (
                one
                for one in self._stored()
                if one.reference == self.source.place and one.architecture == self.request.architecture
            ),
            None,
        )
        if found and not digest:
            return found, False
        half = self.work / f"image.{self.request.format}"
        half.unlink(missing_ok=True)
        if tool == "enroot":
            for folder in ("layers", "tmp"):
                (self.work / folder).mkdir(exist_ok=True)
            command, env = (
                image_store.enroot_import(self.source.place, half, self.request.architecture),
                image_store.enroot_settings(self.work, insecure=self.request.insecure),
            )
        else:
            command = image_store.apptainer_build(
                tool, f"docker://{self.source.place}", half, insecure=self.request.insecure
            )
            env = {
                "APPTAINER_TMPDIR": str(self.work),
                "APPTAINER_CACHEDIR": str(self.work / "cache"),
                "SINGULARITY_TMPDIR": str(self.work),
            }
        self._carry_out(command, f"{tool} fetches and converts", 0, lambda: _size_of(self.work), env)
        made = self._keep(half, digest or f"sha256:{sha256_file(half)}", self.request.architecture, {})
        self._clean()
        return made, True

    def _keep(self, half: Path, digest: str, architecture: str, settings: Mapping[str, Any]) -> StoredImage:
        """Put a made file in its place, and its record beside it, last."""
        final = self.folder.path(self.name, digest, self.request.format)
        half.chmod(0o644)
        with open(half, "rb") as handle:
            os.fsync(handle.fileno())
        self.folder.record(final).unlink(missing_ok=True)
        if same_disk(half, self.folder.root):
            os.replace(half, final)
        else:
            beside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
            shutil.copyfile(half, beside)
            with open(beside, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(beside, final)
        fsync_folder(self.folder.root)
        made = StoredImage(
            path=str(final),
            source=self.request.origin or self.request.source,
            reference=self.source.reference,
            digest=digest,
            format=self.request.format,
            size=final.stat().st_size,
            date=time.strftime("%Y-%m-%dT%H:%M:%S"),
            architecture=architecture,
            by=f"{_user()}@{platform.node()}",
            tools={
                name: version for name in ("mksquashfs", self.source.tool) if name and (version := version_of(name))
            },
            settings={key: settings[key] for key in ("Env", "Entrypoint", "Cmd", "WorkingDir") if settings.get(key)},
        )
        write_json(self.folder.record(final), made.to_json())
        self.folder.record(final).chmod(0o644)
        return made


def _size_of(path: Path) -> int:
    """Bytes at or below a path, as they are now."""
    return path.stat().st_size if path.is_file() else used(path)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
