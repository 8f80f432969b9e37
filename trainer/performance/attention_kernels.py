"""Attention kernels: the order in which torch tries them, the one in use, and why a better one is not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from amlaunch.trainer.models.attention import flex_supports
from amlaunch.trainer.models.base import blocks, config_value
from amlaunch.trainer.torch_features import compiles_document_masks

BACKENDS = {
    "cudnn_attention": SDPBackend.CUDNN_ATTENTION,
    "flash_attention": SDPBackend.FLASH_ATTENTION,
    "efficient_attention": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HOPPER_ORDER = ("cudnn_attention", "flash_attention", "efficient_attention", "math")
"""On Hopper, cuDNN is nearly twice as fast as torch's FlashAttention 2 (pytorch/pytorch#142132)."""
DEFAULT_ORDER = ("flash_attention", "efficient_attention", "cudnn_attention", "math")


def backend_order(method: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    """Return the backends in the order torch should try them: the recipe's ``sdpa_method``, or the device's default."""
    if method is not None:
        return tuple(method)
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return HOPPER_ORDER if is_hopper else DEFAULT_ORDER


def prefer_backends(order: Sequence[str], device: torch.device) -> AbstractContextManager[Any]:
    """Let ``scaled_dot_product_attention`` try only these backends, in this order; a CPU chooses on its own."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([BACKENDS[name] for name in order], set_priority=True)


@dataclass(frozen=True)
class AttentionBackend:
    """The kernel that computes attention in this run."""

    backend: str
    warning: str | None
    """Reason why it is not the preferred kernel; None if it is."""


def select_backend(
    model: nn.Module,
    order: Sequence[str],
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    packed: bool = False,
    compiled: bool = False,
) -> AttentionBackend | None:
    """Return the kernel that torch selects for rows of ``length`` tokens; None if the model's heads are unknown."""
    heads = config_value(model, "num_attention_heads", "n_head")
    width = config_value(model, "hidden_size", "n_embd")
    if not heads or not width or not blocks(model):
        return None
    head_width = config_value(model, "head_dim") or width // heads
    key_value_heads = config_value(model, "num_key_value_heads") or heads
    dropout = _attention_dropout(model)
    is_ours = any(hasattr(module, "attend") for module in model.modules())

    # The conditions of amlaunch.trainer.models.attention.attend.
    if packed and compiled and is_ours and device.type == "cuda" and flex_supports(dtype, head_width, dropout):
        return AttentionBackend("flex_attention", None)

    # The library transformers repeats keys and values if there is a mask.
    if packed and not is_ours:
        key_value_heads = heads
    query, key = (
        torch.empty(1, head_count, length, head_width, dtype=dtype, device=device, requires_grad=True)
        for head_count in (heads, key_value_heads)
    )
    call: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": key,
        "attn_mask": torch.ones(1, 1, length, length, dtype=torch.bool, device=device) if packed else None,
        "dropout_p": dropout,
        "is_causal": not packed,
        "enable_gqa": key_value_heads != heads,
    }
    selected = torch._fused_sdp_choice(**call)
    name = next((known for known, backend in BACKENDS.items() if backend.value == selected), f"backend {selected}")
    if device.type != "cuda":
        return AttentionBackend(name, None)
    if packed:
        advice = ""
        if is_ours and not compiled:
            advice = "; set compile.enabled: true to avoid this"
        elif is_ours and not compiles_document_masks():
            advice = "; an image with torch 2.9 or newer avoids this"
        return AttentionBackend(
            name, f"packed rows: attention by {name} also computes the masked scores between documents{advice}"
        )
    if name == order[0]:
        return AttentionBackend(name, None)
    return AttentionBackend(name, f"{order[0]} is not available: {_unavailable_reason(call, order[0])}")


def _attention_dropout(model: nn.Module) -> float:
    """Return the dropout probability of attention weights in training."""
    for owner in (getattr(model, "settings", None), getattr(model, "config", None)):
        for name in ("attention_dropout", "attn_pdrop", "dropout"):
            value = getattr(owner, name, None)
            if isinstance(value, int | float):
                return float(value)
    return 0.0


def _unavailable_reason(call: dict[str, Any], backend: str) -> str:
    """Return torch's objections to ``backend``, which it only issues as warnings while it tries the backend."""
    with warnings.catch_warnings(record=True) as issued, sdpa_kernel([BACKENDS[backend]]):
        warnings.simplefilter("always")
        try:
            F.scaled_dot_product_attention(**call)
        except RuntimeError as error:
            last_line = str(error).splitlines()[0]
        else:
            return "it works alone, but torch prefers another backend"
    objections = [str(warning.message).splitlines()[0] for warning in issued]
    objections = [text for text in objections if "kernel not used" not in text]
    return "; ".join(objections[:3]) or last_line


def cast_residual_stream(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the input of the first block to ``dtype``, so that all blocks add to a residual stream of that type.

    Under autocast the stream would have the embeddings' type, float32; bfloat16 moves half the bytes.
    """

    def cast(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].to(dtype), *args[1:])

    for block in blocks(model)[:1]:
        block.register_forward_pre_hook(cast)
