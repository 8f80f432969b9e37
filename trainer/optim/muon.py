"""Muon for matrices that may be sharded (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

It differs from torch's class in two ways. It orthogonalises full matrices: a
sharded matrix is gathered first, so that the result does not depend on the
number of ranks (torch's formula on sharded tensors rounds differently: 4 % on a
small matrix, docs/log.md). And a step can be skipped on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

STATE = "momentum_buffer"


class ShardedMuon(torch.optim.Muon):
    """Muon over plain or sharded matrices; takes torch's keywords."""

    _step_supports_amp_scaling = True
    found_inf: torch.Tensor

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
    rows, columns = shape
    # Moonshot's variant: an update as large as AdamW's, so that AdamW's learning rate can be used
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


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
