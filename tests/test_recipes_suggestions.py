"""A key, an option or a recipe that other tools name differently is answered with ours."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from amlaunch.launcher.specs.cluster_profile import StageProfile
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format import schema
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.format.schema import Recipe
from amlaunch.recipes.shipped import find_recipe, shipped_recipes
from amlaunch.recipes.suggestions import ALIASES, CLUSTER_PROFILE_KEYS, KEY_OF_ALIAS, PROFILE_FIELDS, did_you_mean

SECTIONS = [field.name for field in fields(Recipe)]
MINIMAL = """\
model: {_target_: amlaunch.trainer.models.gpt2.build_gpt2_model}
dataset: {file_pattern: data/*.bin, seq_len: 32}
"""


def problem(folder: Path, text: str = "", *overrides: str) -> str:
    path = folder / "r.yaml"
    path.write_text(MINIMAL + text)
    with pytest.raises(BadInput) as caught:
        load(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("lr", "optimizer.lr"),
        ("learning_rate", "optimizer.lr"),
        ("batch_size", "step_scheduler.global_batch_size"),
        ("micro_batch_size", "step_scheduler.local_batch_size"),
        ("max_steps", "step_scheduler.max_steps"),
        ("epochs", "step_scheduler.num_epochs"),
        ("save_every", "step_scheduler.ckpt_every_steps"),
        ("eval_interval", "step_scheduler.val_every_steps"),
        ("gpus", "resources.train.gpus_per_node"),
        ("nodes", "resources.train.nodes"),
        ("time", "resources.train.time"),
        ("mem", "resources.train.mem"),
        ("cpus_per_task", "resources.train.cpus"),
        ("precision", "distributed.dtype"),
        ("bf16", "distributed.dtype"),
        ("fp16", "distributed.dtype"),
        ("gradient_checkpointing", "distributed.activation_checkpointing"),
        ("random_seed", "seed"),
        ("tokenizer", "preprocess.tokenizer"),
        ("data", "preprocess.data_files"),
        ("dataset_path", "preprocess.data_files"),
        ("block_size", "dataset.seq_len"),
        ("warmup_steps", "lr_scheduler.lr_warmup_steps"),
        ("grad_clip", "clip_grad_norm.max_norm"),
        ("resume_from_checkpoint", "checkpoint.restore_from"),
        ("wandb_project", "wandb.project"),
        ("image", "container.image"),
    ],
)
def test_a_top_level_key_that_other_tools_have(tmp_path, typed, key):
    expected = f"unknown key; did you mean {key!r}?"
    assert f"r.yaml:3: {typed}: {expected}" in problem(tmp_path, f"{typed}: 1\n")
    assert f"--{typed}=1: {typed}: {expected}" in problem(tmp_path, "", f"--{typed}", "1")
    assert did_you_mean(f"--{typed}", [f"--{section}" for section in SECTIONS]) == f"did you mean '--{key}'?"


@pytest.mark.parametrize(
    ("section", "typed", "key"),
    [
        ("resources: {train: {%s: 2}}", "cpus_per_task", "cpus"),
        ("resources: {train: {%s: 2}}", "ntasks_per_node", "tasks_per_node"),
        ("resources: {train: {%s: 2}}", "walltime", "time"),
        ("optimizer: {_target_: torch.optim.AdamW, %s: 2}", "learning_rate", "lr"),
        ("step_scheduler: {%s: 2}", "micro_batch_size", "local_batch_size"),
        ("step_scheduler: {%s: 2}", "save_steps", "ckpt_every_steps"),
        ("lr_scheduler: {%s: 2}", "warmup_iters", "lr_warmup_steps"),
        ("distributed: {%s: 2}", "tensor_parallel_size", "tp_size"),
        ("distributed: {%s: 2}", "bf16", "dtype"),
    ],
)
def test_a_key_inside_a_section_that_other_tools_have(tmp_path, section, typed, key):
    message = problem(tmp_path, section % typed + "\n")
    assert f".{typed}: unknown key" in message and f"did you mean {key!r}?" in message


@pytest.mark.parametrize("key", CLUSTER_PROFILE_KEYS)
def test_what_belongs_to_the_cluster_profile_is_sent_there(tmp_path, key):
    place = f"stages.train.{key if key in PROFILE_FIELDS else f'sbatch.{key}'} in clusters.yaml"
    assert place in did_you_mean(f"--{key}", [f"--{section}" for section in SECTIONS])
    for text in (f"{key}: gpu\n", f"resources: {{train: {{{key}: gpu}}}}\n"):
        message = problem(tmp_path, text)
        assert f"{key} belongs to the cluster profile" in message and place in message
    assert "stages.export." in problem(tmp_path, f"resources: {{export: {{{key}: gpu}}}}\n")


def test_the_table_names_real_keys_and_each_alias_once():
    assert len(KEY_OF_ALIAS) == sum(map(len, ALIASES.values())), "an alias means two keys"
    assert set(PROFILE_FIELDS) <= {field.name for field in fields(StageProfile)}
    by_section = {"resources": schema.StageResources, "preprocess": schema.Preprocess}
    for key in ALIASES:
        section, _, rest = key.partition(".")
        assert section in SECTIONS, key
        default = getattr(Recipe, section, None)
        cls = by_section.get(section) or (type(default) if hasattr(default, "__dataclass_fields__") else None)
        if rest and cls is not None:
            assert rest.rpartition(".")[2] in {field.name for field in fields(cls)}, key


@pytest.mark.parametrize("command", ["plot", "compare", "train", "tokenizer", "frobnicate"])
def test_unrelated_words_are_not_suggested(command):
    commands = ["bench", "clean", "data", "doctor", "export", "local", "logs", "preprocess", "recipes", "show", "wait"]
    assert did_you_mean(command, commands).startswith("valid names: ")


def test_another_case_and_a_slip_find_the_name():
    assert did_you_mean("WSD", ["wsd", "cosine"]) == "did you mean 'wsd'?"
    assert did_you_mean("tarin", ["train", "val"]) == "did you mean 'train'?"
    assert did_you_mean("x", []) == "no names are valid here"
    assert did_you_mean("x", map(str, range(20))).endswith(", …")


@pytest.mark.parametrize("typed", ["tiny", "tiny.yml", "tiny.yaml", "./tiny"])
def test_a_recipe_is_found_with_another_ending_or_none(tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(MINIMAL)
    (tmp_path / "tiny").mkdir()
    assert find_recipe(typed).samefile("tiny.yaml")


def test_a_recipe_beside_is_suggested_and_a_shipped_name_stays_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(MINIMAL)
    (tmp_path / "nanogpt.yml").write_text(MINIMAL)
    with pytest.raises(BadInput, match=r"no recipe 'tinny': .*did you mean 'tiny'\?"):
        find_recipe("tinny")
    assert find_recipe("nanogpt") == shipped_recipes()["nanogpt"]
    assert find_recipe("nanogpt.yml") == Path("nanogpt.yml")


def test_a_number_in_quotes_gets_its_fix(tmp_path):
    message = problem(
        tmp_path, "seed: '2'\nstep_scheduler: {max_steps: '10', val_batches: many}\n", "--model.n_head='4'"
    )
    assert 'seed: expected an integer of at least 0, got the string "2"; remove the quotes' in message
    assert 'max_steps: expected an integer of at least 1, got the string "10"; remove the quotes' in message
    assert "val_batches: expected an integer of at least 1, got 'many'" in message
    assert "checkpoint.enabled: expected true or false, got 'yes'" in problem(tmp_path, "checkpoint: {enabled: yes}\n")
