"""Linear layers whose products are of 8-bit floating-point numbers, by torch's own ``_scaled_mm``.

Tensorwise dynamic scaling (Micikevicius et al. 2022, "FP8 formats for deep
learning"): each tensor is scaled so that its largest number just fits,
activations and weights as e4m3, gradients as e5m2; sums are in float32, results
in the type that the model computes in, weights stay as they are. Worth it where
matrix products are large; at 124M parameters the conversions cost more.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.format.schema import Fp8
from amlaunch.trainer.models.base import blocks

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DIMENSION_MULTIPLE = 16
"""Of what each side of a product must be, by cuBLASLt."""
MIN_CAPABILITY = (8, 9)
"""The compute capability from which there are such products: Ada and Hopper."""


def convert_linear_layers(model: nn.Module, section: Fp8, device: torch.device, ranks_of_a_layer: int = 1) -> int:
    """Turn the linear layers of the blocks into 8-bit ones, in place; how many. Raises BadInput where that cannot be."""
    if not section.enabled:
        return 0
    check_support(device, ranks_of_a_layer)
    candidates = {name: layer for name, layer in linear_layers_of_blocks(model) if has_fp8_dimensions(layer)}
    for pattern in section.exclude:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise BadInput(
                f"fp8.exclude {pattern!r} fits no linear layer of the blocks; {did_you_mean(pattern, candidates)}"
            )
    chosen = [
        layer
        for name, layer in candidates.items()
        if not any(fnmatchcase(name, pattern) for pattern in section.exclude)
    ]
    if not chosen:
        raise BadInput(
            f"fp8.enabled: no linear layer of the blocks has sides that are multiples of {DIMENSION_MULTIPLE}; write false"
        )
    for layer in chosen:
        layer.__class__ = Float8Linear  # the same parameters, under the same names: checkpoints stay as they are
    return len(chosen)


def check_support(device: torch.device, ranks_of_a_layer: int) -> None:
    """Raise BadInput where the device has no such products, or layers are cut over ranks."""
    if ranks_of_a_layer > 1:
        raise BadInput(
            "fp8.enabled: layers that tensor parallelism cuts stay in bfloat16; write fp8.enabled: false, or tp_size: 1"
        )
    if device.type != "cuda":
        raise BadInput(
            "fp8.enabled: 8-bit products are for GPUs of NVIDIA's Hopper or Ada generation and later, and this is the CPU; write false"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise BadInput(
            f"fp8.enabled: {name} has compute capability {capability[0]}.{capability[1]}, 8-bit products need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}; write false"
        )


def linear_layers_of_blocks(model: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    """Linear layers that belong to a block, with their names in ``model``: neither embeddings nor the head."""
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    return [
        (name, module) for name, module in model.named_modules() if id(module) in inside and type(module) is nn.Linear
    ]


def has_fp8_dimensions(layer: nn.Linear) -> bool:
    """Whether both sides of a layer's matrix are what the library takes."""
    return layer.in_features % DIMENSION_MULTIPLE == 0 and layer.out_features % DIMENSION_MULTIPLE == 0


class Float8Linear(nn.Linear):
    """A linear layer with 8-bit products, forward and backward; inputs whose rows do not suit stay as they are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ``nn.Linear``; the result is in the type that the model computes in."""
        rows = x.flatten(0, -2)
        if len(rows) % DIMENSION_MULTIPLE:
            return super().forward(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        scaled_product = _Product.apply(rows.to(dtype), self.weight.to(dtype)).unflatten(0, x.shape[:-1])
        return scaled_product if self.bias is None else scaled_product + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """``x @ weight.T`` with everything in 8 bits but the results."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return scaled_product(quantize(x, E4M3), quantize(weight, E4M3), x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        wide = quantize(gradient, E5M2)
        by_x = scaled_product(wide, transpose(quantize(weight, E4M3)), x.dtype)
        by_weight = scaled_product(transpose(wide), transpose(quantize(x, E4M3)), weight.dtype)
        return by_x, by_weight


QuantizedTensor = tuple[torch.Tensor, torch.Tensor]
"""Numbers of 8 bits, and what each has to be multiplied by, in float32."""


def quantize(x: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """``x`` in 8 bits, its largest number the largest that there is."""
    largest = torch.finfo(dtype).max
    factor = largest / x.abs().amax().float().clamp(min=1e-12)
    return (x.float() * factor).clamp(-largest, largest).to(dtype), factor.reciprocal()


def transpose(x: QuantizedTensor) -> QuantizedTensor:
    """Transposed, in memory too: the library wants both sides of a product along what is summed."""
    return x[0].t().contiguous(), x[1]


def scaled_product(
    left: QuantizedTensor, right: QuantizedTensor, dtype: torch.dtype, fast: bool = False
) -> torch.Tensor:
    """``left (M, K) @ right (N, K).T`` in ``dtype``; ``fast`` sums with less precision, which gradients are not worth."""
    return torch._scaled_mm(
        left[0], right[0].t(), scale_a=left[1], scale_b=right[1], out_dtype=dtype, use_fast_accum=fast
    )
