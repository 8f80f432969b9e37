"""An image's layers as one file system: a single tar stream, made in one pass, without unpacking anything to disk.

Formats: https://github.com/opencontainers/image-spec (layer.md: whiteouts; image-layout.md), and docker's own archive
(``docker save``: ``manifest.json``). What is written into the stream for enroot and Charliecloud, which find an image's
environment and entrypoint in files, is what their manuals describe (enroot doc/image-format.md, ch-run(1) ``--set-env``).
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import posixpath
import re
import shlex
import shutil
import subprocess
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
BUFFER = 1 << 20
FOLDERS = {"dev": 0o755, "etc": 0o755, "proc": 0o555, "run": 0o755, "sys": 0o555, "tmp": 0o1777}
"""Where runtimes mount something, whether or not the image has them."""
FILES = ("etc/passwd", "etc/group", "etc/hosts", "etc/resolv.conf")
"""The same of files; enroot, apptainer and Charliecloud put the host's over them."""
Opener = Callable[[], IO[bytes]]


class NotAnImage(ValueError):
    """A file or folder that holds no image that we can read; the message says why."""


@dataclass(frozen=True)
class Layered:
    """An image on disk: its configuration and its layers, lowest first."""

    digest: str
    """``sha256:...`` of its manifest (OCI) or of its configuration (docker)."""
    config: Mapping[str, Any]
    layers: Sequence[Opener]
    size: int
    """Bytes of all layers as they are stored."""

    @property
    def architecture(self) -> str:
        """``amd64``, ``arm64``; empty: it does not say."""
        return str(self.config.get("architecture", ""))

    @property
    def settings(self) -> Mapping[str, Any]:
        """Env, Entrypoint, Cmd, WorkingDir, Labels."""
        found = self.config.get("config")
        return found if isinstance(found, Mapping) else {}


SAVED = re.compile(r"(blobs(/.*)?|oci-layout|index\.json|manifest\.json|repositories|[0-9a-f]{64}(/.*|\.json|\.tar)?)$")
"""Names at the top of an OCI layout, and of what docker save writes."""

ENOUGH_NAMES, MOST_NAMES = 100, 20_000
"""So many at the beginning of a tar tell an image from a root file system; more than that is in no image that was saved."""


# --- where the layers are -------------------------------------------------------------------------------


@contextmanager
def open_layout(folder: Path, architecture: str) -> Iterator[Layered]:
    """An OCI image layout. Raises NotAnImage."""
    yield _oci(str(folder), lambda name: _reading(folder / name), architecture)


def archive_layout(path: Path) -> str:
    """How a tar of an image is laid out: ``docker`` (docker save) or ``oci``; ``docker``, too, where it cannot be read.

    What docker 25 and newer save is both, so where a tar is compressed its first names will do: nobody waits for all of it.
    """
    with suppress(tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError):
        if magic_of(path) is not None:
            return (
                "oci"
                if any(name.partition("/")[0] in ("blobs", "index.json", "oci-layout") for name in _first_names(path))
                else "docker"
            )
        with tarfile.open(path, "r:") as tar:
            names = {posixpath.normpath(member.name) for member in tar}
            return "oci" if "oci-layout" in names and "manifest.json" not in names else "docker"
    return "docker"


def why_no_image(path: Path) -> str:
    """Why a runtime will start nothing of a file; empty where it may, or where that would take long to know."""
    try:
        if magic_of(path) is not None:
            known = any(SAVED.match(name) for name in _first_names(path))
        else:
            with tarfile.open(path, "r:") as tar:
                known = _is_saved(posixpath.normpath(member.name) for member in tar)
    except (PermissionError, NotAnImage):
        return ""
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        return f"is not a tar archive, or a torn one ({error})"
    return "" if known else "is a tar of something else than an image (it has no manifest.json and no index.json)"


def _is_saved(names: Iterator[str]) -> bool:
    """Whether an archive has the file that names its layers, which may stand at its end; of a root file system not all names are read."""
    like = 0
    for number, name in enumerate(names):
        if name in ("manifest.json", "index.json") or number > MOST_NAMES:
            return True
        like += SAVED.match(name) is not None
        if number > ENOUGH_NAMES and not like:
            return False
    return False


@contextmanager
def open_archive(path: Path, architecture: str) -> Iterator[Layered]:
    """A tar of an OCI layout or of ``docker save``; a tar of anything else is one layer, a root file system.

    Raises NotAnImage.
    """
    with ExitStack() as stack:
        if magic_of(path) is not None:
            if _looks_saved(path):
                raise NotAnImage(
                    f"{path} is a compressed archive of docker save, or of an OCI layout, which is read as it is: gunzip --keep it, and import that"
                )
            yield _root_file_system(path)
            return
        try:
            tar = stack.enter_context(tarfile.open(path, "r:"))
            names = {posixpath.normpath(member.name): member for member in tar}
        except (tarfile.TarError, EOFError) as error:
            raise NotAnImage(f"{path} is not a tar archive, or a torn one ({error})") from None

        def read(name: str) -> IO[bytes]:
            member = names.get(posixpath.normpath(name))
            found = tar.extractfile(member) if member else None
            if found is None:
                raise NotAnImage(f"{path} has no {name}: a torn archive, or not an image")
            return found

        if "manifest.json" in names:
            yield _docker(str(path), read, names)
        elif "index.json" in names:
            yield _oci(str(path), read, architecture)
        else:
            yield _root_file_system(path)


def _looks_saved(path: Path) -> bool:
    """Whether a compressed tar begins as an image that was saved does, not as a root file system."""
    with suppress(tarfile.TarError, EOFError, OSError):  # torn: said where it is read
        return any(SAVED.match(name) for name in _first_names(path))
    return False


def _first_names(path: Path) -> list[str]:
    """Some names at the beginning of a compressed tar, which is not read to its end."""
    with open(path, "rb") as handle, decompressed(handle) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
        return [posixpath.normpath(member.name) for member, _ in zip(tar, range(8), strict=False)]


def _reading(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise NotAnImage(f"{path}: {error.strerror}: the layout is not whole") from None


def _oci(place: str, read: Callable[[str], IO[bytes]], architecture: str) -> Layered:
    index = _json(place, read("index.json"))
    entry = _choose(place, index.get("manifests") or [], architecture)
    manifest = _json(place, read(_blob(entry["digest"])))
    if "manifests" in manifest:  # an index of its own: one manifest for each architecture
        entry = _choose(place, manifest["manifests"], architecture)
        manifest = _json(place, read(_blob(entry["digest"])))
    try:
        config = _json(place, read(_blob(manifest["config"]["digest"])))
        layers = [_blob(layer["digest"]) for layer in manifest["layers"]]
        size = sum(int(layer["size"]) for layer in manifest["layers"])
    except (KeyError, TypeError) as error:
        raise NotAnImage(f"{place}: its manifest lacks {error}") from None
    return Layered(entry["digest"], config, [lambda name=name: read(name) for name in layers], size)  # type: ignore[misc]


def _choose(place: str, manifests: Sequence[Mapping[str, Any]], architecture: str) -> Mapping[str, Any]:
    """The manifest for an architecture; one without a word about it is for any."""
    if not manifests:
        raise NotAnImage(f"{place} names no image")
    known = [str((entry.get("platform") or {}).get("architecture", "")) for entry in manifests]
    for entry, name in zip(manifests, known, strict=True):
        if name in (architecture, ""):
            return entry
    raise NotAnImage(f"{place} has images for {', '.join(sorted(set(known) - {'unknown'}))}, none for {architecture}")


def _docker(place: str, read: Callable[[str], IO[bytes]], names: Mapping[str, tarfile.TarInfo]) -> Layered:
    found = _json(place, read("manifest.json"))
    if not isinstance(found, list) or len(found) != 1:
        raise NotAnImage(f"{place} holds {len(found)} images; save one of them: docker save IMAGE -o FILE")
    try:
        name, layers = str(found[0]["Config"]), [str(layer) for layer in found[0]["Layers"]]
    except (KeyError, TypeError) as error:
        raise NotAnImage(f"{place}: its manifest.json lacks {error}") from None
    digest = "sha256:" + posixpath.basename(name).removesuffix(".json")
    size = sum(names[posixpath.normpath(layer)].size for layer in layers if posixpath.normpath(layer) in names)
    return Layered(digest, _json(place, read(name)), [lambda name=name: read(name) for name in layers], size)  # type: ignore[misc]


def _root_file_system(path: Path) -> Layered:
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(BUFFER):
            digest.update(chunk)
    return Layered(f"sha256:{digest.hexdigest()}", {}, [lambda: open(path, "rb")], path.stat().st_size)


def _json(place: str, handle: IO[bytes]) -> Any:
    with handle:
        try:
            return json.load(handle)
        except ValueError as error:
            raise NotAnImage(f"{place}: damaged ({error})") from None


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


# --- one layer ------------------------------------------------------------------------------------------

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}


def magic_of(path: Path) -> str | None:
    """How a file is compressed; None: not at all."""
    with open(path, "rb") as handle:
        return _kind(handle.read(8))


def _kind(start: bytes) -> str | None:
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)


@contextmanager
def decompressed(handle: IO[bytes]) -> Iterator[IO[bytes]]:
    """The tar in a layer, whatever it is compressed with. Raises NotAnImage where nothing here reads zstd."""
    start = handle.read(8)
    handle.seek(0)
    kind = _kind(start)
    if kind == "zstd":
        with _zstd(handle) as plain:
            yield plain
    elif kind == "gzip":
        yield gzip.GzipFile(fileobj=handle)  # type: ignore[misc]
    elif kind == "xz":
        yield lzma.LZMAFile(handle)
    elif kind == "bzip2":
        yield bz2.BZ2File(handle)
    else:
        yield handle


@contextmanager
def _zstd(handle: IO[bytes]) -> Iterator[IO[bytes]]:
    """Python can read zstd from 3.14 on; the program is on every machine that makes images."""
    program = shutil.which("zstd") or shutil.which("unzstd")
    if program is None:
        raise NotAnImage("a layer is compressed with zstd, and there is no zstd here to read it: install zstd")
    with subprocess.Popen([program, "-dcq"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout

        def feed(pipe: IO[bytes]) -> None:
            with suppress(BrokenPipeError), pipe:
                shutil.copyfileobj(handle, pipe, BUFFER)

        thread = threading.Thread(target=feed, args=(process.stdin,), daemon=True)
        thread.start()
        try:
            yield process.stdout
        finally:
            process.stdout.close()
            process.wait()
            thread.join()


# --- all of them as one ---------------------------------------------------------------------------------


@dataclass
class _Merge:
    """What the layers above have shown, while the stream is made from the top down."""

    out: tarfile.TarFile
    shown: set[str] = field(default_factory=set)
    """Names that are in the stream; what a lower layer has under them is not seen."""
    closed: set[str] = field(default_factory=set)
    """Names below which nothing of a lower layer is seen: removed, replaced by a file, or opaque."""
    orphans: dict[tuple[int, str], list[tarfile.TarInfo]] = field(default_factory=dict)
    """Hard links to a file whose own name is hidden, by layer and that name."""

    def hidden(self, name: str) -> bool:
        """Whether a layer above hides what lies under a name."""
        if "" in self.closed:
            return True
        part = name
        while part:
            if part in self.closed:
                return True
            part = part.rpartition("/")[0]
        return name in self.shown

    def add(self, info: tarfile.TarInfo, content: IO[bytes] | None) -> None:
        """Put an entry into the stream."""
        self.shown.add(info.name)
        self.out.addfile(info, content)


def merge(image: Layered, out: IO[bytes], files: Mapping[str, tuple[bytes, int]], count: Callable[[int], None]) -> None:
    """Write the file system of an image as a tar to ``out``.

    ``files`` (name: content and mode) lie above all layers. ``count`` is told of every piece of the layers that was
    read, in bytes as they are stored. The top layer comes first, and each name once, so nothing is written that a later
    entry would replace; devices and what lies in /dev are left out. Raises NotAnImage.
    """
    with _damage_told(), tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        tar.copybufsize = BUFFER  # type: ignore[attr-defined]
        state = _Merge(tar)
        for name, (content, mode) in files.items():
            state.add(_made(name, mode, len(content)), io.BytesIO(content))
        for number in range(len(image.layers) - 1, -1, -1):
            _merge_layer(state, number, image.layers[number], count)
        _find_orphans(state, image)
        workdir = _plain(
            str(image.settings.get("WorkingDir") or "")
        )  # where it starts, and nobody can make it in a read-only image
        for name, mode in {**FOLDERS, workdir: 0o755}.items():
            if name and not state.hidden(name):
                state.add(_made(name, mode, None), None)
        for name in FILES:
            if not state.hidden(name):
                state.add(_made(name, 0o644, 0), io.BytesIO())


@contextmanager
def _damage_told() -> Iterator[None]:
    """What a torn or spoilt layer raises, in one word; what the output raises has a number of its own."""
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise NotAnImage(f"a layer is damaged ({error}); remove what was downloaded, or save the image again") from None


def _made(name: str, mode: int, size: int | None) -> tarfile.TarInfo:
    """An entry of our own: a file of a size, or a folder."""
    info = tarfile.TarInfo(name)
    info.mode = mode
    info.type = tarfile.DIRTYPE if size is None else tarfile.REGTYPE
    info.size = size or 0
    return info


def _merge_layer(state: _Merge, number: int, layer: Opener, count: Callable[[int], None]) -> None:
    """Show what no layer above hides. What this layer removes counts for those below it alone."""
    closed: set[str] = set()
    mine: set[str] = set()
    for info, content in _entries(layer, count):
        folder, _, last = info.name.rpartition("/")
        if last == OPAQUE:
            closed.add(folder)
        elif last.startswith(WHITEOUT):
            closed.add(posixpath.join(folder, last[len(WHITEOUT) :]))
        elif info.name and not _is_device(info):
            if not info.isdir():  # it hides what is below its name, and is hidden itself, perhaps
                closed.add(info.name)
            if state.hidden(info.name):
                continue
            if info.islnk() and info.linkname not in mine:
                state.orphans.setdefault((number, info.linkname), []).append(info)
                state.shown.add(info.name)
            else:
                state.add(info, content)
                mine.add(info.name)
    state.closed |= closed


def _entries(layer: Opener, count: Callable[[int], None]) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """The entries of a layer, by names without ``./`` and ``/`` before them."""
    with (
        layer() as handle,
        decompressed(_Counted(handle, count)) as plain,  # type: ignore[arg-type]
        tarfile.open(fileobj=plain, mode="r|") as tar,
    ):
        for info in tar:
            content = tar.extractfile(info) if info.isreg() else None
            if info.issparse():  # read whole, it is written as any other
                info.type, info.sparse = tarfile.REGTYPE, None
                info.pax_headers = {
                    key: value for key, value in info.pax_headers.items() if not key.startswith("GNU.sparse")
                }
            info.name = _plain(info.name)
            if info.islnk():
                info.linkname = _plain(info.linkname)
            yield info, content


def _plain(name: str) -> str:
    """A name below the root, whatever the archive's own way to write it. Raises NotAnImage for one that leads out."""
    found = posixpath.normpath("/" + name).lstrip("/")
    if ".." in name.split("/"):
        raise NotAnImage(f"a layer holds the name {name!r}, which leads out of the image")
    return found


def _is_device(info: tarfile.TarInfo) -> bool:
    return info.ischr() or info.isblk() or info.name.startswith("dev/")


def _find_orphans(state: _Merge, image: Layered) -> None:
    """Give hard links whose file is hidden by a layer above the content of that file; the first becomes the file."""
    for number in range(len(image.layers) - 1, -1, -1):
        waiting = {name: links for (layer, name), links in state.orphans.items() if layer >= number and links}
        if not waiting:
            continue
        for info, content in _entries(image.layers[number], lambda _: None):
            for key in (
                [key for key in state.orphans if key[1] == info.name and key[0] >= number]
                if info.name in waiting and info.isreg()
                else []
            ):
                first, *others = state.orphans.pop(key)
                info.name = first.name
                state.add(info, content)
                for link in others:
                    link.linkname = first.name
                    state.add(link, None)
    if state.orphans:
        (_, name), links = next(iter(state.orphans.items()))
        raise NotAnImage(f"a layer links {links[0].name} to {name}, which is in no layer")


class _Counted(io.RawIOBase):
    """A file that tells how much of it was read."""

    def __init__(self, handle: IO[bytes], count: Callable[[int], None]):
        self.handle = handle
        self.count = count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.handle.read(len(buffer))
        buffer[: len(data)] = data
        self.count(len(data))
        return len(data)

    def read(self, size: int = -1) -> bytes:
        data = self.handle.read(size)
        self.count(len(data))
        return data

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        return self.handle.seek(place, whence)


# --- what a runtime finds in files ----------------------------------------------------------------------


def runtime_files(settings: Mapping[str, Any]) -> dict[str, tuple[bytes, int]]:
    """The image's environment, entrypoint and working directory, where enroot and Charliecloud look for them."""
    variables = [str(line) for line in settings.get("Env") or [] if "\n" not in str(line)]
    environment = "".join(f"{line}\n" for line in variables).encode()
    return {
        "etc/rc": (_start_script(settings).encode(), 0o755),
        "etc/rc.local": (b"", 0o644),
        "etc/environment": (environment, 0o644),
        "etc/fstab": (b"", 0o644),
        "ch/environment": (environment, 0o644),
    }


def _start_script(settings: Mapping[str, Any]) -> str:
    """What enroot runs with the command as its arguments: a change of folder, then the entrypoint."""
    folder = shlex.quote(str(settings.get("WorkingDir") or "/"))
    entrypoint = shlex.join(map(str, settings.get("Entrypoint") or []))
    default = shlex.join(map(str, settings.get("Cmd") or [])) or ("" if entrypoint else "/bin/sh")
    return (
        "#!/bin/sh\n# made from the image's own configuration by amlaunch image import\n"
        f"mkdir -p {folder} 2>/dev/null\ncd {folder} || exit 1\nunset OLDPWD\n"
        "if [ -s /etc/rc.local ]; then . /etc/rc.local; fi\n"
        f'if [ $# -eq 0 ]; then set -- {default}; fi\nexec {entrypoint + " " if entrypoint else ""}"$@"\n'
    )
