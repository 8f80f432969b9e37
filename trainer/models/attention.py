"""Causal attention of our models, behind one attribute so that it can be replaced.

Every attention module calls ``self.attend(q, k, v, documents=..., dropout_p=...)``. That attribute is :func:`attend`
unless context parallelism replaces it by one that spreads the positions over ranks
(:mod:`amlaunch.trainer.parallel.context_parallel`).

Shapes: B batch, H heads, K key-value heads (K divides H), T positions, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from amlaunch.trainer.torch_features import compiles_document_masks

FLEX_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Types that flex_attention's GPU kernels support."""
FLEX_MIN_HEAD_WIDTH = 16
"""Smallest head width that flex_attention's GPU kernels support."""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, documents: torch.Tensor | None = None, dropout_p: float = 0.0
) -> torch.Tensor:
    """Attend causally: ``q (B, H, T, D)``, ``k`` and ``v (B, K, T, D)`` to ``(B, H, T, D)``.

    ``documents (B, T)`` int32 numbers the document of each position and restricts attention to positions of the same
    document. Torch selects the kernel; compiled blocks on a GPU use flex_attention for documents, which skips masked
    blocks.
    """
    grouped = q.shape[1] != k.shape[1]
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, enable_gqa=grouped)
    if torch.compiler.is_compiling() and q.is_cuda and flex_supports(q.dtype, q.shape[-1], dropout_p):
        return flex_attend(q, k, v, documents)
    mask = same_document_mask(documents).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, enable_gqa=grouped)


def flex_supports(dtype: torch.dtype, head_width: int, dropout_p: float) -> bool:
    """Return True if this torch compiles flex_attention, and its GPU kernels support type, head width and dropout."""
    is_supported = dtype in FLEX_DTYPES and head_width >= FLEX_MIN_HEAD_WIDTH and not dropout_p
    return is_supported and compiles_document_masks()


def same_document_mask(documents: torch.Tensor) -> torch.Tensor:
    """Return a mask ``(B, 1, T, T)``, true where query and key are in the same document of ``documents (B, T)``."""
    return (documents[:, :, None] == documents[:, None, :]).unsqueeze(1)


def flex_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Attend within documents through flex_attention (Dong et al. 2024).

    The mask's shapes depend on T alone, so other documents cause no recompilation. On a CPU only the forward pass
    works, and it is fast only if compiled.
    """
    # Loads torch's compiler, a second that most runs can save.
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    mask = create_block_mask(sees, q.shape[0], None, q.shape[2], q.shape[2], device=q.device.type)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
