"""Stages really inside containers, on a cluster: with every runtime that Debian's Slurm nodes can have."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import container_image
import container_pipeline
import pytest
from slurm_cluster import REPOSITORY, Cluster
from slurm_runs import CPU, PROFILE, RECIPE, Place, attempts, element, states

from amlaunch.launcher.specs.plan import Element, Needs, Plan, Stage, StageContainer
from amlaunch.recipes.files import read_json_lines, write_json
from amlaunch.recipes.run_layout import RunDir

pytestmark = pytest.mark.slow

RUNTIMES = ("podman", "charliecloud", "slurm")
OF_THE_STEP = {"podman": "podman", "charliecloud": "ch-run", "slurm": "--container"}
"""What the argv of a step in such a container has."""
HOST = {
    "LD_LIBRARY_PATH": "/opt/host/lib",
    "CONDA_PREFIX": "/opt/conda",
    "VIRTUAL_ENV": "/venv",
    "DBUS_SESSION_BUS_ADDRESS": "unix:path=/no/bus",
    "PMI_RANK": "3",
    "PMIX_RANK": "3",
}
"""Of the shell that submits; so are XDG_CACHE_HOME, LANG, and a TMPDIR that is not in the image."""
TWO = Needs(2, 0, 1, 1, "1G", 5)
CLUSTERS = """\
lab:
  signal_seconds: 60
  time: 5
  stages:
    preprocess: {mem: 1G}
    train: {mem: 3G}
"""


@pytest.fixture(scope="module")
def image() -> Path:
    return container_image.wanted()


def stand_in(place: Place, container: StageContainer, needs: Needs, *words: str) -> RunDir:
    """A run of one stand-in stage in a container, planned but not submitted; its code is a copy, as in a snapshot."""
    run = RunDir(place.folder / "runs" / "test-1")
    one = Element("0", "stand_in", [*words, "--element", str(run.element("train", "0").root)])
    stage = Stage("train", [one], [], needs, "cpu", container)
    plan = Plan(
        "test-1",
        [stage],
        None,
        str(place.folder),
        {"BOTH": "recipe", "SPACES": "a b; $HOME 'c'"},
        {"name": "slurm", "profile": dict(PROFILE)},
    )
    write_json(run.plan, plan.to_json())
    run.recipe.write_text(RECIPE)
    place.write("tokens.bin", "")
    run.code.mkdir()
    shutil.copytree(REPOSITORY / "src" / "amlaunch", run.code / "amlaunch")
    shutil.copy(REPOSITORY / "tests" / "stand_in.py", run.code)
    subprocess.run(["chown", "-R", "lab:lab", str(place.folder / "runs")], check=True)
    return run


def ends(run: RunDir) -> list[dict[str, Any]]:
    """How its attempts ended."""
    return [line for line in read_json_lines(run.element("train", "0").attempts) if line["event"] == "end"]


def submitted(place: Place) -> str:
    place.amlaunch("retry", "test-1")
    return place.queued()[0]


@pytest.mark.parametrize(
    ("runtime", "outside"), [("podman", []), ("charliecloud", ["preprocess"]), ("slurm", ["verify"])]
)
def test_the_whole_pipeline(cluster: Cluster, image: Path, runtime: str, outside: list[str]) -> None:
    """Text and shards on one node, a model on two; ``container: none`` for a stage is the environment that submits."""
    place = Place(cluster, "inside")
    for name, text in {**container_pipeline.FILES, "clusters.yaml": CLUSTERS}.items():
        place.write(name, text)
    words = [
        "submit",
        "inside.yaml",
        "--cluster",
        "lab",
        "--container.image",
        str(image),
        "--container.runtime",
        runtime,
        "--resources.train.nodes",
        "2",
    ]
    words += [
        "--resources.train.tasks_per_node",
        "1",
        "--export",
        "null",
        "--container.stages",
        json.dumps(dict.fromkeys(outside, "none")),
    ]
    dry = {row["stage"]: row for row in json.loads(place.amlaunch(*words, "--dry-run", "--json").stdout)["scripts"]}
    in_it = {
        stage: OF_THE_STEP[runtime] in [word.partition("=")[0] for word in row["step"]] for stage, row in dry.items()
    }
    assert in_it == {stage: stage not in outside for stage in ("preprocess", "verify", "train")}
    place.amlaunch(*words)
    assert all(Path(row["path"]).read_text() == row["script"] for row in dry.values()), (
        "the dry run is what is submitted"
    )
    found = place.wait("inside", 180)
    assert (
        states(found) == {"preprocess": ["done"], "verify": ["done"], "train": ["done"]}
        and element(found, "train")["nodes"] == "cpu[1-2]"
    )
    (folder,) = (place.folder / "runs").glob("inside-*")
    assert container_pipeline.made_in(folder) == ("host" if "preprocess" in outside else "image", "image")
    run = RunDir(folder)
    assert "2 x cpu, ddp" in run.element("train", "0").log(1, 0).read_text()
    assert (
        len([line for line in read_json_lines(run.element("train", "0").metrics) if "loss" in line]) == 2
        and len(attempts(run, "train")) == 1
    )


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_environment_mounts_and_a_signal_that_requeues(cluster: Cluster, image: Path, runtime: str) -> None:
    place = Place(cluster, runtime)
    (place.folder / "data").mkdir()
    shutil.chown(place.folder / "data", "lab", "lab")
    read_only = runtime != "charliecloud"
    file = (
        f"file://{image}"
        if runtime != "charliecloud"
        else str(container_pipeline.squashed(image, place.folder / "a.sqsh"))
    )
    container = StageContainer(file, runtime, [(str(place.folder / "data"), "/data", read_only)])
    inside = {
        "BOTH": "recipe",
        "FROM_IMAGE": "image",
        "SPACES": "a b; $HOME 'c'",
        **dict.fromkeys((*HOST, "TMPDIR", "XDG_CACHE_HOME", "LANG"), "None"),
    }
    run = stand_in(
        place,
        container,
        TWO,
        "--do",
        "steps",
        *(word for name in inside for word in ("--print", name)),
        "--touch",
        "/data/mine",
    )
    cluster.run("mkdir", "-p", "/home/lab/tmp")
    place.env |= {**HOST, "TMPDIR": "/home/lab/tmp"}
    job = submitted(place)
    place.wait_until(
        "test-1", lambda found: element(found, "train")["progress"].get("done", 0) > 3 or found["state"] == "failed"
    )
    cluster.run("scancel", "--signal=USR1", "--batch", f"{job}_0")
    found = place.wait("test-1", 90)
    folder = run.element("train", "0")
    log = folder.log(1, 0).read_text()
    assert "rank 0 of 2 on cpu1" in log and "rank 1 of 2 on cpu2" in folder.log(1, 1).read_text()
    assert [line for line in log.splitlines() if line.partition("=")[0] in inside] == [
        f"{name}={value}" for name, value in inside.items()
    ]
    assert ("could not write: [Errno 30]" in log) == read_only and (
        place.folder / "data" / "mine"
    ).exists() != read_only
    assert states(found)["train"] == ["done"] and len(attempts(run, "train")) == 2
    assert ends(run)[0]["outcome"] == "stopped" and "time limit" in ends(run)[0]["reason"]
    assert ends(run)[0]["exit_codes"] in ([75], [-15]), (
        "they left, or Slurm ended one when another had; not the signal itself"
    )
    steps = [line.split() for line in (folder.root / "steps0").read_text().splitlines()]
    assert steps == [[str(n)] for n in range(1, 25)], "each step once: it went on where it stopped"
    assert (folder.root / "saved1").stat().st_uid == (place.folder / "data").stat().st_uid, "what it writes is lab's"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_exit_code_comes_back(cluster: Cluster, image: Path, runtime: str) -> None:
    place = Place(cluster, runtime)
    run = stand_in(place, StageContainer(f"file://{image}", runtime), CPU, "--do", "bad")
    submitted(place)
    found = place.wait("test-1", 60, code=2)
    assert "model.n_layer: expected int" in element(found, "train")["reason"] and len(attempts(run, "train")) == 1


@pytest.mark.parametrize(
    "container, words",
    [
        (
            StageContainer("/no/such.sqsh", "charliecloud"),
            ["no such image", "/no/such.sqsh does not exist on this node"],
        ),
        (StageContainer("localhost:1/none:1", "podman"), ["registry unreachable", "amlaunch image import"]),
        (StageContainer("nvcr.io/nvidia/pytorch:25.08-py3", "apptainer"), ["no runtime", "apptainer is not installed"]),
    ],
)
def test_what_is_missing_is_said_in_the_first_seconds(
    cluster: Cluster, container: StageContainer, words: list[str]
) -> None:
    place = Place(cluster, "missing")
    run = stand_in(place, container, CPU, "--do", "ok")
    submitted(place)
    place.wait_until(
        "test-1", lambda _: ends(run)
    )  # a registry that is out of reach is tried again for longer than this takes
    reason = ends(run)[0]["reason"]
    assert all(word in reason for word in words) and "cpu" in reason, reason
    assert ends(run)[0]["again"] == ("registry unreachable" in words)
    assert not run.element("train", "0").log(1, 0).exists(), "no rank was started"


def test_what_a_first_run_lacks(cluster: Cluster) -> None:
    """Credentials and a mount are reported at submit; the mount also by its node, in the first seconds."""
    place = Place(
        cluster, "lacks", https_proxy="http://127.0.0.1:9"
    )  # nobody listens: no registry is reached, wherever this runs
    for name, text in {**container_pipeline.FILES, "clusters.yaml": CLUSTERS}.items():
        place.write(name, text)
    words = [
        "submit",
        "inside.yaml",
        "--cluster",
        "lab",
        "--stage",
        "preprocess",
        "--container.image",
        "nvcr.io/org/private:1",
        "--container.runtime",
        "podman",
    ]
    words += ["--container.mounts", "[/no/such/folder:/data]", "-v"]
    told = [place.amlaunch(*words, "--dry-run")]
    assert (
        "no credentials for nvcr.io found on this machine" in told[0].stderr
        and "podman login --username '$oauthtoken' nvcr.io" in told[0].stderr
    ), told[0].stderr
    assert "/no/such/folder does not exist on this machine" in told[0].stderr
    secret = base64.b64encode(b"$oauthtoken:hunter2-do-not-tell").decode()
    place.env["REGISTRY_AUTH_FILE"] = str(
        place.write("auth.json", json.dumps({"auths": {"nvcr.io": {"auth": secret}}}))
    )
    told.append(place.amlaunch(*words))
    assert "no credentials" not in told[1].stderr
    reason = element(place.wait("inside", 60, code=1), "preprocess")["reason"]
    assert "/no/such/folder does not exist on this node" in reason, reason
    told.append(place.amlaunch("logs", "inside"))
    files = [path for path in place.folder.rglob("*") if path.is_file() and path.name != "auth.json"]
    assert any(path.name == "script.sh" for path in files)
    text = "".join([*(one.stdout + one.stderr for one in told), *(path.read_text(errors="replace") for path in files)])
    assert secret not in text and "hunter2" not in text
