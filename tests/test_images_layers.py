"""An image's layers as one folder: hidden, linked and removed files, compared with the kernel's overlay."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_helpers import layer, need, unsquashed, write_docker_archive, write_layout

from amlaunch.containers.images import image_store, layers
from amlaunch.containers.images.layers import LayeredImage, NotAnImage, unpack

ADDED = {*layers.MOUNT_FOLDERS, *layers.MOUNT_FILES, *layers.runtime_files({}), "ch"}
"""What every image gets."""


def image_of(*stack: bytes, **config: str) -> LayeredImage:
    """An image of uncompressed layers, lowest first."""
    return LayeredImage("sha256:0", {"config": config}, [lambda data=data: io.BytesIO(data) for data in stack], 0)


def unpacked(*stack: bytes) -> dict[str, bytes | str | None]:
    """The file system of layers, lowest first: content, ``->target``, or None for a folder."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        unpack(image_of(*stack), root, lambda _: None)
        return {name: value for name, value in files_below(root).items() if name not in ADDED}


def files_below(root: Path) -> dict[str, bytes | str | None]:
    """Content of each path below a folder, as :func:`unpacked` returns it."""
    found: dict[str, bytes | str | None] = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"->{path.readlink()}"
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def test_what_upper_layers_hide():
    low = layer(
        [
            ("./a", None),
            ("./a/x", b"low"),
            ("./a/y", b"low"),
            ("./b", None),
            ("./b/z", b"low"),
            ("./c", b"low"),
            ("/d", None),
            ("d/e", b"low"),
        ]
    )
    high = layer(
        [
            ("a/x", b"high"),
            ("a/.wh.y", b""),
            ("b/.wh..wh..opq", b""),
            ("b/new", b"high"),
            ("c", None),
            ("c/f", b"high"),
            ("d", "->a"),
        ]
    )
    expected = {"a": None, "a/x": b"high", "b": None, "b/new": b"high", "c": None, "c/f": b"high", "d": "->a"}
    assert unpacked(low, high) == expected
    back = layer([("a", None), ("a/y", b"back")])
    assert unpacked(low, high, back)["a/y"] == b"back", "what one layer removed, a later one brings back"
    assert unpacked(layer([("a/x", b"low")]), layer([("a", b"file")]), layer([("a", None)])) == {"a": None}, (
        "a file that is hidden itself hid it"
    )


def test_a_hard_link_whose_file_is_replaced_keeps_its_content(tmp_path):
    low = layer([("bin/one", b"program"), ("bin/two", "=bin/one"), ("bin/three", "=bin/one")])
    high = layer([("bin/one", b"other")])
    expected = {"bin": None, "bin/one": b"other", "bin/two": b"program", "bin/three": b"program"}
    assert unpacked(low, high) == expected
    unpack(image_of(low), tmp_path, lambda _: None)
    assert (tmp_path / "bin" / "one").samefile(tmp_path / "bin" / "two"), "links stay links"
    linked = layer([("bin/four", "=bin/one")])  # to a file of a lower layer, as some builders write it
    assert unpacked(layer([("bin/one", b"program")]), linked)["bin/four"] == b"program"
    with pytest.raises(NotAnImage, match="links bin/four to bin/one"):
        unpacked(linked)


def test_a_whiteout_that_stands_behind_what_its_own_layer_brings():
    """The specification recommends the other order, and does not ask for it."""
    low = layer([("a", None), ("a/old", b"low"), ("b", b"low")])
    high = layer([("a", None), ("a/new", b"high"), ("a/.wh..wh..opq", b""), ("b", b"high"), (".wh.b", b"")])
    assert unpacked(low, high) == {"a": None, "a/new": b"high", "b": b"high"}


def test_devices_and_names_that_lead_out():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind in (("dev/null", tarfile.CHRTYPE), ("odd", tarfile.BLKTYPE), ("pipe", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    assert unpacked(out.getvalue()) == {}
    with pytest.raises(NotAnImage, match=r"'a/\.\./\.\./etc/passwd', which leads out"):
        unpacked(layer([("a/../../etc/passwd", b"x")]))


@pytest.mark.parametrize(
    "entry", [("out/file", b"x"), ("out/.wh.kept", b""), ("out/.wh..wh..opq", b""), ("mine", "=out/kept")]
)
def test_nothing_is_written_through_a_link_that_leads_out(tmp_path, entry):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (tmp_path / "root").mkdir()
    with pytest.raises(NotAnImage, match="through a link that leads out of the image"):
        unpack(image_of(layer([("out", f"->{outside}")]), layer([entry])), tmp_path / "root", lambda _: None)
    assert [path.name for path in outside.iterdir()] == ["kept"]
    inside = unpacked(layer([("usr/lib", None), ("lib", "->usr/lib")]), layer([("lib/a", b"1")]))
    assert inside == {"usr": None, "usr/lib": None, "lib": "->usr/lib", "usr/lib/a": b"1"}


def test_a_file_where_a_layer_needs_a_folder():
    with pytest.raises(NotAnImage, match="needs a folder where another has a file"):
        unpacked(layer([("a", b"file")]), layer([("a/b", b"x")]))


names = st.sampled_from(["a", "b", "a/a", "a/b", "b/a", "a/a/a"])
entries = st.lists(st.tuples(names, st.sampled_from(["file", "folder", "remove", "opaque", "link"])), max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(entries, min_size=1, max_size=3))
def test_against_a_plain_model(stack):
    """The same layers, unpacked one upon the other from below into a dictionary."""
    model: dict[str, bytes | str | None] = {}
    tars = []
    for number, actions in enumerate(stack):
        chosen: dict[str, str] = {}
        for name, action in actions:
            parents = {name.rsplit("/", count)[0] for count in range(1, name.count("/") + 1)}
            if name not in chosen and not any(
                chosen.get(parent, "folder") not in ("folder", "opaque") for parent in parents
            ):
                if action in ("file", "remove", "link") and any(other.startswith(f"{name}/") for other in chosen):
                    continue
                for parent in parents:
                    chosen.setdefault(parent, "folder")
                chosen[name] = action
        below = dict(model)
        listing = []
        for name, action in sorted(chosen.items()):
            folder, _, last = name.rpartition("/")
            if action == "remove":
                listing.append((f"{folder}/.wh.{last}".lstrip("/"), b""))
                below = {key: value for key, value in below.items() if key != name and not key.startswith(f"{name}/")}
            if action == "opaque":
                below = {key: value for key, value in below.items() if not key.startswith(f"{name}/")}
            if action in ("file", "link") or (action in ("folder", "opaque") and below.get(name) is not None):
                below = {key: value for key, value in below.items() if key != name and not key.startswith(f"{name}/")}
            if action != "remove":
                content = f"{number}{name}".encode() if action == "file" else "->there" if action == "link" else None
                listing.append((name, content))
                below[name] = content
            if action == "opaque":
                listing.append((f"{name}/.wh..wh..opq", b""))
        model = below
        tars.append(layer(listing))
    assert unpacked(*tars) == model


def test_archives_are_told_apart(tmp_path):
    stack = [layer([("etc/name", b"low")]), layer([("etc/name", b"high")])]
    layout = write_layout(tmp_path / "oci", stack, {"Env": ["A=1"]})
    with layers.open_layout(layout, "amd64") as image:
        digest, size = image.digest, image.size
        assert image.architecture == "amd64" and image.settings == {"Env": ["A=1"]}
        assert size == sum(len(gzip.compress(one, 1, mtime=0)) for one in stack)
    archive = tmp_path / "oci.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(layout, ".")
    docker = write_docker_archive(tmp_path / "docker.tar", stack, {"Env": ["A=1"]})
    for path, known_digest in ((archive, digest), (docker, None)):
        with layers.open_archive(path, "amd64") as image:
            assert known_digest in (None, image.digest)
            root = tmp_path / path.stem / "root"
            root.mkdir(parents=True)
            unpack(image, root, lambda _: None)
            assert (root / "etc" / "name").read_bytes() == b"high", path
    assert layers.archive_layout(docker) == "docker" and layers.archive_layout(archive) == "oci"


def test_what_is_no_saved_image_is_refused_with_what_to_do(tmp_path):
    saved = write_docker_archive(tmp_path / "docker.tar", [layer([("etc/name", b"1")])])
    packed = tmp_path / "docker.tar.gz"
    packed.write_bytes(gzip.compress(saved.read_bytes()))
    root = tmp_path / "root.tar"
    root.write_bytes(layer([("etc/name", b"1")]))
    for path, fix in ((packed, f"gunzip --keep {packed}"), (root, "mksquashfs FOLDER IMAGE.sqsh")):
        with pytest.raises(NotAnImage, match=fix), layers.open_archive(path, "amd64"):
            pass


def test_a_tar_that_is_no_image_is_recognised_at_submit(tmp_path):
    tars = {
        "system": layer([(f"usr/lib/{number}", b"") for number in range(150)]),
        "packed": gzip.compress(layer([("etc/name", b"1")])),
        "text": b"no tar" * 500,
        "empty": b"",
    }
    for name, raw in tars.items():
        (tmp_path / name).write_bytes(raw)
    problems = {name: layers.archive_problem(tmp_path / name) for name in tars}
    assert all("is a tar archive but not an image" in problems[name] for name in ("system", "packed"))
    assert all("is not a tar archive" in problems[name] for name in ("text", "empty"))
    many = [(f"{number:064x}/{name}", b"") for number in range(60) for name in ("VERSION", "json", "layer.tar")]
    (tmp_path / "old").write_bytes(layer([*many, ("manifest.json", b"[]")]))
    (tmp_path / "packed").write_bytes(gzip.compress(layer(many)))
    write_layout(tmp_path / "oci", [layer([("a", b"1")])])
    write_docker_archive(tmp_path / "docker", [layer([("a", b"1")])])
    with tarfile.open(tmp_path / "oci.tar", "w") as tar:
        tar.add(tmp_path / "oci", ".")
    assert not any(layers.archive_problem(tmp_path / name) for name in ("old", "packed", "oci.tar", "docker"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "index.json").write_text("{"), "damaged"),
        (lambda folder: next((folder / "blobs" / "sha256").iterdir()).unlink(), "layout is incomplete"),
        (lambda folder: (folder / "index.json").write_text('{"manifests": []}'), "contains no image"),
    ],
)
def test_a_damaged_layout_says_so(tmp_path, damage, message):
    layout = write_layout(tmp_path, [layer([("a", b"1")])])
    damage(layout)
    with pytest.raises(NotAnImage, match=message), layers.open_layout(layout, "amd64") as image:
        unpack(image, tmp_path, lambda _: None)


def test_a_torn_layer_and_another_machine(tmp_path):
    layout = write_layout(tmp_path, [layer([("a", bytes(100_000))])], architecture="arm64")
    with pytest.raises(NotAnImage, match="has images for arm64, none for amd64"), layers.open_layout(layout, "amd64"):
        pass
    blob = max((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-20])
    with layers.open_layout(layout, "arm64") as image, pytest.raises(NotAnImage, match="damaged"):
        unpack(image, tmp_path, lambda _: None)


def test_a_layer_compressed_with_zstd():
    need("zstd")
    data = layer([("a", b"1" * 1000)])
    packed = subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout
    assert unpacked(packed) == {"a": b"1" * 1000}


def test_the_start_script_keeps_words_apart(tmp_path):
    """enroot runs /etc/rc with the command as its arguments, after the entrypoint; exit codes come through."""
    settings_ = {
        "WorkingDir": str(tmp_path / "a b"),
        "Entrypoint": ["/usr/bin/env", "FROM=entry point"],
        "Cmd": ["sh", "-c", "exit 3"],
    }
    script = tmp_path / "rc"
    content, mode = layers.runtime_files(settings_)["etc/rc"]
    script.write_bytes(content)
    assert mode == 0o755
    found = subprocess.run(
        ["sh", str(script), "sh", "-c", 'echo "$PWD:$FROM:$1"; exit 7', "_", "x y"], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (7, f"{tmp_path}/a b:entry point:x y\n")
    assert subprocess.run(["sh", str(script)]).returncode == 3, "without a command, the image's own"


def test_the_files_in_a_squashfs(tmp_path):
    """Modes and times come through, everything belongs to root, and what runtimes mount or read is there."""
    need("mksquashfs", "unsquashfs")
    stack = [
        layer([("etc", None), ("etc/low", b"1"), ("bin/tool", b"#!/bin/sh\n"), ("bin/same", "=bin/tool")]),
        layer([("etc/.wh.low", b""), ("etc/high", b"2"), ("link", "->etc/high")]),
    ]
    rootfs = tmp_path / "rootfs"
    rootfs.mkdir()
    previous = os.umask(0o077)
    try:
        unpack(image_of(*stack, WorkingDir="/app/here"), rootfs, lambda _: None)
    finally:
        os.umask(previous)
    target = tmp_path / "image.sqsh"
    subprocess.run(image_store.mksquashfs(rootfs, target), check=True, capture_output=True)
    files = unsquashed(target, tmp_path / "files")
    names = {str(path.relative_to(files)) for path in files.rglob("*")}
    assert {"etc/high", "bin/same", "link", "etc/rc", "app/here", "dev", "proc", "tmp"} <= names
    assert "etc/low" not in names
    assert (files / "bin" / "tool").samefile(files / "bin" / "same")
    assert (files / "bin" / "tool").stat().st_mtime == 0, "a .pyc is valid for one time of its source"
    modes = {name: (files / name).stat().st_mode & 0o7777 for name in ("bin", "app", "bin/tool", "tmp", "etc/hosts")}
    assert modes == {"bin": 0o755, "app": 0o755, "bin/tool": 0o755, "tmp": 0o1777, "etc/hosts": 0o644}


def test_overlay_of_the_kernel_agrees(tmp_path):
    """The same layers by way of buildah, whose storage lets the kernel lay them over each other."""
    need("buildah")
    stack = [
        layer([("etc", None), ("etc/a", b"1"), ("etc/b", b"1"), ("lib", None), ("lib/x", b"1"), ("lib/y", "=lib/x")]),
        layer([("etc/.wh.a", b""), ("lib/x", b"2")]),
    ]
    layout = write_layout(tmp_path / "oci", stack)
    store_ = ["--root", str(tmp_path / "storage"), "--runroot", str(tmp_path / "run"), "--storage-driver", "vfs"]
    container = subprocess.run(
        ["buildah", *store_, "from", f"oci:{layout}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    mounted = Path(
        subprocess.run(
            ["buildah", *store_, "mount", container], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    theirs = {
        str(path.relative_to(mounted)): path.read_bytes()
        for path in mounted.rglob("*")
        if path.is_file()
        and path.parts[len(mounted.parts)] in ("etc", "lib")
        and str(path.relative_to(mounted)) not in ADDED
    }
    ours = unpacked(*stack)
    assert theirs == {"etc/b": b"1", "lib/x": b"2", "lib/y": b"1"}
    assert {name: value for name, value in ours.items() if isinstance(value, bytes)} == theirs
