"""Attention masks that keep the documents of a packed row apart."""

from __future__ import annotations

import inspect
from collections.abc import Set
from typing import Any

import torch
from torch import nn

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Distributed
from amlaunch.trainer.models.attention import same_document_mask

DOCUMENT_ARGUMENTS = {"position_ids", "documents"}
HF_ARGUMENTS = {"position_ids", "attention_mask"}


def keep_documents_apart(model: nn.Module, section: Distributed) -> None:
    """Make ``model`` accept ``documents`` (see :class:`amlaunch.trainer.data.batches.Batch`) besides ``position_ids``.

    Our models accept them, and a user's model may. A model of transformers with torch's attention receives them as a
    mask ``(B, 1, T, T)``, which replaces the mask that it would build. Raises BadInput for any other model, which would
    silently attend across documents.
    """
    parameters = inspect.signature(model.forward).parameters.keys()
    if parameters >= DOCUMENT_ARGUMENTS:
        return
    obstacle = _mask_obstacle(model, parameters, section)
    if obstacle:
        raise BadInput(
            f"packed_sequence.packed_sequence_size: {type(model).__name__} {obstacle}. Set it to 0, "
            "or use a model whose forward takes position_ids and documents (see trainer/models/document_masks.py)"
        )
    model.register_forward_pre_hook(_documents_to_mask, with_kwargs=True)


def _mask_obstacle(model: nn.Module, parameters: Set[str], section: Distributed) -> str | None:
    """Return the reason why a mask would not keep documents apart; None if it does."""
    config: Any = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if not parameters >= HF_ARGUMENTS or implementation is None:
        return "cannot restrict attention to documents"
    if implementation != "sdpa":
        return f"uses the attention implementation {implementation}, which ignores our mask (use sdpa)"

    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    layer_types = getattr(config, "layer_types", None) or ()
    if windowed or any(layer_type != "full_attention" for layer_type in layer_types):
        return "has layers without full attention, which our mask does not support"
    if section.cp_size > 1:
        return "is a transformers model, which does not support documents with distributed.cp_size above 1"
    return None


def _documents_to_mask(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    documents: torch.Tensor | None = kwargs.pop("documents", None)
    if documents is not None:
        kwargs["attention_mask"] = same_document_mask(documents).tril()
    return args, kwargs
