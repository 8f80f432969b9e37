"""What was written before the package was called ``amlaunch``: names of targets, code beside recipes, identities."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.format.targets import OWN_TARGETS, TargetPolicy, current_name, resolve, stable_names

RECIPE = """\
model: {{_target_: {prefix}trainer.models.gpt2.build_gpt2_model, vocab_size: 257, n_positions: 16}}
dataset: {{_target_: {prefix}trainer.data.NanogptDataset, seq_len: 16, file_pattern: "*.bin"}}
loss_fn: {{_target_: {prefix}trainer.loss.LinearCrossEntropy, vocab_size: 257}}
sweep: {{loss_fn._target_: [{prefix}trainer.loss.MaskedCrossEntropy, {prefix}trainer.loss.LinearCrossEntropy]}}
"""


def test_the_names_of_before_give_the_same_run_without_a_note(tmp_path: Path) -> None:
    recipes = {}
    for prefix in ("", "amlaunch."):
        path = tmp_path / f"tiny{prefix}yaml"
        path.write_text(RECIPE.format(prefix=prefix) + "name: tiny\n")
        recipes[prefix] = load(path)
    old, new = recipes[""], recipes["amlaunch."]
    assert old.recipe.model["_target_"] == "amlaunch.trainer.models.gpt2.build_gpt2_model"
    assert (old.recipe.model, old.recipe.dataset, old.recipe.loss_fn) == (
        new.recipe.model,
        new.recipe.dataset,
        new.recipe.loss_fn,
    )
    assert old.notes == new.notes == []
    assert old.fingerprint() == new.fingerprint()


def test_the_shipped_recipes_are_the_same_runs_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their fingerprints at the last version whose packages had bare names, for data under the root folder."""
    monkeypatch.chdir("/")
    fingerprints = {name: load(_shipped(name)).fingerprint() for name in ("nanogpt", "llama-1.3b")}
    assert fingerprints == {"nanogpt": "9de393a1", "llama-1.3b": "d2b78430"}


def _shipped(name: str) -> Path:
    return Path(__file__).resolve().parent.parent / "recipes" / f"{name}.yaml"


@pytest.mark.parametrize("target", OWN_TARGETS)
def test_every_target_has_its_earlier_name(target: str) -> None:
    earlier = target.removeprefix("amlaunch.")
    assert current_name(earlier) == current_name(target) == target
    assert stable_names({"_target_": target, "list": [target]}) == {"_target_": earlier, "list": [earlier]}
    assert callable(resolve(target, TargetPolicy()))


def test_a_users_own_trainer_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("WIDTH = 3\n")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").write_text("NAME = 'mine'\n")
    (tmp_path / "my_model.py").write_text(
        "import recipes, trainer\n\n\ndef build(scale):\n    return scale * trainer.WIDTH, recipes.NAME\n"
    )
    code = (
        "from pathlib import Path; from amlaunch.recipes.format.targets import TargetPolicy, build;"
        "import amlaunch.trainer.process.stop_request;"
        f"print(build({{'_target_': 'my_model.py:build', 'scale': 2}}, TargetPolicy(Path({str(tmp_path)!r}))))"
    )
    source = str(Path(__file__).resolve().parent.parent / "src")
    environment = {**os.environ, "PYTHONPATH": source, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path.parent, capture_output=True, text=True
    )
    assert done.stdout.strip() == "(6, 'mine')", done.stderr


def test_code_that_imports_our_packages_by_their_earlier_names_is_told_todays(tmp_path: Path) -> None:
    (tmp_path / "my_old_model.py").write_text("import launcher.plan\n\n\ndef build():\n    return launcher.plan\n")
    with pytest.raises(BadInput, match=r"my_old_model\.py: no module 'launcher.*import amlaunch\.launcher"):
        resolve("my_old_model.py:build", TargetPolicy(tmp_path))
