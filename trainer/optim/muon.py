"""Muon for matrices that may be sharded (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

torch's own class, but for two things. It orthogonalises whole matrices: a
sharded one is gathered first, so that the result does not depend on the number
of ranks (torch's formula on sharded tensors rounds differently: 4 % on a small
matrix, docs/log.md). And a step can be called off on the device.
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
    """Muon over plain or sharded matrices; the keywords are torch's."""

    _step_supports_amp_scaling = True
    found_inf: torch.Tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a closure is never given
        """One step; none where ``found_inf``, a scalar on the device, is not 0."""
        found = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    skip = torch.zeros((), device=parameter.device) if found is None else found
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
        ahead = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        whole = orthogonalize(_whole(ahead, parameter), group["ns_coefficients"], group["ns_steps"], group["eps"])
        rate = group["lr"] * (~skip).to(local.dtype)
        update = _part_of(whole, parameter).to(local.dtype)
        local.mul_(1 - rate * group["weight_decay"]).sub_(rate * scale_of(whole.shape, group["adjust_lr_fn"]) * update)


def _part_of(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of ``whole``, laid out as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return whole[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]


def _whole(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor(local, parameter._spec, requires_grad=False).full_tensor()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def scale_of(shape: Sequence[int], kind: str | None) -> float:
    """What the update of a matrix ``(rows, columns)`` is multiplied by; ``kind`` is torch's ``adjust_lr_fn``."""
    rows, columns = shape
    if kind == "match_rms_adamw":  # Moonshot's: the size of an AdamW update, so that its rate can be used
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def orthogonalize(matrix: torch.Tensor, coefficients: Sequence[float], steps: int, eps: float) -> torch.Tensor:
    """Newton-Schulz: ``matrix (R, C)`` with its singular values pushed towards 1.

    In bfloat16, as torch does it; float64 stays, so that runs in it can be compared tightly.
    """
    a, b, c = coefficients
    x = matrix if matrix.dtype == torch.float64 else matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
