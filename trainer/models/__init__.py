"""What the trainer asks of a model, ours, the user's or Hugging Face's.

A model is an ``nn.Module`` whose ``forward(input_ids)`` takes ``(B, T)`` int64
and returns logits ``(B, T, V)``, or an object that has them as ``.logits``.
Everything else is optional:

``linear_loss``, ``labels``
    Arguments of ``forward`` by which it is given a loss that works on the last
    hidden states: then it returns ``linear_loss.from_hidden(hidden, weight, labels)``.
``wrap_blocks``
    Names of the ``nn.ModuleList`` whose items are sharded and compiled one by
    one. Without it: the longest list that lies in no other.
``context``
    The most positions it takes; sampling crops to it.
``flops_per_token(seq_len)``
    Forward and backward; without it :func:`flops_per_token` estimates.
``hf_export(tensors, vocab_size)``
    ``(config, tensors)`` of a Hugging Face folder; see :mod:`trainer.hf_folder`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of ``model``, in order; empty where it has no ``nn.ModuleList``."""
    names = getattr(model, "wrap_blocks", None)
    if names is not None:
        return [block for name in names for block in model.get_submodule(name).children()]
    return max((list(found) for found in _outer_lists(model)), key=len, default=[])


def _outer_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The module lists that lie in no other: the experts of a mixture are part of their block."""
    if isinstance(module, nn.ModuleList):
        return [module]
    return [found for child in module.children() for found in _outer_lists(child)]


def logits_of(output: Any) -> torch.Tensor:
    """The logits ``(B, T, V)`` in what a model's forward returned."""
    return output if isinstance(output, torch.Tensor) else output.logits


def parameter_count(model: nn.Module) -> int:
    """Numbers the model learns; a tied tensor counts once, a sharded one with its full size."""
    return sum(parameter.numel() for parameter in model.parameters())


def setting(model: nn.Module, *names: str) -> int | None:
    """The first of ``names`` that the model, or its Hugging Face config, states as a number."""
    for place in (model, getattr(model, "config", None)):
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int):
                return value
    return None


def vocab_rows(model: nn.Module) -> int | None:
    """One more than the largest token id that the model takes; None where it does not say."""
    return setting(model, "vocab_size")


def context_of(model: nn.Module) -> int | None:
    """The most positions that the model takes; None where it does not say."""
    return setting(model, "context", "max_position_embeddings", "n_positions")


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Floating-point operations a token, forward and backward: nanoGPT's ``6N + 12 L d T``.

    N leaves out embeddings that are only looked up. Attention counts as if it
    were not causal, as everybody's published MFU does (karpathy/nanoGPT#464,
    PaLM appendix B).
    """
    own = getattr(model, "flops_per_token", None)
    if own is not None:
        return float(own(seq_len))
    width = setting(model, "hidden_size", "n_embd") or 0
    return 6.0 * parameter_count(model) + 12.0 * len(blocks(model)) * width * seq_len
