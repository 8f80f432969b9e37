"""``amlaunch image import`` and ``list``: real archives, a real registry, real kills."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from image_helpers import Registry, layer, leave_out, need, unsquashed, write_docker_archive, write_layout

from amlaunch.containers.images import credentials, image_store
from amlaunch.launcher.__main__ import main
from amlaunch.recipes.files import Lock

ROOT = Path(__file__).resolve().parent.parent
PASSWORD, HASH = "correct horse", "$2b$04$QxIqyGEg9gvPkPfnIj7FQOAkoa70RIMTZnyqrln0Vsak2G8Lvxeo6"
"""For the registry's htpasswd file: crypt's blowfish of the password."""


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No image folder, profile or credentials but the test's own."""
    for name in ("AMLAUNCH_IMAGES", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


def noise(megabytes: int) -> bytes:
    """What no compression makes smaller."""
    return os.urandom(megabytes << 20)


def start(*words: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """amlaunch as a process of its own."""
    command = [sys.executable, "-m", "amlaunch", "image", *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **env},
    )


def result(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["image", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_archives_become_images_once(tmp_path, capsys):
    need("mksquashfs", "unsquashfs")
    stack = [layer([("etc", None), ("etc/name", b"tiny\n")])]
    layout = write_layout(tmp_path / "oci", stack, {"Env": ["A=image"], "WorkingDir": "/w", "Entrypoint": ["/e"]})
    made = result(capsys, "import", f"oci:{layout}", "--images", "images")
    image = Path(made["path"])
    assert made["made"] and image.parent == tmp_path / "images" and image.name == f"oci-{made['digest'][7:19]}.sqsh"
    assert (
        made["settings"] == {"Env": ["A=image"], "Entrypoint": ["/e"], "WorkingDir": "/w"}
        and made["architecture"] == "amd64"
    )
    files = unsquashed(image, tmp_path / "files")
    assert (
        (files / "etc" / "name").read_text() == "tiny\n"
        and (files / "w").is_dir()
        and (files / "etc" / "environment").read_text() == "A=image\n"
    )
    before = image.stat().st_mtime_ns
    assert (
        result(capsys, "import", f"oci:{layout}", "--images", "images")["made"] is False
        and image.stat().st_mtime_ns == before
    )
    docker = write_docker_archive(tmp_path / "saved.tar", stack)
    saved = result(capsys, "import", str(docker), "--images", "images")
    assert saved["made"]
    listed = result(capsys, "list", "--images", "images")
    assert {image["path"] for image in listed["images"]} == {made["path"], saved["path"]}
    assert all(image["whole"] for image in listed["images"])
    assert not [path for path in (tmp_path / "images" / ".work").iterdir() if path.suffix != ".lock"], (
        "nothing half made is left"
    )
    image.write_bytes(b"torn")
    assert [
        one["whole"] for one in result(capsys, "list", "--images", "images")["images"] if one["path"] == str(image)
    ] == [False]
    assert result(capsys, "import", f"oci:{layout}", "--images", "images")["made"], (
        "a file that is not whole is made again"
    )
    assert main(["image", "list", "--images", "images"]) == 0
    assert "oci-" in capsys.readouterr().out


@pytest.mark.slow
def test_a_kill_in_the_middle_of_mksquashfs_then_a_good_import(tmp_path, capsys):
    need("mksquashfs", "unsquashfs")
    content = noise(100)
    layout = write_layout(tmp_path / "oci", [layer([("blob", content)])], packed=False)
    images = tmp_path / "images"
    killed = start("import", f"oci:{layout}", "--images", str(images), cwd=tmp_path)
    half = images / ".work" / f"oci.{os.getuid()}" / "image.sqsh"
    deadline = time.monotonic() + 60
    while not (half.exists() and half.stat().st_size > 1 << 20):
        assert killed.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not list(images.glob("*.sqsh")) and result(capsys, "list", "--images", "images")["images"] == []
    made = result(capsys, "import", f"oci:{layout}", "--images", "images")
    assert made["made"] and (unsquashed(Path(made["path"]), tmp_path / "files") / "blob").read_bytes() == content
    assert not half.exists()


@pytest.mark.slow
def test_of_imports_at_once_one_works_and_the_others_wait(tmp_path):
    """A third one, that has the lock, is this test."""
    need("mksquashfs")
    layout = write_layout(tmp_path / "oci", [layer([("blob", noise(5))])], packed=False)
    lock = Lock(tmp_path / "images" / ".work" / "oci.lock")
    assert lock.acquire()
    both = [start("import", f"oci:{layout}", "--images", "images", cwd=tmp_path) for _ in range(2)]
    for process in both:
        assert process.stdout and "waiting for it" in process.stdout.readline()
    lock.release()
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    out = sorted(stdout for stdout, _ in said)
    assert sum("created " in text for text in out) == 1 and sum("already exists: " in text for text in out) == 1, out
    assert len(list((tmp_path / "images").glob("*.sqsh"))) == 1


@pytest.mark.slow
def test_ctrl_c_leaves_no_tool_and_no_half_image(tmp_path):
    need("mksquashfs")
    layout = write_layout(tmp_path / "oci", [layer([("blob", noise(100))])], packed=False)
    process = start("import", f"oci:{layout}", "--images", "images", cwd=tmp_path)
    half = tmp_path / "images" / ".work" / f"oci.{os.getuid()}" / "image.sqsh"
    while not half.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command again to continue" in out and "Traceback" not in err
    lock = tmp_path / "images" / ".work" / "oci.lock"
    assert subprocess.run(["flock", "-n", str(lock), "true"]).returncode == 0, (
        "a tool that is left behind would hold it"
    )


def test_a_tool_that_fails_is_quoted_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    need("mksquashfs")
    program = tmp_path / "bin" / "mksquashfs"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\n[ "$1" = -version ] && echo "mksquashfs version 4.6" && exit\necho "FATAL ERROR: No space left '
        'on device"; exit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    layout = write_layout(tmp_path / "oci", [layer([("blob", noise(4))])])
    assert main(["image", "import", f"oci:{layout}", "--images", "images"]) == 1
    error = capsys.readouterr().err
    assert (
        "no space left on the disk. Free some space and run the same command again" in error
        and "choose another folder with --tmp DIR or --images DIR" in error
        and "mksquashfs printed: FATAL ERROR" in error
    )
    assert not list((tmp_path / "images").glob("*.sqsh"))


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    need("mount")
    if os.geteuid():
        leave_out("needs root for a small file system")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_import_needs_twice_the_size_of_the_layers(tmp_path, capsys):
    """In the folder of images, or with --tmp there; the folder of images then needs the size once."""
    need("mksquashfs")
    layout = write_layout(tmp_path / "oci", [layer([("blob", noise(4))])])
    with small_disk(tmp_path / "small", 2) as small:
        for folders, size, option in (
            (["--images", str(small)], "8", "--images DIR"),
            (["--images", "images", "--tmp", str(small)], "8", "--tmp DIR"),
            (["--images", str(small), "--tmp", "tmp"], "4", "--images DIR"),
        ):
            assert main(["image", "import", f"oci:{layout}", *folders]) == 2
            error = capsys.readouterr().err
            expected = rf"{small}: 2\.10 MB free, at least {size}\.\d+ MB needed\. Free some space or choose {option}"
            assert re.search(expected, error), error


def test_a_disk_that_fills_up_while_layers_are_unpacked(tmp_path, capsys):
    """The check is a floor: layers that are mostly zeros need more than twice their size."""
    need("mksquashfs")
    layout = write_layout(tmp_path / "oci", [layer([("blob", bytes(8 << 20))])])
    with small_disk(tmp_path / "small", 2) as small:
        assert main(["image", "import", f"oci:{layout}", "--images", "images", "--tmp", str(small)]) == 1
    error = capsys.readouterr().err
    assert "cannot unpack: No space left on device. Choose another folder with --tmp DIR" in error
    assert not list((tmp_path / "images").glob("*.sqsh"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import"], "the following arguments are required: image"),
        (["import", "nothing.tar"], "no such file"),
        (["import", "./folder"], "is a folder but not an OCI image layout"),
        (["import", "oci:./folder"], "not an OCI image layout"),
        (["import", "image.sqsh"], "needs no import: runtimes start it as it is"),
        (["import", "text.tar"], "is not a tar archive"),
        (["import", "NVCR.io/NVIDIA/PyTorch:25.08"], "lower case"),
        (["import", "https://nvcr.io/nvidia/pytorch:1"], "did you mean 'nvcr.io/nvidia/pytorch:1'"),
        (["import", "debian:12", "--tool", "skopo"], "skopo is not in PATH"),
        (["import", "podman://debian:12", "--tool", "skopeo"], "--tool skopeo cannot save a local image; use docker"),
        (["import", "debian:12", "--format", "zip"], "invalid choice: 'zip'"),
        (["import", "text.tar", "--images", "/dev/null/x"], "/dev/null/x: cannot create files"),
        (["import", ""], "no image given"),
        (["list", "--cluster", "nowhere"], "no cluster 'nowhere'"),
        (["list", "--imagse", "x"], "did you mean '--images'"),
        (["lst"], "unknown command 'image lst'; did you mean 'list'?"),
        ([], "the following arguments are required: ACTION"),
        (["build", "--file", "nothing"], "no such file"),
        (["build", "--tool", "kaniko"], "cannot build images; use buildah, podman, docker"),
    ],
)
def test_wrong_input_is_a_message_and_exit_code_2(tmp_path, capsys, words, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.tar").write_text("no tar")
    assert main(["image", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.splitlines()) == 1, error


def test_nothing_that_fetches(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["image", "import", "nvcr.io/nvidia/pytorch:25.08-py3"]) == 2
    assert "no tool to fetch an image is in PATH" in capsys.readouterr().err


def test_the_folder_of_images(tmp_path, monkeypatch, capsys):
    """--images, AMLAUNCH_IMAGES, the profile's, and the only one that any profile names."""
    (tmp_path / "clusters.yaml").write_text("one: {image_folder: /shared/one}\ntwo: {}\n")
    folders = [result(capsys, "list", *words)["folder"] for words in ([], ["--cluster", "one"], ["--cluster", "two"])]
    assert folders == ["/shared/one"] * 3
    (tmp_path / "clusters.yaml").write_text("one: {image_folder: /shared/one}\ntwo: {image_folder: /shared/two}\n")
    folders = [result(capsys, "list", *words)["folder"] for words in ([], ["--cluster", "two"], ["--images", "here"])]
    assert folders == [str(tmp_path / "images"), "/shared/two", str(tmp_path / "here")]
    monkeypatch.setenv("AMLAUNCH_IMAGES", "/elsewhere")
    assert result(capsys, "list", "--cluster", "two")["folder"] == "/elsewhere"


# --- a registry ---------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path) -> Iterator[Registry]:
    need("docker-registry", "skopeo", "mksquashfs")
    folder = tmp_path / "registry"
    folder.mkdir()
    found = Registry(folder)
    yield found
    found.process.terminate()
    found.process.wait()


@pytest.mark.slow
def test_from_a_registry_every_layer_once(tmp_path, registry, capsys):
    """Killed while it converts, it goes on from the layers that are there; a tag that moves is another image."""
    content = noise(60)
    layout = write_layout(tmp_path / "oci", [layer([("etc", None)]), layer([("blob", content)])], packed=False)
    place = registry.push(layout, "team/tiny:1")
    killed = start("import", place, "--insecure", "--images", "images", cwd=tmp_path)
    work = tmp_path / "images" / ".work" / f"team-tiny-1.{os.getuid()}"
    while not (work / "image.sqsh").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert registry.fetched() == 1
    made = result(capsys, "import", f"docker://{place}", "--insecure", "--images", "images")
    assert made["made"] and registry.fetched() == 1, "the layer was there"
    assert (
        made["digest"] == registry.digest("team/tiny", "1") and made["reference"] == place and made["tools"]["skopeo"]
    )
    assert Path(made["path"]).name == f"team-tiny-1-{made['digest'][7:19]}.sqsh"
    assert result(capsys, "import", place, "--insecure", "--images", "images")["made"] is False
    registry.push(write_layout(tmp_path / "newer", [layer([("etc/name", b"newer")])]), "team/tiny:1")
    newer = result(capsys, "import", place, "--insecure", "--images", "images")
    assert (
        newer["made"]
        and newer["digest"] != made["digest"]
        and len(result(capsys, "list", "--images", "images")["images"]) == 2
    )
    assert main(["image", "import", place.replace("tiny:1", "tiny:2"), "--insecure", "--images", "images"]) == 1
    assert "has no 127.0.0.1" in capsys.readouterr().err
    assert main(["image", "import", place, "--images", "images"]) == 1
    assert "uses plain HTTP. To allow that, add --insecure" in capsys.readouterr().err
    registry.process.terminate()
    registry.process.wait()
    assert main(["image", "import", place, "--insecure", "--images", "images"]) == 1
    assert (
        "cannot be reached from this machine. On a machine that can reach it, run: skopeo copy"
        in capsys.readouterr().err
    )


def storage(folder: Path, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For podman and buildah, in a place of the test's own."""
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\nrunroot = "{folder}/run"\ngraphroot = "{graph}"\n'
    )
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(folder / "storage.conf"))


@contextmanager
def dockerd(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A daemon of the test's own, which leaves the machine's network as it is."""
    need("dockerd", "docker")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # the paths of sockets are short
    words = [
        "--data-root",
        data,
        "--exec-root",
        folder / "exec",
        "--pidfile",
        folder / "pid",
        "--storage-driver=vfs",
        "--bridge=none",
        "--iptables=false",
        "--ip6tables=false",
    ]
    monkeypatch.setenv("DOCKER_HOST", f"unix://{folder}/socket")
    with open(folder / "log", "w") as log:
        daemon = subprocess.Popen(
            ["dockerd", "--host", os.environ["DOCKER_HOST"], *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 30
        while subprocess.run(["docker", "version"], capture_output=True).returncode:
            assert daemon.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield
    finally:
        daemon.terminate()
        daemon.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["skopeo", "podman", "buildah", "docker"])
def test_nothing_is_fetched_into_a_full_storage(tmp_path, registry, monkeypatch, capsys, tool):
    """A tool's own storage is too small, and nothing is fetched into it; then there is enough."""
    need(tool)
    place = registry.push(write_layout(tmp_path / "oci", [layer([("blob", noise(8))])]), "tiny:1")
    images = ["--images", "images"]
    with ExitStack() as held:
        small = held.enter_context(small_disk(tmp_path / "small", 6))
        if tool == "docker":
            held.enter_context(dockerd(small, monkeypatch))
        elif tool == "skopeo":
            images = ["--images", str(small)]
        else:
            storage(tmp_path, small, monkeypatch)
        assert main(["image", "import", place, "--insecure", *images, "--tool", tool]) == 2
        error = capsys.readouterr().err
        size, choice = ("16", "--images DIR") if tool == "skopeo" else ("8", f"another storage folder for {tool}")
        assert re.search(rf"{small}: \d\.\d+ MB free, at least {size}\.\d+ MB needed\. .*{choice}", error), error
        assert registry.fetched() == 0
    with ExitStack() as held:
        if tool == "docker":
            held.enter_context(dockerd(tmp_path / "graph", monkeypatch))
        elif tool != "skopeo":
            storage(tmp_path, tmp_path / "graph", monkeypatch)
        made = result(capsys, "import", place, "--insecure", "--images", "images", "--tool", tool)
        assert made["made"] and made["digest"] == registry.digest("tiny", "1") and registry.fetched() == 1
        assert (
            result(capsys, "import", place, "--insecure", "--images", "images", "--tool", tool)["made"] is False
            and registry.fetched() == 1
        )


ONE_TOOL = {"enroot": "sqsh", "apptainer": "sif"}
"""What is not installed where the tests run, and what each makes; a stand-in keeps its arguments and makes a file."""
STAND_IN = """#!/bin/sh
[ "$1" = --version ] && echo 1.2 && exit
echo "$@" "$ENROOT_ALLOW_HTTP" >>{calls}
for word in "$@"; do case $word in */image.*) echo image >"$word";; esac; done
"""


@pytest.fixture
def calls(tmp_path, monkeypatch) -> Path:
    """What the stand-ins were asked for."""
    found, programs = tmp_path / "calls", tmp_path / "bin"
    programs.mkdir()
    found.touch()
    for tool in ONE_TOOL:
        (programs / tool).write_text(STAND_IN.format(calls=found))
        (programs / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return found


@pytest.mark.parametrize("tool", ONE_TOOL)
def test_nothing_is_fetched_into_a_full_folder_by_a_tool_that_does_all(tmp_path, registry, capsys, calls, tool):
    place = registry.push(write_layout(tmp_path / "oci", [layer([("blob", noise(4))])]), "tiny:1")
    words = ["import", place, "--insecure", "--tool", tool, "--format", ONE_TOOL[tool]]
    with small_disk(tmp_path / "small", 6) as small:
        for folders, option in (
            (["--images", str(small)], "--images"),
            (["--images", "images", "--tmp", str(small)], "--tmp"),
        ):
            assert main(["image", *words, *folders]) == 2
            error = capsys.readouterr().err
            assert re.search(rf"{small}: \d\.\d+ MB free, at least 8\.\d+ MB needed\. .*{option} DIR", error), error
    assert calls.read_text() == "" and registry.fetched() == 0
    made = result(capsys, *words, "--images", "images")
    assert (
        made["made"]
        and made["digest"] == registry.digest("tiny", "1")
        and {"enroot": "import", "apptainer": "build --force --no-https"}[tool] in calls.read_text()
    )
    assert calls.read_text().rstrip().endswith("yes") is (tool == "enroot"), (
        "plain HTTP is allowed in each tool's own way"
    )
    assert result(capsys, *words, "--images", "images")["made"] is False and len(calls.read_text().splitlines()) == 1
    registry.push(write_layout(tmp_path / "newer", [layer([("etc/name", b"newer")])]), "tiny:1")
    assert result(capsys, *words, "--images", "images")["made"], "the tag has moved"
    assert (
        main(["image", *words[:-1], {"sqsh": "sif", "sif": "sqsh"}[words[-1]]]) == 2
        and f"{tool} makes .{words[-1]} images, not" in capsys.readouterr().err
    )


def test_a_registry_that_does_not_say_is_no_reason_to_refuse(tmp_path, registry, capsys, calls):
    """The tool may know a way that amlaunch does not; that nobody looked for room is said."""
    place = registry.push(write_layout(tmp_path / "oci", [layer([("a", b"1")])]), "tiny:1")
    registry.process.terminate()
    registry.process.wait()
    assert main(["image", "import", place, "--insecure", "--tool", "enroot", "--images", "images"]) == 0
    said = capsys.readouterr().out
    assert (
        f"the size of {place} is unknown (127.0.0.1:{registry.port} cannot be reached (" in said
        and "); checking only that 1 GB is free" in said
    )
    assert calls.read_text()


def test_an_image_for_another_architecture_is_not_fetched(tmp_path, registry, capsys, calls):
    """An index names those that it has."""
    place = registry.push(write_layout(tmp_path / "oci", [layer([("a", b"1")])]), "tiny:1")
    registry.put_index("tiny", "all", "1", "s390x")
    assert (
        main(
            [
                "image",
                "import",
                f"{place.rpartition(':')[0]}:all",
                "--insecure",
                "--tool",
                "enroot",
                "--images",
                "images",
            ]
        )
        == 2
    )
    assert (
        "is for s390x, not for amd64. To import it anyway, add --arch s390x" in capsys.readouterr().err
        and calls.read_text() == ""
    )


@pytest.mark.parametrize("wanted", ["arm64", "bogus"])
def test_an_image_that_is_there_is_not_one_for_another_architecture(tmp_path, registry, capsys, wanted):
    """Its digest is the same, whatever --arch says."""
    place = registry.push(write_layout(tmp_path / "oci", [layer([("a", b"1")])]), "tiny:1")
    words = ("import", place, "--insecure", "--images", "images")
    assert result(capsys, *words)["made"] and not result(capsys, *words)["made"]
    assert main(["image", *words, "--arch", wanted]) == 2
    assert f"{place} is for amd64, not for {wanted}. To import it anyway, add --arch amd64" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["podman", "buildah"])
def test_from_a_registry_by_other_tools(tmp_path, registry, monkeypatch, capsys, tool):
    need(tool)
    storage(tmp_path, tmp_path / "graph", monkeypatch)
    place = registry.push(write_layout(tmp_path / "oci", [layer([("etc/name", b"tiny")])], {"Env": ["A=1"]}), "tiny:1")
    made = result(capsys, "import", place, "--insecure", "--images", "images", "--tool", tool)
    assert (unsquashed(Path(made["path"]), tmp_path / "files") / "etc" / "name").read_bytes() == b"tiny" and made[
        "settings"
    ] == {"Env": ["A=1"]}


@pytest.mark.slow
def test_a_registry_that_wants_credentials(tmp_path, capsys, monkeypatch):
    """The message names the file and how it is written; the password is in no output."""
    need("docker-registry", "skopeo", "mksquashfs")
    (tmp_path / "registry").mkdir()
    registry = Registry(tmp_path / "registry", HASH)
    try:
        place = registry.push(write_layout(tmp_path / "oci", [layer([("a", b"1")])]), "tiny:1", f"me:{PASSWORD}")
        assert main(["image", "import", place, "--insecure", "--images", "images"]) == 1
        error = capsys.readouterr().err
        assert (
            f"refuses access to {place}. To log in, run skopeo login --username 'USER' 127.0.0.1:{registry.port}"
            in error
        )
        auth = tmp_path / "auth.json"
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(auth))
        for password, code in (("wrong horse", 1), (PASSWORD, 0)):
            auth.write_text(
                json.dumps(
                    {
                        "auths": {
                            f"127.0.0.1:{registry.port}": {"auth": base64.b64encode(f"me:{password}".encode()).decode()}
                        }
                    }
                )
            )
            assert main(["image", "import", place, "--insecure", "--images", "images"]) == code
            said = "".join(capsys.readouterr())
            assert "horse" not in said and (code == 0 or "refuses access" in said)
        assert "horse" not in "".join(path.read_text(errors="replace") for path in (tmp_path / "images").glob("*.json"))
    finally:
        registry.process.terminate()
        registry.process.wait()


def test_where_credentials_go():
    """nvcr.io's user is $oauthtoken (NGC user guide); enroot's file has netrc's form (enroot doc/cmd/import.md)."""
    home = {"HOME": "/home/me"}
    assert credentials.login_advice("enroot", "nvcr.io", home) == (
        "add to /home/me/.config/enroot/.credentials (mode 600): machine nvcr.io login $oauthtoken password KEY, "
        "and the same line for machine authn.nvidia.com (password: an API key from ngc.nvidia.com)"
    )
    assert credentials.login_advice("enroot", "x.io", {**home, "ENROOT_CONFIG_PATH": "/e"}) == (
        "add to /e/.credentials (mode 600): machine x.io login USER password KEY"
    )
    for tool, command in (
        ("docker", "run docker login --username '$oauthtoken' nvcr.io"),
        ("podman", "run podman login --username '$oauthtoken' nvcr.io"),
        ("apptainer", "run apptainer registry login --username '$oauthtoken' docker://nvcr.io"),
        ("charliecloud", "run ch-image pull --auth nvcr.io/…"),
    ):
        assert credentials.login_advice(tool, "nvcr.io", home).startswith(f"{command} (password: an API key")
    assert (
        credentials.redact("GET https://me:pw@x.io/v2 Authorization: Bearer abc")
        == "GET https://***@x.io/v2 Authorization: Bearer ***"
    )


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("copying blob 4013 B, sha256:ab401cd, 403.5MB: no word", ""),
        ("layer 404 MB of 1401 MB, 0.404 done", ""),
        ("pulled sha256:9f40400f1 (404 KiB): dial tcp: i/o timeout", "cannot be reached from this machine"),
        (
            "reading manifest: 401 KB read, then connection reset by peer after 403 tries",
            "cannot be reached from this machine",
        ),
        ("curl: (22) The requested URL returned error: 401", "refuses access"),
        ("unexpected HTTP status 403.", "refuses access"),
        ("status 404 (Not Found)", "Check the name and the tag"),
    ],
)
def test_what_a_tools_last_words_mean(said, meaning):
    """A status is no digits of a size or a digest; an unreachable registry comes before other meanings."""
    found = credentials.explain_failure("enroot", "x.io/a:1", said, {"HOME": "/home/me"})
    assert meaning in found and bool(meaning) == bool(found)


def test_commands_of_tools_that_are_not_here(tmp_path):
    """https://github.com/NVIDIA/enroot/blob/master/doc/cmd/import.md (``[USER@][REGISTRY#]IMAGE[:TAG]``,
    ``--output``, ``--arch``), doc/configuration.md (ENROOT_SQUASH_OPTIONS and the paths), and
    https://apptainer.org/docs/user/latest/cli/apptainer_build.html (``--force``, IMAGE, then the spec)."""
    target = tmp_path / "image.sqsh"
    assert image_store.enroot_import("nvcr.io/nvidia/pytorch:25.08-py3", target, "amd64") == [
        "enroot",
        "import",
        "--arch",
        "x86_64",
        "--output",
        str(target),
        "docker://nvcr.io#nvidia/pytorch:25.08-py3",
    ]
    assert image_store.enroot_settings(tmp_path) == {
        "ENROOT_SQUASH_OPTIONS": "-comp zstd -Xcompression-level 3 -b 1M -noappend",
        "ENROOT_CACHE_PATH": str(tmp_path / "layers"),
        "ENROOT_TEMP_PATH": str(tmp_path / "tmp"),
        "ENROOT_DATA_PATH": str(tmp_path / "data"),
        "ENROOT_RUNTIME_PATH": str(tmp_path / "run"),
    }
    assert image_store.apptainer_build("apptainer", "oci:/there/layout:image", target) == [
        "apptainer",
        "build",
        "--force",
        str(target),
        "oci:/there/layout:image",
    ]
    assert image_store.pull("docker", "a.io/b:1", "arm64") == [
        "docker",
        "pull",
        "--platform",
        "linux/arm64",
        "a.io/b:1",
    ]
