"""Documents that lie in one row do not see one another: what a model must do for that, and what it is told."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Distributed
from amlaunch.trainer.models.attention import same_document_mask

OURS = {"position_ids", "documents"}
HUGGING_FACE = {"position_ids", "attention_mask"}


def keep_documents_apart(model: nn.Module, section: Distributed) -> None:
    """Have ``model`` take ``documents`` (see :class:`amlaunch.trainer.data.batches.Batch`) besides ``position_ids``.

    Ours do, and so may a model of the user's. One of transformers that attends
    through torch's own attention gets them as a mask ``(B, 1, T, T)``, which
    replaces the one that it would make. Raises BadInput for any other: a model
    that quietly looks across documents learns something else.
    """
    takes = inspect.signature(model.forward).parameters.keys()
    if takes >= OURS:
        return
    why = _why_not(model, takes, section)
    if why:
        raise BadInput(
            f"packed_sequence.packed_sequence_size: {type(model).__name__} {why}; write 0, "
            "or a model whose forward takes position_ids and documents (see trainer/models/document_masks.py)"
        )
    model.register_forward_pre_hook(_as_mask, with_kwargs=True)


def _why_not(model: nn.Module, takes: Any, section: Distributed) -> str | None:
    """Why a mask of our own would not keep documents apart; None where it does."""
    config: Any = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    if not takes >= HUGGING_FACE or attention is None:
        return "takes no documents between which its attention would not go"
    if attention != "sdpa":
        return f"attends through {attention}, which takes no mask of ours (attn_implementation: sdpa does)"
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if windowed or any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "has layers that do not attend to everything before, for which a mask of ours is not enough"
    if section.cp_size > 1:
        return "is of transformers, whose positions cp_size spreads without documents"
    return None


def _as_mask(
    model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    documents: torch.Tensor | None = keywords.pop("documents", None)
    if documents is not None:
        keywords["attention_mask"] = same_document_mask(documents).tril()
    return args, keywords
