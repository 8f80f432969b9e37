"""Context parallelism: each rank computes a part of the positions, attention sees all of them.

Ulysses (Jacobs et al. 2023): before attention the ranks exchange positions for
heads, so that each has all positions of a few heads and runs the very same
kernel as one rank would, then they exchange back. Where the heads do not
divide, keys and values of all ranks are gathered, and each rank attends from
its own positions: as many bytes as a ring sends, without a ring's sums of
partial softmaxes, which torch has no public kernel for.

A rank's part is one piece from the front of the sequence and its mirror image
from the back, where the length allows it: with causal attention all ranks then
have as much to do when keys are gathered. Ulysses does not mind.

Shapes: n ranks; B batch, H heads, K key-value heads, T positions, t of them a rank's own, D head width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from amlaunch.recipes.errors import BadInput
from amlaunch.trainer.models.attention import attend
from amlaunch.trainer.parallel.collectives import Group, exchange, stack

HF_NAME = "amlaunch_context_parallel"


# --- which positions are whose ------------------------------------------------------------------------


def position_slices(length: int, ranks: int) -> list[list[slice]]:
    """For each rank its pieces of ``length`` positions: two where that is divisible by ``2 * ranks``, else one."""
    mirrored = length % (2 * ranks) == 0
    size = length // (2 * ranks) if mirrored else length // ranks
    starts = [[rank, 2 * ranks - 1 - rank] if mirrored else [rank] for rank in range(ranks)]
    return [[slice(start * size, (start + 1) * size) for start in mine] for mine in starts]


def local_positions(x: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    """The part of ``x`` along ``dim``, all positions, that is ``rank``'s."""
    return torch.cat([x.movedim(dim, 0)[piece] for piece in position_slices(x.shape[dim], ranks)[rank]]).movedim(0, dim)


def split_positions(x: torch.Tensor, dim: int, ranks: int) -> torch.Tensor:
    """All positions along ``dim`` to ``(n, ..., t, ...)``, the part of each rank."""
    return torch.stack([local_positions(x, dim, rank, ranks) for rank in range(ranks)])


def merge_positions(parts: torch.Tensor, dim: int) -> torch.Tensor:
    """``parts (n, ...)`` of all ranks, with t positions along ``dim`` of each, as one tensor in the order of positions."""
    ranks, t = parts.shape[0], parts.shape[dim + 1]
    size = position_slices(ranks * t, ranks)[0][0].stop
    found = [
        (piece.start, parts[rank].narrow(dim, i * size, size))
        for rank, mine in enumerate(position_slices(ranks * t, ranks))
        for i, piece in enumerate(mine)
    ]
    return torch.cat([tensor for _, tensor in sorted(found, key=lambda pair: pair[0])], dim)


# --- attention ----------------------------------------------------------------------------------------


def context_parallel_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    documents: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    group: Group,
) -> torch.Tensor:
    """:func:`amlaunch.trainer.models.attention.attend` where each rank of ``group`` has t of the positions; exact, gradients too."""
    if documents is not None:
        documents = merge_positions(stack(documents, group), 1)
    way = _exchanging if q.shape[1] % group.size() == 0 else _gathering
    return way(q, k, v, documents, dropout_p, group)


def _exchanging(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None, dropout_p: float, group: Group
) -> torch.Tensor:
    """Positions for heads, and back; key-value heads that are too few are repeated first."""
    repeats = math.lcm(k.shape[1], group.size()) // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k, v))
    q, k, v = (merge_positions(exchange(_by_heads(x, group), group), 2) for x in (q, k, v))
    y = attend(q, k, v, documents=documents, dropout_p=dropout_p)
    return exchange(split_positions(y, 2, group.size()), group).movedim(0, 1).flatten(1, 2)


def _by_heads(x: torch.Tensor, group: Group) -> torch.Tensor:
    """``(B, H, t, D)`` to ``(n, B, H / n, t, D)``."""
    return x.unflatten(1, (group.size(), -1)).movedim(1, 0)


def _gathering(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None, dropout_p: float, group: Group
) -> torch.Tensor:
    """Own positions against all keys up to them, piece by piece."""
    mine = position_slices(q.shape[2] * group.size(), group.size())[group.rank()]
    k, v = (merge_positions(stack(x, group), 2) for x in (k, v))
    found = []
    for piece, queries in zip(mine, q.chunk(len(mine), 2), strict=True):
        mask = _sees(piece, documents, q.device)
        keys, values = k[:, :, : piece.stop], v[:, :, : piece.stop]
        grouped = q.shape[1] != k.shape[1]
        found.append(
            F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, dropout_p=dropout_p, enable_gqa=grouped
            )
        )
    return torch.cat(found, 2)


def _sees(piece: slice, documents: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Which keys, from the first to the last of ``piece``, its queries see: ``(queries, keys)``, of each sequence its own with documents."""
    causal = torch.ones(piece.stop - piece.start, piece.stop, dtype=torch.bool, device=device).tril(piece.start)
    if documents is None:
        return causal
    same = documents[:, piece, None] == documents[:, None, : piece.stop]
    return (same & causal).unsqueeze(1)


# --- models -------------------------------------------------------------------------------------------


def apply_context_parallel(model: nn.Module, group: Group) -> None:
    """Have ``model``'s attention go over the ranks of ``group``. Raises BadInput where it cannot be replaced."""
    over_ranks = partial(context_parallel_attend, group=group)
    modules = [module for module in model.modules() if getattr(module, "attend", None) is attend]
    for module in modules:
        module.attend = over_ranks  # type: ignore[assignment]
    if not modules and hasattr(model, "set_attn_implementation"):
        _spread_hf(model, over_ranks)
    elif not modules:
        raise BadInput(
            f"distributed.cp_size: {type(model).__name__} has no attention that can go over ranks; its attention modules would call "
            "self.attend, which is amlaunch.trainer.models.attention.attend, or write cp_size: 1"
        )


def _spread_hf(model: Any, over_ranks: Any) -> None:
    from transformers import AttentionInterface

    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise BadInput(
            f"distributed.cp_size: {type(model).__name__} has layers of {', '.join(sorted(kinds))}; only full causal attention can go over ranks"
        )
    AttentionInterface.register(HF_NAME, partial(_hf_attention, over_ranks=over_ranks))
    model.set_attn_implementation(HF_NAME)  # one that transformers does not know: it makes no mask for it
    if model.config._attn_implementation != HF_NAME:
        raise BadInput(
            f"distributed.cp_size: transformers cannot replace the attention of {type(model).__name__}; write cp_size: 1"
        )


def _hf_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    over_ranks: Any,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: ``(B, H, T, D)`` in, ``(B, T, H, D)`` out."""
    if (
        attention_mask is not None
        or more.get("softcap")
        or more.get("sliding_window")
        or not getattr(module, "is_causal", True)
    ):
        raise BadInput(f"distributed.cp_size: {type(module).__name__} is more than causal attention; write cp_size: 1")
    usual = query.shape[-1] ** -0.5
    if scaling is not None and scaling != usual:
        query = query * (scaling / usual)
    return over_ranks(query, key, value, dropout_p=dropout).transpose(1, 2), None
