"""A recipe loads completely, or is refused with file, line and the nearest valid name."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.consistency import check_batch
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.format.schema import validation_sets
from amlaunch.recipes.format.targets import (
    OPTIMIZER_KEYS,
    OPTIMIZERS,
    OWN_TARGETS,
    TargetPolicy,
    _tree,
    build,
    check_target,
    resolve,
    signature,
)
from amlaunch.recipes.format.units import parse_count, parse_memory, parse_minutes
from amlaunch.recipes.shipped import find_recipe, recipe_summary, shipped_recipes

MINIMAL = """\
model:
  _target_: my_models.py:build
  n_embd: 64
  n_head: 4
dataset:
  file_pattern: data/*.bin
  seq_len: 32
"""
MODELS = """\
import os
from os import system

def build(*, n_embd: int = 32, n_head: int = 2, n_positions: int = 64, dropout: float = 0.0, act: str | None = None):
    return ("model", n_embd, n_head)

def _private():
    return None

class Config:
    def __init__(self, width: int, tag="x"):
        self.width = width

class Own:
    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95)):
        self.lr = lr

not_callable = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_models.py").write_text(MODELS)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def problems(folder: Path, text: str, *overrides: str, **options) -> str:
    with pytest.raises(BadInput) as caught:
        load(write(folder, text), overrides, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        ("amlaunch.trainer.models.gpt2.build_gpt2_model\n  n_head: 12", 8, "8 does not divide model.n_head 12"),
        ("amlaunch.trainer.models.gpt2.build_gpt2_model", 2, "2 does not divide model.vocab_size 50257"),
        (
            "amlaunch.trainer.models.llama.build_llama_model\n  num_key_value_heads: 2",
            4,
            "4 does not divide model.num_key_value_heads 2",
        ),
        (
            "transformers.AutoModelForCausalLM.from_config\n"
            "  config: {_target_: transformers.LlamaConfig, num_attention_heads: 6}",
            4,
            "num_attention_heads 6",
        ),
    ],
)
def test_heads_that_tensor_parallelism_cannot_divide_are_refused_early(folder, model, size, expected):
    data = "dataset:\n  file_pattern: d.bin\n  seq_len: 32\n"
    text = f"model:\n  _target_: {model}\n{data}distributed:\n  tp_size: {size}\n"
    assert expected in problems(folder, text)


def test_a_minimal_recipe_gets_the_defaults(folder):
    recipe = load(write(folder, MINIMAL)).recipe
    assert recipe.optimizer == {"_target_": "torch.optim.AdamW", "lr": 2e-4}  # as in the guide
    assert recipe.dataset["_target_"] == "amlaunch.trainer.data.NanogptDataset"
    assert recipe.distributed.strategy == "fsdp2" and recipe.distributed.dp_size is None


@pytest.mark.parametrize(
    ("add", "line", "expected"),
    [
        ("step_scheduler:\n  max_stps: 3\n", 9, "did you mean 'max_steps'"),
        ("step_schedule:\n  max_steps: 3\n", 8, "did you mean 'step_scheduler'"),
        ("step_scheduler:\n  max_steps: lots\n", 9, "expected an integer of at least 1, got 'lots'"),
        ("step_scheduler:\n  max_steps: 0\n", 9, "at least 1"),
        ("step_scheduler:\n  max_steps: true\n", 9, "got true"),
        ("seed: -1\n", 8, "expected an integer of at least 0, got -1"),
        ("distributed:\n  strategy: fsdp\n", 9, "one of fsdp2, ddp, none"),
        ("distributed: fsdp2\n", 8, "expected a section with keys"),
        ("optimizer:\n  _target_: torch.optim.AdamW\n  learning_rate: 3\n", 10, "unknown key of torch.optim.AdamW"),
        ("optimizer:\n  _target_: torch.optim.AdamW\n  lr: fast\n", 10, "expected a number, got 'fast'"),
        (
            "step_scheduler:\n  global_batch_size: 10\n  local_batch_size: 4\n",
            9,
            "10 is not a multiple of local_batch_size 4",
        ),
        ("step_scheduler:\n  grad_acc_steps: 4\n", 9, "write global_batch_size"),
        ("distributed:\n  tp_size: 5\n", 9, "5 (tp_size x cp_size) does not divide dataset.seq_len 32"),
        ("distributed:\n  cp_size: 3\n", 9, "3 (tp_size x cp_size) does not divide dataset.seq_len"),
        ("distributed:\n  sequence_parallel: true\n", 9, "has no effect with tp_size 1; set false"),
        ("distributed:\n  strategy: ddp\n  dp_replicate_size: 2\n", 10, "needs strategy fsdp2, not ddp"),
        ("distributed:\n  strategy: none\n  cp_size: 2\n", 10, "strategy none does not sum gradients"),
        ("distributed:\n  strategy: ddp\n  cpu_offload: true\n", 10, "needs strategy fsdp2, not ddp"),
        ("packed_sequence:\n  packed_sequence_size: -1\n", 9, "expected an integer of at least 0"),
        ("preprocess:\n  max_tokens: some\n  data_files: x\n", 9, "500M"),
        ("preprocess:\n  tokenizer: gpt2\n", 8, "set exactly one of dataset"),
        ("preprocess:\n  data_files: x\n  max_tokens: 1K\n  val_tokens: 1K\n", 11, "leaves nothing"),
        ("resources:\n  train:\n    time: soon\n", 10, "04:00:00"),
        ("name: a/b\n", 8, "'a/b' cannot name the run's folder"),
        ("wandb:\n  api_key: abc\n", 9, "export API_KEY"),
        ("sweep:\n  optimizer.lrr: [1, 2]\n", 9, "unknown key"),
        ("sweep:\n  optimizer.lr: []\n", 9, "the list is empty"),
        ("sweep:\n  optimizer.lr: [1e-3, 2, 0.001]\n", 9, "0.001 is listed twice"),
        ("sweep:\n  optimizer.lr: 3\n", 9, "expected a list"),
    ],
)
def test_each_problem_names_its_line(folder, add, line, expected):
    message = problems(folder, MINIMAL + add)
    assert f"r.yaml:{line}: " in message and expected in message


def test_keys_of_a_users_own_callable_are_checked_without_importing_it(folder):
    (folder / "my_models.py").write_text("raise SystemExit('imported')\n" + MODELS)
    message = problems(folder, MINIMAL, "--model.n_layr", "3", "--model.n_head=two")
    assert "--model.n_layr=3: model.n_layr: unknown key" in message and "expected an integer, got 'two'" in message


def test_x_keys_are_a_place_for_anchors(folder):
    anchors = "x-data: &data\n  seq_len: 32\n  shuffel: true\n"
    merged = MINIMAL + "validation_dataset:\n  <<: *data\n  file_pattern: v.bin\n"
    assert "r.yaml:3: validation_dataset.shuffel: unknown key" in problems(folder, anchors + merged)
    loaded = load(write(folder, anchors.replace("shuffel", "shuffle_files") + merged))
    assert loaded.recipe.validation_dataset["shuffle_files"] is True
    assert "x-data" not in loaded.tree and load(write(folder, loaded.text())).tree == loaded.tree


def test_all_problems_are_reported_together(folder):
    message = problems(folder, MINIMAL + "seed: x\nnam: y\n", "--step_scheduler.max_steps=no")
    assert len(message.splitlines()) == 3


def test_inconsistent_keys_are_refused(folder):
    assert "n_embd: 64 is not divisible by n_head 5" in problems(folder, MINIMAL, "--model.n_head", "5")
    assert "exceeds the model's context of 64" in problems(folder, MINIMAL, "--dataset.seq_len", "65")
    assert "exceeds the model's context of 16" in problems(folder, MINIMAL, "--model.n_positions", "16")
    assert "no preprocess section" in problems(folder, MINIMAL.replace("  file_pattern: data/*.bin\n", ""))


@pytest.mark.parametrize(("ranks", "fits"), [(1, True), (2, True), (3, False), (4, True), (8, False)])
def test_the_global_batch_must_divide(folder, ranks, fits):
    recipe = load(
        write(folder, MINIMAL), ["--step_scheduler.global_batch_size=8", "--step_scheduler.local_batch_size=2"]
    ).recipe
    message = check_batch(recipe, ranks)
    assert (message is None) == fits
    if ranks == 3:
        assert "set 6 or 12" in message


def test_numbers_and_none_as_the_guide_writes_them(folder):
    recipe = load(
        write(folder, MINIMAL),
        ["--distributed.dp_size", "none", "--step_scheduler.max_steps", "1e3", "--optimizer.lr", "1e-4"],
    ).recipe
    assert recipe.distributed.dp_size is None
    assert recipe.step_scheduler.max_steps == 1000 and isinstance(recipe.step_scheduler.max_steps, int)
    assert recipe.optimizer["lr"] == 1e-4


def test_an_override_of_a_list_item(folder):
    text = MINIMAL + "optimizer:\n  _target_: torch.optim.AdamW\n  betas: [0.9, 0.95]\n"
    assert load(write(folder, text), ["--optimizer.betas.0", "0.8"]).recipe.optimizer["betas"] == [0.8, 0.95]


def test_a_stored_recipe_is_the_same_recipe(folder):
    first = load(write(folder, MINIMAL), ["--name", "123abc", "--optimizer.lr", "1e-5", "--seed", "7"])
    again = load(write(folder, first.text()))
    assert again.recipe == first.recipe and again.fingerprint() == first.fingerprint()


def test_the_fingerprint_identifies_the_result(folder):
    base = load(write(folder, MINIMAL)).fingerprint()
    assert load(write(folder, MINIMAL), ["--resources.train.cpus=3", "--name=other"]).fingerprint() == base
    assert load(write(folder, MINIMAL), ["--seed=3"]).fingerprint() != base


def test_the_fingerprint_follows_the_users_code_but_not_its_comments(folder):
    def now() -> str:
        _tree.cache_clear()  # a process reads a file once
        return load(write(folder, MINIMAL)).fingerprint()

    (folder / "parts.py").write_text("width = 1\n")
    (folder / "my_models.py").write_text("import parts\n" + MODELS)
    before = now()
    (folder / "my_models.py").write_text("import parts  # of mine\n" + MODELS)
    assert now() == before
    (folder / "parts.py").write_text("width = 2\n")
    assert now() != before, "a neighbour that it imports is its code too"


def test_the_fingerprint_follows_relative_paths_to_data(folder, tmp_path_factory, monkeypatch):
    fingerprints = set()
    for current in (folder, tmp_path_factory.mktemp("elsewhere")):
        monkeypatch.chdir(current)
        fingerprints.add(load(write(folder, MINIMAL)).fingerprint())
    assert len(fingerprints) == 2, "data/*.bin is other data there"


def test_every_sweep_point_must_be_consistent(folder):
    text = MINIMAL + "sweep:\n  model.n_embd: [8, 12]\n  model.n_head: [2, 8]\n"
    assert "12 is not divisible by n_head 8" in problems(folder, text)
    loaded = load(write(folder, MINIMAL + "sweep:\n  model.n_embd: [60]\n  model.n_head: [6]\n"))
    assert loaded.elements() == [{"model.n_embd": 60, "model.n_head": 6}]
    assert load(write(folder, MINIMAL), ["--sweep.optimizer.lr", "[1e-4, 3e-4]"]).elements() == [
        {"optimizer.lr": 1e-4},
        {"optimizer.lr": 3e-4},
    ]


@pytest.mark.parametrize("key", ["preprocess.max_tokens", "name", "resources.train.cpus", "export", "wandb.project"])
def test_a_sweep_over_shared_settings_is_refused(folder, key):
    assert "sweep points share this setting" in problems(folder, MINIMAL + f"sweep:\n  {key}: [1, 2]\n")


@pytest.mark.parametrize(
    "section",
    [
        "wandb: {api_key: abc}",
        "wandb: {l: [{password: x}]}",
        "container: {env: {AWS_SECRET_ACCESS_KEY: x}}",
        "container: {env: {GITHUB_TOKEN: x}}",
        "wandb: {api_key: '${KEY:-abc}'}",
    ],
)
def test_a_literal_secret_is_refused(folder, section):
    assert "the run directory would store this secret" in problems(folder, MINIMAL + section + "\n")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--model.n_head=0", "at least 1"),
        ("--dataset.seq_len=0", "at least 1"),
        ("--optimizer.lr=.nan", "at least 0"),
        ("--optimizer.lr=-1.0", "at least 0"),
        ("--clip_grad_norm.max_norm=-1", "above 0"),
        ("--export.temperature=-1", "at least 0"),
        ("--model.dropout=2.0", "below 1"),
        ("--checkpoint.enabled=false", "nothing to export"),
        ("--seed=99999999999999999999", "63 bits"),
        ("--optimizer._target_=torch.optim.Adamw", "AdamW"),
        ("--checkpoint={enabled: false, restore_from: best}", "needs checkpoint.enabled: true"),
        ("--checkpoint.keep_bst=true", "did you mean 'keep_best'"),
        ("--parameter_groups=[{match: x, lr: -1.0}]", "at least 0"),
        ("--parameter_groups=[{mtch: x}]", "did you mean 'match'"),
        ("--lr_scheduler={lr_decay_steps: 5, lr_decay_tokens: 1K}", "remove one of them"),
        ("--profile.stps=3", "did you mean 'steps'"),
        ("--optimizer={_target_: torch.optim.Muon, othrs: {}}", "did you mean 'others'"),
        ("--preprocess={data_files: x, tokenizer: gpt5}", "did you mean 'gpt2'"),
        ("--preprocess.max_tokens=1e400M", "500M"),
        ("--preprocess={data_files: x, shard_tokens: 0}", "at least 1"),
        ("--lr_scheduler={min_lr: -1}", "at least 0"),
        ("--lr_scheduler={init_lr: .inf}", "at least 0"),
        ("--lr_scheduler={min_lr: 1e-2}", "above optimizer.lr 0.0002"),
        ("--lr_scheduler={init_lr: 1, lr_warmup_steps: 2}", "above optimizer.lr 0.0002"),
        ("--lr_scheduler={lr_warmup_steps: 9, lr_decay_steps: 8}", "before the warmup ends at step 9"),
        ("--lr_scheduler={lr_decay_tokens: 0}", "at least 1"),
        ("--optimizer={_target_: torch.optim.AdamW, betas: [0.9]}", "a list of 2 numbers"),
        ("--optimizer={_target_: torch.optim.AdamW, betas: [0.9, 1.0]}", "below 1, got 1.0"),
        ("--optimizer={_target_: torch.optim.RMSprop, lr: -1}", "at least 0"),
        ("--optimizer={_target_: torch.optim.AdamW, eps: -1}", "at least 0"),
        ("--optimizer={_target_: torch.optim.Muon, others: {_target_: torch.optim.SGD, momentum: -1}}", "at least 0"),
        ("--optimizer={_target_: my_models.py:Own, betas: [0.9]}", "a list of 2 numbers"),
        ("--optimizer={_target_: my_models.py:Own, betas: [0.9, x]}", "a list of 2 numbers"),
        ("--dataset.bos_token=-1", "at least 0"),
    ],
)
def test_sizes_that_cannot_work_are_refused(folder, override, expected):
    assert expected in problems(folder, MINIMAL, override)


def test_missing_splits_and_small_vocabularies_are_refused(folder):
    text = MINIMAL.replace("  file_pattern: data/*.bin\n", "") + "preprocess: {data_files: x}\n"
    assert "did you mean 'train'" in problems(folder, text, "--dataset.split", "tarin")
    assert "val_tokens is 0" in problems(folder, text, "--validation_dataset.split=val")
    own = "_target_: amlaunch.trainer.models.gpt2.build_gpt2_model\n  vocab_size: 100"
    assert "gpt2 has 50257 tokens" in problems(folder, text.replace("_target_: my_models.py:build", own))


class TestVariables:
    TEXT = MINIMAL + "wandb:\n  project: ${PROJECT_X:-mine}\n  api_key: ${SECRET_X}\n"

    def test_defaults_and_values(self, folder, monkeypatch):
        monkeypatch.setenv("SECRET_X", "hunter2")
        monkeypatch.setenv("LR_X", "3e-3")
        loaded = load(write(folder, self.TEXT), ["--optimizer.lr=${LR_X}"], job_start=True)
        assert (
            loaded.recipe.wandb == {"project": "mine", "api_key": "hunter2"} and loaded.recipe.optimizer["lr"] == 3e-3
        )
        assert "hunter2" not in loaded.text() and "${SECRET_X}" in loaded.text()

    def test_a_secret_may_be_unknown_until_the_job_starts(self, folder, monkeypatch):
        monkeypatch.delenv("SECRET_X", raising=False)
        assert load(write(folder, self.TEXT)).recipe.wandb["api_key"] == "${SECRET_X}"
        assert "SECRET_X is not set" in problems(folder, self.TEXT, job_start=True)

    def test_a_number_must_be_known_to_plan(self, folder):
        assert "NOT_SET_X is not set" in problems(folder, MINIMAL, "--seed=${NOT_SET_X}")

    def test_an_empty_folder_is_not_the_root(self, folder, monkeypatch):
        monkeypatch.setenv("EMPTY_X", "")
        assert "EMPTY_X is empty" in problems(folder, MINIMAL, "--preprocess.data_files=${EMPTY_X}/**", job_start=True)
        assert load(write(folder, MINIMAL), ["--name=a${EMPTY_X}"]).recipe.name == "a"

    @pytest.mark.parametrize("value", ["1", "007", "1e5", "1.10", "true", "null", "", "12345678", "0x1f"])
    def test_text_stays_as_the_environment_sets_it(self, folder, monkeypatch, value):
        monkeypatch.setenv("VALUE_X", value)
        text = MINIMAL + "container: {image: x/y, env: {A: '${VALUE_X}', B: '${NOT_SET_X:-1}', C: 'is ${VALUE_X}'}}\n"
        assert load(write(folder, text), job_start=True).recipe.container.env == {
            "A": value,
            "B": "1",
            "C": f"is {value}",
        }
        assert "container.env.A: expected text, got 1" in problems(
            folder, MINIMAL + "container: {image: x/y, env: {A: 1}}\n"
        )

    @pytest.mark.parametrize(
        ("key", "expected"),
        [
            ("seed", "an integer of at least 0"),
            ("model.n_embd", "an integer"),
            ("step_scheduler", "a section with keys"),
            ("preprocess.data_files", "a list or text"),
        ],
    )
    def test_a_variable_of_the_wrong_type_is_named_without_its_value(self, folder, monkeypatch, key, expected):
        monkeypatch.setenv("VALUE_X", "18764.25")
        message = problems(folder, MINIMAL, f"--{key}=${{VALUE_X}}")
        assert f"{key}: expected {expected}, but ${{VALUE_X}} is something else" in message and "18764" not in message

    def test_another_value_is_another_run_but_another_secret_is_not(self, folder, monkeypatch):
        fingerprints = set()
        for seed, secret in (("1", "a"), ("1", "b"), ("2", "b")):
            monkeypatch.setenv("SEED_X", seed)
            monkeypatch.setenv("MY_TOKEN", secret)
            loaded = load(write(folder, MINIMAL), ["--seed=${SEED_X}", "--model.act=${MY_TOKEN}"])
            fingerprints.add(loaded.fingerprint())
        assert len(fingerprints) == 2


class TestTargets:
    @pytest.mark.parametrize(
        "name",
        [
            "os.system",
            "subprocess.run",
            "builtins.eval",
            "torch.hub.load",
            "torch.load",
            "torch.utils.cpp_extension.load",
            "torch.utils.collect_env.run",
            "torch.nn.functional.torch.load",
            "torch.nn.functional.torch.hub.load",
            "torch.utils.model_zoo.load_url",
            "transformers.modeling_utils.torch.hub.load_state_dict_from_url",
            "transformers.testing_utils.run_command",
            "transformers.pipeline",
            "transformers.dynamic_module_utils.get_class_from_dynamic_module",
            "transformers.utils.import_utils.direct_transformers_import",
            "torch.distributed.launch.main",
            "torch.os.system",
            "amlaunch.trainer.checkpoints.checkpoint.discard",
            "amlaunch.recipes.files.write_text",
            "my_models.py:os.system",
            "my_models.py:system",
            "amlaunch.trainer.loss._private",
            "torch._C.x",
            "my_models.py:_private",
            "torch",
            "not a name",
            "a..b",
            "/etc/passwd:x",
            "my_models.py:nothing",
            "missing.py:x",
            "amlaunch.trainer.models.base.gpt3.build",
        ],
    )
    def test_refused_by_name(self, folder, name):
        assert check_target(name, TargetPolicy(folder))

    @pytest.mark.parametrize(
        ("name", "complete"),
        [
            ("my_models.build", "my_models.py:build"),
            ("my_models:build", "my_models.py:build"),
            ("AdamW", "torch.optim.AdamW"),
            ("LinearCrossEntropy", "amlaunch.trainer.loss.LinearCrossEntropy"),
            ("my_modls.py:build", "my_models.py:build"),
            ("my_modls.py:biuld", "my_models.py:build"),
            ("elsewhere/my_models.py:build", "my_models.py:build"),
            ("torch.AdamW", "torch.optim.AdamW"),
            ("torch.adamw", "torch.optim.AdamW"),
            ("trainer.models.gpt2.build_gpt2_mdl", "amlaunch.trainer.models.gpt2.build_gpt2_model"),
            ("amlaunch.trainer.models.gpt2.build_gpt2_mdl", "amlaunch.trainer.models.gpt2.build_gpt2_model"),
        ],
    )
    def test_an_incomplete_name_is_completed(self, folder, name, complete):
        assert f"did you mean {complete!r}?" in str(check_target(name, TargetPolicy(folder)))
        assert check_target(complete, TargetPolicy(folder)) is None

    def test_a_name_without_a_file_beside_the_recipe_may_be_a_package(self, folder):
        for name in ("my_models.missing", "my_package.build"):
            assert "add --allow-target my_" in str(check_target(name, TargetPolicy(folder)))
        assert "add --allow-target trainer" in str(check_target("trainer.mine.Thing", TargetPolicy(folder)))
        assert "did you mean" not in str(check_target("other.py:build", TargetPolicy(folder)))

    @pytest.mark.parametrize(
        "name",
        ["torch.nn.functional.torch.Tensor", "torch.nn.modules.container.OrderedDict", "torch.nn.modules.module.Any"],
    )
    def test_refused_when_resolved(self, folder, name):
        """A library's namespace also holds what it imported."""
        with pytest.raises(BadInput, match="outside the known libraries"):
            resolve(name, TargetPolicy(folder))

    def test_a_file_elsewhere_needs_permission(self, folder, tmp_path_factory):
        other = tmp_path_factory.mktemp("other") / "mine.py"
        other.write_text(MODELS)
        name = f"{other}:build"
        assert "--allow-target" in check_target(name, TargetPolicy(folder))
        assert check_target(name, TargetPolicy(folder, (str(other),))) is None
        assert check_target(f"../{other.parent.name}/mine.py:build", TargetPolicy(folder))

    def test_permission_by_name(self, folder):
        assert "--allow-target collections" in check_target("collections.OrderedDict", TargetPolicy(folder))
        assert resolve("collections.OrderedDict", TargetPolicy(folder, ("collections",)))

    def test_nested_targets_are_built_first(self, folder):
        node = {
            "_target_": "my_models.py:Config",
            "width": {"_target_": "my_models.py:build", "n_embd": 8},
            "tag": [1, {"a": 2}],
        }
        built = build(node, TargetPolicy(folder))
        assert built.width == ("model", 8, 2)

    def test_wrong_keywords_are_bad_input(self, folder):
        with pytest.raises(BadInput, match="unexpected keyword"):
            build({"_target_": "my_models.py:Config", "width": 1, "hight": 2}, TargetPolicy(folder))
        with pytest.raises(BadInput, match="cannot be called"):
            resolve("my_models.py:not_callable", TargetPolicy(folder))

    def test_code_from_the_hub_needs_permission(self, folder):
        with pytest.raises(BadInput, match="trust_remote_code"):
            build({"_target_": "my_models.py:Config", "width": 1, "trust_remote_code": True}, TargetPolicy(folder))

    def test_the_keys_of_optimizers_match_torch(self):
        """A key that torch has and we do not would be refused; one that we have and torch does not, too late."""
        import inspect

        for name, keys in OPTIMIZER_KEYS.items():
            real = set(inspect.signature(resolve(name, TargetPolicy())).parameters) - {"params"}
            assert set(keys) == real, name

    def test_the_optimizers_match_torch(self):
        import torch

        real = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)} - {
            "Optimizer",
            "LBFGS",
            "SparseAdam",
        }
        assert set(OPTIMIZERS) == real
        assert "did you mean 'torch.optim.AdamW'" in check_target("torch.optim.Adamw", TargetPolicy())

    @pytest.mark.slow
    def test_unknown_settings_of_a_configuration_are_refused(self):
        node = {"_target_": "transformers.LlamaConfig", "hidden_size": 64, "num_hidden_layers": 1}
        assert build(node, TargetPolicy()).hidden_size == 64
        with pytest.raises(BadInput, match="not a multiple"):
            build({**node, "hidden_size": 8}, TargetPolicy())
        with pytest.raises(BadInput, match="did you mean 'hidden_size'"):
            build({**node, "hidden_sze": 4}, TargetPolicy())

    def test_our_own_targets_can_be_read(self):
        for name in OWN_TARGETS:
            assert check_target(name, TargetPolicy()) is None and signature(name, TargetPolicy()) is not None, name


def test_activation_checkpointing_as_the_guide_writes_it(folder):
    for written, expected in (("true", "full"), ("false", "none"), ("selective", "selective")):
        text = MINIMAL + f"distributed:\n  activation_checkpointing: {written}\n"
        assert load(write(folder, text)).recipe.distributed.activation_checkpointing == expected


def test_the_guides_spellings_are_translated(folder):
    text = """\
        recipe: TrainFinetuneRecipeForNextTokenPrediction
        rng: {_target_: nemo_automodel.components.training.rng.StatefulRNG, seed: 7, ranked: true}
        dist_env: {backend: nccl, timeout_minutes: 1}
        model:
          _target_: nemo_AutoModel.components.models.gpt2.build_gpt2_model
          n_embd: 64
          n_head: 4
        dataset:
          _target_: nemo_automodel.components.datasets.llm.nanogpt_dataset.NanogptDataset
          file_pattern: data/dataset.bin
          seq_len: 128
        loss_fn: {_target_: nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy}
        dataloader:
          _target_: torchdata.stateful_dataloader.StatefulDataLoader
          batch_size: 8
          collate_fn: nemo_automodel.components.datasets.utils.default_collater
          shuffle: false
        optimizer:
          _target_: transformer_engine.pytorch.optimizers.fused_adam.FusedAdam
          lr: 1.0e-4
          master_weights: true
        distributed: {_target_: nemo_automodel.components.distributed.fsdp2.FSDP2Manager, dp_size: none, tp_size: 1}
        checkpoint: {model_save_format: safetensors, save_consolidated: true}
        """
    loaded = load(write(folder, text))
    recipe = loaded.recipe
    assert recipe.model["_target_"] == "amlaunch.trainer.models.gpt2.build_gpt2_model"
    assert recipe.dataset["_target_"] == "amlaunch.trainer.data.NanogptDataset"
    assert recipe.loss_fn["_target_"] == "amlaunch.trainer.loss.MaskedCrossEntropy"
    assert recipe.optimizer == {"_target_": "torch.optim.AdamW", "lr": 1e-4}
    assert (recipe.distributed.strategy, recipe.distributed.timeout_minutes, recipe.seed) == ("fsdp2", 1, 7)
    assert recipe.step_scheduler.local_batch_size == 8
    assert (recipe.checkpoint.model_save_format, recipe.checkpoint.save_consolidated) == ("safetensors", True)
    notes = "\n".join(loaded.notes)
    for line in (1, 2, 3, 5, 9, 12, 14, 15, 16, 17, 19, 21, 22):
        assert f"r.yaml:{line}: " in notes, line


def test_a_guide_name_without_counterpart_gets_alternatives(folder):
    message = problems(
        folder, MINIMAL + "loss_fn:\n  _target_: nemo_automodel.components.loss.te_parallel_ce.TEParallelCrossEntropy\n"
    )
    assert "r.yaml:9" in message and "amlaunch.trainer.loss.MaskedCrossEntropy" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500M", 500_000_000),
        ("1.5B", 1_500_000_000),
        ("2k", 2000),
        (7, 7),
        ("1e3", 1000),
        ("1_000", 1000),
        (1e6, 10**6),
        (3 * 10**18, 3 * 10**18),
    ],
)
def test_counts(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5", "1X", True, None, "0.0001K"])
def test_not_counts(text):
    with pytest.raises(ValueError, match="500M"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("04:00:00", 240),
        ("1-12:00:00", 2160),
        ("2-6", 3240),
        (90, 90),
        ("30:30", 31),
        ("00:00:01", 1),
        ("1-0:30", 1470),
        ("100:00:00", 6000),
        ("90:00", 90),
    ],
)
def test_times_are_slurms(text, value):
    assert parse_minutes(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "99:99",
        "1:60",
        "1:60:00",
        "1:00:60",
        "1-24",
        "1-1:60",
        "1-",
        "-1",
        "0",
        "0:00",
        "1:2:3:4",
        "",
        "1.5",
        "infinite",
        True,
        None,
        "٣",
        10**12,
    ],
)
def test_not_times(text):
    with pytest.raises(ValueError, match="04:00:00"):
        parse_minutes(text)


@pytest.mark.parametrize(("text", "value"), [("64G", "64G"), ("900m", "900M"), (4000, "4000"), (0, "0"), ("1T", "1T")])
def test_memory_is_slurms(text, value):
    assert parse_memory(text) == value


@pytest.mark.parametrize(
    "text", ["lots", 4, "15M", "999K", "4X", "64GB", "1.5G", "-1", "", "G", True, None, 1.5, "6 4G", "٣G"]
)
def test_not_memory(text):
    with pytest.raises(ValueError, match="64G"):
        parse_memory(text)


class TestLibrary:
    def test_every_shipped_recipe_loads(self):
        assert set(shipped_recipes()) >= {"quickstart", "nanogpt", "llama-350m", "llama-1.3b"}
        for path in shipped_recipes().values():
            assert load(path).recipe.name == path.stem and recipe_summary(path)

    @pytest.mark.parametrize("name", ["nanogpt", "nanogpt.yaml", "recipes/nanogpt.yaml"])
    def test_found_from_any_folder(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert find_recipe(name) == shipped_recipes()["nanogpt"]

    def test_a_users_file_wins(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "nanogpt.yaml").write_text("x: 1")
        assert find_recipe("nanogpt.yaml") == Path("nanogpt.yaml")

    def test_an_unknown_name_gets_the_nearest(self):
        with pytest.raises(BadInput, match="did you mean 'nanogpt'"):
            find_recipe("nanogtp")

    def test_a_folder_is_called_a_folder_and_is_no_suggestion(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for folder in ("pear.yaml", "data", "empty"):
            (tmp_path / folder).mkdir()
        (tmp_path / "data" / "tiny.yaml").write_text("x: 1")
        for name, message in {
            "data": "no recipe 'data': it is a folder. Name a YAML file, such as data/tiny.yaml",
            "empty": "no recipe 'empty': it is a folder. Name a YAML file",
            "pear.yaml": "no recipe 'pear.yaml': it is a folder. Name a YAML file",
        }.items():
            with pytest.raises(BadInput) as error:
                find_recipe(name)
            assert str(error.value) == message
        for name in ("pear", "pears"):
            with pytest.raises(BadInput) as error:
                find_recipe(name)
            assert "did you mean" not in str(error.value)


def test_reading_a_recipe_imports_nothing_heavy(root):
    code = (
        "import sys\n"
        "from amlaunch.recipes.format.loader import load\n"
        "from amlaunch.recipes.shipped import shipped_recipes\n"
        "[load(path) for path in shipped_recipes().values()]\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'tiktoken', 'submitit', 'rich'}\n"
        "heavy |= {'amlaunch.trainer', 'amlaunch.preprocess'}\n"
        "print(heavy & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
    )
    assert ast.literal_eval(found.stdout.replace("set()", "{}")) == {}


# --- several validation sets ------------------------------------------------------------------------------


def test_each_named_validation_set_is_checked(folder):
    text = (
        MINIMAL
        + "validation_dataset:\n  web: {file_pattern: w.bin, seq_len: 32}\n"
        + "  code: {file_pattern: c.bin, seq_len: 32, splt: val}\n"
    )
    message = problems(folder, text)
    assert "r.yaml:10: validation_dataset.code.splt: unknown key" in message and "did you mean 'split'" in message
    loaded = load(write(folder, text.replace("splt", "split")))
    sets = validation_sets(loaded.recipe.validation_dataset)
    assert list(sets) == ["web", "code"] and {node["_target_"] for node in sets.values()} == {
        "amlaunch.trainer.data.NanogptDataset"
    }
    assert [Path(current).name for current in loaded.data_paths("validation_dataset")] == ["w.bin", "c.bin"]
    assert "validation_dataset.web.seq_len: 65 exceeds" in problems(
        folder, text.replace("splt", "split"), "--validation_dataset.web.seq_len", "65"
    )


def test_a_mixture_is_a_single_validation_set(folder):
    single = load(
        write(folder, MINIMAL + "validation_dataset: {file_pattern: w.bin, seq_len: 32}\n")
    ).recipe.validation_dataset
    assert list(validation_sets(single)) == [""]
    mixed = load(
        write(folder, MINIMAL + "validation_dataset: {seq_len: 32, sources: {a: {file_pattern: w.bin}}}\n")
    ).recipe.validation_dataset
    assert (
        list(validation_sets(mixed)) == [""]
        and validation_sets(mixed)[""]["_target_"] == "amlaunch.trainer.data.MixedDataset"
    )
    assert validation_sets(None) == {}


def test_the_guides_validation_sections_are_read_by_their_names(folder):
    text = (
        MINIMAL
        + "validation_dataset:\n  file_pattern: v.bin\n  seq_len: 32\n"
        + "validation_dataset_code:\n  file_pattern: c.bin\n  seq_len: 99\n"
    )
    message = problems(folder, text)
    assert "r.yaml:13: validation_dataset.code.seq_len: 99 exceeds" in message
    loaded = load(write(folder, text.replace("99", "32")))
    assert list(validation_sets(loaded.recipe.validation_dataset)) == ["default", "code"]
    assert any("validation_dataset_code: read as validation_dataset.code" in note for note in loaded.notes)


def test_the_guides_dataloader_workers_are_kept(folder):
    recipe = load(
        write(
            folder,
            MINIMAL + "dataloader:\n  _target_: torchdata.stateful_dataloader.StatefulDataLoader\n  num_workers: 3\n",
        )
    ).recipe
    assert recipe.dataloader.num_workers == 3


# --- recipes as JSON, for processes without PyYAML --------------------------------------------------------


def test_the_same_recipe_as_json(folder):
    loaded = load(write(folder, MINIMAL), ["--optimizer.lr=1e-5", "--sweep.seed=[1, 2]", "--model.act=null"])
    path = folder / "recipe.json"
    path.write_text(json.dumps(loaded.tree))
    again = load(path)
    assert again.recipe == loaded.recipe and again.fingerprint() == loaded.fingerprint()
    assert load(path, ["--optimizer.betas=[0.8, 0.9]"]).recipe.optimizer["betas"] == [0.8, 0.9]
    with pytest.raises(BadInput, match=r"recipe.json: model.n_layr: unknown key"):
        path.write_text(json.dumps({**loaded.tree, "model": {**loaded.tree["model"], "n_layr": 1}}))
        load(path)
    path.write_text("{")
    with pytest.raises(BadInput, match=r"recipe.json: not valid JSON"):
        load(path)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "from amlaunch.trainer.process.arguments import parse; "
            "options = parse('amlaunch.trainer', '', ['recipe.json', '--optimizer.betas=[0.8, 0.9]', '--element=e']); "
            "print(options.loaded.recipe.optimizer['betas'], '0.9' in options.loaded.json_text())",
            "[0.8, 0.9] True",
        ),
        (
            "from amlaunch.preprocess.__main__ import main; "
            "main(['element', 'recipe.json', '--index', '0', '--out', 'shards', '--workers', '1', '--element', 'e'])",
            "element 0: ",
        ),
    ],
    ids=["trainer", "preprocess"],
)
def test_stages_read_their_recipe_without_pyyaml(tmp_path, root, code, expected):
    """In an image that lacks it; the override is a sweep point as the plan writes it."""
    (tmp_path / "text.txt").write_text("hello\n")
    overrides = [
        "--preprocess.data_files=text.txt",
        "--preprocess.exclude=[]",
        "--preprocess.tokenizer=byte",
        "--preprocess.elements=1",
    ]
    recipe = load(
        shipped_recipes()["quickstart"], [*overrides, "--preprocess.val_tokens=0", "--validation_dataset=null"]
    )
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.tree))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['yaml'] = None; {code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
    )
    assert expected in done.stdout, done.stderr
