"""Free space on a node: too little is refused with the folder and the fix, before the runtime starts to fetch."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from image_helpers import layer, leave_out, need, write_enroot

from amlaunch.containers import disk_space
from amlaunch.containers.node_setup import check, main
from amlaunch.containers.runtimes.catalog import parse
from amlaunch.containers.runtimes.enroot import COMPLETE_MARKER, container_name
from amlaunch.containers.start_failures import FAILURES, advice, failure_of

SIZE = 4 << 20
"""Bytes of an image's compressed layers."""
IMAGE = "registry.example/team/tiny:1"


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str, int], Path]]:
    """Makes file systems of so many megabytes."""
    need("mount")
    if os.geteuid():
        leave_out("needs root for a small file system")
    folders: list[Path] = []

    def make(name: str, megabytes: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
        folders.append(folder)
        return folder

    yield make
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No variables of runtimes but the test's own."""
    for name in list(os.environ):
        if name.startswith(("ENROOT_", "APPTAINER_", "SINGULARITY_", "XDG_", "CH_")) or name == "TMPDIR":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_enroot(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("ENROOT_RUNTIME_PATH", str(tmp_path / "run"))


def problem(runtime: str, image: str = IMAGE, size: int | None = SIZE) -> str:
    """What a node reports about free space; empty: nothing."""
    spec = {
        "runtime": runtime,
        "image": image,
        "path": image if image.startswith("/") else None,
        "mounts": [],
        "prepare": [["true"]],
        "bytes": size,
    }
    return dict(check(spec)).get("no space for the image", "")


@pytest.mark.parametrize(
    ("runtime", "variable"),
    [("enroot", "ENROOT_DATA_PATH"), ("enroot", "ENROOT_TEMP_PATH"), ("charliecloud", "CH_IMAGE_STORAGE")],
)
def test_a_folder_that_a_variable_names(disk, monkeypatch, runtime, variable):
    small, large = disk("small", 3), disk("large", 40)
    monkeypatch.setenv(variable, str(small / "images"))
    assert problem(runtime).startswith(f"{small}/images has 0.0 GB free, and the image needs at least 0.0 GB there")
    assert not problem(runtime, size=1 << 20), "a smaller image fits"
    monkeypatch.setenv(variable, str(large))
    assert not problem(runtime)


def test_an_image_that_the_node_has_needs_nothing(disk, monkeypatch):
    small = disk("small", 3)
    monkeypatch.setenv("ENROOT_DATA_PATH", str(small))
    assert problem("enroot")
    (small / container_name(parse(IMAGE))).mkdir()
    assert problem("enroot"), "a partial container"
    (small / container_name(parse(IMAGE)) / COMPLETE_MARKER).touch()
    assert not problem("enroot"), "a container that was unpacked is started as it is"


def test_a_file_needs_at_least_its_size(tmp_path, disk, monkeypatch):
    image = tmp_path / "a.sqsh"
    image.write_bytes(bytes(SIZE))
    monkeypatch.setenv("ENROOT_DATA_PATH", str(disk("small", 3)))
    assert problem("enroot", str(image))
    image.write_bytes(bytes(1 << 20))
    assert not problem("enroot", str(image))


def test_an_image_of_unknown_size_needs_a_gigabyte(disk, monkeypatch):
    monkeypatch.setenv("ENROOT_DATA_PATH", str(disk("small", 900)))
    assert "has 0.9 GB free, and the image needs at least 1.0 GB" in problem("enroot", size=None)
    monkeypatch.setenv("ENROOT_DATA_PATH", str(disk("large", 1100)))
    assert not problem("enroot", size=None)


def test_podman_says_itself_where_its_storage_is(tmp_path, disk, monkeypatch):
    need("podman")
    small, large = disk("small", 3), disk("large", 40)
    config = tmp_path / "storage.conf"
    config.write_text(f'[storage]\ndriver = "vfs"\nrunroot = "{large}/run"\ngraphroot = "{small}/graph"\n')
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(config))
    monkeypatch.setenv("TMPDIR", str(large))
    assert problem("podman").startswith(f"{small}/graph has")
    (tmp_path / "root.tar").write_bytes(layer([("a", b"1")]))
    subprocess.run(["podman", "import", "-q", tmp_path / "root.tar", IMAGE], check=True, capture_output=True)
    assert not problem("podman"), "it has the image"
    config.write_text(f'[storage]\ndriver = "vfs"\nrunroot = "{large}/run2"\ngraphroot = "{large}/graph"\n')
    assert not problem("podman")


def test_an_engine_without_an_answer_is_not_checked(tmp_path, monkeypatch):
    """A daemon on another machine, or a program that fails: the tool itself reports what it lacks."""
    for engine in disk_space.ENGINES:
        program = tmp_path / engine
        program.write_text('#!/bin/sh\necho \'{"DockerRootDir": "/no/such/folder", "store": 5}\'\nexit 1\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [disk_space.storage_root(engine) for engine in disk_space.ENGINES] == [None, None, None]


def test_a_node_refuses_with_the_folder_and_the_fix(tmp_path, disk, monkeypatch, capsys):
    monkeypatch.setenv("ENROOT_DATA_PATH", str(disk("small", 3)))
    spec = {
        "runtime": "enroot",
        "image": IMAGE,
        "path": None,
        "mounts": [],
        "prepare": [["true"]],
        "bytes": SIZE,
        "verdicts": str(tmp_path),
    }
    assert main([json.dumps(spec)]) == 1
    error = capsys.readouterr().err
    assert f"no space for the image (registry.example/team/tiny:1): {tmp_path}/small has 0.0 GB free" in error
    assert "choose other folders with ENROOT_CACHE_PATH, ENROOT_DATA_PATH and ENROOT_TEMP_PATH" in error


@pytest.mark.parametrize(
    ("runtime", "fix"),
    [
        ("pyxis", "pyxis does not pass your own variables to enroot"),
        ("enroot", "ENROOT_TEMP_PATH"),
        ("apptainer", "APPTAINER_TMPDIR"),
        ("singularity", "SINGULARITY_TMPDIR"),
        ("docker", "docker image prune"),
        ("podman", "graphroot in ~/.config/containers/storage.conf and with TMPDIR"),
        ("charliecloud", "CH_IMAGE_STORAGE"),
        ("slurm", "TMPDIR"),
    ],
)
def test_each_runtimes_folders_are_named(runtime, fix):
    assert fix in advice(FAILURES[0], runtime)


def test_docker_that_loads_no_layout_is_told_apart():
    """docker 28's own words, of a tar of an OCI layout."""
    found = failure_of("open /var/lib/docker/tmp/docker-import-3278311284/blobs/json: no such file or directory\n")
    assert (
        found is not None
        and found[0].kind == "wrong archive layout"
        and "skopeo copy oci-archive:FILE docker-archive:NEW" in found[0].advice
    )


@pytest.mark.parametrize(
    "line",
    [
        "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
        "failed to connect to the docker API at unix:///var/run/docker.sock; check if the path is correct and "
        "if the daemon is running: dial unix /var/run/docker.sock: connect: no such file or directory",
        "failed to connect to the docker API at tcp://10.0.0.1:2375: dial tcp 10.0.0.1:2375: connect: "
        "connection refused",
        "permission denied while trying to connect to the docker API at unix:///var/run/docker.sock",
        "Got permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: "
        "dial unix: connect: permission denied",
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
