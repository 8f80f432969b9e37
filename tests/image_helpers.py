"""Tiny images for the tests: this machine's Python and a shell in a root file system of some megabytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

PYTHON = Path("/usr/bin/python3")
PROGRAMS = ("dash", "mkdir", "rm", "chmod", "cat", "sleep", "env", "true")
LEFT_OUT = {
    "__pycache__",
    "test",
    "idlelib",
    "turtledemo",
    "tkinter",
    "pydoc_data",
    "lib2to3",
    "config-3.11-x86_64-linux-gnu",
    "dist-packages",
}
Entry = tuple[str, Any]
"""Name and content: bytes, None for a folder, ``->name`` for a symbolic link, ``=name`` for a hard one."""


def leave_out(why: str) -> None:
    """Skip the test; in continuous integration, where nothing is left out, it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"this test must run here: {why}")
    pytest.skip(why)


def need(*programs: str) -> None:
    """Leave the test out where a program is missing."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        leave_out(f"needs {', '.join(missing)}")


def layer(entries: Sequence[Entry]) -> bytes:
    """An uncompressed layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.mode = 0o755
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str) and content.startswith("->"):
                info.type, info.linkname = tarfile.SYMTYPE, content[2:]
            elif isinstance(content, str) and content.startswith("="):
                info.type, info.linkname = tarfile.LNKTYPE, content[1:]
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


def write_layout(
    folder: Path,
    layers: Sequence[bytes],
    config: Mapping[str, Any] | None = None,
    architecture: str = "amd64",
    *,
    packed: bool = True,
) -> Path:
    """An OCI image layout of these layers, compressed with gzip unless they are large and made of noise."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def blob(data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    stored = [gzip.compress(one, 1, mtime=0) if packed else one for one in layers]
    diffs = [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in layers]
    settings = {
        "architecture": architecture,
        "os": "linux",
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": diffs},
    }
    kind = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": {"mediaType": f"{kind}.config.v1+json", **blob(json.dumps(settings).encode())},
        "layers": [{"mediaType": f"{kind}.layer.v1.tar{'+gzip' * packed}", **blob(one)} for one in stored],
    }
    entry = {
        "mediaType": f"{kind}.manifest.v1+json",
        **blob(json.dumps(manifest).encode()),
        "platform": {"architecture": architecture, "os": "linux"},
    }
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return folder


def write_docker_archive(
    path: Path, layers: Sequence[bytes], config: Mapping[str, Any] | None = None, tag: str = "tiny:1"
) -> Path:
    """A tar as ``docker save`` writes it."""
    diffs = [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in layers]
    settings = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": diffs},
        }
    ).encode()
    name = f"{hashlib.sha256(settings).hexdigest()}.json"
    files = {name: settings, **{f"{number}/layer.tar": data for number, data in enumerate(layers)}}
    files["manifest.json"] = json.dumps(
        [{"Config": name, "RepoTags": [tag], "Layers": [f"{number}/layer.tar" for number in range(len(layers))]}]
    ).encode()
    path.write_bytes(layer(list(files.items())))
    return path


def unsquashed(image: Path, folder: Path) -> Path:
    """The files of a squashfs image."""
    subprocess.run(["unsquashfs", "-q", "-n", "-d", str(folder), str(image)], check=True, capture_output=True)
    return folder


def python_layer(more: Sequence[tuple[Path, str]] = ()) -> bytes:
    """A root file system with a shell, a few programs, the system's Python, and ``more`` files: about 40 MB."""
    out = io.BytesIO()
    files: dict[str, Path] = {}
    for program in [shutil.which(name) or name for name in PROGRAMS] + [str(PYTHON.resolve())]:
        files |= {program: Path(program).resolve(), **_libraries(program)}
    version = PYTHON.resolve().name
    library = Path("/usr/lib") / version
    for path in sorted(library.rglob("*")):
        if path.is_file() and not LEFT_OUT & set(path.parts):
            files[str(path)] = path.resolve()
            files |= _libraries(str(path)) if path.suffix == ".so" else {}
    with tarfile.open(fileobj=out, mode="w") as tar:
        for target, source in sorted(files.items()):
            target = re.sub(r"^/(bin|sbin|lib|lib64)/", r"/usr/\1/", target)
            tar.add(source, target.lstrip("/"), recursive=False)
        for source, target in more:
            tar.add(source, target, recursive=False)
        for name in ("bin", "sbin", "lib", "lib64"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(link)
        for name, target in (("usr/bin/sh", "dash"), ("usr/bin/python3", version)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        for name in ("etc", "usr/sbin", "usr/local/bin", "root"):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
    return out.getvalue()


def _libraries(program: str) -> dict[str, Path]:
    """The shared libraries of a program, under the names that it asks for."""
    found = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    return {name: Path(name).resolve() for name in re.findall(r"(/\S+) \(0x", found)}


def registry_config(folder: Path, place: str, password: str | None = None, *, tls: bool = False) -> Path:
    """docker-registry's, with everything in a folder; ``tls``: the files key and certificate are there."""
    auth = f"auth: {{htpasswd: {{realm: tests, path: {folder / 'htpasswd'}}}}}\n" if password else ""
    (folder / "htpasswd").write_text(f"me:{password}\n")
    encrypted = f", tls: {{certificate: {folder / 'certificate'}, key: {folder / 'key'}}}" if tls else ""
    config = folder / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: info, accesslog: {{disabled: false}}}}\nstorage: {{filesystem: "
        f"{{rootdirectory: {folder / 'data'}}}}}\nhttp: {{addr: '{place}'{encrypted}}}\n{auth}"
    )
    return config


class Registry:
    """docker-registry on loopback, its log to count in."""

    def __init__(self, folder: Path, password: str | None = None, *, tls: bool = False):
        """``password``: as htpasswd has it; ``tls``: with the files key and certificate that lie in the folder."""
        self.folder, self.tls = folder, tls
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.name = f"127.0.0.1:{self.port}"
        self.log = folder / "registry.log"
        self.process = self._start(password)

    def restart(self, password: str) -> None:
        """The same, for those alone who know a password."""
        self.process.terminate()
        self.process.wait()
        self.process = self._start(password)

    def _start(self, password: str | None) -> subprocess.Popen[bytes]:
        config = registry_config(self.folder, self.name, password, tls=self.tls)
        process = subprocess.Popen(
            ["docker-registry", "serve", str(config)], stdout=open(self.log, "wb"), stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return process
            except OSError:
                time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def push(self, layout: Path, name: str, *credentials_: str) -> str:
        place = f"127.0.0.1:{self.port}/{name}"
        more = ["--dest-creds", credentials_[0]] if credentials_ else []
        subprocess.run(
            ["skopeo", "copy", "-q", "--dest-tls-verify=false", *more, f"oci:{layout}", f"docker://{place}"],
            check=True,
            capture_output=True,
        )
        return place

    def fetched(self) -> int:
        """How often a layer of more than a megabyte was read."""
        lines = [
            line
            for line in self.log.read_text().splitlines()
            if "http.request.method=GET" in line and "/blobs/" in line
        ]
        return sum(int(size) > 1 << 20 for line in lines for size in re.findall(r"http\.response\.written=(\d+)", line))

    def digest(self, name: str, tag: str) -> str:
        """Of a manifest, as the registry says."""
        wanted = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v2/{name}/manifests/{tag}", headers={"Accept": wanted}
        )
        with urllib.request.urlopen(request) as answer:
            return answer.headers["Docker-Content-Digest"]

    def put_index(self, name: str, tag: str, of: str, architecture: str) -> None:
        """An index that says of one image for which architecture it is."""
        kind = "application/vnd.oci.image.index.v1+json"
        place = f"http{'s' * self.tls}://{self.name}/v2/{name}/manifests"
        with urllib.request.urlopen(
            urllib.request.Request(f"{place}/{of}", headers={"Accept": "application/vnd.oci.image.manifest.v1+json"})
        ) as answer:
            raw, of_kind = answer.read(), answer.headers["Content-Type"]
        entry = {
            "mediaType": of_kind,
            "digest": f"sha256:{hashlib.sha256(raw).hexdigest()}",
            "size": len(raw),
            "platform": {"architecture": architecture, "os": "linux"},
        }
        body = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [entry]}).encode()
        urllib.request.urlopen(
            urllib.request.Request(f"{place}/{tag}", data=body, headers={"Content-Type": kind}, method="PUT")
        ).close()


def make_certificate(folder: Path) -> Path:
    """A key, and a certificate for 127.0.0.1."""
    need("openssl")
    words = [
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=127.0.0.1",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run(
        ["openssl", "req", *words, "-keyout", folder / "key", "-out", folder / "certificate"],
        check=True,
        capture_output=True,
    )
    return folder / "certificate"


ENROOT = """#!/bin/bash
set -euo pipefail
if [ -e {conf} ]; then
    while read -r key value; do export "$key=${{!key:-$(eval echo "$value")}}"; done <{conf}
fi
home=${{HOME:-$(echo ~)}}
export ENROOT_LIBRARY_PATH=${{ENROOT_LIBRARY_PATH:-{library}}}
export ENROOT_DATA_PATH=${{ENROOT_DATA_PATH:-$home/.local/share/enroot}}
export ENROOT_CACHE_PATH=${{ENROOT_CACHE_PATH:-$home/.cache/enroot}}
export ENROOT_RUNTIME_PATH=${{ENROOT_RUNTIME_PATH:-${{XDG_RUNTIME_DIR:-/run}}/enroot}}
export ENROOT_TEMP_PATH=${{ENROOT_TEMP_PATH:-${{TMPDIR:-/tmp}}}}
mkdir -p "$ENROOT_CACHE_PATH" "$ENROOT_DATA_PATH" "$ENROOT_RUNTIME_PATH"
. "$ENROOT_LIBRARY_PATH/common.sh"
command=$1; shift
case $command in
list) ls -1 "$ENROOT_DATA_PATH" ;;
import) echo "$2" >>{folder}/imports; cp {folder}/image.sqsh "$2" ;;
create)
    unsquashfs -s "$4" >/dev/null 2>&1 || {{ echo "[ERROR] Invalid image format: $4" >&2; exit 1; }}
    unsquashfs -no-progress -d "$ENROOT_DATA_PATH/$3" "$4" ;;
remove) rm -r "$ENROOT_DATA_PATH/$2" ;;
start)
    while [ "${{1#-}}" != "$1" ]; do
        case $1 in --rc) rc=$2; shift 2 ;; --env|--mount) shift 2 ;; *) shift ;; esac
    done
    shift
    for fd in $(ls /proc/$$/fd); do
        [ "$fd" -le 2 ] || [ "$fd" = 255 ] || eval "exec $fd>&-"
    done
    cp -Lp "$rc" {folder}/rc
    exec sh {folder}/rc "$@" ;;
esac
"""
"""A stand-in with the parts of enroot that amlaunch relies on, where enroot itself is not packaged.

github.com/NVIDIA/enroot: enroot.in (config::init, config::export, then mkdir, then common.sh), src/runtime.sh
(runtime::list, runtime::create, runtime::_do_rc), bin/enroot-nsenter.c (closefrom before the rc file is copied).
"""


def write_enroot(folder: Path, conf: str = "") -> Path:
    """Put the stand-in into ``folder``, with its enroot.conf and an image that its registry has; return the image."""
    (folder / "library").mkdir(parents=True)
    (folder / "library" / "common.sh").touch()
    (folder / "enroot.conf").write_text(conf)
    (folder / "rootfs").mkdir()
    # Compressible: squashfs stores other blocks as they are, and does not notice damage there.
    (folder / "rootfs" / "content").write_text(" ".join(map(str, range(100_000))))
    image = folder / "image.sqsh"
    subprocess.run(["mksquashfs", folder / "rootfs", image, "-quiet", "-no-progress"], check=True, capture_output=True)
    program = folder / "enroot"
    program.write_text(ENROOT.format(folder=folder, conf=folder / "enroot.conf", library=folder / "library"))
    program.chmod(0o755)
    return image
