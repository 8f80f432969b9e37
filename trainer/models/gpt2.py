"""GPT-2: learned positions, pre-LayerNorm blocks, GELU, tied embeddings (Radford et al. 2019).

Equals ``transformers.GPT2LMHeadModel`` with the same weights. Parameters have the same names, but linear layers are
``nn.Linear`` (transformers stores them transposed), and the output head is the token embedding itself, so sharding or
a checkpoint cannot untie the two.

Shapes: B batch, T positions, C width, H heads, V vocabulary.
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

INIT_STD = 0.02
ACTIVATIONS = {"gelu_new": "tanh", "gelu": "none"}
"""Hugging Face's names, mapped to torch's ``approximate``; GPT-2 was trained with the tanh form."""
ATTENTION_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
TRANSPOSED_IN_HF = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Ends of the names of parameters that transformers stores transposed."""


@dataclass(frozen=True)
class GPT2Config:
    """Sizes and settings of a GPT-2, named as in its ``config.json``."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    dropout: float
    layer_norm_epsilon: float
    activation: str
    bos_token_id: int
    eos_token_id: int


class GPT2Attention(nn.Module):
    """Causal self-attention with query, key and value in one projection."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.dropout = config.dropout
        self.attend = attend
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(B, T, C)`` to ``(B, T, C)``; ``documents`` as in :func:`amlaunch.trainer.models.attention.attend`."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        # The attend function has no eval mode.
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, documents=documents, dropout_p=dropout)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class GPT2MLP(nn.Module):
    """Two linear layers with a GELU between them; the hidden width is four times the width."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.approximate = ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, T, C)`` to ``(B, T, C)``."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class GPT2Block(nn.Module):
    """Attention, then MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(B, T, C)`` to ``(B, T, C)``."""
        x = x + self.drop(self.attn(self.ln_1(x), documents))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    """GPT-2 language model; its logits cover the vocabulary, padding rows included.

    Padding rows take part in the softmax, as in nanoGPT: they learn to be improbable. The export removes them.
    """

    wrap_blocks = ("h",)
    tp_plan: ClassVar = {
        "wte": "vocabulary",
        "wpe": "positions",
        "h.*.attn": "enter",
        "h.*.attn.c_attn": "fused",
        "h.*.attn.c_proj": "row",
        "h.*.mlp": "enter",
        "h.*.mlp.c_fc": "column",
        "h.*.mlp.c_proj": "row",
    }

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.settings = config
        self.vocab_size = config.vocab_size
        self.context = config.n_positions
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(GPT2Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
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

        ``position_ids (B, T)`` int64 are below ``n_positions``; None means 0 to T - 1. ``documents (B, T)`` int32
        separates documents within a row; None means one. ``linear_loss`` computes the loss of ``labels``; see
        :mod:`amlaunch.trainer.loss`.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) if position_ids is None else position_ids
        x = self.drop(self.wte(input_ids) + self.wpe(positions))
        for block in self.h:
            x = block(x, documents)
        x, rows = self.head(self.ln_f(x), self.wte.weight)
        return F.linear(x, rows) if linear_loss is None else linear_loss.from_hidden(x, rows, labels)

    def init_parameter(self, name: str, tensor: torch.Tensor) -> None:
        """Initialise as GPT-2: normal(0, 0.02), scaled down where 2·n_layer projections add to the residual stream."""
        if tensor.dim() > 1:
            is_residual = name.endswith("c_proj.weight")
            tensor.normal_(0.0, INIT_STD / math.sqrt(2 * len(self.h)) if is_residual else INIT_STD)
        else:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)

    def flops_per_token(self, seq_len: int) -> float:
        """Return nanoGPT's ``6N + 12 L d T``, where N excludes the position table."""
        count = sum(parameter.numel() for parameter in self.parameters()) - self.wpe.weight.numel()
        return 6.0 * count + 12.0 * self.settings.n_layer * self.settings.n_embd * seq_len

    def hf_export(
        self, tensors: dict[str, torch.Tensor], vocab_size: int
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return ``config.json`` and tensors of ``transformers.GPT2LMHeadModel`` with ``vocab_size`` tokens."""
        renamed = {}
        for name, tensor in tensors.items():
            if name.endswith(TRANSPOSED_IN_HF):
                tensor = tensor.t()
            if name == "wte.weight":
                tensor = tensor[:vocab_size]
            renamed[f"transformer.{name}"] = tensor
        settings = dataclasses.asdict(self.settings)
        dropout, activation = settings.pop("dropout"), settings.pop("activation")
        config = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            **settings,
            "vocab_size": vocab_size,
            "n_ctx": self.context,
            "activation_function": activation,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout),
            "tie_word_embeddings": True,
        }
        return config, renamed


def build_gpt2_model(
    *,
    vocab_size: int = 50257,
    n_positions: int = 2048,
    n_ctx: int | None = None,
    n_embd: int = 768,
    n_layer: int = 12,
    n_head: int = 12,
    dropout: float = 0.0,
    bos_token_id: int = 50256,
    eos_token_id: int = 50256,
    attn_implementation: str = "sdpa",
    layer_norm_epsilon: float = 1e-5,
    activation: str = "gelu_new",
) -> GPT2:
    """Build a GPT-2 with initial weights; the keywords are NeMo AutoModel's.

    ``n_ctx`` overrides ``n_positions``. ``activation`` is ``gelu_new`` (GPT-2's) or ``gelu`` (the exact form).
    Attention always uses torch's ``scaled_dot_product_attention``, which selects a flash kernel itself. Raises BadInput
    for unsupported values.
    """
    if n_embd % n_head:
        raise BadInput(f"model.n_embd {n_embd} is not divisible by n_head {n_head}; change one of them")
    if activation not in ACTIVATIONS:
        raise BadInput(f"model.activation {activation!r} is not supported; use one of: {', '.join(ACTIVATIONS)}")
    if attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        raise BadInput(
            f"model.attn_implementation {attn_implementation!r} is not supported; "
            "use sdpa, which selects the fastest kernel"
        )
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions if n_ctx is None else n_ctx,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        dropout=dropout,
        layer_norm_epsilon=layer_norm_epsilon,
        activation=activation,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    return build_initialized(lambda: GPT2(config))
