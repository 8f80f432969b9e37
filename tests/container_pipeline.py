"""A recipe whose text and model record where they are made: in the tests' image, or in the environment that submits."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import container_image

FILES = {
    "inside.yaml": """\
name: inside
preprocess: {source: {_target_: "mine.py:documents"}, tokenizer: byte, max_tokens: 4K, val_tokens: 500}
model: {_target_: "mine.py:model", vocab_size: 257, n_positions: 32, n_embd: 16, n_layer: 1, n_head: 2}
dataset: {seq_len: 32}
optimizer: {lr: 1e-2}
step_scheduler: {global_batch_size: 4, local_batch_size: 2, max_steps: 2}
distributed: {strategy: ddp}
""",
    "mine.py": """\
import os

def where():
    return os.environ.get("FROM_IMAGE", "host")

def documents():
    for number in range(400):
        yield f"document {number} of the {where()}"

def model(**sizes):
    from amlaunch.trainer.models.gpt2 import build_gpt2_model

    print("made in the", where(), flush=True)
    return build_gpt2_model(**sizes)
""",
}


def squashed(image: Path, file: Path) -> Path:
    """The tests' image as a .sqsh with its record, as ``image import`` leaves them; without torch, to save time."""
    subprocess.run(
        ["mksquashfs", image / "rootfs", file, "-comp", "lz4", "-no-progress", "-e", "usr/local"],
        check=True,
        capture_output=True,
    )
    file.with_suffix(".json").write_text(
        json.dumps({"settings": {"Env": [f"{name}={value}" for name, value in container_image.ENV.items()]}})
    )
    return file


def made_in(run: Path) -> tuple[str, str]:
    """Where a run's text came from and where its model was trained: ``image`` or ``host``."""
    (shard,) = (run / "data").glob("*train*.bin")
    text = shard.read_bytes()[1024::2].decode(
        errors="replace"
    )  # two bytes a token, of which the first is the byte of the text
    log = (run / "stages" / "train" / "0" / "logs" / "attempt1.rank0.log").read_text()
    return re.findall(r"of the (image|host)", text)[-1], re.findall(r"made in the (\w+)", log)[-1]
