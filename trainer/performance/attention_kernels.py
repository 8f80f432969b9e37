"""Which kernel computes attention: the order in which they are tried, what was taken, and why not another one."""

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

from amlaunch.trainer.models.attention import FLEX_DTYPES
from amlaunch.trainer.models.base import blocks, config_value

BACKENDS = {
    "cudnn_attention": SDPBackend.CUDNN_ATTENTION,
    "flash_attention": SDPBackend.FLASH_ATTENTION,
    "efficient_attention": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HOPPER_ORDER = ("cudnn_attention", "flash_attention", "efficient_attention", "math")
"""cuDNN computes nearly twice as fast there as torch's FlashAttention 2 (pytorch/pytorch#142132)."""
DEFAULT_ORDER = ("flash_attention", "efficient_attention", "cudnn_attention", "math")


def backend_order(method: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    """The backends in the order in which they are tried: the recipe's ``sdpa_method``, else by device."""
    if method is not None:
        return tuple(method)
    return (
        HOPPER_ORDER if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) else DEFAULT_ORDER
    )


def prefer_backends(order: Sequence[str], device: torch.device) -> AbstractContextManager[Any]:
    """Have ``scaled_dot_product_attention`` try these backends, in this order, and no other; the CPU chooses itself."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([BACKENDS[name] for name in order], set_priority=True)


@dataclass(frozen=True)
class AttentionBackend:
    """What computes attention in this run."""

    backend: str
    warning: str | None
    """Where it is not what was wanted first: what is in the way."""


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
    """What computes attention over rows of ``length`` tokens; None where the model's heads are not known."""
    heads, width = config_value(model, "num_attention_heads", "n_head"), config_value(model, "hidden_size", "n_embd")
    if not heads or not width or not blocks(model):
        return None
    size, dropout = config_value(model, "head_dim") or width // heads, _dropout(model)
    ours = any(hasattr(module, "attend") for module in model.modules())
    if packed and compiled and ours and device.type == "cuda" and dtype in FLEX_DTYPES and size >= 16 and not dropout:
        return AttentionBackend("flex_attention", None)  # see amlaunch.trainer.models.attention.attend
    shared = config_value(model, "num_key_value_heads") or heads
    if packed and not ours:  # transformers repeats keys and values where there is a mask
        shared = heads
    query, key = (
        torch.empty(1, some, length, size, dtype=dtype, device=device, requires_grad=True) for some in (heads, shared)
    )
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device) if packed else None
    call: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": key,
        "attn_mask": mask,
        "dropout_p": dropout,
        "is_causal": not packed,
        "enable_gqa": shared != heads,
    }
    chosen = torch._fused_sdp_choice(**call)
    name = next((known for known, backend in BACKENDS.items() if backend.value == chosen), f"backend {chosen}")
    if device.type != "cuda":
        return AttentionBackend(name, None)
    if packed:
        more = "; compile.enabled true leaves that out" if ours and not compiled else ""
        return AttentionBackend(
            name,
            f"rows are packed: attention by {name} computes what lies between documents, too, and hides it by a mask{more}",
        )
    return AttentionBackend(
        name, None if name == order[0] else f"{order[0]} was wanted and cannot be had: {_reason(call, order[0])}"
    )


def _dropout(model: nn.Module) -> float:
    """The share of its weights that attention drops in training."""
    for place in (getattr(model, "settings", None), getattr(model, "config", None)):
        for name in ("attention_dropout", "attn_pdrop", "dropout"):
            value = getattr(place, name, None)
            if isinstance(value, int | float):
                return float(value)
    return 0.0


def _reason(call: dict[str, Any], backend: str) -> str:
    """What torch says against ``backend``, which it tells as warnings only while it tries."""
    with warnings.catch_warnings(record=True) as said, sdpa_kernel([BACKENDS[backend]]):
        warnings.simplefilter("always")
        try:
            F.scaled_dot_product_attention(**call)
        except RuntimeError as error:
            said_last = str(error).splitlines()[0]
        else:
            return "it works alone: another backend stands before it"
    told = [str(one.message).splitlines()[0] for one in said if "kernel not used" not in str(one.message)]
    return "; ".join(told[:3]) or said_last


def cast_residual_stream(model: nn.Module, dtype: torch.dtype) -> None:
    """Carry the residual stream in ``dtype``: what enters the first block is cast, and all blocks add to that.

    Under autocast it would be float32, the type of the embeddings; sums of bfloat16 move half the bytes.
    """

    def cast(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].to(dtype), *args[1:])

    for block in blocks(model)[:1]:
        block.register_forward_pre_hook(cast)
