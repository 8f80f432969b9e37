"""Read saved images, and unpack one into a folder that ``mksquashfs`` can pack.

skopeo fetches layers and docker and podman save them, but none of these merges layers outside of its own storage, and
mksquashfs packs only a plain folder. The formats are OCI layouts (https://github.com/opencontainers/image-spec:
layer.md, image-layout.md) and docker archives (``docker save``, with a ``manifest.json``). enroot and Charliecloud read
an image's environment and entrypoint from files, which are written here as their manuals describe (enroot
doc/image-format.md, ch-run(1) ``--set-env``).
"""

from __future__ import annotations

import json
import lzma
import os
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
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

WHITEOUT_PREFIX, OPAQUE_MARKER = ".wh.", ".wh..wh..opq"
BUFFER_BYTES = 1 << 20
MOUNT_FOLDERS = {"dev": 0o755, "etc": 0o755, "proc": 0o755, "run": 0o755, "sys": 0o755, "tmp": 0o1777}
"""Folders that runtimes mount something on, whether or not the image has them."""
MOUNT_FILES = ("etc/passwd", "etc/group", "etc/hosts", "etc/resolv.conf")
"""Files that enroot, apptainer and Charliecloud mount the host's over."""
COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}
SAVED_IMAGE_NAMES = re.compile(
    r"(blobs(/.*)?|oci-layout|index\.json|manifest\.json|repositories|[0-9a-f]{64}(/.*|\.json|\.tar)?)$"
)
"""Names at the top of an OCI layout and of a docker archive."""
MAX_NAMES, MAX_COMPRESSED_NAMES = 20_000, 8
"""Names of an archive to look at. Reading on in a compressed one means decompressing all of it."""
TAR_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
"""Exceptions that reading a damaged tar raises."""

LayerOpener = Callable[[], IO[bytes]]


class NotAnImage(ValueError):
    """A file or folder without an image that can be read; the message says why."""


@dataclass(frozen=True)
class LayeredImage:
    """An image on disk: its configuration and its layers, lowest first."""

    digest: str
    """``sha256:...`` of its manifest (OCI) or of its configuration (docker)."""
    config: Mapping[str, Any]
    layers: Sequence[LayerOpener]
    size: int
    """Bytes of all layers as they are stored."""

    @property
    def architecture(self) -> str:
        """``amd64`` or ``arm64``; empty if the image does not say."""
        return str(self.config.get("architecture", ""))

    @property
    def settings(self) -> Mapping[str, Any]:
        """Env, Entrypoint, Cmd, WorkingDir and Labels."""
        settings = self.config.get("config")
        return settings if isinstance(settings, Mapping) else {}


# --- recognise an archive -------------------------------------------------------------------------------


def archive_layout(path: Path) -> str:
    """Return the transport that reads a tar of an image: ``oci`` or ``docker``; ``docker`` also if it cannot be read.

    docker 25 and newer save both layouts in one archive. Such an archive counts as ``docker``, or as ``oci`` if it is
    compressed and begins with the OCI layout.
    """
    with suppress(*TAR_ERRORS):
        names = _first_names(path)
        if _compression(path) is not None:
            is_oci = any(name.partition("/")[0] in ("blobs", "index.json", "oci-layout") for name in names)
        else:
            is_oci = "oci-layout" in names and "manifest.json" not in names
        return "oci" if is_oci else "docker"
    return "docker"


def archive_problem(path: Path) -> str:
    """Return why no runtime can start an archive; empty if one may, or if the archive cannot be examined here."""
    try:
        if _compression(path) == "zstd":
            return ""
        names = _first_names(path)
    except PermissionError:
        return ""
    except TAR_ERRORS as error:
        return f"is not a tar archive, or is truncated ({error})"

    is_image = any(SAVED_IMAGE_NAMES.match(name) for name in names)
    return "" if is_image else "is a tar archive but not an image (it has no manifest.json and no index.json)"


def _first_names(path: Path) -> set[str]:
    compressed = _compression(path) is not None
    limit = MAX_COMPRESSED_NAMES if compressed else MAX_NAMES
    with tarfile.open(path, "r|*" if compressed else "r:") as tar:
        return {posixpath.normpath(member.name) for member in islice(tar, limit)}


def _compression(path: Path) -> str | None:
    with open(path, "rb") as handle:
        return _compression_of(handle.read(8))


def _compression_of(start: bytes) -> str | None:
    return next((name for magic, name in COMPRESSION_MAGIC.items() if start.startswith(magic)), None)


# --- open an image --------------------------------------------------------------------------------------


@contextmanager
def open_layout(folder: Path, architecture: str) -> Iterator[LayeredImage]:
    """Open an OCI image layout. Raises NotAnImage."""

    def read(name: str) -> IO[bytes]:
        try:
            return open(folder / name, "rb")
        except OSError as error:
            raise NotAnImage(f"{folder / name}: {error.strerror}. The layout is incomplete") from None

    yield _read_oci(str(folder), read, architecture)


@contextmanager
def open_archive(path: Path, architecture: str) -> Iterator[LayeredImage]:
    """Open an uncompressed tar of an OCI layout or of ``docker save``. Raises NotAnImage."""
    if _compression(path) is not None:
        raise NotAnImage(f"{path} is compressed. Decompress it (gunzip --keep {path}), then import the .tar file")
    with ExitStack() as stack:
        try:
            tar = stack.enter_context(tarfile.open(path, "r:"))
            members = {posixpath.normpath(member.name): member for member in tar}
        except (tarfile.TarError, EOFError) as error:
            raise NotAnImage(f"{path} is not a tar archive, or is truncated ({error})") from None

        def read(name: str) -> IO[bytes]:
            member = members.get(posixpath.normpath(name))
            content = tar.extractfile(member) if member else None
            if content is None:
                raise NotAnImage(f"{path} has no {name}: the archive is truncated, or is not an image")
            return content

        if "manifest.json" in members:
            yield _read_docker(str(path), read, members)
        elif "index.json" in members:
            yield _read_oci(str(path), read, architecture)
        else:
            raise NotAnImage(
                f"{path} is not an image: it has no manifest.json and no index.json. "
                "For a tar of a root file system, unpack it and run: mksquashfs FOLDER IMAGE.sqsh -all-root"
            )


def _read_oci(origin: str, read: Callable[[str], IO[bytes]], architecture: str) -> LayeredImage:
    index = _read_json(origin, read("index.json"))
    entry = _choose_manifest(origin, index.get("manifests") or [], architecture)
    manifest = _read_json(origin, read(_blob_path(entry["digest"])))
    # A nested index: one manifest per architecture.
    if "manifests" in manifest:
        entry = _choose_manifest(origin, manifest["manifests"], architecture)
        manifest = _read_json(origin, read(_blob_path(entry["digest"])))
    try:
        config = _read_json(origin, read(_blob_path(manifest["config"]["digest"])))
        names = [_blob_path(layer["digest"]) for layer in manifest["layers"]]
        size = sum(int(layer["size"]) for layer in manifest["layers"])
    except (KeyError, TypeError) as error:
        raise NotAnImage(f"{origin}: its manifest lacks {error}") from None
    return LayeredImage(entry["digest"], config, _layer_openers(read, names), size)


def _choose_manifest(origin: str, manifests: Sequence[Mapping[str, Any]], architecture: str) -> Mapping[str, Any]:
    """Return the manifest for an architecture; one without an architecture serves all."""
    if not manifests:
        raise NotAnImage(f"{origin} contains no image")
    architectures = [str((entry.get("platform") or {}).get("architecture", "")) for entry in manifests]
    for entry, name in zip(manifests, architectures, strict=True):
        if name in (architecture, ""):
            return entry
    available = ", ".join(sorted(set(architectures) - {"unknown"}))
    raise NotAnImage(f"{origin} has images for {available}, none for {architecture}")


def _read_docker(origin: str, read: Callable[[str], IO[bytes]], members: Mapping[str, tarfile.TarInfo]) -> LayeredImage:
    manifest = _read_json(origin, read("manifest.json"))
    if not isinstance(manifest, list) or len(manifest) != 1:
        raise NotAnImage(f"{origin} holds {len(manifest)} images. Save one of them: docker save IMAGE -o FILE")
    try:
        config_name, names = str(manifest[0]["Config"]), [str(layer) for layer in manifest[0]["Layers"]]
    except (KeyError, TypeError) as error:
        raise NotAnImage(f"{origin}: its manifest.json lacks {error}") from None
    digest = "sha256:" + posixpath.basename(config_name).removesuffix(".json")
    sizes = [members[name].size for name in map(posixpath.normpath, names) if name in members]
    config = _read_json(origin, read(config_name))
    return LayeredImage(digest, config, _layer_openers(read, names), sum(sizes))


def _layer_openers(read: Callable[[str], IO[bytes]], names: Sequence[str]) -> list[LayerOpener]:
    return [lambda name=name: read(name) for name in names]  # type: ignore[misc]


def _read_json(origin: str, handle: IO[bytes]) -> Any:
    with handle:
        try:
            return json.load(handle)
        except ValueError as error:
            raise NotAnImage(f"{origin}: damaged ({error})") from None


def _blob_path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


# --- unpack it ------------------------------------------------------------------------------------------


def unpack(image: LayeredImage, rootfs: Path, count: Callable[[int], None]) -> None:
    """Unpack all layers into the folder ``rootfs``, lowest first, then add what runtimes expect to find.

    Files belong to the current user, who may read and write all of them. Devices and the content of /dev are left out.
    ``count`` receives the size of each file when it has been written. Raises NotAnImage.
    """
    rootfs = Path(os.path.realpath(rootfs))
    rootfs.chmod(0o755)
    with _damage_reported():
        for open_layer in image.layers:
            _unpack_layer(open_layer, rootfs, count)
        _add_runtime_files(image.settings, rootfs)


@contextmanager
def _damage_reported() -> Iterator[None]:
    """Turn what a damaged layer raises into NotAnImage; errors of the file system, such as a full disk, stay."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise NotAnImage(f"a layer needs a folder where another has a file: {error.filename}") from None
    except TAR_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise NotAnImage(f"a layer is damaged ({error}). Delete the download, or save the image again") from None


def _unpack_layer(open_layer: LayerOpener, rootfs: Path, count: Callable[[int], None]) -> None:
    """Unpack one layer over those below it; its whiteouts remove only what lower layers brought."""
    written: set[Path] = set()
    with (
        open_layer() as handle,
        _without_zstd(handle) as stream,
        # Decompresses gzip, xz and bzip2.
        tarfile.open(fileobj=stream, mode="r|*") as tar,
    ):
        for member in tar:
            name = _normal_name(member.name)
            folder, _, last = name.rpartition("/")
            if not name or name.startswith("dev/") or member.isdev():
                continue
            parent = _resolve_inside(rootfs, folder)
            if last == OPAQUE_MARKER:
                for child in parent.iterdir() if parent.is_dir() else ():
                    _remove(child, written)
            elif last.startswith(WHITEOUT_PREFIX):
                _remove(parent / last[len(WHITEOUT_PREFIX) :], written)
            else:
                _write_member(tar, member, parent / last, rootfs)
                written.add(parent / last)
                count(member.size)


def _normal_name(name: str) -> str:
    """Return a name relative to the image's root. Raises NotAnImage for one that leads out of it."""
    if ".." in name.split("/"):
        raise NotAnImage(f"a layer contains the name {name!r}, which leads out of the image")
    return posixpath.normpath("/" + name).lstrip("/")


def _resolve_inside(rootfs: Path, folder: str) -> Path:
    """Follow the links of a folder's path. Raises NotAnImage if they lead out of the image."""
    path = Path(os.path.realpath(rootfs / folder))
    if path != rootfs and rootfs not in path.parents:
        raise NotAnImage(f"a layer writes to {folder!r} through a link that leads out of the image")
    return path


def _remove(path: Path, kept: set[Path] | frozenset[Path] = frozenset()) -> None:
    """Remove a file, or a folder with all that it holds, except for the paths in ``kept``."""
    if path.is_dir() and not path.is_symlink():
        for child in list(path.iterdir()):
            _remove(child, kept)
        if path not in kept and not any(path.iterdir()):
            path.rmdir()
    elif path not in kept:
        path.unlink(missing_ok=True)


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, rootfs: Path) -> None:
    """Write one entry of a layer in place of what lower layers have there; two folders become one."""
    if member.isdir() and target.is_dir() and not target.is_symlink():
        target.chmod(member.mode | 0o700)
        return
    _remove(target)
    _make_folder(target.parent)
    if member.isdir():
        target.mkdir()
        target.chmod(member.mode | 0o700)
    elif member.issym():
        target.symlink_to(member.linkname)
    elif member.islnk():
        _write_hard_link(member, target, rootfs)
    else:
        content = tar.extractfile(member)
        assert content is not None
        with content, open(target, "xb") as output:
            shutil.copyfileobj(content, output, BUFFER_BYTES)
        target.chmod(member.mode | 0o600)
        # Python takes a .pyc for outdated if the time of its .py is another.
        os.utime(target, (member.mtime, member.mtime))


def _write_hard_link(member: tarfile.TarInfo, target: Path, rootfs: Path) -> None:
    link = _normal_name(member.linkname)
    source = _resolve_inside(rootfs, posixpath.dirname(link)) / posixpath.basename(link)
    if not os.path.lexists(source):
        raise NotAnImage(f"a layer links {member.name} to {member.linkname}, which is in no layer")
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        # Some parallel file systems link only within a folder.
        shutil.copy2(source, target, follow_symlinks=False)


def _make_folder(folder: Path) -> None:
    """Make a folder that no layer describes, and its parents, whatever the user's umask."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir()
        folder.chmod(0o755)


@contextmanager
def _without_zstd(handle: IO[bytes]) -> Iterator[IO[bytes]]:
    """Decompress zstd by its program, because Python reads it only from 3.14 on; pass other data on as it is."""
    start = handle.read(8)
    handle.seek(0)
    if _compression_of(start) != "zstd":
        yield handle
        return
    program = shutil.which("zstd") or shutil.which("unzstd")
    if program is None:
        raise NotAnImage("a layer is compressed with zstd, and the zstd program is not in PATH. Install zstd")
    with subprocess.Popen([program, "-dcq"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout

        def feed(pipe: IO[bytes]) -> None:
            with suppress(BrokenPipeError), pipe:
                shutil.copyfileobj(handle, pipe, BUFFER_BYTES)

        thread = threading.Thread(target=feed, args=(process.stdin,), daemon=True)
        thread.start()
        try:
            yield process.stdout
        finally:
            process.stdout.close()
            process.wait()
            thread.join()


# --- add what runtimes look for -------------------------------------------------------------------------


def _add_runtime_files(settings: Mapping[str, Any], rootfs: Path) -> None:
    """Write the files that carry an image's settings, and add missing mount points and the working directory."""
    for name, (content, mode) in runtime_files(settings).items():
        folder, _, last = name.rpartition("/")
        target = _resolve_inside(rootfs, folder) / last
        _remove(target)
        _make_folder(target.parent)
        target.write_bytes(content)
        target.chmod(mode)

    working_directory = _normal_name(str(settings.get("WorkingDir") or ""))
    for name, mode in {**MOUNT_FOLDERS, working_directory: 0o755}.items():
        if name and not os.path.lexists(rootfs / name):
            _make_folder(_resolve_inside(rootfs, name))
            (rootfs / name).chmod(mode)
    for name in MOUNT_FILES:
        if not os.path.lexists(rootfs / name):
            (rootfs / name).touch()
            (rootfs / name).chmod(0o644)


def runtime_files(settings: Mapping[str, Any]) -> dict[str, tuple[bytes, int]]:
    """Return content and mode of the files in which enroot and Charliecloud look for an image's settings."""
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
    """Return the script that enroot runs with the command as its arguments: change folder, then run the entrypoint."""
    folder = shlex.quote(str(settings.get("WorkingDir") or "/"))
    entrypoint = shlex.join(map(str, settings.get("Entrypoint") or []))
    default = shlex.join(map(str, settings.get("Cmd") or [])) or ("" if entrypoint else "/bin/sh")
    return (
        "#!/bin/sh\n# made from the image's own configuration by amlaunch image import\n"
        f"mkdir -p {folder} 2>/dev/null\ncd {folder} || exit 1\nunset OLDPWD\n"
        "if [ -s /etc/rc.local ]; then . /etc/rc.local; fi\n"
        f'if [ $# -eq 0 ]; then set -- {default}; fi\nexec {entrypoint + " " if entrypoint else ""}"$@"\n'
    )
