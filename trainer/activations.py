"""Activation checkpointing: memory for compute. What a block's backward needs is computed again instead of kept.

``full`` keeps a block's inputs alone. ``selective`` keeps what is dear to
compute, products of matrices and attention, and computes the rest again:
norms, activation functions, rotations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.models import blocks

KEPT = ("mm", "addmm", "bmm", "_scaled_mm")
"""Operators of aten that ``selective`` keeps the outputs of, besides attention."""
ATTENTION = "_scaled_dot_product"


def checkpoint_activations(model: nn.Module, kind: str) -> None:
    """Have each block of ``model`` computed again in the backward, as ``kind`` says: none, full, selective."""
    if kind == "none":
        return
    extra: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if kind == "selective" else {}
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **extra)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator._opname if isinstance(operator, torch._ops.OpOverload) else ""
    keep = name in KEPT or name.startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
