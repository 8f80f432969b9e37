"""Llama: rotary positions, RMSNorm, SwiGLU, grouped-query attention (Touvron et al. 2023).

Equals ``transformers.LlamaForCausalLM`` with the same weights, and has the same parameter names. One deliberate
difference: norms are computed in float32 or better, whereas transformers rounds even float64 to float32.

Shapes: B batch, T positions, C width, H heads, K key-value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from amlaunch.recipes.errors import BadInput
from amlaunch.trainer.models.attention import attend
from amlaunch.trainer.models.base import build_initialized, identity_head


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and settings of a Llama, named as in its ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    initializer_range: float
    bos_token_id: int
    eos_token_id: int

    @property
    def head_dim(self) -> int:
        """Width D of a head."""
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """Normalisation by the root mean square over the width, computed in float32 or better."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised ``x``, with the same shape and type."""
        x_float = x if x.dtype == torch.float64 else x.float()
        normed = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_angles(positions: torch.Tensor, width: int, theta: float) -> torch.Tensor:
    """Return angles ``(..., T, D)`` of ``positions (..., T)`` in float32, each frequency twice as in transformers."""
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, device=positions.device).float() / width)
    angles = positions.float()[..., None] * frequencies
    return torch.cat((angles, angles), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (d, d + D/2) of ``x (B, H, T, D)`` by the angles of their position (Su et al. 2021).

    The result has the type of ``x``: under autocast the angles are float32, but attention needs queries and keys of
    the values' type.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class LlamaAttention(nn.Module):
    """Causal self-attention with fewer key-value heads than query heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        key_value = config.num_key_value_heads * config.head_dim
        self.attend = attend
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map ``(B, T, C)`` to ``(B, T, C)``; ``documents`` as in :func:`amlaunch.trainer.models.attention.attend`."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = self.attend(q, k, v, documents=documents)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """Gated MLP with SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, T, C)`` to ``(B, T, C)``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """Attention, then MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map ``(B, T, C)`` to ``(B, T, C)``."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, documents)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Llama language model; its logits cover the vocabulary, padding rows included."""

    wrap_blocks = ("layers",)
    tp_plan: ClassVar = {
        "embed_tokens": "vocabulary",
        "layers.*.self_attn": "enter",
        "layers.*.self_attn.o_proj": "row",
        "layers.*.self_attn.*_proj": "column",
        "layers.*.mlp": "enter",
        "layers.*.mlp.down_proj": "row",
        "layers.*.mlp.*_proj": "column",
        "lm_head": "column",
    }

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.settings = config
        self.vocab_size = config.vocab_size
        self.context = config.max_position_embeddings
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.head = identity_head

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        linear_loss: Any = None,
    ) -> torch.Tensor:
        """Map token ids ``(B, T)`` int64 to logits ``(B, T, V)``, or to a loss if ``linear_loss`` is given.

        ``position_ids (B, T)`` int64; None means 0 to T - 1. ``documents (B, T)`` int32 separates documents within a
        row; None means one. ``linear_loss`` computes the loss of ``labels``; see :mod:`amlaunch.trainer.loss`.
        """
        x = self.embed_tokens(input_ids)
        positions = (
            torch.arange(input_ids.shape[1], device=x.device) if position_ids is None else position_ids.unsqueeze(1)
        )
        angles = rotary_angles(positions, self.settings.head_dim, self.settings.rope_theta)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, documents)
        output_layer = self.embed_tokens if self.lm_head is None else self.lm_head
        x, rows = self.head(self.norm(x), output_layer.weight)
        return F.linear(x, rows) if linear_loss is None else linear_loss.from_hidden(x, rows, labels)

    def init_parameter(self, name: str, tensor: torch.Tensor) -> None:
        """Initialise as GPT-2: normal, scaled down where 2·layers projections add to the residual stream."""
        if tensor.dim() > 1:
            std = self.settings.initializer_range
            is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            tensor.normal_(0.0, std / math.sqrt(2 * len(self.layers)) if is_residual else std)
        else:
            tensor.fill_(1.0)

    def flops_per_token(self, seq_len: int) -> float:
        """Return ``6N + 12 L d T``, where N excludes an embedding that is only looked up."""
        count = sum(parameter.numel() for parameter in self.parameters())
        embedding_parameters = 0 if self.lm_head is None else self.embed_tokens.weight.numel()
        return 6.0 * (count - embedding_parameters) + 12.0 * len(self.layers) * self.settings.hidden_size * seq_len

    def hf_export(
        self, tensors: dict[str, torch.Tensor], vocab_size: int
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return ``config.json`` and tensors of ``transformers.LlamaForCausalLM`` with ``vocab_size`` tokens."""
        renamed = {}
        for name, tensor in tensors.items():
            if name in ("embed_tokens.weight", "lm_head.weight"):
                tensor = tensor[:vocab_size]
            renamed[name if name.startswith("lm_head") else f"model.{name}"] = tensor
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **dataclasses.asdict(self.settings),
            "vocab_size": vocab_size,
            "head_dim": self.settings.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            # transformers 5 reads the base from here, earlier versions from rope_theta above
            "rope_parameters": {"rope_type": "default", "rope_theta": self.settings.rope_theta},
        }
        return config, renamed


def build_llama_model(
    *,
    vocab_size: int = 50304,
    hidden_size: int = 1024,
    intermediate_size: int = 2816,
    num_hidden_layers: int = 24,
    num_attention_heads: int = 16,
    num_key_value_heads: int | None = None,
    max_position_embeddings: int = 2048,
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-5,
    tie_word_embeddings: bool = False,
    initializer_range: float = 0.02,
    bos_token_id: int = 50256,
    eos_token_id: int = 50256,
) -> Llama:
    """Build a Llama with initial weights; the keywords are those of ``transformers.LlamaConfig``.

    ``num_key_value_heads`` None means as many as query heads. Raises BadInput if the sizes do not divide.
    """
    key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
    if hidden_size % (2 * num_attention_heads):
        raise BadInput(
            f"model.hidden_size {hidden_size} is not an even multiple of num_attention_heads {num_attention_heads}; "
            "change one of them"
        )
    if num_attention_heads % key_value_heads:
        raise BadInput(
            f"model.num_attention_heads {num_attention_heads} is not divisible by num_key_value_heads "
            f"{key_value_heads}; change one of them"
        )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=max_position_embeddings,
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    return build_initialized(lambda: Llama(config))
