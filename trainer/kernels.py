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

from trainer.models import blocks, setting

BACKENDS = {
    "cudnn_attention": SDPBackend.CUDNN_ATTENTION,
    "flash_attention": SDPBackend.FLASH_ATTENTION,
    "efficient_attention": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HOPPER = ("cudnn_attention", "flash_attention", "efficient_attention", "math")
"""cuDNN computes nearly twice as fast there as torch's FlashAttention 2 (pytorch/pytorch#142132)."""
EARLIER = ("flash_attention", "efficient_attention", "cudnn_attention", "math")


def wanted(method: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    """The backends in the order in which they are tried: the recipe's ``sdpa_method``, else by device."""
    if method is not None:
        return tuple(method)
    return HOPPER if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) else EARLIER


def preferring(order: Sequence[str], device: torch.device) -> AbstractContextManager[Any]:
    """Have ``scaled_dot_product_attention`` try these backends, in this order, and no other; the CPU chooses itself."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([BACKENDS[name] for name in order], set_priority=True)


@dataclass(frozen=True)
class Taken:
    """What computes attention in this run."""

    backend: str
    warning: str | None
    """Where it is not what was wanted first: what is in the way."""


def taken(model: nn.Module, order: Sequence[str], length: int, dtype: torch.dtype, device: torch.device) -> Taken | None:
    """Which backend torch chooses for windows of ``length`` tokens; None where the model's heads are not known."""
    heads, width = setting_of(model, "num_attention_heads", "n_head"), setting_of(model, "hidden_size", "n_embd")
    if not heads or not width or not blocks(model):
        return None
    query = torch.empty(1, heads, length, width // heads, dtype=dtype, device=device, requires_grad=True)
    chosen = torch._fused_sdp_choice(query, query, query, is_causal=True)
    name = next((known for known, backend in BACKENDS.items() if backend.value == chosen), f"backend {chosen}")
    if device.type != "cuda" or name == order[0]:
        return Taken(name, None)
    return Taken(name, f"{order[0]} was wanted and cannot be had: {_reason(query, order[0])}")


def setting_of(model: nn.Module, *names: str) -> int | None:
    """A size of the model, from itself, its Hugging Face config, or our own settings."""
    own = getattr(model, "settings", None)
    found = (getattr(own, name, None) for name in names)
    return setting(model, *names) or next((value for value in found if isinstance(value, int)), None)


def _reason(query: torch.Tensor, backend: str) -> str:
    """What torch says against ``backend``, which it tells as warnings only while it tries."""
    with warnings.catch_warnings(record=True) as said, sdpa_kernel([BACKENDS[backend]]):
        warnings.simplefilter("always")
        try:
            F.scaled_dot_product_attention(query, query, query, is_causal=True)
        except RuntimeError as error:
            said_last = str(error).splitlines()[0]
        else:
            return "it works alone: another backend stands before it"
    told = [str(one.message).splitlines()[0] for one in said if "kernel not used" not in str(one.message)]
    return "; ".join(told[:3]) or said_last


def carry_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Carry the residual stream in ``dtype``: what enters the first block is cast, and all blocks add to that.

    Under autocast it would be float32, the type of the embeddings; sums of bfloat16 move half the bytes.
    """

    def cast(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].to(dtype), *args[1:])

    for block in blocks(model)[:1]:
        block.register_forward_pre_hook(cast)
