"""Images as a run meets them: what its image lacks is told before anything starts, and a file that was imported is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_helpers import layer, need, write_layout

from launcher.__main__ import main

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
    assert "container.image: stages preprocess and verify need tiktoken" in error and "--container.stages.preprocess none --container.stages.verify none" in error
    assert not (tmp_path / "runs").exists()
    assert main([*words, "--container.stages.preprocess", "none", "--container.stages.verify", "none", "--stage", "verify"]) == 2
    assert "needs stage preprocess, which is not done" in capsys.readouterr().err, "nothing else is wrong"


@pytest.mark.slow
def test_the_run_brings_along_what_its_image_lacks(tmp_path):
    need("podman")
    assert main(["local", "quickstart", "--container.image", NGC, "--container.stages.preprocess", "none", "--container.stages.verify", "none", "--stage", "preprocess"]) == 0
    [run] = (tmp_path / "runs").glob("quickstart-*")
    assert (run / "code" / "packages" / "yaml" / "__init__.py").is_file() and not list((run / "code").rglob("*.so"))
    assert "pyyaml" in json.loads((run / "code" / "packages" / "packages.json").read_text())["copied"]


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
        assert main(["show", "quickstart", "--container.image", NGC, "--container.runtime", "charliecloud", *more, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)["plan"]
        return next(stage["container"]["image"] for stage in plan["stages"] if stage["name"] == "train")

    assert Path(image_of_train()) == image
    assert image_of_train("--container.runtime", "podman") == NGC, "which starts no such file"
    image.write_bytes(b"torn")
    assert image_of_train() == NGC
