"""Ranks in real containers on this machine (podman and docker as root, charliecloud), and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import container_image
import container_pipeline
import pytest
from image_helpers import need

from amlaunch.launcher.__main__ import main
from amlaunch.launcher.specs.plan import Element, Needs, Plan, Stage, StageContainer
from amlaunch.recipes.files import read_json_lines, write_json
from amlaunch.recipes.run_layout import RunDir

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
HOST = {
    "LANG": "de_DE.UTF-8",
    "LD_LIBRARY_PATH": "/opt/host/lib",
    "CONDA_PREFIX": "/opt/conda",
    "VIRTUAL_ENV": "/venv",
    "XDG_CACHE_HOME": "/cache/of/host",
    "DBUS_SESSION_BUS_ADDRESS": "unix:path=/no/bus",
    "PMI_RANK": "3",
    "SLURM_PROCID": "7",
    "CH_RUN_STORAGE": "/no",
}
"""Of a shell in a job, with what speaks of files that are not in the image."""
HEEDED = {
    "https_proxy": "http://u:${PROXY_PASSWORD:-a 'b' $(c)}@proxy:1",
    "NVIDIA_API_KEY": "nvapi",
    "DOCKER_HOST": "unix:///no",
    "STORAGE_DRIVER": "no",
    "XDG_DATA_HOME": "/no",
}
"""Of a recipe, what the runtime's own program would heed."""
OPTIONS = {
    # for a machine that is a container itself: no higher limits than its own, and no mix of both kinds of control
    # groups
    "podman": [
        "--runtime",
        "runc",
        "--ulimit",
        "nofile=1024:1024",
        "--ulimit",
        "nproc=1024:1024",
        "--ulimit",
        "memlock=65536:65536",
    ],
    "docker": ["--ulimit", "memlock=65536:65536"],
    "charliecloud": [],
}
STARTER = f"""\
#!{sys.executable}
import os, subprocess, sys
inside = next(i for i, word in enumerate(sys.argv) if word.startswith("docker://")) + 1
prefix = "APPTAINERENV_"
env = {{name.removeprefix(prefix): value for name, value in os.environ.items() if name.startswith(prefix)}}
sys.exit(subprocess.run(sys.argv[inside:], env={{**env, "PATH": os.environ["PATH"]}}).returncode)
"""
"""What of apptainer a test without containers can know: who is whose parent, and which environment enters."""
DRIVER = """
import sys
from amlaunch.launcher.execution.attempt import Assignment
from amlaunch.launcher.execution.driver import run_element
print(run_element(sys.argv[1], "train", "0", Assignment(1, ())))
"""


@pytest.fixture(scope="module")
def image() -> Path:
    return container_image.wanted()


@pytest.fixture(scope="module")
def docker(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A daemon of our own with the image, without torch: its name there."""
    need("dockerd")
    folder = tmp_path_factory.mktemp("docker")
    host = f"unix://{folder}/socket"
    # no bridge and no rules for packets: the machine's network stays as it is
    command = [
        "dockerd",
        "--host",
        host,
        "--data-root",
        folder / "data",
        "--exec-root",
        folder / "exec",
        "--pidfile",
        folder / "pid",
        "--bridge=none",
        "--iptables=false",
        "--ip6tables=false",
    ]
    with open(folder / "log", "w") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    before = os.environ.get("DOCKER_HOST")
    os.environ["DOCKER_HOST"] = host
    try:
        deadline = time.monotonic() + 30
        while subprocess.run(["docker", "version"], capture_output=True).returncode:
            assert daemon.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        tar = subprocess.Popen(
            ["tar", "-C", image / "rootfs", "--exclude=./usr/local/lib/python3.11/dist-packages/*", "-c", "."],
            stdout=subprocess.PIPE,
        )
        changes = [word for name, value in container_image.ENV.items() for word in ("--change", f"ENV {name}={value}")]
        subprocess.run(
            ["docker", "import", *changes, "--change", 'ENTRYPOINT ["/bin/false"]', "-", "amlaunch-test:1"],
            stdin=tar.stdout,
            check=True,
            capture_output=True,
        )
        yield "docker.io/library/amlaunch-test:1"
    finally:
        daemon.terminate()
        daemon.wait(30)
        mounted = [
            line.split()[1]
            for line in Path("/proc/mounts").read_text().splitlines()
            if line.split()[1].startswith(str(folder))
        ]
        for path in reversed(mounted):  # namespaces and layers that the daemon leaves behind
            subprocess.run(["umount", "-l", path])
        if before is None:
            del os.environ["DOCKER_HOST"]
        else:
            os.environ["DOCKER_HOST"] = before


@pytest.fixture(params=["podman", "docker", "charliecloud"])
def container(request: pytest.FixtureRequest, image: Path) -> StageContainer:
    runtime = request.param
    if runtime == "charliecloud.sqsh":
        return StageContainer(
            str(container_pipeline.squashed(image, request.getfixturevalue("tmp_path") / "a.sqsh")), "charliecloud"
        )
    name = request.getfixturevalue("docker") if runtime == "docker" else f"file://{image}"
    return StageContainer(name, runtime, options=OPTIONS[runtime])


def make_run(folder: Path, container: StageContainer, *words: str, tasks: int = 1) -> RunDir:
    """A run of one stand-in stage, planned."""
    folder.mkdir(exist_ok=True)
    run = RunDir(folder / "run")
    one = Element("0", "stand_in", [*words, "--element", str(run.element("train", "0").root)])
    stage = Stage("train", [one], [], Needs(1, 0, tasks, 1), None, container)
    plan = Plan("run", [stage], None, str(folder), {"BOTH": "recipe", "QUOTED": "a 'b' \"c\" $HOME", **HEEDED})
    write_json(run.plan, plan.to_json())
    run.code.mkdir()
    shutil.copytree(ROOT / "src" / "amlaunch", run.code / "amlaunch")
    shutil.copy(ROOT / "tests" / "stand_in.py", run.code)
    return run


def drive(run: RunDir, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", DRIVER, run.root],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **env},
    )


def until(test, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def last(run: RunDir) -> dict:
    return read_json_lines(run.element("train", "0").attempts)[-1]


def test_a_rank_in_a_container(tmp_path, container):
    inside = {
        "BOTH": "recipe",
        "FROM_IMAGE": "image",
        "QUOTED": "a 'b' \"c\" $HOME",
        "HF_TOKEN": "of the shell",
        "MASTER_ADDR": "127.0.0.1",
        "TMPDIR": "None",
        **dict.fromkeys(HOST, "None"),
    }
    (tmp_path / "tmp").mkdir()
    work = tmp_path / "work"
    run = make_run(
        work, container, *(word for name in (*inside, *HEEDED, "PYTHONPATH") for word in ("--print", name)), tasks=2
    )
    out, _ = drive(
        run, **HOST, TMPDIR=str(tmp_path / "tmp"), HF_TOKEN="of the shell", MASTER_ADDR="elsewhere"
    ).communicate(timeout=60)
    log = run.element("train", "0").log(1, 1).read_text()
    assert out.strip() == "done", (last(run), log)
    assert f"rank 1 of 2 on {os.uname().nodename} in {work}" in log
    for name, value in {
        **inside,
        **HEEDED,
        "https_proxy": "http://u:a 'b' $(c)@proxy:1",
        "PYTHONPATH": str(run.code),
    }.items():
        assert f"{name}={value}\n" in log, log


@pytest.mark.parametrize(
    ("container", "outside"),
    [("podman", ["preprocess", "verify"]), ("docker", []), ("charliecloud", [])],
    indirect=["container"],
)
def test_the_whole_pipeline(tmp_path, image, container, outside):
    """``amlaunch local``; docker's image gets what it lacks of torch by a mount, and exports, too."""
    for name, text in container_pipeline.FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "clusters.yaml").write_text(
        json.dumps(
            {"local": {"executor": "local", "container": {"runtime": container.runtime, "options": container.options}}}
        )
    )
    own = "/usr/local/lib/python3.11/dist-packages"
    is_docker = container.runtime == "docker"
    section = {
        "image": container.image.removeprefix("file://"),
        "stages": dict.fromkeys(outside, "none"),
        "mounts": [f"{image}/rootfs{own}:{own}:ro"] if is_docker else [],
    }
    words = [
        "local",
        "inside.yaml",
        *(word for key, value in section.items() for word in (f"--container.{key}", json.dumps(value))),
        *([] if is_docker else ["--export", "null"]),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "amlaunch", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").glob("inside-*")
    assert container_pipeline.made_in(run) == ("host" if outside else "image", "image")
    assert (run / "export" / "0" / "model.safetensors").exists() == is_docker


def test_the_home_of_a_rank_is_its_own(tmp_path, image):
    """charliecloud's /tmp is the node's."""
    home = Path(f"/tmp/amlaunch-{os.getuid()}")
    if home.is_dir():
        home.chmod(0o755)
    run = make_run(tmp_path, StageContainer(f"file://{image}", "charliecloud"), "--print", "HOME")
    assert (
        drive(run).communicate(timeout=60)[0].strip() == "done"
        and f"HOME={home}\n" in run.element("train", "0").log(1, 0).read_text()
    )
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("container", ["podman", "docker", "charliecloud", "charliecloud.sqsh"], indirect=True)
def test_told_to_stop_it_saves_and_leaves(tmp_path, container):
    run = make_run(tmp_path, container, "--do", "steps", tasks=2)
    driver = drive(run)
    until(lambda: all((run.element("train", "0").root / f"steps{rank}").exists() for rank in range(2)))  # both listen
    driver.send_signal(signal.SIGTERM)
    out, _ = driver.communicate(timeout=30)
    assert out.strip() == "stopped" and last(run)["exit_codes"] == [75, 75], last(run)


def test_a_rank_whose_driver_was_killed_does_not_live_on(tmp_path, container):
    run = make_run(tmp_path, container, "--do", "steps")
    driver = drive(run)
    steps = run.element("train", "0").root / "steps0"
    until((run.element("train", "0").root / "steps0").exists)
    driver.kill()
    driver.wait()
    time.sleep(2)
    before = steps.read_text()
    time.sleep(1.5)
    assert steps.read_text() == before and len(before.split()) < 20


def test_a_runtime_that_stays_the_parent_of_what_it_starts(tmp_path):
    """As apptainer's starter does: the rank is not the driver's own child, and still ends when the driver does."""
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(STARTER)
    program.chmod(0o755)
    run = make_run(tmp_path, StageContainer("nvcr.io/nvidia/pytorch:25.08-py3", "apptainer"), "--do", "steps")
    driver = drive(run, PATH=f"{program.parent}:{Path(sys.executable).parent}:/usr/bin:/bin")
    until((run.element("train", "0").root / "steps0").exists)
    pid = int((run.element("train", "0").root / "pid0").read_text())
    driver.kill()
    driver.wait()
    until(lambda: not Path(f"/proc/{pid}").exists(), 10)


def test_bad_input_comes_back_as_such(tmp_path, container):
    run = make_run(tmp_path, container, "--do", "bad")
    out, _ = drive(run).communicate(timeout=60)
    assert out.strip() == "failed" and last(run)["exit_codes"] == [2] and last(run)["retry"] is False
    assert "model.n_layer: expected int" in last(run)["reason"]


def test_an_image_is_looked_at_as_the_site_starts_it(tmp_path, monkeypatch, capsys, container):
    """``amlaunch image check`` as the profile called local has it started; docker's image here has no torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USER", "root")
    site = {
        "runtime": container.runtime,
        "options": OPTIONS[container.runtime],
        "mounts": [f"{tmp_path}:/data"],
        "images": {"site/image:1": container.image},
    }
    known = container.runtime != "docker"  # a file can stand for an image, not another image
    (tmp_path / "clusters.yaml").write_text(
        json.dumps({"local": {"executor": "local", "container": site if known else {**site, "images": {}}}})
    )
    code = main(["image", "check", "site/image:1" if known else container.image, "--json"])
    seen = json.loads(capsys.readouterr().out)
    assert seen["runtime"] == container.runtime and seen["executable"] == "/usr/bin/python3"
    assert [(mount["path"], mount["writable"]) for mount in seen["mounts"]] == [("/data", True)]
    assert (code, "error" in seen["torch"]) == ((0, False) if known else (1, True)), seen


def test_a_missing_image_of_docker(tmp_path, docker):
    run = make_run(tmp_path, StageContainer("localhost:1/none:1", "docker"), "--do", "ok")
    drive(run).communicate(timeout=60)
    assert last(run)["kind"] in ("registry unreachable", "no such image") and "none:1" in last(run)["reason"], last(run)


def speaking_of(text: str) -> list[list[str]]:
    """The argv of each process in whose argv a text stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().decode(errors="replace").split("\0"))
    return [argv for argv in found if text in " ".join(argv)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["local", "inside.yaml", "--container.runtime", "podman", "--container.image"], 75),
        (["image", "check", "--runtime", "podman"], 130),
    ],
)
def test_nothing_goes_on_fetching_an_image_for_an_amlaunch_that_has_ended(tmp_path, words, code, number):
    """From a registry that takes a connection, and never says a word."""
    need("podman")
    for name, text in container_pipeline.FILES.items():
        (tmp_path / name).write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as registry:
        image = f"localhost:{registry.getsockname()[1]}/x/y:1"
        command = [sys.executable, "-m", "amlaunch", *words, image]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            until(lambda: any(argv[0] == "podman" and "pull" in argv for argv in speaking_of(image)))
            process.send_signal(number)
            assert process.wait(30) == (code if number != signal.SIGKILL else -number)
            until(lambda: not speaking_of(image), 10)
        finally:
            process.kill()


def test_an_entrypoint_runs_only_where_it_is_asked_for(tmp_path, docker):
    """The image's own is /bin/false."""
    run = make_run(tmp_path, StageContainer(docker, "docker", entrypoint=True, options=OPTIONS["docker"]), "--do", "ok")
    out, _ = drive(run).communicate(timeout=60)
    assert out.strip() == "failed" and last(run)["exit_codes"] == [1]
