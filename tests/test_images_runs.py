"""Images of runs: what an image lacks is reported before anything starts, and an imported file is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_helpers import layer, need, write_layout

from amlaunch.launcher.__main__ import main
from amlaunch.launcher.planning.container_start import container_spec
from amlaunch.launcher.specs.plan import Needs, Plan, Stage, StageContainer
from amlaunch.recipes.run_layout import RunDir

NGC = "nvcr.io/nvidia/pytorch:25.08-py3"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("AMLAUNCH_IMAGES", raising=False)
    monkeypatch.chdir(tmp_path)


def test_what_a_stock_image_lacks_is_told_before_anything_starts(tmp_path, capsys):
    """A tokenizer is compiled; the message has the ways out, and one of them is taken: a user's word."""
    need("podman")
    words = ["local", "quickstart", "--container.image", NGC]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert (
        "container.image: stages preprocess and verify need tiktoken" in error
        and "--container.stages.preprocess none --container.stages.verify none" in error
    )
    assert not (tmp_path / "runs").exists()
    assert (
        main(
            [*words, "--container.stages.preprocess", "none", "--container.stages.verify", "none", "--stage", "verify"]
        )
        == 2
    )
    assert "needs stage preprocess, which is not done" in capsys.readouterr().err, "nothing else is wrong"


@pytest.mark.slow
def test_the_run_brings_along_what_its_image_lacks(tmp_path):
    need("podman")
    assert (
        main(
            [
                "local",
                "quickstart",
                "--container.image",
                NGC,
                "--container.stages.preprocess",
                "none",
                "--container.stages.verify",
                "none",
                "--stage",
                "preprocess",
            ]
        )
        == 0
    )
    [run] = (tmp_path / "runs").glob("quickstart-*")
    assert not (run / "code" / "packages" / "yaml").exists() and not list((run / "code").rglob("*.so"))
    assert json.loads((run / "recipe.json").read_text())["name"] == "quickstart", "read without PyYAML"


def test_an_imported_file_stands_for_its_image(tmp_path, capsys):
    """By the record beside it, where what starts containers here starts such files."""
    need("ch-run", "mksquashfs")
    layout = write_layout(tmp_path / "oci", [layer([("etc", None)])])
    assert main(["image", "import", f"oci:{layout}"]) == 0
    [image] = (tmp_path / "images").glob("*.sqsh")
    record = image.with_suffix(".json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "reference": NGC}))
    capsys.readouterr()

    def image_of_train(*more: str) -> str:
        assert (
            main(
                ["show", "quickstart", "--container.image", NGC, "--container.runtime", "charliecloud", *more, "--json"]
            )
            == 0
        )
        plan = json.loads(capsys.readouterr().out)["plan"]
        return next(stage["container"]["image"] for stage in plan["stages"] if stage["name"] == "train")

    assert Path(image_of_train()) == image
    assert image_of_train("--container.runtime", "podman") == NGC, "which starts no such file"
    image.write_bytes(b"torn")
    assert image_of_train() == NGC


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--container.mounts", "[/tmp:/data:ro]"],
            "container of preprocess and verify and train and export: charliecloud has no read-only mounts",
        ),
        (
            ["--container.mounts", "[{source: '{here}/a:b', target: /data}]"],
            "/a:b at /data: it misreads a colon in a path",
        ),
        (["--container.env", "{A B: x}"], "container.env.A B: not a valid variable name"),
        (["--container.workdir", "here"], "container.workdir: 'here': expected an absolute path inside the container"),
        (["--container.image", "./a.sif"], "charliecloud cannot start .sif files; use apptainer or singularity\n"),
    ],
)
def test_what_a_runtime_cannot_do_is_told_before_anything_starts(tmp_path, capsys, words, message):
    need("ch-run")
    for name in ("image", "a:b"):
        (tmp_path / name).mkdir()
    words = [word.replace("{here}", str(tmp_path)) for word in words]
    assert (
        main(["local", "quickstart", "--container.image", "./image", "--container.runtime", "charliecloud", *words])
        == 2
    )
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_profile_can_say_that_there_are_no_containers(tmp_path, capsys):
    need("podman")
    (tmp_path / "clusters.yaml").write_text("local: {executor: local, container: {runtime: none}}\n")
    assert main(["show", "quickstart", "--container.image", NGC, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert all(stage["container"] is None for stage in shown["plan"]["stages"])


def test_home_is_not_mounted_by_another_name_nor_a_path_of_the_host_told_that_is_not_inside(tmp_path, monkeypatch):
    """A home behind a link, and a variable of the shell that names a file."""
    (tmp_path / "real" / "work").mkdir(parents=True)
    (tmp_path / "home").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    stage = Stage(
        "train",
        [],
        [],
        Needs(1, 0, 1, 1),
        None,
        StageContainer(
            f"file://{tmp_path}",
            "podman",
            [(str(tmp_path / "real" / "work"), "/data", False)],
            passed=["HF_TOKEN_PATH"],
        ),
    )
    for cwd, mounted in ((tmp_path / "real", False), (tmp_path / "home", False), (tmp_path / "real" / "work", True)):
        plan = Plan("run", [stage], None, str(cwd))
        image = container_spec(RunDir(tmp_path / "run"), plan, stage, {}, [], on_slurm=False)
        assert (str(cwd) in [mount.target for mount in image.mounts]) is mounted, cwd
    host = {
        "SSL_CERT_FILE": "/etc/pki/tls/cert.pem",
        "HF_HOME": "/data/hf",
        "HF_TOKEN_PATH": "/nowhere",
        "http_proxy": "http://proxy:1",
    }
    for name, value in host.items():
        monkeypatch.setenv(name, value)
    assert container_spec(RunDir(tmp_path / "run"), plan, stage, {}, host, on_slurm=False).passed == (
        "HF_HOME",
        "HF_TOKEN_PATH",
        "http_proxy",
    )
