"""The whole path on one machine, with real processes: text to model, killed, stopped, repeated, resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from amlaunch.recipes.files import read_json_lines

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

TINY = """\
name: tiny
preprocess:
  data_files: "${TEXT}/**/*.txt"
  max_tokens: 24K
  val_tokens: 2K
  shard_tokens: 4K
  elements: 2
model:
  _target_: amlaunch.trainer.models.gpt2.build_gpt2_model
  vocab_size: 50304
  n_positions: 32
  n_embd: 16
  n_layer: 2
  n_head: 2
  dropout: 0.1
dataset: {seq_len: 32, shuffle_files: true}
validation_dataset: {seq_len: 32, split: val}
optimizer: {lr: 1e-2}
step_scheduler:
  global_batch_size: 8
  local_batch_size: 2
  max_steps: 40
  ckpt_every_steps: 5
  val_every_steps: 20
  val_batches: 2
resources:
  train: {tasks_per_node: 2, cpus: 2}
export: {prompt: "The", max_new_tokens: 8}
"""


def write_text(folder: Path) -> None:
    """Documents of real prose: docstrings of the standard library."""
    import pydoc_data.topics

    for i, text in enumerate(list(pydoc_data.topics.topics.values())[:60]):
        path = folder / f"{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class Place:
    """A folder with a recipe and its text, where amlaunch is run."""

    def __init__(self, folder: Path, text: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "tiny.yaml").write_text(TINY)
        self.env = {**os.environ, "TEXT": str(text), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}

    def start(self, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "amlaunch", "local", *(words or ["tiny.yaml"])]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str) -> str:
        process = self.start(*words)
        output = process.communicate(timeout=900)[0]
        assert process.returncode == 0, output
        return output

    def amlaunch(self, *words: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "amlaunch", *words],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    @property
    def run_dir(self) -> Path:
        (result,) = (self.folder / "runs").iterdir()
        return result

    def losses(self) -> list[tuple[int, str]]:
        lines = read_json_lines(self.run_dir / "stages" / "train" / "0" / "metrics.jsonl")
        return [(line["step"], line["loss"].hex()) for line in lines if "loss" in line]

    def shards(self) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes()
            for path in sorted((self.run_dir / "data").glob("*.*"))
            if path.suffix in (".bin", ".idx")
        }

    def weights(self) -> bytes:
        return (self.run_dir / "export" / "0" / "model.safetensors").read_bytes()

    def same_as(self, other: Place) -> None:
        assert self.shards() == other.shards()
        assert self.losses() == other.losses()
        assert self.weights() == other.weights()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text) -> Place:
    place = Place(tmp_path_factory.mktemp("undisturbed") / "here", text)
    place.output = place.run()
    return place


def test_one_command_goes_all_the_way(undisturbed):
    assert [step for step, _ in undisturbed.losses()] == list(range(1, 41))
    for words in (
        "24,000 tokens",
        "loss ",
        "validation ",
        "sample from the model",
        "\nfiles\n",
        "next steps",
    ):
        assert words in undisturbed.output, words
    first, last = (float.fromhex(undisturbed.losses()[i][1]) for i in (0, -1))
    assert 10.5 < first < 11.1 and last < first - 1.5, "from ln(vocabulary) downwards"


def test_the_same_command_again_skips_what_is_done(undisturbed):
    before = undisturbed.weights()
    began = time.monotonic()
    output = undisturbed.run()
    assert output.count("already done, skipped") == 4 and time.monotonic() - began < 5
    assert undisturbed.weights() == before


def test_the_export_loads_in_transformers(undisturbed):
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(undisturbed.run_dir / "export" / "0")
    assert model.config.vocab_size == 50257, "the padding is not exported"
    assert torch.isfinite(model(torch.arange(16)[None]).logits).all()


def test_status_and_logs_tell_what_happened(undisturbed):
    (shown,) = json.loads(undisturbed.amlaunch("status", "tiny", "--json"))
    assert shown["state"] == "done"
    assert [(stage["name"], len(stage["elements"])) for stage in shown["stages"]] == [
        ("preprocess", 2),
        ("verify", 1),
        ("train", 1),
        ("export", 1),
    ]
    train = shown["stages"][2]["elements"][0]
    assert train["progress"]["done"] == train["progress"]["total"] == 40 and train["result"]["tokens"] == 40 * 8 * 32
    assert "tiny-" in undisturbed.amlaunch("status") and "train" in undisturbed.amlaunch("status", "tiny")
    log = undisturbed.amlaunch("logs", "tiny", "--stage", "train", "--rank", "0")
    assert "[0:0] " in log and "40" in log


def test_a_checkpoint_is_exported_and_writes_text(undisturbed):
    before = (undisturbed.run_dir / "export" / "0" / "config.json").stat().st_mtime_ns
    undisturbed.amlaunch("export", "tiny", "--step", "35", "--out", str(undisturbed.folder / "at35"))
    assert (undisturbed.folder / "at35" / "model.safetensors").read_bytes() != undisturbed.weights()
    assert (undisturbed.run_dir / "export" / "0" / "config.json").stat().st_mtime_ns == before, (
        "the stage's own is left alone"
    )
    written = [
        undisturbed.amlaunch(
            "generate", "tiny", "--best", "--prompt", "The standard", "--max-new-tokens", "5", "--seed", "3"
        )
        for _ in range(2)
    ]
    assert written[0].startswith("The standard") and written[0] == written[1]
    file = undisturbed.folder / "file"
    file.touch()
    for words, message in (
        (["export", "tiny", "--step", "7"], "no checkpoint of step 7. Available steps: 40, 35"),
        (["export", "tiny", "--element", "1"], "--element 1: tiny-"),
        (
            ["export", "tiny", "--out", str(undisturbed.folder)],
            "holds other files, and an export would replace them. Choose another folder with --out",
        ),
        (["export", "tiny", "--out", f"{file}/x"], f"{file} cannot be created"),
        (["export", "tiny", "--out", f"{file}/x/y"], f"{file}/x cannot be created"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "amlaunch", *words],
            cwd=undisturbed.folder,
            env=undisturbed.env,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def test_kill_any_process_at_any_moment_then_the_same_command(undisturbed, tmp_path, text):
    """Four kills in a row, of any process of the tree, launcher included; then the run is finished, bit for bit."""
    chance = random.Random(1)
    place = Place(tmp_path / "here", text)
    killed = 0
    for _ in range(4):
        process = place.start()
        time.sleep(chance.uniform(0.3, 9.0))
        try:
            victim = chance.choice(descendants(process))
            victim.kill()
            killed += 1
        except psutil.NoSuchProcess:  # it was done already
            pass
        process.communicate(timeout=400)
    place.run()
    place.same_as(undisturbed)
    assert killed


def wait_for_step(place: Place, step: int, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while True:
        result = list((place.folder / "runs").glob("*/stages/train/0/metrics.jsonl"))
        if result and any(line.get("step", 0) >= step for line in read_json_lines(result[0])):
            return
        assert time.monotonic() < deadline, "training did not get there"
        time.sleep(0.02)


def test_a_second_launcher_is_refused_and_ctrl_c_saves_and_the_same_command_goes_on(undisturbed, tmp_path, text):
    place = Place(tmp_path / "here", text)
    process = place.start()
    deadline = time.monotonic() + 60
    while not list(place.folder.glob("*/*/stages/*/*/attempts.jsonl")):
        assert time.monotonic() < deadline, "it did not begin"
        time.sleep(0.02)
    second = place.start()
    output = second.communicate(timeout=240)[0]
    assert second.returncode == 2 and "already running in another amlaunch process" in output, output
    wait_for_step(place, 7)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 75 and "next: " in output, output
    (shown,) = json.loads(place.amlaunch("status", "tiny", "--json"))
    stopped = shown["stages"][2]["elements"][0]
    assert (shown["state"], stopped["state"]) == ("stopped", "stopped") and stopped["progress"]["done"] >= 7
    saved = max(int(path.name[5:]) for path in place.run_dir.glob("checkpoints/0/step-*"))
    assert saved == len(place.losses()), "every step that was made is saved"
    place.run()
    place.same_as(undisturbed)


def test_a_run_of_other_weights_shares_the_data(undisturbed):
    output = undisturbed.run(
        "tiny.yaml",
        "--name",
        "other",
        "--seed",
        "7",
        "--export",
        "null",
        "--step_scheduler.max_steps",
        "2",
        "--runs",
        str(undisturbed.folder / "more" / "runs"),
        "--preprocess.output_dir",
        str(undisturbed.run_dir / "data"),
    )
    assert "preprocess 0: done" in output


GUIDE = """\
model:
  _target_: nemo_AutoModel.components.models.gpt2.build_gpt2_model
  vocab_size: 50258
  n_positions: 2048
  n_embd: 768
  n_layer: 12
  n_head: 12
dataset:
  _target_: nemo_AutoModel.components.datasets.llm.nanogpt_dataset.NanogptDataset
  file_pattern: "tools/fineweb_max_tokens_500M/dataset.bin"
  seq_len: 1024
  shuffle_files: true
distributed:
  _target_: nemo_AutoModel.components.distributed.fsdp2.FSDP2Manager
  dp_size: none
  tp_size: 1
  cp_size: 1
"""


def test_the_guides_yaml_trains(tmp_path, text):
    """Its sections as printed, on a file in its own layout; only the size is cut so that two cores can do it."""
    place = Place(tmp_path / "here", text)
    (place.folder / "guide.yaml").write_text(GUIDE)
    header = np.zeros(256, dtype=np.int32)
    tokens = np.random.default_rng(0).integers(0, 50257, 5000).astype(np.uint16)
    header[:4] = [278895051, 1, len(tokens), 2]
    (place.folder / "dataset.bin").write_bytes(header.tobytes() + tokens.tobytes())
    assert "is read as amlaunch.trainer.models.gpt2.build_gpt2_model" in place.amlaunch("show", "guide.yaml")
    output = place.run(
        "guide.yaml", "--dataset.file_pattern", "dataset.bin",
        "--step_scheduler.max_steps", "3", "--step_scheduler.global_batch_size", "2",
        "--model.n_layer", "2", "--model.n_embd", "48", "--dataset.seq_len", "64",
    )  # fmt: skip
    assert "is done" in output and "loss 10.8" in output


MY_MODEL = """\
import torch
from my_parts import width

def build(vocab: int = 50304):
    return torch.nn.Sequential(torch.nn.Embedding(vocab, width), torch.nn.Linear(width, vocab))
"""


def test_a_users_own_model_from_a_file_beside_the_recipe(tmp_path, text):
    place = Place(tmp_path / "here", text)
    (place.folder / "my_model.py").write_text(MY_MODEL)
    (place.folder / "my_parts.py").write_text("width = 8\n")
    recipe = TINY.split("model:")[0] + "model: {_target_: 'my_model.py:build'}\ndataset: {seq_len: 16}\nexport: null\n"
    (place.folder / "mine.yaml").write_text(recipe + "step_scheduler: {max_steps: 3, global_batch_size: 4}\n")
    assert "is done" in place.run("mine.yaml")
