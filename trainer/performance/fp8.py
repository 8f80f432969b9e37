"""Linear layers with 8-bit floating-point matrix products, by torch's ``_scaled_mm``.

Tensorwise dynamic scaling (Micikevicius et al. 2022, "FP8 formats for deep learning"): each tensor is scaled so that
its largest value just fits; activations and weights are e4m3, gradients e5m2. Sums are in float32, results in the
compute dtype, and the weights themselves do not change. It pays off for large matrix products; at 124M parameters the
conversions cost more than they save.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Fp8
from amlaunch.recipes.suggestions import did_you_mean
from amlaunch.trainer.models.base import blocks

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DIMENSION_MULTIPLE = 16
"""Divisor that cuBLASLt requires of each dimension of a product."""
MIN_CAPABILITY = (8, 9)
"""Lowest compute capability with 8-bit products: Ada, then Hopper."""


def convert_linear_layers(model: nn.Module, section: Fp8, device: torch.device, ranks_of_a_layer: int = 1) -> int:
    """Convert the linear layers of the blocks to 8-bit products in place and return their number.

    Raises BadInput if the device, the parallelism or the layers do not allow it.
    """
    if not section.enabled:
        return 0
    check_support(device, ranks_of_a_layer)
    candidates = {name: layer for name, layer in linear_layers_of_blocks(model) if has_fp8_dimensions(layer)}
    for pattern in section.exclude:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise BadInput(
                f"fp8.exclude {pattern!r} matches no linear layer of the blocks; {did_you_mean(pattern, candidates)}"
            )
    layers = [
        layer
        for name, layer in candidates.items()
        if not any(fnmatchcase(name, pattern) for pattern in section.exclude)
    ]
    if not layers:
        raise BadInput(
            "fp8.enabled: no linear layer of the blocks has dimensions that are multiples of "
            f"{DIMENSION_MULTIPLE}; set it to false"
        )
    for layer in layers:
        # Same parameters and names, so checkpoints do not change.
        layer.__class__ = Float8Linear
    return len(layers)


def check_support(device: torch.device, ranks_of_a_layer: int) -> None:
    """Raise BadInput if the device has no 8-bit products, or tensor parallelism shards the layers."""
    if ranks_of_a_layer > 1:
        raise BadInput(
            "fp8.enabled does not support tensor parallelism; set fp8.enabled: false or distributed.tp_size: 1"
        )
    if device.type != "cuda":
        raise BadInput(
            "fp8.enabled: 8-bit products need an NVIDIA GPU of the Ada or Hopper generation or later, "
            "but this is the CPU; set it to false"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise BadInput(
            f"fp8.enabled: {name} has compute capability {capability[0]}.{capability[1]}, but 8-bit products need "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}; set it to false"
        )


def linear_layers_of_blocks(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers of the blocks with their names in ``model``; embeddings and head are not included."""
    in_blocks = {id(module) for block in blocks(model) for module in block.modules()}
    return [
        (name, module)
        for name, module in model.named_modules()
        if id(module) in in_blocks and type(module) is nn.Linear
    ]


def has_fp8_dimensions(layer: nn.Linear) -> bool:
    """Return True if cuBLASLt supports both dimensions of the layer's weight."""
    return layer.in_features % DIMENSION_MULTIPLE == 0 and layer.out_features % DIMENSION_MULTIPLE == 0


class Float8Linear(nn.Linear):
    """A linear layer with 8-bit products, forward and backward; inputs with an unsupported row count stay unchanged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute ``nn.Linear`` in 8 bits; the result has the compute dtype."""
        rows = x.flatten(0, -2)
        if len(rows) % DIMENSION_MULTIPLE:
            return super().forward(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y = _Float8Product.apply(rows.to(dtype), self.weight.to(dtype)).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(dtype)


class _Float8Product(torch.autograd.Function):
    """``x @ weight.T`` with 8-bit operands in forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return scaled_product(quantize(x, E4M3), quantize(weight, E4M3), x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gradient = quantize(gradients[0].contiguous(), E5M2)
        x_gradient = scaled_product(gradient, transpose(quantize(weight, E4M3)), x.dtype)
        weight_gradient = scaled_product(transpose(gradient), transpose(quantize(x, E4M3)), weight.dtype)
        return x_gradient, weight_gradient


QuantizedTensor = tuple[torch.Tensor, torch.Tensor]
"""8-bit values, and the float32 factor that restores their scale."""


def quantize(x: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """Convert ``x`` to 8 bits, scaled so that its largest value becomes the largest of ``dtype``."""
    max_value = torch.finfo(dtype).max
    scale = max_value / x.abs().amax().float().clamp(min=1e-12)
    return (x.float() * scale).clamp(-max_value, max_value).to(dtype), scale.reciprocal()


def transpose(x: QuantizedTensor) -> QuantizedTensor:
    """Transpose ``x`` in memory: cuBLASLt needs the summed dimension of both operands to be contiguous."""
    return x[0].t().contiguous(), x[1]


def scaled_product(
    left: QuantizedTensor, right: QuantizedTensor, dtype: torch.dtype, fast: bool = False
) -> torch.Tensor:
    """Return ``left (M, K) @ right (N, K).T`` in ``dtype``; ``fast`` sums less precisely, too little for gradients."""
    return torch._scaled_mm(
        left[0], right[0].t(), scale_a=left[1], scale_b=right[1], out_dtype=dtype, use_fast_accum=fast
    )
