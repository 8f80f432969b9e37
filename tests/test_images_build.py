"""``amlaunch image build`` and ``check``: our Dockerfile, built offline on a tiny base, imported and started."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import container_image
import pytest
from image_helpers import (
    PYTHON,
    Registry,
    layer,
    make_certificate,
    need,
    python_layer,
    unsquashed,
    write_docker_archive,
    write_layout,
)

from amlaunch import containers
from amlaunch.launcher.__main__ import main
from amlaunch.launcher.display.findings import BAD, OK, WARN
from amlaunch.launcher.images import checker, probe_findings

BASE = "localhost/amlaunch-test-base:1"


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Iterator[Path]:
    """A storage of the test's own for buildah and podman, which work without user namespaces."""
    (tmp_path / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\nrunroot = "{tmp_path}/run"\ngraphroot = "{tmp_path}/graph"\n'
    )
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(tmp_path / "storage.conf"))
    monkeypatch.setenv("BUILDAH_ISOLATION", "chroot")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for folder in ("graph", "run"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)


def wheel(folder: Path) -> Path:
    """A wheel of one module, as a site without a network keeps them."""
    folder.mkdir()
    path = folder / "tiny_extra-1.2-py3-none-any.whl"
    info = "tiny_extra-1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_extra.py", "VALUE = 12\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-extra\nVersion: 1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", f"tiny_extra.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return folder


def pip_files() -> list[tuple[Path, str]]:
    """pip as the tests' own environment has it."""
    import pip

    root = Path(pip.__file__).parent
    return [
        (path, f"usr/lib/python3/dist-packages/pip/{path.relative_to(root)}") for path in sorted(root.rglob("*.py"))
    ] + [
        (path, f"usr/lib/python3/dist-packages/pip/{path.relative_to(root)}")
        for path in sorted(root.rglob("*.pem")) + sorted(root.rglob("vendor.txt"))
    ]


@pytest.mark.slow
def test_our_dockerfile_without_a_network(storage, capsys):
    """Base from an archive, packages from a folder of wheels; amlaunch and the package are in the imported image."""
    need("buildah", "mksquashfs", "unsquashfs")
    if not PYTHON.exists():
        need(str(PYTHON))
    base = write_layout(storage / "base", [python_layer(pip_files())], {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]})
    subprocess.run(["buildah", "pull", "-q", f"oci:{base}"], check=True, capture_output=True)
    image = subprocess.run(["buildah", "images", "-q"], check=True, capture_output=True, text=True).stdout.split()[0]
    subprocess.run(["buildah", "tag", image, BASE], check=True)
    words = [
        "--base",
        BASE,
        "--packages",
        "tiny-extra",
        "--wheels",
        str(wheel(storage / "wheels")),
        "--tag",
        "localhost/baked:1",
        "--tool",
        "buildah",
    ]
    assert main(["image", "build", *words, "--images", "images", "--json"]) == 0, capsys.readouterr()
    made = json.loads(capsys.readouterr().out)
    assert made["made"] and made["source"] == f"build on {BASE}" and made["reference"] == "localhost/baked:1"
    files = unsquashed(Path(made["path"]), storage / "files")
    code = "import tiny_extra, amlaunch.launcher, amlaunch.trainer; print(tiny_extra.VALUE, amlaunch.launcher.__file__)"
    found = subprocess.run(["chroot", str(files), "/usr/bin/python3", "-c", code], capture_output=True, text=True)
    assert found.stdout == "12 /opt/amlaunch/amlaunch/launcher/__init__.py\n", found
    assert not (files / "tmp" / "amlaunch-wheels").exists()
    assert (
        main(
            [
                "image",
                "build",
                "--base",
                "localhost/nothing:1",
                "--packages",
                "",
                "--tool",
                "buildah",
                "--images",
                "images",
            ]
        )
        == 1
    )
    said = capsys.readouterr()
    assert "buildah build failed with exit code" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("nvcr.io#nvidia/pytorch:25.08-py3", "nvcr.io/nvidia/pytorch:25.08-py3"),
        ("docker://nvcr.io/nvidia/pytorch:25.08-py3", "nvcr.io/nvidia/pytorch:25.08-py3"),
        ("debian:12", "docker.io/library/debian:12"),
        (f"nvcr.io/nvidia/pytorch@sha256:{'0' * 64}", f"nvcr.io/nvidia/pytorch@sha256:{'0' * 64}"),
    ],
)
def test_a_base_is_spelled_as_in_a_recipe(storage, monkeypatch, base, name):
    """A builder that keeps its arguments sees the name that a Dockerfile knows."""
    tool = storage / "bin" / "buildah"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{storage}/words\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    assert main(["image", "build", "--base", base, "--no-import", "--tool", "buildah"]) == 0
    assert f"BASE={name}" in (storage / "words").read_text().splitlines()


@pytest.mark.parametrize("named", ["--base", "Dockerfile"])
def test_room_for_a_base_is_looked_for_before_it_is_fetched(storage, monkeypatch, capsys, named):
    need("buildah", "docker-registry", "skopeo", "mount")
    if os.geteuid():
        need("root, for a small file system")
    folder = storage / "registry"
    folder.mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", str(make_certificate(folder)))
    registry = Registry(folder, tls=True)
    graph = storage / "graph"
    graph.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(graph)], check=True)
    try:
        base = registry.push(write_layout(storage / "oci", [layer([("blob", os.urandom(8 << 20))])]), "base:1")
        (storage / "Dockerfile").write_text(f"ARG BASE={base}\nFROM ${{BASE}}\n")
        words = ["--base", base] if named == "--base" else ["--file", "Dockerfile"]
        assert main(["image", "build", *words, "--tool", "buildah", "--no-import"]) == 2
        error = capsys.readouterr().err
        assert (
            re.search(rf"{graph}: \d\.\d+ MB free, at least 8\.\d+ MB needed", error)
            and "another storage folder for buildah" in error
        ), error
        assert registry.fetched() == 0
    finally:
        registry.process.terminate()
        registry.process.wait()
        subprocess.run(["umount", "-l", str(graph)], check=True)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            "nvcr.io/NVIDIA/pytorch:25.08-py3",
            "--base 'nvcr.io/NVIDIA/pytorch:25.08-py3': image names are in lower case; did you mean "
            "'nvcr.io/nvidia/pytorch:25.08-py3'?",
        ),
        ("https://nvcr.io/nvidia/pytorch:1", "did you mean 'nvcr.io/nvidia/pytorch:1'?"),
        ("nvcr.io#", "the image name is missing"),
        ("base.tar", "--base base.tar: a base cannot be a file or a folder; load it"),
    ],
)
def test_a_base_that_is_no_image(storage, capsys, base, message):
    assert main(["image", "build", "--base", base]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (storage / "graph").exists()


def test_the_dockerfile_is_printed(capsys):
    assert main(["image", "build", "--print"]) == 0
    assert capsys.readouterr().out == Path(containers.__file__).with_name("Dockerfile").read_text()


# --- what the probe sees ------------------------------------------------------------------------------------


def _pythons() -> list[str]:
    """Every Python from 3.10 to 3.13 that is here, by version."""
    found: dict[str, str] = {}
    places = [
        sys.executable,
        *(shutil.which(f"python3.{minor}") or "" for minor in range(10, 14)),
        *map(str, (Path.home() / ".pyenv" / "versions").glob("3.1[0-3].*/bin/python3")),
    ]
    for place in filter(None, places):
        ask = subprocess.run(
            [place, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if ask.returncode == 0 and ask.stdout.strip() in ("3.10", "3.11", "3.12", "3.13"):
            found.setdefault(ask.stdout.strip(), place)
    return [found[version] for version in sorted(found)]


@pytest.mark.parametrize("python", _pythons())
@pytest.mark.slow
def test_the_probe_runs_on_any_python_and_says_what_is_so(tmp_path, python):
    """As source on the command line, alone: no file of ours is in the image."""
    closed = tmp_path / "closed"
    closed.mkdir()
    found = subprocess.run(
        [python, "-I", "-W", "error", "-c", checker.PROBE.read_text(), str(tmp_path), str(tmp_path / "none"), "/proc"],
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
    )
    assert found.returncode == 0 and found.stderr == "", found.stderr
    [line] = [line for line in found.stdout.splitlines() if line.startswith(checker.MARK)]
    seen = json.loads(line.removeprefix(checker.MARK))
    version = subprocess.run(
        [python, "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True
    ).stdout.strip()
    assert seen["python"] == version and seen["architecture"] == os.uname().machine and seen["shm_bytes"] > 0
    assert [(mount["there"], mount["writable"]) for mount in seen["mounts"]] == [
        (True, True),
        (False, False),
        (True, False),
    ]
    assert not list(tmp_path.glob(".amlaunch-probe-*"))
    if python == sys.executable:
        verdicts = {one.name: one.verdict for one in probe_findings.findings("x", seen, False)}
        assert (
            seen["torch"]["version"]
            and verdicts["torch"] == OK
            and seen["packages"]["pyyaml"]
            and seen["packages"]["safetensors"]
        )


def test_verdicts():
    h100 = {"name": "NVIDIA H100 80GB HBM3", "works": True, "problem": "", "memory_bytes": 1}
    torch = {
        "version": "2.8.0a0+34c6371d24.nv25.08",
        "cuda": "13.0",
        "nccl": "2.27.7",
        "cudnn": 91200,
        "available": True,
        "gpus": [h100] * 8,
    }
    seen = {
        "python": "3.12.3",
        "architecture": os.uname().machine,
        "torch": torch,
        "driver": {"version": "580.65.06"},
        "shm_bytes": 1 << 40,
        "packages": {"torch": "2.8", "tiktoken": "0.9"},
    }

    def verdict(name: str, **changed: object) -> tuple[str, str, str]:
        one = next(one for one in probe_findings.findings("img", {**seen, **changed}, True) if one.name == name)
        return one.verdict, one.text, one.advice

    assert (
        verdict("CUDA") == (OK, "CUDA 13.0, NCCL 2.27.7, cuDNN 9.12.0", "")
        and verdict("GPUs")[1] == "8 x NVIDIA H100 80GB HBM3"
    )
    assert verdict("torch")[0] == OK and verdict("driver") == (OK, "580.65.06", "")
    blind = {**torch, "available": False, "gpus": []}
    old = verdict("driver", torch=blind, driver={"version": "535.183.01", "cuda": "12.2"})
    assert old[0] == BAD and "CUDA 13.0 needs driver 580.65 or newer; use an image with CUDA 12" in old[2]
    assert verdict("driver", driver={"version": "535.183.01"})[0] == OK, "torch works: forward compatibility"
    assert verdict("GPUs", torch=blind)[0] == BAD and "sees none" in verdict("GPUs", torch=blind)[1]
    broken = {**torch, "gpus": [h100, {**h100, "works": False, "problem": "no kernel image is available"}]}
    assert verdict("GPUs", torch=broken)[:2] == (
        BAD,
        "2 x NVIDIA H100 80GB HBM3; 1 of them fail: no kernel image is available",
    )
    assert verdict("Python", python="3.9.18")[0] == BAD and verdict("Python", python="3.14.0")[0] == WARN
    assert verdict("torch", torch={"error": "ModuleNotFoundError: No module named 'torch'"})[0] == BAD
    assert verdict("torch", torch={**torch, "version": "2.1.0"})[2] == "amlaunch needs torch>=2.8; use a newer image"
    assert verdict("/dev/shm", shm_bytes=64 << 20)[0] == WARN and verdict("packages")[1] == "torch 2.8, tiktoken 0.9"
    assert verdict(
        "mount", mounts=[{"path": "/d", "there": True, "writable": False, "problem": "Read-only file system"}]
    )[:2] == (WARN, "/d is not writable: Read-only file system")
    assert [probe_findings.cudnn_version(number) for number in (8902, 91002, None)] == ["8.9.2", "9.10.2", "missing"]


# --- check --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_check_starts_an_image_and_writes_down_what_it_saw(storage, capsys, monkeypatch):
    need("ch-run", "mksquashfs")
    monkeypatch.setenv("USER", "root")
    layout = write_layout(storage / "oci", [python_layer()])
    assert main(["image", "import", f"oci:{layout}", "--images", "images"]) == 0
    capsys.readouterr()
    assert main(["image", "check", "oci", "--images", "images", "--runtime", "charliecloud", "--json"]) == 1, (
        "it has no torch"
    )
    seen = json.loads(capsys.readouterr().out)
    version = subprocess.run(
        [str(PYTHON), "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True
    ).stdout.strip()
    assert (
        seen["verdict"] == BAD
        and seen["python"] == version
        and seen["executable"] == "/usr/bin/python3"
        and seen["runtime"] == "charliecloud"
    )
    record = Path(seen["record"])
    assert record.parent == storage / "images" and json.loads(record.read_text())["python"] == version
    assert main(["image", "list", "--images", "images", "--json"]) == 0
    [listed] = json.loads(capsys.readouterr().out)["images"]
    assert listed["checked"] == f"checked {seen['date']}"


@pytest.mark.slow
def test_check_of_an_image_with_torch_is_content(tmp_path, capsys, monkeypatch):
    """The tests' own, as a folder; a mount that is written to, and one that is not there inside."""
    need("ch-run")
    monkeypatch.setenv("USER", "root")
    monkeypatch.chdir(tmp_path)
    image = str(container_image.wanted())
    assert (
        main(["image", "check", image, "--runtime", "charliecloud", "--mount", f"{tmp_path}:/data", "--json"]) == 0
    ), capsys.readouterr()
    seen = json.loads(capsys.readouterr().out)
    assert seen["torch"]["version"] and seen["packages"]["tiktoken"] and "pyyaml" not in seen["packages"]
    assert [(mount["path"], mount["writable"]) for mount in seen["mounts"]] == [("/data", True)] and seen[
        "verdict"
    ] == WARN, "a torch for the CPU is no error"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.sqsh"], "does not exist"),
        (["UPPER/case"], "lower case"),
        (["debian:12", "--mount", "relative:also"], "must start with /"),
        (["debian:12", "--mount", "/nowhere:/data"], "/nowhere does not exist on this machine"),
        (["debian:12", "--runtime", "dcker"], "--runtime dcker: unknown runtime; did you mean 'docker'?"),
        (
            ["debian:12", "--runtime", "pyxis"],
            "pyxis starts images only in Slurm jobs; name a cluster with --cluster NAME",
        ),
        (["debian:12", "--has", ","], "--has needs package names"),
        ([], "the following arguments are required: image"),
    ],
)
def test_wrong_input_to_check(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["image", "check", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_nothing_that_starts_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    write_docker_archive(tmp_path / "tiny.tar", [])
    assert main(["image", "check", "./tiny.tar"]) == 2
    assert "no runtime on this machine can start" in capsys.readouterr().err


def test_what_the_user_vouches_for(tmp_path, monkeypatch, capsys):
    from amlaunch.containers.images.image_store import ImageFolder

    monkeypatch.chdir(tmp_path)
    image = "nvcr.io/nvidia/pytorch:25.08-py3"
    folder = ImageFolder(tmp_path / "images")
    assert [folder.facts(image).has(name) for name in ("torch", "tiktoken", "pyarrow")] == [True, False, None]
    for names in ("tiktoken", "Some_Thing,gigatoken"):
        assert main(["image", "check", image, "--has", names]) == 0
    spelled = folder.facts("docker://nvcr.io/nvidia/pytorch:25.08-py3")
    assert [spelled.has(name) for name in ("torch", "tiktoken", "some-thing", "gigatoken", "datasets")] == [
        True,
        True,
        True,
        True,
        False,
    ]
    assert spelled.python == (3, 12) and spelled.cuda == "13.0"


def test_a_failed_check_names_the_cause_and_not_the_last_lines():
    """Lines of unsquashfs 4.5 on a damaged file, and its summary after them."""
    cause = "FATAL ERROR: writer: failed to read/uncompress file /data/a/usr/lib/libtorch.so"
    summary = [f"created {count} files" for count in range(20)]
    message = str(checker._failure("enroot", "/images/a.sqsh", "\n".join([cause, *summary])))
    assert message.startswith(f"/images/a.sqsh: damaged image: {cause}. ") and "amlaunch image import" in message
