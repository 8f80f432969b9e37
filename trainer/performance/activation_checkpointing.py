"""Activation checkpointing trades compute for memory: the backward pass recomputes a block's activations.

``full`` keeps only the inputs of each block. ``selective`` keeps the results of expensive operators, matrix products
and attention, and recomputes the rest: norms, activation functions, rotations.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from amlaunch.trainer.models.base import blocks

SAVED_OPERATORS = ("mm", "addmm", "bmm", "_scaled_mm")
"""Operators of aten whose outputs ``selective`` keeps, besides attention."""
ATTENTION_PREFIX = "_scaled_dot_product"
RECOMPUTED_MARKER = "_is_recomputed"
"""Attribute of block classes whose forward is recomputed."""


def checkpoint_activations(model: nn.Module, kind: str) -> None:
    """Make the backward pass recompute each block of ``model``; ``kind`` is none, full or selective."""
    if kind == "none":
        return
    for block in blocks(model):
        # An instance attribute, which hides any class's forward.
        if "forward" in vars(block):
            block.forward = partial(checkpoint, block.forward, **_checkpoint_options(kind))
        else:
            base: Any = type(block)
            block.__class__ = recomputing_class(base, kind)


@cache
def recomputing_class(base: type[nn.Module], kind: str) -> type[nn.Module]:
    """Derive a class from ``base`` whose forward is recomputed in the backward pass.

    All blocks of a model share one class, and no block has ``checkpoint`` as its ``forward``: dynamo compiles code,
    which blocks of one class share, and skips torch's own frames.
    """
    options = _checkpoint_options(kind)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(base.forward, self, *args, **options, **kwargs)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), {**names, "forward": forward, RECOMPUTED_MARKER: True})


def keep_recomputed_blocks_eager(model: nn.Module) -> None:
    """Exclude recomputed blocks from ``torch.compile`` if the model or its blocks are compiled."""
    if all(module._compiled_call_impl is None for module in (model, *blocks(model))):
        return
    for block in blocks(model):
        if hasattr(type(block), RECOMPUTED_MARKER):
            block.forward = torch.compiler.disable(block.forward)


def _checkpoint_options(kind: str) -> dict[str, Any]:
    if kind == "selective":
        context_fn = partial(create_selective_checkpoint_contexts, _selective_policy)
        return {"use_reentrant": False, "context_fn": context_fn}
    return {"use_reentrant": False}


def _selective_policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator._opname if isinstance(operator, torch._ops.OpOverload) else ""
    is_expensive = name in SAVED_OPERATORS or name.startswith(ATTENTION_PREFIX)
    return CheckpointPolicy.MUST_SAVE if is_expensive else CheckpointPolicy.PREFER_RECOMPUTE
