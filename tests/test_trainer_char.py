"""Compare recipes/char.yaml with a hand-written training loop: the same losses at every step."""

from __future__ import annotations

import math
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from test_trainer_runs import TIGHT, on_cpu
from trainer_runs import Run

from amlaunch.preprocess.shards.shard_format import HEADER_BYTES, write_shard
from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer
from amlaunch.recipes.errors import OK
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.shipped import find_recipe
from amlaunch.trainer.data.sample_order import permute
from amlaunch.trainer.models.gpt2 import build_gpt2_model

__all__ = ["on_cpu"]  # an autouse fixture
STEPS = 50
BLOCK, BATCH, SEED = 64, 12, 1337


def real_text(path: Path) -> int:
    """Write a character-level ``.bin`` of Python's own sources like the recipe; return its number of tokens."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    tokenizer = load_tokenizer(f"char:{stdlib}/pydoc_data/topics.py")
    text = "".join((stdlib / name).read_text() for name in ("argparse.py", "ast.py", "typing.py"))
    tokens = np.asarray(tokenizer.encode(text)).astype("<u2")
    write_shard(path, [tokens], np.dtype("<u2"))
    assert tokenizer.n_vocab <= 128
    return len(tokens)


def by_hand(path: Path, tokens: int) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step of nanoGPT's loop, with its learning rates and AdamW, in float64."""
    data = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
    windows = (tokens - 1) // BLOCK
    order = permute(np.arange(windows), windows, SEED, 0)
    torch.manual_seed(SEED)
    model = build_gpt2_model(
        vocab_size=128, n_positions=BLOCK, n_embd=128, n_layer=4, n_head=4, activation="gelu"
    ).double()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    losses_and_norms = []
    for iteration in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = nanogpt_rate(iteration)
        places = order[iteration * BATCH : (iteration + 1) * BATCH] * BLOCK
        x = torch.stack([torch.from_numpy(data[i : i + BLOCK].astype(np.int64)) for i in places])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in places])
        loss = F.cross_entropy(model(x).view(-1, 128), y.view(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses_and_norms.append((loss.item(), norm.item()))
    return losses_and_norms


def nanogpt_rate(iteration: int) -> float:
    """Return the learning rate of nanoGPT's train.py, with 100 iterations of warmup and 2000 of decay."""
    if iteration < 100:
        return 1e-3 * (iteration + 1) / 101
    ratio = (iteration - 100) / (2000 - 100)
    return 1e-4 + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (1e-3 - 1e-4)


@pytest.mark.slow
def test_the_first_steps_equal_a_plain_loop(tmp_path: Path) -> None:
    tokens = real_text(tmp_path / "text.bin")
    assert tokens > STEPS * BATCH * BLOCK, "one epoch is enough"
    recipe = find_recipe("char")
    run = Run(tmp_path / "run", yaml.safe_load(recipe.read_text()))
    shutil.copy(recipe, run.folder / "recipe.yaml")
    overrides = {
        "distributed.dtype": "float64",
        "dataset.file_pattern": str(tmp_path / "text.bin"),
        "validation_dataset": "null",
    }
    arguments = [argument for key, value in overrides.items() for argument in (f"--{key}", value)]
    assert run.train_inline("--step_scheduler.max_steps", str(STEPS), *arguments) == OK
    expected = by_hand(tmp_path / "text.bin", tokens)
    assert np.allclose(run.column("loss"), [loss for loss, _ in expected], rtol=TIGHT, atol=0)
    assert np.allclose(run.column("grad_norm"), [norm for _, norm in expected], rtol=TIGHT, atol=0)
    assert run.column("loss")[-1] < 3.2 < run.column("loss")[0], "it learns"


def test_the_recipe_has_nanogpts_learning_rates() -> None:
    from amlaunch.trainer.optim.optimizers import LearningRateSchedule

    recipe = load(find_recipe("char")).recipe
    schedule = LearningRateSchedule(recipe.lr_scheduler, recipe.optimizer["lr"], recipe.step_scheduler.max_steps or 0)
    assert np.allclose(
        [schedule.rate(step + 1) for step in range(2000)],
        [nanogpt_rate(step) for step in range(2000)],
        rtol=1e-13,
        atol=0,
    )
