"""Activation checkpointing: memory for compute. What a block's backward needs is computed again instead of kept.

``full`` keeps a block's inputs alone. ``selective`` keeps what is dear to
compute, products of matrices and attention, and computes the rest again:
norms, activation functions, rotations.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from amlaunch.trainer.models.base import blocks

SAVED_OPERATORS = ("mm", "addmm", "bmm", "_scaled_mm")
"""Operators of aten that ``selective`` keeps the outputs of, besides attention."""
ATTENTION = "_scaled_dot_product"
RECOMPUTED_MARKER = "_computed_again"
"""What classes of blocks have whose forward is computed again."""


def checkpoint_activations(model: nn.Module, kind: str) -> None:
    """Have each block of ``model`` computed again in the backward, as ``kind`` says: none, full, selective."""
    if kind == "none":
        return
    for block in blocks(model):
        if "forward" in vars(block):  # one of its own, which hides that of any class
            block.forward = partial(checkpoint, block.forward, **_options(kind))
        else:
            base: Any = type(block)
            block.__class__ = recomputing_class(base, kind)


@cache
def recomputing_class(base: type[nn.Module], kind: str) -> type[nn.Module]:
    """A class of blocks like ``base``, whose forward is computed again in the backward.

    One for all blocks of a model, and no ``checkpoint`` set as a block's ``forward``:
    dynamo compiles code, which blocks of one class share, and skips frames of torch's own.
    """
    options = _options(kind)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(base.forward, self, *args, **options, **kwargs)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), {**names, "forward": forward, RECOMPUTED_MARKER: True})


def keep_recomputed_blocks_eager(model: nn.Module) -> None:
    """Leave blocks that are computed again out of ``torch.compile``, where that was asked for."""
    if any(part._compiled_call_impl is not None for part in (model, *blocks(model))):
        for block in blocks(model):
            if hasattr(type(block), RECOMPUTED_MARKER):
                block.forward = torch.compiler.disable(block.forward)


def _options(kind: str) -> dict[str, Any]:
    extra = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if kind == "selective" else {}
    return {"use_reentrant": False, **extra}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator._opname if isinstance(operator, torch._ops.OpOverload) else ""
    keep = name in SAVED_OPERATORS or name.startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
