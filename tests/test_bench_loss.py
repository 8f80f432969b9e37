"""The chunked loss: exact in float64 with masks, padding and any chunk size, and as part of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from amlaunch.recipes.errors import OK, BadInput
from amlaunch.trainer.loss import LinearCrossEntropy, MaskedCrossEntropy, compute_loss
from amlaunch.trainer.models.gpt2 import build_gpt2_model
from amlaunch.trainer.models.llama import build_llama_model
from amlaunch.trainer.torch_features import has_linear_cross_entropy
from tests.trainer_runs import Run, recipe

TIGHT = 1e-12


def reference(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocab: int) -> list[torch.Tensor]:
    """Return loss and gradients of torch's cross entropy over the rows of ``weight`` that are tokens."""
    loss = F.cross_entropy(F.linear(hidden, weight[:vocab]).flatten(0, 1), labels.flatten(), reduction="sum")
    return [loss, *torch.autograd.grad(3.0 * loss, (hidden, weight))]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 30),
    st.integers(0, 5),
    st.integers(1, 25),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_chunks_padding_and_masks_change_nothing(
    batch: int, length: int, vocab: int, padding: int, chunk: int, masked: float, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(batch, length, 6, dtype=torch.float64, requires_grad=True)
    weight = (3 * torch.randn(vocab + padding, 6, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, vocab, (batch, length)).masked_fill(torch.rand(batch, length) < masked, -100)
    loss = LinearCrossEntropy(vocab_size=vocab, chunk_tokens=chunk).from_hidden(hidden, weight, labels)
    results = [loss, *torch.autograd.grad(3.0 * loss, (hidden, weight))]
    for ours, expected in zip(results, reference(hidden, weight, labels, vocab), strict=True):
        torch.testing.assert_close(ours, expected, rtol=TIGHT, atol=TIGHT)
    from_logits = MaskedCrossEntropy(vocab_size=vocab)(F.linear(hidden, weight), labels)
    torch.testing.assert_close(from_logits, loss, rtol=TIGHT, atol=TIGHT)


@pytest.mark.torch_range
def test_torchs_own_gives_the_same_where_this_torch_has_it() -> None:
    if not has_linear_cross_entropy():
        with pytest.raises(BadInput, match=r"needs torch 2\.13 or newer, but this is torch .*; use chunked"):
            LinearCrossEntropy(implementation="torch")
        return
    hidden = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, -100, 2, 10, 0], [-100, 3, 3, 4, -100]])
    loss = LinearCrossEntropy(implementation="torch").from_hidden(hidden, weight, labels)
    for ours, expected in zip(
        [loss, *torch.autograd.grad(3.0 * loss, (hidden, weight))], reference(hidden, weight, labels, 11), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=TIGHT, atol=TIGHT)


@pytest.mark.torch_range
def test_torchs_own_adds_up_in_float32() -> None:
    """Fails if torch computes the sum, which in bfloat16 loses complete chunks."""
    if not has_linear_cross_entropy():
        return  # refused, as the test above shows
    torch.manual_seed(0)
    hidden, weight, labels = (
        torch.randn(1, 4096, 16).bfloat16(),
        torch.randn(500, 16).bfloat16(),
        torch.randint(0, 500, (1, 4096)),
    )
    exact = F.cross_entropy((hidden.double() @ weight.double().t()).flatten(0, 1), labels.flatten(), reduction="sum")
    loss = LinearCrossEntropy(implementation="torch").from_hidden(
        hidden.requires_grad_(), weight.requires_grad_(), labels
    )
    assert loss.dtype is torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-3)


def test_in_half_precision_its_gradients_are_as_near_to_the_truth_as_plain_ones() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(1, 512, 64), 0.3 * torch.randn(384, 64), torch.randint(0, 370, (1, 512))
    exact = reference(hidden.double().requires_grad_(), weight.double().requires_grad_(), labels, 370)
    half = [hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()]
    loss = LinearCrossEntropy(vocab_size=370, chunk_tokens=100).from_hidden(*half, labels)
    assert loss.dtype is torch.float32
    ours = [loss, *torch.autograd.grad(3.0 * loss, half)]
    plain = reference(*half, labels, 370)
    for our_value, plain_value, truth in zip(ours, plain, exact, strict=True):
        errors = [((value.double() - truth).norm() / truth.norm()).item() for value in (our_value, plain_value)]
        assert errors[0] < 1e-2 and errors[0] < 1.25 * errors[1] + 1e-4


def test_gradients_are_there_only_where_they_are_wanted_and_once() -> None:
    hidden, weight, labels = (
        torch.randn(1, 4, 3),
        torch.randn(5, 3, requires_grad=True),
        torch.zeros(1, 4, dtype=torch.int64),
    )
    loss = LinearCrossEntropy().from_hidden(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
    with torch.no_grad():
        assert LinearCrossEntropy().from_hidden(hidden, weight, labels).item() == pytest.approx(loss.item())


@pytest.mark.parametrize("build", [build_gpt2_model, build_llama_model], ids=["gpt2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_models_loss_and_gradients_are_those_of_its_logits(build: Any, tied: bool) -> None:
    sizes: dict[str, int] = {"n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    if build is build_llama_model:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes["tie_word_embeddings"] = tied
    model = build(vocab_size=50, **sizes).double()
    inputs, labels = torch.randint(0, 50, (2, 8)), torch.randint(0, 50, (2, 8))
    results = []
    for loss_fn in (LinearCrossEntropy(chunk_tokens=5), MaskedCrossEntropy()):
        loss = compute_loss(model, model, loss_fn, inputs, labels)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=TIGHT, atol=TIGHT)


def test_settings_that_cannot_work_are_refused() -> None:
    for keywords, message in (({"implementation": "liger"}, "chunked, torch"), ({"chunk_tokens": 0}, "at least 1")):
        with pytest.raises(BadInput, match=message):
            LinearCrossEntropy(**keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["none", "ddp", "fsdp2"])
@pytest.mark.slow
def test_training_with_it_is_the_same(tmp_path: Path, strategy: str) -> None:
    sections: dict[str, Any] = {
        "distributed": {"strategy": strategy},
        "step_scheduler": {"max_steps": 4, "val_every_steps": 2},
    }
    losses = []
    for name, loss_fn in (("logits", "MaskedCrossEntropy"), ("hidden", "LinearCrossEntropy")):
        run = Run(
            tmp_path / name, recipe(tmp_path, loss_fn={"_target_": f"amlaunch.trainer.loss.{loss_fn}"}, **sections)
        )
        assert run.train_inline("--export", "null") == OK
        losses.append([run.column(column) for column in ("loss", "grad_norm", "val_loss")])
    for ours, expected in zip(*losses, strict=True):
        assert np.abs(np.array(ours) / expected - 1).max() < TIGHT
