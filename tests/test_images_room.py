"""Room on a node: looked for in the folders that each runtime writes to, on file systems that are too small, and nothing refused that would fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from image_helpers import layer, leave_out, need

from amlaunch.containers import disk_space
from amlaunch.containers.node_setup import check, main
from amlaunch.containers.runtimes.catalog import parse
from amlaunch.containers.runtimes.enroot import name_of
from amlaunch.containers.start_failures import FAILURES, advice, failure_of
from amlaunch.launcher.images.disk_space import Room

SIZE = 4 << 20
"""Bytes of an image's compressed layers."""
IMAGE = "registry.example/team/tiny:1"


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str, int], Path]]:
    """Makes file systems of so many megabytes."""
    need("mount")
    if os.geteuid():
        leave_out("needs root for a small file system")
    made: list[Path] = []

    def make(name: str, megabytes: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No configuration of enroot or Slurm but the test's own, and no variables."""
    for name in list(os.environ):
        if name.startswith(("ENROOT_", "APPTAINER_", "SINGULARITY_", "XDG_", "CH_")) or name == "TMPDIR":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(disk_space, "ENROOT_CONFIGS", (str(tmp_path / "enroot.conf"),))
    monkeypatch.setattr(disk_space, "PLUGSTACKS", (str(tmp_path / "plugstack*"),))


def lack(runtime: str, image: str = IMAGE, size: int | None = SIZE) -> str:
    """What a node says of the room; empty: nothing."""
    path = image if image.startswith("/") else None
    spec = {
        "runtime": runtime,
        "image": image,
        "path": path,
        "mounts": [],
        "prepare": [] if runtime == "pyxis" else [["true"]],
        "bytes": size,
    }
    return dict(check(spec)).get("no space for the image", "")


@pytest.mark.parametrize(
    ("variable", "megabytes", "what"),
    [
        ("CACHE", 3, "the download"),
        ("TEMP", 7, "the image as one file and the unpacked layers"),
        ("DATA", 3, "the unpacked image"),
    ],
)
def test_enroot(disk, monkeypatch, variable, megabytes, what):
    """Each of its three folders, alone on a file system that is too small."""
    large, small = disk("large", 40), disk("small", megabytes)
    for name in ("CACHE", "TEMP", "DATA"):
        monkeypatch.setenv(f"ENROOT_{name}_PATH", str((small if name == variable else large) / name))
    said = lack("enroot")
    assert said.startswith(
        f"the disk of {small / variable} has 0.0 GB free, and {what} will take about 0.0 GB there"
    ), said
    monkeypatch.setenv(f"ENROOT_{variable}_PATH", str(large / "also"))
    assert not lack("enroot"), "unpacked layers are gone before the image is unpacked: they need not both fit"


def test_enroot_does_not_need_what_it_has(disk, monkeypatch):
    small = disk("small", 5)
    large = disk("large", 40)
    monkeypatch.setenv("ENROOT_DATA_PATH", str(large / "data"))
    monkeypatch.setenv("ENROOT_TEMP_PATH", str(large))
    monkeypatch.setenv("ENROOT_CACHE_PATH", str(small / "cache"))
    (small / "somebody's").write_bytes(bytes(3 << 20))
    assert "the download" in lack("enroot")
    monkeypatch.setenv("ENROOT_CACHE_PATH", str(small))
    assert not lack("enroot"), "a layer in the cache is not fetched again"
    monkeypatch.setenv("ENROOT_DATA_PATH", str(small / "data"))
    assert "the unpacked image" in lack("enroot")
    (small / "data" / name_of(parse(IMAGE))).mkdir(parents=True)
    assert not lack("enroot"), "a container that is there is started as it is"


@pytest.fixture
def squashed(tmp_path) -> Callable[..., str]:
    def make(name: str, *options: str) -> str:
        need("mksquashfs")
        source = tmp_path / f"of-{name}"
        source.mkdir()
        (source / "blob").write_bytes(os.urandom(SIZE))
        subprocess.run(
            ["mksquashfs", source, tmp_path / name, "-quiet", "-no-progress", *options],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return str(tmp_path / name)

    return make


def test_a_squashfs_file_is_unpacked(disk, monkeypatch, capsys, squashed):
    """As much as it says itself: enroot's own are not compressed (-noD)."""
    packed, plain = squashed("packed.sqsh", "-comp", "zstd"), squashed("plain.sqsh", "-comp", "lzo", "-noD")
    monkeypatch.setenv("ENROOT_DATA_PATH", str(disk("small", 6)))
    assert not lack("enroot", plain) and not capsys.readouterr().out
    assert not lack("enroot", packed), "this one compresses to nothing, and would fit"
    assert (
        "the unpacked image will take about 0.0 GB there, unless its files compress less than most"
        in capsys.readouterr().out
    )
    monkeypatch.setenv("ENROOT_DATA_PATH", str(disk("smaller", 3)))
    assert "the unpacked image" in lack("enroot", plain) and "the unpacked image" in lack("enroot", packed)


def test_enroots_own_folders():
    """doc/configuration.md: below XDG's folders, and TMPDIR."""
    assert disk_space.enroot_folders({"HOME": "/home/me"}) == disk_space.Folders(
        Path("/home/me/.cache/enroot"), Path("/home/me/.local/share/enroot"), Path("/tmp")
    )
    given = {"HOME": "/home/me", "XDG_CACHE_HOME": "/c", "XDG_DATA_HOME": "/d", "TMPDIR": "/t"}
    assert disk_space.enroot_folders(given) == disk_space.Folders(Path("/c/enroot"), Path("/d/enroot"), Path("/t"))
    assert disk_space.enroot_folders({**given, "ENROOT_DATA_PATH": "/raid"}).data == Path("/raid")


@pytest.mark.parametrize(
    ("words", "data"),
    [
        ("ENROOT_DATA_PATH ${XDG_DATA_HOME}/enroot", "/home/me/.local/share/enroot"),
        ("ENROOT_CACHE_PATH /raid/c\nENROOT_DATA_PATH ${ENROOT_CACHE_PATH}/d", "/raid/c/d"),
        ("ENROOT_RUNTIME_PATH ${XDG_RUNTIME_DIR}/enroot\nENROOT_DATA_PATH ${ENROOT_RUNTIME_PATH}/d", "/run/enroot/d"),
        ("ENROOT_DATA_PATH /tmp/${SLURM_JOB_ID}/enroot", "/tmp/7/enroot"),
        ("ENROOT_DATA_PATH /raid/${USER:-nobody}", "/raid/nobody"),
        ("ENROOT_DATA_PATH /raid/${USER}", "USER: unbound variable"),
        ("ENROOT_DATA_PATH /raid/$(no-such-program)", "no-such-program: command not found"),
        ("ENROOT_DATA_PATH $(echo not a path)", "it comes to 'not a path'"),
        ("ENROOT_DATA_PATH /raid/$(", "unexpected"),
    ],
)  # fmt: skip
def test_enroots_configuration_as_pyxis_has_it_read(tmp_path, disk, monkeypatch, capsys, words, data):
    """Words that mean nothing here are a doubt, for which nobody is refused."""
    (tmp_path / "enroot.conf").write_text(words)
    job = {"HOME": "/home/me", "PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "USER": "me"}
    found = disk_space.enroot_folders(
        {name: value for name, value in job.items() if disk_space.TO_PYXIS.fullmatch(name)}
    )
    if data.startswith("/"):
        assert str(found.data) == data and not found.doubt
        return
    assert found.data == Path("/home/me/.local/share/enroot") and data in found.doubt
    monkeypatch.setenv("HOME", str(disk("small", 3)))
    monkeypatch.delenv("USER", raising=False)
    (tmp_path / "plugstack.conf").write_text("required spank_pyxis.so")
    assert not lack("pyxis") and not lack("enroot")
    said = capsys.readouterr().out
    assert "the download" in said and said.count("of its enroot.conf means another folder here (") >= 2


def test_pyxis_writes_where_the_administrator_says(tmp_path, disk, monkeypatch, capsys):
    """enroot.conf is a shell's; of the job's own variables pyxis hands on none that names a folder (pyxis#43); its file goes to runtime_path (pyxis#53)."""
    large, small = disk("large", 40), disk("small", 3)
    for name in ("CACHE", "TEMP", "DATA"):
        monkeypatch.setenv(f"ENROOT_{name}_PATH", "/nowhere/that/counts")
    (tmp_path / "enroot.conf").write_text(
        f"#ENROOT_TEMP_PATH /x\nENROOT_CACHE_PATH {small}/group-$(id -g)\nENROOT_DATA_PATH = ${{HOME}}/data\n  ENROOT_TEMP_PATH\t{large}\n"
    )
    monkeypatch.setenv("HOME", str(large))
    folders = disk_space.enroot_folders({"HOME": str(large), "PATH": os.environ["PATH"]})
    assert folders == disk_space.Folders(small / f"group-{os.getgid()}", large / "data", large)
    (tmp_path / "plugstack.conf").write_text(
        f"include /etc/x/*\nrequired /usr/lib/slurm/spank_pyxis.so runtime_path={large} execute_entrypoint=0\n"
    )
    assert f"the disk of {small}/group-{os.getgid()} has" in lack("pyxis")
    (tmp_path / "enroot.conf").write_text(
        f"ENROOT_CACHE_PATH {large}\nENROOT_DATA_PATH {large}\nENROOT_TEMP_PATH {large}\n"
    )
    assert not lack("pyxis")
    (tmp_path / "plugstack.conf").write_text(f"required spank_pyxis.so runtime_path={small}")
    assert f"the disk of {small} has 0.0 GB free, and the image as one file" in lack("pyxis")
    (tmp_path / "plugstack.conf").write_text(f"required spank_pyxis.so runtime_path={small} use_enroot_load=1")
    assert not lack("pyxis"), "it makes no file"
    assert capsys.readouterr().out == ""


def test_pyxis_of_which_nothing_is_seen_refuses_nothing(tmp_path, disk, monkeypatch, capsys, squashed):
    monkeypatch.setenv("HOME", str(disk("small", 3)))
    image = squashed("a.sqsh", "-comp", "zstd")
    assert not lack("pyxis", image)
    assert (
        "/small/.local/share/enroot has 0.0 GB free, and the unpacked image will take about 0.0 GB there, unless pyxis is set up otherwise"
        in capsys.readouterr().out
    )
    (tmp_path / "plugstack.conf").write_text("optional spank_pyxis.so")
    assert "the unpacked image" in lack("pyxis", image)
    (tmp_path / "plugstack.conf").write_text("optional spank_pyxis.so use_squashfuse=yes")
    assert not lack("pyxis", image), "it is mounted"
    (tmp_path / "plugstack.conf").write_text("optional spank_pyxis.so importer=/opt/caching")
    assert (
        not lack("pyxis") and "unless /opt/caching, which the site imports with, needs less" in capsys.readouterr().out
    )


@pytest.mark.parametrize("runtime", ["apptainer", "singularity"])
def test_apptainer(disk, monkeypatch, capsys, runtime):
    large, small = disk("large", 40), disk("small", 6)
    prefix = runtime.upper()
    monkeypatch.setenv(f"{prefix}_CACHEDIR", str(small))
    monkeypatch.setenv("TMPDIR", str(large))
    assert f"the disk of {small}/cache has 0.0 GB free, and the download and the converted image" in lack(runtime)
    (small / "cache" / "oci-tmp").mkdir(parents=True)
    (small / "cache" / "oci-tmp" / "0123.sif").write_bytes(b"1")
    assert not lack(runtime) and "unless the image is in its cache" in capsys.readouterr().out
    monkeypatch.setenv(f"{prefix}_CACHEDIR", str(large))
    monkeypatch.setenv(f"{prefix}_TMPDIR", str(disk("smaller", 3)))
    assert "the unpacked files" in lack(runtime)
    assert not lack(runtime, "/images/a.sif") and not lack(runtime, IMAGE, 1 << 20)


def test_podman_says_itself_where_its_storage_is(tmp_path, disk, monkeypatch):
    need("podman")
    small, large = disk("small", 3), disk("large", 40)
    (tmp_path / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\nrunroot = "{large}/run"\ngraphroot = "{small}/graph"\n'
    )
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(tmp_path / "storage.conf"))
    monkeypatch.setenv("TMPDIR", str(large))
    said = lack("podman")
    assert said.startswith(f"the disk of {small}/graph has") and "the unpacked image in podman's storage" in said, said
    (tmp_path / "root.tar").write_bytes(layer([("a", b"1")]))
    subprocess.run(["podman", "import", "-q", tmp_path / "root.tar", IMAGE], check=True, capture_output=True)
    assert not lack("podman"), "it has the image"
    (tmp_path / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\nrunroot = "{large}/run2"\ngraphroot = "{large}/graph2"\n'
    )
    assert not lack("podman")
    (tmp_path / "containers.conf").write_text(f'[engine]\nimage_copy_tmp_dir = "{small}/copies"\n')
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setenv("CONTAINERS_CONF", str(tmp_path / "containers.conf"))
    assert not lack("podman", IMAGE, 1 << 20) and f"the disk of {small}/copies" in lack("podman"), (
        "it has a folder of its own for what is on its way"
    )
    shutil.rmtree(large / "graph2", ignore_errors=True)


def test_ngcs_images_are_known_to_be_large(disk, monkeypatch):
    """20 GB unpacked, where no registry said how large; of any other image two."""
    monkeypatch.setenv("ENROOT_DATA_PATH", str(disk("data", 10000)))
    monkeypatch.setenv("ENROOT_TEMP_PATH", str(disk("temp", 40000)))
    monkeypatch.setenv("ENROOT_CACHE_PATH", str(disk("cache", 40000)))
    assert "has 10.5 GB free, and the unpacked image will take about 20.0 GB" in lack(
        "enroot", "nvcr.io/nvidia/pytorch:25.08-py3", None
    )
    assert (
        not lack("enroot", IMAGE, None)
        and not lack("enroot", IMAGE, 8 * 10**9)
        and not lack("enroot", "nvcr.io/nvidia/pytorch:25.08-py3", 10**9)
    )


def test_what_is_certain_goes_before_what_is_likely(disk):
    small = disk("small", 4)
    likely, certain = (
        disk_space.Need(small, 5 << 20, "likely", least=1 << 20),
        disk_space.Need(small / "not yet", 5 << 20, "certain"),
    )
    assert [lack.what for lack in disk_space.lacks([[likely], [certain]])] == ["certain"] and [
        lack.certain for lack in disk_space.lacks([[likely]])
    ] == [False]
    assert not disk_space.lacks(
        [[disk_space.Need(small, 3 << 20, "a")], [disk_space.Need(small, 3 << 20, "b")]]
    ) and disk_space.lacks([[disk_space.Need(small, 3 << 20, "a"), disk_space.Need(small, 3 << 20, "b")]])


def test_docker_saves_what_it_unpacked(tmp_path):
    """The archive's size, where an engine says nothing of its storage."""
    found = {
        tool: Room(tmp_path, None, False, IMAGE).to_fetch(tool, 10.0, 0, {"PATH": ""})[1][-1].size
        for tool in ("docker", "buildah")
    }
    assert found == {"docker": 25.0, "buildah": 10.0}


def test_a_node_refuses_with_where_the_runtimes_folders_are_named(tmp_path, disk, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(disk("small", 3)))
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "plugstack.conf").write_text("required spank_pyxis.so")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    spec = {
        "runtime": "pyxis",
        "image": IMAGE,
        "path": None,
        "mounts": [],
        "prepare": [],
        "bytes": SIZE,
        "verdicts": str(tmp_path),
    }
    assert main([json.dumps(spec)]) == 1
    said = capsys.readouterr().err
    assert (
        "no space for the image (registry.example/team/tiny:1): the disk of" in said
        and "pyxis hands none of your own variables on to enroot" in said
    )
    space = FAILURES[0]
    assert {
        "enroot": "ENROOT_TEMP_PATH",
        "apptainer": "APPTAINER_TMPDIR",
        "singularity": "SINGULARITY_TMPDIR",
        "docker": "prune",
        "podman": "TMPDIR",
        "charliecloud": "CH_IMAGE_STORAGE",
    }.items() <= {
        name: next(
            word
            for word in (
                "ENROOT_TEMP_PATH",
                "APPTAINER_TMPDIR",
                "SINGULARITY_TMPDIR",
                "CH_IMAGE_STORAGE",
                "TMPDIR",
                "prune",
            )
            if word in advice(space, name)
        )
        for name in ("enroot", "apptainer", "singularity", "docker", "podman", "charliecloud")
    }.items()


def test_docker_that_loads_no_layout_is_told_apart():
    """docker 28's own words, of a tar of an OCI layout."""
    found = failure_of("open /var/lib/docker/tmp/docker-import-3278311284/blobs/json: no such file or directory\n")
    assert (
        found is not None
        and found[0].kind == "an archive of the other kind"
        and "skopeo copy oci-archive:FILE docker-archive:NEW" in found[0].advice
    )


@pytest.mark.parametrize(
    "line",
    [
        "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
        "failed to connect to the docker API at unix:///var/run/docker.sock; check if the path is correct and if the daemon is running: dial unix /var/run/docker.sock: connect: no such file or directory",
        "failed to connect to the docker API at tcp://10.0.0.1:2375: dial tcp 10.0.0.1:2375: connect: connection refused",
        "permission denied while trying to connect to the docker API at unix:///var/run/docker.sock",
        "Got permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: dial unix: connect: permission denied",
    ],
)
def test_a_docker_without_a_daemon(line):
    """docker's own words, from version 19 to 29."""
    found = failure_of(f"{line}\n")
    assert found is not None and found[0].kind == "no daemon" and found[1] == line


@pytest.mark.parametrize(
    "line",
    [
        "Cannot open x: no such file or directory",
        "failed to connect to master: connection refused",
        "permission denied: no such file or directory",
    ],
)
def test_a_trainers_own_words_are_not_dockers(line):
    assert failure_of(line) is None
