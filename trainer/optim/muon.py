"""Muon for matrices that may be sharded (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

It takes the keywords of ``torch.optim.Muon``, which torch has since 2.9, and
gives the same results on whole matrices. It differs in two ways. It
orthogonalises full matrices: a sharded matrix is gathered first, so that the
result does not depend on the number of ranks (torch's formula on sharded
tensors rounds differently: 4 % on a small matrix, docs/log.md). And a step can
be skipped on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

STATE = "momentum_buffer"
ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    # Moonshot's variant: an update as large as AdamW's, so that AdamW's learning rate can be used.
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}
"""Factor of the update of a matrix, by torch's names; torch 2.13 does not know the last one yet."""


class ShardedMuon(torch.optim.Optimizer):
    """Muon over plain or sharded matrices, with the keywords and defaults of ``torch.optim.Muon``.

    Raises ValueError for keywords out of range and for parameters that are not matrices.
    """

    _step_supports_amp_scaling = True
    found_inf: torch.Tensor

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ):
        for name, value in {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}.items():
            if not value >= 0:
                raise ValueError(f"{name} {value} is negative; use 0 or more")
        if adjust_lr_fn is not None and adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn {adjust_lr_fn!r} is not supported; use one of: {', '.join(ADJUSTMENTS)}")
        if len(ns_coefficients) != 3 or not 0 < ns_steps < 100:
            raise ValueError("ns_coefficients must be three numbers, and ns_steps between 1 and 99")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults)
        shapes = [tuple(parameter.shape) for group in self.param_groups for parameter in group["params"]]
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"Muon optimizes matrices only, not {next(shape for shape in shapes if len(shape) != 2)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # the loop passes no closure
        """Take one step; skip it if ``found_inf``, a scalar on the device, is not 0."""
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    skip = torch.zeros((), device=parameter.device) if found_inf is None else found_inf
                    self._update(parameter, parameter.grad, group, skip != 0)

    def _update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], skip: torch.Tensor
    ) -> None:
        state = self.state[parameter]
        if STATE not in state:
            state[STATE] = torch.zeros_like(gradient)
        local, grad, buffer = _local(parameter), _local(gradient), _local(state[STATE])
        grad = torch.where(skip, 0.0, grad)
        buffer.copy_(torch.where(skip, buffer, buffer.lerp(grad, 1 - group["momentum"])))
        direction = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        full = orthogonalize(_full(direction, parameter), group["ns_coefficients"], group["ns_steps"], group["eps"])
        update = _shard_of(full, parameter).to(local.dtype)
        rate = group["lr"] * (~skip).to(local.dtype)
        local.mul_(1 - rate * group["weight_decay"])
        local.sub_(rate * update_scale(full.shape, group["adjust_lr_fn"]) * update)


def _shard_of(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of ``full``, laid out like ``parameter``."""
    if not isinstance(parameter, DTensor):
        return full
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return full[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]


def _full(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor(local, parameter._spec, requires_grad=False).full_tensor()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def update_scale(shape: Sequence[int], adjust_lr_fn: str | None) -> float:
    """Return the factor of the update of a matrix ``(rows, columns)``; ``adjust_lr_fn`` is torch's option."""
    return ADJUSTMENTS[adjust_lr_fn or "original"](*shape)


def orthogonalize(matrix: torch.Tensor, coefficients: Sequence[float], steps: int, eps: float) -> torch.Tensor:
    """Push the singular values of ``matrix (R, C)`` towards 1 with Newton-Schulz iterations.

    Computes in bfloat16 like torch. float64 stays float64, so that such runs can be compared tightly.
    """
    a, b, c = coefficients
    x = matrix if matrix.dtype == torch.float64 else matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
