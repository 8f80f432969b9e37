"""The optimizer of a recipe, the learning rate as a function of the step, and clipping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recipes.errors import BadInput
from recipes.schema import ClipGradNorm, LRScheduler
from recipes.targets import Policy, build, resolve


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step; ``section`` None is a constant rate."""

    section: LRScheduler | None
    peak: float
    last_step: int

    def __post_init__(self) -> None:
        section = self.section
        if section and section.lr_decay_steps and section.lr_decay_steps < section.lr_warmup_steps:
            raise BadInput(
                f"lr_scheduler.lr_decay_steps {section.lr_decay_steps} lies before the end of the warmup, "
                f"lr_warmup_steps {section.lr_warmup_steps}"
            )

    def rate(self, step: int) -> float:
        """The rate that step ``step`` (the first is 1) is taken with.

        Linear from ``init_lr`` to the peak, reached at step ``lr_warmup_steps``;
        then down to ``min_lr``, reached at ``lr_decay_steps`` and kept.
        """
        section = self.section
        if section is None:
            return self.peak
        warmup = section.lr_warmup_steps
        if step <= warmup:
            return section.init_lr + (self.peak - section.init_lr) * step / warmup
        if section.lr_decay_style == "constant":
            return self.peak
        end = section.lr_decay_steps or self.last_step
        done = min(1.0, (step - warmup) / max(1, end - warmup))
        left = 1.0 - done if section.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return section.min_lr + (self.peak - section.min_lr) * left


def parameter_groups(model: nn.Module, decays: bool) -> list[dict[str, Any]]:
    """Matrices and embeddings as the recipe says; vectors (norms, biases) without weight decay, where there is any."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not decays:
        return [{"params": parameters}]
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(section: dict[str, Any], policy: Policy, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's parameters; AdamW is the fused one on a GPU unless it says otherwise."""
    target = resolve(section["_target_"], policy)
    extra: dict[str, Any] = {}
    if target is torch.optim.AdamW and device.type == "cuda" and not {"fused", "foreach"} & section.keys():
        extra["fused"] = True
    decays = "weight_decay" in inspect.signature(target).parameters
    return build(section, policy, parameter_groups(model, decays), **extra)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use ``rate`` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip(parameters: Iterable[nn.Parameter], section: ClipGradNorm | None) -> torch.Tensor:
    """The 2-norm of the whole gradient, all shards together; the gradient is scaled down to ``max_norm`` where given."""
    with_grad = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in with_grad if parameter.grad is not None])
    if section is not None:
        torch.nn.utils.clip_grads_with_norm_(with_grad, section.max_norm, norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
