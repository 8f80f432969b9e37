"""Causal attention as our models call it, in one place, so that it can be replaced.

Every attention module calls ``self.attend(q, k, v, documents=..., dropout_p=...)``.
That attribute is :func:`attend`, until context parallelism puts another in its
place that spreads the positions over ranks (:mod:`trainer.context_parallel`).

Shapes: B batch, H heads, K key-value heads (H is a multiple of it), T positions, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, documents: torch.Tensor | None = None, dropout_p: float = 0.0
) -> torch.Tensor:
    """``q (B, H, T, D)``, ``k`` and ``v (B, K, T, D)`` to ``(B, H, T, D)``; a position sees itself and those before it.

    ``documents (B, T)`` int32, the number of the document that a position lies
    in: then it sees those of its own document only. Torch picks the kernel.
    """
    grouped = q.shape[1] != k.shape[1]
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, enable_gqa=grouped)
    mask = same_document(documents).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, enable_gqa=grouped)


def same_document(documents: torch.Tensor) -> torch.Tensor:
    """``(B, T)`` to ``(B, 1, T, T)``: whether query and key lie in one document."""
    return (documents[:, :, None] == documents[:, None, :]).unsqueeze(1)
