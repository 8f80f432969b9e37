"""A run stores its recipe twice: as YAML for people, and as JSON for its stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amlaunch.recipes.format.loader import load
from amlaunch.recipes.run_layout import RunDir

RECIPE = """\
name: tiny
preprocess: {data_files: text.txt, tokenizer: byte}
model: {_target_: amlaunch.trainer.models.gpt2.build_gpt2_model, vocab_size: 257, n_positions: 16}
dataset: {seq_len: 16}
"""


def amlaunch(folder: Path, root: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "amlaunch", *arguments, "--runs", "runs"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_stages_read_json_and_older_runs_get_it_when_they_are_retried(tmp_path, root):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("hello\n" * 100)
    amlaunch(tmp_path, root, "local", "tiny", "--stage", "preprocess")
    [folder] = (tmp_path / "runs").iterdir()
    run = RunDir(folder)
    assert load(run.recipe).recipe == load(run.recipe_json).recipe
    assert f'"{run.recipe_json}"' in run.plan.read_text() and f'"{run.recipe}"' not in run.plan.read_text()
    assert not (run.code / "packages").exists()

    # As an earlier version left it: no JSON, and a plan that names the YAML file.
    run.recipe_json.unlink()
    run.plan.write_text(run.plan.read_text().replace("recipe.json", "recipe.yaml"))
    run.element("preprocess", "0").done.unlink()
    amlaunch(tmp_path, root, "retry", folder.name)
    assert run.element("preprocess", "0").done.exists()
    assert json.loads(run.recipe_json.read_text())["name"] == "tiny"
