"""Causal attention as our models call it, in one place, so that it can be replaced.

Every attention module calls ``self.attend(q, k, v, documents=..., dropout_p=...)``.
That attribute is :func:`attend`, until context parallelism puts another in its
place that spreads the positions over ranks (:mod:`amlaunch.trainer.parallel.context_parallel`).

Shapes: B batch, H heads, K key-value heads (H is a multiple of it), T positions, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

FLEX_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Types that flex_attention's GPU kernels compute in."""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, documents: torch.Tensor | None = None, dropout_p: float = 0.0
) -> torch.Tensor:
    """``q (B, H, T, D)``, ``k`` and ``v (B, K, T, D)`` to ``(B, H, T, D)``; a position sees itself and those before it.

    ``documents (B, T)`` int32, the number of the document that a position lies
    in: then it sees those of its own document only. Torch picks the kernel; in
    compiled blocks on a GPU that is one which skips what no position may see.
    """
    grouped = q.shape[1] != k.shape[1]
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, enable_gqa=grouped)
    if torch.compiler.is_compiling() and q.is_cuda and q.dtype in FLEX_DTYPES and q.shape[-1] >= 16 and not dropout_p:
        return flex_attend(q, k, v, documents)
    mask = same_document_mask(documents).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, enable_gqa=grouped)


def same_document_mask(documents: torch.Tensor) -> torch.Tensor:
    """``(B, T)`` to ``(B, 1, T, T)``: whether query and key lie in one document."""
    return (documents[:, :, None] == documents[:, None, :]).unsqueeze(1)


def flex_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """:func:`attend` by documents, through flex_attention (Dong et al. 2024).

    The mask's shapes depend on T alone, so that other documents compile nothing
    again. Only forward on a CPU, and only compiled is it fast.
    """
    # Loads torch's compiler: a second that most runs need not wait.
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    mask = create_block_mask(sees, q.shape[0], None, q.shape[2], q.shape[2], device=q.device.type)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
