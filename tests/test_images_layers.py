"""An image's layers as one file system: what is hidden, linked and removed, against the kernel's own overlay where that runs."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_helpers import layer, need, unsquashed, write_docker_archive, write_layout

from amlaunch.containers.images import image_store, layers
from amlaunch.containers.images.layers import Layered, NotAnImage, merge


def merged(*stack: bytes) -> dict[str, bytes | str | None]:
    """The file system of layers, lowest first: content, ``->target``, ``=name`` or None for a folder."""
    image = Layered("sha256:0", {}, [lambda data=data: io.BytesIO(data) for data in stack], 0)
    out = io.BytesIO()
    merge(image, out, {}, lambda _: None)
    out.seek(0)
    found: dict[str, bytes | str | None] = {}
    with tarfile.open(fileobj=out) as tar:
        for info in tar:
            assert info.name not in found, f"{info.name} is in the stream twice"
            handle = tar.extractfile(info) if info.isreg() else None
            found[info.name] = (
                handle.read()
                if handle
                else f"->{info.linkname}"
                if info.issym()
                else f"={info.linkname}"
                if info.islnk()
                else None
            )
    return {name: value for name, value in found.items() if name not in layers.FOLDERS and name not in layers.FILES}


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
    assert merged(low, high) == {"a": None, "a/x": b"high", "b/new": b"high", "c": None, "c/f": b"high", "d": "->a"}
    back = layer([("a", None), ("a/y", b"back")])
    assert merged(low, high, back)["a/y"] == b"back", "what one layer removed, a later one brings back"
    assert merged(layer([("a/x", b"low")]), layer([("a", b"file")]), layer([("a", None)])) == {"a": None}, (
        "a file that is hidden itself hid it"
    )


def test_a_hard_link_whose_file_is_hidden_keeps_its_content():
    low = layer([("bin/one", b"program"), ("bin/two", "=bin/one"), ("bin/three", "=bin/one")])
    high = layer([("bin/one", b"other")])
    assert merged(low, high) == {"bin/one": b"other", "bin/three": "=bin/two", "bin/two": b"program"}
    assert merged(low)["bin/two"] == "=bin/one"
    linked = layer([("bin/four", "=bin/one")])  # to a file of a lower layer, as some builders write it
    assert merged(layer([("bin/one", b"program")]), linked)["bin/four"] == b"program"
    with pytest.raises(NotAnImage, match="links bin/four to bin/one"):
        merged(linked)


def test_devices_and_names_that_lead_out():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind in (("dev/null", tarfile.CHRTYPE), ("odd", tarfile.BLKTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    assert merged(out.getvalue()) == {}
    with pytest.raises(NotAnImage, match=r"'a/\.\./\.\./etc/passwd', which leads out"):
        merged(layer([("a/../../etc/passwd", b"x")]))


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
    assert merged(*tars) == model


def test_archives_are_told_apart(tmp_path):
    stack = [layer([("etc/name", b"low")]), layer([("etc/name", b"high")])]
    layout = write_layout(tmp_path / "oci", stack, {"Env": ["A=1"]})
    with layers.open_layout(layout, "amd64") as image:
        digest, size = image.digest, image.size
        assert (
            image.architecture == "amd64"
            and image.settings == {"Env": ["A=1"]}
            and size == sum(len(gzip.compress(one, 1, mtime=0)) for one in stack)
        )
    archive = tmp_path / "oci.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(layout, ".")
    docker = write_docker_archive(tmp_path / "docker.tar", stack, {"Env": ["A=1"]})
    plain, packed = tmp_path / "root.tar", tmp_path / "root.tar.gz"
    plain.write_bytes(stack[1])
    packed.write_bytes(gzip.compress(stack[1]))
    for path, digest_known in ((archive, digest), (docker, None), (plain, None), (packed, None)):
        with layers.open_archive(path, "amd64") as image:
            assert digest_known in (None, image.digest)
            out = io.BytesIO()
            merge(image, out, {}, lambda _: None)
            out.seek(0)
            with tarfile.open(fileobj=out) as tar:
                assert tar.extractfile("etc/name").read() == b"high", path  # type: ignore[union-attr]
    assert layers.archive_layout(docker) == "docker" and layers.archive_layout(archive) == "oci"
    for saved in (archive, docker):  # of a compressed one a root file system was made, which held the layers as files
        packed.write_bytes(gzip.compress(saved.read_bytes()))
        with pytest.raises(layers.NotAnImage, match="gunzip --keep it"), layers.open_archive(packed, "amd64"):
            pass


def test_a_tar_that_is_no_image_is_told_without_reading_it_whole(tmp_path):
    """What an image is, is known at submit; the list of its layers may be the last of its names."""
    system = [(f"usr/lib/{number}", b"") for number in range(150)]
    tars = {
        "system": layer([*system, ("manifest.json", b"")]),
        "small": layer([("etc/name", b"1")]),
        "packed": gzip.compress(layer([("etc/name", b"1")])),
        "text": b"no tar" * 500,
        "empty": b"",
    }
    for name, raw in tars.items():
        (tmp_path / name).write_bytes(raw)
    said = {name: layers.why_no_image(tmp_path / name) for name in tars}
    assert (
        all("is a tar of something else than an image" in said[name] for name in ("system", "small", "packed"))
        and "is not a tar archive" in said["text"]
        and "is not a tar archive" in said["empty"]
    )
    many = [(f"{number:064x}/{name}", b"") for number in range(60) for name in ("VERSION", "json", "layer.tar")]
    (tmp_path / "old").write_bytes(layer([*many, ("manifest.json", b"[]")]))
    (tmp_path / "packed").write_bytes(gzip.compress(layer(many)))
    write_layout(tmp_path / "oci", [layer([("a", b"1")])])
    write_docker_archive(tmp_path / "docker", [layer([("a", b"1")])])
    with tarfile.open(tmp_path / "oci.tar", "w") as tar:
        tar.add(tmp_path / "oci", ".")
    assert not any(layers.why_no_image(tmp_path / name) for name in ("old", "packed", "oci.tar", "docker"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "index.json").write_text("{"), "damaged"),
        (lambda folder: next((folder / "blobs" / "sha256").iterdir()).unlink(), "not whole"),
        (lambda folder: (folder / "index.json").write_text('{"manifests": []}'), "names no image"),
    ],
)
def test_a_damaged_layout_says_so(tmp_path, damage, message):
    layout = write_layout(tmp_path, [layer([("a", b"1")])])
    damage(layout)
    with pytest.raises(NotAnImage, match=message), layers.open_layout(layout, "amd64") as image:
        merge(image, io.BytesIO(), {}, lambda _: None)


def test_a_torn_layer_and_another_machine(tmp_path):
    layout = write_layout(tmp_path, [layer([("a", bytes(100_000))])], architecture="arm64")
    with pytest.raises(NotAnImage, match="has images for arm64, none for amd64"), layers.open_layout(layout, "amd64"):
        pass
    blob = max((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-20])
    with layers.open_layout(layout, "arm64") as image, pytest.raises(NotAnImage, match="damaged"):
        merge(image, io.BytesIO(), {}, lambda _: None)


def test_a_layer_compressed_with_zstd():
    need("zstd")
    data = layer([("a", b"1" * 1000)])
    packed = subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout
    assert merged(packed) == {"a": b"1" * 1000}


def test_the_start_script_keeps_words_apart(tmp_path):
    """enroot runs /etc/rc with the command as its arguments; an entrypoint comes before it, and exit codes come through."""
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


def test_both_ways_to_squashfs_give_the_same_files(tmp_path):
    """A tar into mksquashfs, and for older ones unpacked files."""
    need("mksquashfs", "unsquashfs")
    stack = [
        layer([("etc", None), ("etc/low", b"1"), ("bin/tool", b"#!/bin/sh\n"), ("bin/same", "=bin/tool")]),
        layer([("etc/.wh.low", b""), ("etc/high", b"2"), ("link", "->etc/high")]),
    ]
    image = Layered(
        "sha256:0", {"config": {"WorkingDir": "/app/here"}}, [lambda data=data: io.BytesIO(data) for data in stack], 0
    )
    out = io.BytesIO()
    merge(image, out, layers.runtime_files(image.settings), lambda _: None)
    direct, rootfs = tmp_path / "direct.sqsh", tmp_path / "rootfs"
    subprocess.run(image_store.mksquashfs("-", direct, tar=True), input=out.getvalue(), check=True, capture_output=True)
    rootfs.mkdir()
    subprocess.run(image_store.untar(rootfs), input=out.getvalue(), check=True)
    subprocess.run(
        image_store.mksquashfs(str(rootfs), tmp_path / "unpacked.sqsh", tar=False), check=True, capture_output=True
    )
    trees = [_tree(unsquashed(tmp_path / f"{name}.sqsh", tmp_path / name)) for name in ("direct", "unpacked")]
    assert (
        trees[0] == trees[1]
        and {"etc/high", "bin/same", "link", "etc/rc", "app/here", "dev", "proc"} <= set(trees[0])
        and "etc/low" not in trees[0]
    )
    assert (tmp_path / "direct" / "bin" / "tool").samefile(tmp_path / "direct" / "bin" / "same")


def _tree(root: Path) -> dict[str, object]:
    found = {}
    for path in sorted(root.rglob("*")):
        content: object = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (content, 0 if path.is_symlink() else path.stat().st_mode)
    return found


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
        and str(path.relative_to(mounted)) not in layers.FILES
    }
    ours = merged(*stack)
    assert theirs == {"etc/b": b"1", "lib/x": b"2", "lib/y": b"1"}
    assert {name: value for name, value in ours.items() if isinstance(value, bytes)} == theirs
