"""Context parallelism: each rank computes a share of the positions, and attention sees all of them.

Ulysses (Jacobs et al. 2023): before attention the ranks exchange positions for heads, so that each has all positions of
a few heads and runs the same kernel as a single rank would; then they exchange back. If the heads do not divide, each
rank gathers all keys and values and attends from its own positions: that sends as many bytes as a ring, without a
ring's sums of partial softmaxes, for which torch has no public kernel.

If the length allows it, a rank's share is one slice from the front of the sequence and its mirror image from the back:
with causal attention and gathered keys, all ranks then have equal work. Ulysses works with any share.

Shapes: n ranks; B batch, H heads, K key-value heads, T positions, t local positions of a rank, D head width.
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
from amlaunch.trainer.parallel.collectives import Group, all_gather_stacked, all_to_all

HF_ATTENTION_NAME = "amlaunch_context_parallel"


# --- positions of each rank -------------------------------------------------------------------------


def position_slices(length: int, ranks: int) -> list[list[slice]]:
    """Return the slices of ``length`` positions for each rank: two if ``2 * ranks`` divides it, else one."""
    mirrored = length % (2 * ranks) == 0
    size = length // (2 * ranks) if mirrored else length // ranks
    indices = [[rank, 2 * ranks - 1 - rank] if mirrored else [rank] for rank in range(ranks)]
    return [[slice(index * size, (index + 1) * size) for index in rank_indices] for rank_indices in indices]


def local_positions(x: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    """Return the share of ``rank`` in ``x``, which has all positions along ``dim``."""
    slices = position_slices(x.shape[dim], ranks)[rank]
    return torch.cat([x.movedim(dim, 0)[positions] for positions in slices]).movedim(0, dim)


def split_positions(x: torch.Tensor, dim: int, ranks: int) -> torch.Tensor:
    """Split all positions along ``dim`` into ``(n, ..., t, ...)``, the share of each rank."""
    return torch.stack([local_positions(x, dim, rank, ranks) for rank in range(ranks)])


def merge_positions(shares: torch.Tensor, dim: int) -> torch.Tensor:
    """Merge ``shares (n, ...)`` of all ranks, each with t positions along ``dim``, into the order of positions."""
    ranks, t = shares.shape[0], shares.shape[dim + 1]
    slices = position_slices(ranks * t, ranks)
    size = slices[0][0].stop

    by_start: dict[int, torch.Tensor] = {}
    for rank, rank_slices in enumerate(slices):
        for i, positions in enumerate(rank_slices):
            by_start[positions.start] = shares[rank].narrow(dim, i * size, size)
    return torch.cat([by_start[start] for start in sorted(by_start)], dim)


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
    """Compute :func:`amlaunch.trainer.models.attention.attend` over the ranks of ``group``, each with t positions.

    Outputs and gradients are exact.
    """
    if documents is not None:
        documents = merge_positions(all_gather_stacked(documents, group), 1)
    attention = _ulysses if q.shape[1] % group.size() == 0 else _gathered_keys
    return attention(q, k, v, documents, dropout_p, group)


def _ulysses(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None, dropout_p: float, group: Group
) -> torch.Tensor:
    """Exchange positions for heads, attend, and exchange back; repeat key-value heads if they are too few."""
    repeats = math.lcm(k.shape[1], group.size()) // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k, v))
    q, k, v = (merge_positions(all_to_all(_split_heads(x, group), group), 2) for x in (q, k, v))
    y = attend(q, k, v, documents=documents, dropout_p=dropout_p)
    return all_to_all(split_positions(y, 2, group.size()), group).movedim(0, 1).flatten(1, 2)


def _split_heads(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Reshape ``(B, H, t, D)`` to ``(n, B, H / n, t, D)``."""
    return x.unflatten(1, (group.size(), -1)).movedim(1, 0)


def _gathered_keys(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None, dropout_p: float, group: Group
) -> torch.Tensor:
    """Attend from local positions to all keys up to them, slice by slice."""
    slices = position_slices(q.shape[2] * group.size(), group.size())[group.rank()]
    k, v = (merge_positions(all_gather_stacked(x, group), 2) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    outputs = []
    for positions, queries in zip(slices, q.chunk(len(slices), 2), strict=True):
        mask = _causal_mask(positions, documents, q.device)
        keys, values = k[:, :, : positions.stop], v[:, :, : positions.stop]
        output = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=dropout_p, enable_gqa=grouped
        )
        outputs.append(output)
    return torch.cat(outputs, 2)


def _causal_mask(positions: slice, documents: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Return the mask ``(queries, keys)`` of queries at ``positions`` and all keys up to the last of them.

    With ``documents`` its shape is ``(B, 1, queries, keys)``.
    """
    size = positions.stop - positions.start
    causal = torch.ones(size, positions.stop, dtype=torch.bool, device=device).tril(positions.start)
    if documents is None:
        return causal
    same_document = documents[:, positions, None] == documents[:, None, : positions.stop]
    return (same_document & causal).unsqueeze(1)


# --- models -------------------------------------------------------------------------------------------


def apply_context_parallel(model: nn.Module, group: Group) -> None:
    """Replace the attention of ``model`` by one over the ranks of ``group``. Raises BadInput if that is impossible."""
    parallel_attend = partial(context_parallel_attend, group=group)
    modules = [module for module in model.modules() if getattr(module, "attend", None) is attend]
    for module in modules:
        module.attend = parallel_attend  # type: ignore[assignment]
    if not modules and hasattr(model, "set_attn_implementation"):
        _apply_to_hf_model(model, parallel_attend)
    elif not modules:
        raise BadInput(
            f"distributed.cp_size: {type(model).__name__} has no attention that supports context parallelism. "
            "Set cp_size: 1, or let its attention modules call self.attend = amlaunch.trainer.models.attention.attend"
        )


def _apply_to_hf_model(model: Any, parallel_attend: Any) -> None:
    from transformers import AttentionInterface

    unsupported = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
    if unsupported:
        raise BadInput(
            f"distributed.cp_size: {type(model).__name__} has layers of type {', '.join(sorted(unsupported))}, "
            "but context parallelism supports only full causal attention. Set cp_size: 1"
        )
    AttentionInterface.register(HF_ATTENTION_NAME, partial(_hf_attention, parallel_attend=parallel_attend))
    # The library transformers builds no mask for a name that it does not know.
    model.set_attn_implementation(HF_ATTENTION_NAME)
    if model.config._attn_implementation != HF_ATTENTION_NAME:
        raise BadInput(
            f"distributed.cp_size: transformers cannot replace the attention of {type(model).__name__}. Set cp_size: 1"
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
    parallel_attend: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with the interface of transformers: ``(B, H, T, D)`` in, ``(B, T, H, D)`` out."""
    is_plain_causal = (
        attention_mask is None
        and not kwargs.get("softcap")
        and not kwargs.get("sliding_window")
        and getattr(module, "is_causal", True)
    )
    if not is_plain_causal:
        raise BadInput(
            f"distributed.cp_size: {type(module).__name__} is not plain causal attention, "
            "which context parallelism requires. Set cp_size: 1"
        )
    default_scaling = query.shape[-1] ** -0.5
    if scaling is not None and scaling != default_scaling:
        query = query * (scaling / default_scaling)
    return parallel_attend(query, key, value, dropout_p=dropout).transpose(1, 2), None
