"""Build a recipe's optimizers, schedule the learning rate, and clip gradients."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import ClipGradNorm, LRScheduler, ParameterGroup
from amlaunch.recipes.format.targets import TargetPolicy, build, resolve
from amlaunch.recipes.suggestions import did_you_mean
from amlaunch.trainer.models.base import blocks
from amlaunch.trainer.optim.muon import ShardedMuon

MUON = "torch.optim.Muon"
FUSED_OPTIMIZERS = ("AdamW", "Adam")
"""torch optimizers whose fused kernels can skip a step on the device, on GPU and CPU."""
DECAY_STYLES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "exponential": lambda progress: 2.0 * 0.5**progress - 1.0,
}
"""Remaining fraction of the distance between peak and floor, as a function of progress from 0 to 1."""
WSD_DECAY_FRACTION = 0.2
"""Fraction of all steps in which WSD decays if the recipe does not say (Hägele et al. 2024)."""

NamedParameters = list[tuple[str, nn.Parameter]]
ShardingMesh = tuple[DeviceMesh, tuple[int, ...]]
"""A mesh and those of its dimensions over which a tensor is sharded."""


# --- the learning rate ----------------------------------------------------------------------------


@dataclass(frozen=True)
class LearningRateSchedule:
    """The learning rate as a function of the step; constant if ``section`` is None."""

    section: LRScheduler | None
    peak: float
    last_step: int
    step_tokens: int = 1

    def __post_init__(self) -> None:
        # The recipe's checks cannot convert tokens to steps.
        if self.section and self._steps_of("decay") and self.end < self.warmup:
            raise BadInput(
                f"lr_scheduler: the decay ends at step {self.end}, before the warmup ends at step {self.warmup}. "
                "Lengthen the decay or shorten the warmup"
            )

    def _steps_of(self, phase: str) -> int | None:
        """Return ``lr_<phase>_steps``, or ``lr_<phase>_tokens`` converted to steps and rounded up."""
        tokens = getattr(self.section, f"lr_{phase}_tokens")
        return -(-tokens // self.step_tokens) if tokens is not None else getattr(self.section, f"lr_{phase}_steps")

    @property
    def warmup(self) -> int:
        """The step that reaches the peak."""
        return (self._steps_of("warmup") or 0) if self.section else 0

    @property
    def end(self) -> int:
        """The step that reaches the floor."""
        return self._steps_of("decay") or self.last_step

    @property
    def decay_start(self) -> int:
        """The last step at the peak."""
        if self.section is None or self.section.lr_decay_style != "WSD":
            return self.warmup
        decay_steps = self._steps_of("wsd_decay") or math.ceil(WSD_DECAY_FRACTION * self.end)
        return max(self.warmup, self.end - decay_steps)

    def rate(self, step: int) -> float:
        """Return the learning rate of ``step``; the first step is 1.

        Rises linearly from ``init_lr`` to the peak at the end of the warmup, then
        decays to ``min_lr`` in the section's style and stays there.
        """
        section = self.section
        if section is None:
            return self.peak
        if step <= self.warmup:
            return section.init_lr + (self.peak - section.init_lr) * step / self.warmup
        if section.lr_decay_style == "constant":
            return self.peak
        if section.lr_decay_style == "inverse-square-root":
            return max(section.min_lr, self.peak * math.sqrt(max(1, self.warmup) / step))
        start = self.decay_start
        progress = min(1.0, max(0, step - start) / max(1, self.end - start))
        style = section.lr_wsd_decay_style if section.lr_decay_style == "WSD" else section.lr_decay_style
        return section.min_lr + (self.peak - section.min_lr) * DECAY_STYLES[style](progress)


# --- the optimizers -------------------------------------------------------------------------------


class Optimizers:
    """All optimizers of a run, stepped together.

    ``lr_scales``: the factor of each parameter group on the scheduled learning rate, in order.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer], lr_scales: Sequence[float], peak_rate: float):
        self.members = list(members)
        self.peak_rate = peak_rate
        """The recipe's learning rate, which is the peak of the schedule."""
        self._lr_scales = list(lr_scales)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.members for group in optimizer.param_groups]

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of all groups, each with its factor, for the next step."""
        for group, scale in zip(self.groups, self._lr_scales, strict=True):
            group["lr"] = rate * scale

    def step(self, finite: torch.Tensor) -> None:
        """Take one step, or none if ``finite`` (a bool on the device, the same on all ranks) is false.

        Fused kernels and our Muon check it on the device. Other optimizers read it, which waits for a GPU.
        """
        for optimizer in self.members:
            if can_skip_on_device(optimizer):
                device = optimizer.param_groups[0]["params"][0].device
                optimizer.grad_scale = None  # type: ignore[attr-defined]
                optimizer.found_inf = (~finite).float().to(device)  # type: ignore[attr-defined]
                optimizer.step()
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
            elif finite.item():
                optimizer.step()

    def zero_grad(self) -> None:
        """Free the gradients."""
        for optimizer in self.members:
            optimizer.zero_grad(set_to_none=True)


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if a step can be skipped on the device (torch's protocol for loss scaling)."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def build_optimizers(
    section: dict[str, Any], groups: Sequence[ParameterGroup], policy: TargetPolicy, model: nn.Module
) -> Optimizers:
    """Build the recipe's optimizer over the parameters of ``model`` (unwrap, or sharded by FSDP2).

    Muon updates the hidden matrices, and ``optimizer.others`` the rest. Raises
    BadInput if a group's pattern matches no parameter.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    check_patterns(groups, [name for name, _ in named])
    target = _optimizer_class(section, policy)
    rate = section.get("lr", _default(target, "lr", 1e-3))
    if target is not ShardedMuon:
        optimizer, scales = _build_one(section, groups, policy, named, rate)
        return Optimizers([optimizer], scales, rate)

    hidden_names = hidden_matrices(model)
    hidden = [(name, parameter) for name, parameter in named if name in hidden_names]
    rest = [(name, parameter) for name, parameter in named if name not in hidden_names]
    others = section.get("others")
    if others is None and rest:
        raise BadInput(
            "optimizer: Muon updates only hidden matrices. Add optimizer.others for the other parameters, "
            "such as {_target_: torch.optim.AdamW, lr: 3e-4}"
        )
    muon_section = {key: value for key, value in section.items() if key != "others"}
    muon, muon_scales = _build_one(muon_section, groups, policy, hidden, rate)
    if others is None:
        return Optimizers([muon], muon_scales, rate)
    other, other_scales = _build_one(others, groups, policy, rest, rate)
    return Optimizers([muon, other], [*muon_scales, *other_scales], rate)


def check_patterns(groups: Sequence[ParameterGroup], names: Sequence[str]) -> None:
    """Raise BadInput if a group's pattern matches no parameter, because the group would have no effect."""
    for i, group in enumerate(groups):
        if not any(fnmatchcase(name, group.match) for name in names):
            raise BadInput(
                f"parameter_groups.{i}.match: {group.match!r} matches no parameter of the model; "
                f"{did_you_mean(group.match, names)}"
            )


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of two-dimensional parameters inside the blocks, without embeddings and head."""
    inside = {id(parameter) for block in blocks(model) for parameter in block.parameters() if parameter.dim() == 2}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def _optimizer_class(section: dict[str, Any], policy: TargetPolicy) -> Any:
    """Return the class that a section names; our Muon stands for torch's, which torch before 2.9 does not have."""
    return ShardedMuon if section["_target_"] == MUON else resolve(section["_target_"], policy)


def _build_one(
    section: dict[str, Any], groups: Sequence[ParameterGroup], policy: TargetPolicy, named: NamedParameters, rate: float
) -> tuple[torch.optim.Optimizer, list[float]]:
    """Build one optimizer over ``named``; return it and its groups' learning rates as multiples of ``rate``."""
    target = _optimizer_class(section, policy)
    section_rate = section.get("lr", _default(target, "lr", rate))
    takes_weight_decay = "weight_decay" in inspect.signature(target).parameters
    torch_groups, rates = parameter_groups(named, groups, takes_weight_decay, section_rate)
    scales = [group_rate / rate if rate else 1.0 for group_rate in rates]
    if target is ShardedMuon:
        try:
            return ShardedMuon(torch_groups, **_keywords(section)), scales
        except ValueError as error:
            raise BadInput(f"{MUON}: {error}") from error

    extra: dict[str, Any] = {}
    has_fused_kernels = target in [getattr(torch.optim, name) for name in FUSED_OPTIMIZERS]
    if has_fused_kernels and not {"fused", "foreach", "differentiable"} & section.keys():
        extra["fused"] = True
    return build(section, policy, torch_groups, **extra), scales


def _keywords(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in section.items() if key != "_target_"
    }


def _default(target: Any, name: str, fallback: float) -> float:
    value = getattr(inspect.signature(target).parameters.get(name), "default", fallback)
    return float(value) if isinstance(value, (int, float)) else fallback


def parameter_groups(
    named: NamedParameters, groups: Sequence[ParameterGroup], takes_weight_decay: bool, rate: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """Split parameters by learning rate and weight decay; return torch's groups and their learning rates.

    Matrices and embeddings decay as the recipe says; vectors (norms, biases) do
    not decay. The first of ``groups`` that matches a parameter's name overrides both.
    """
    parameters_by_setting: dict[tuple[float, float | None], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = None if parameter.dim() >= 2 else 0.0
        parameter_rate = rate
        group = next((group for group in groups if fnmatchcase(name, group.match)), None)
        if group is not None:
            decay = decay if group.weight_decay is None else group.weight_decay
            parameter_rate = rate * group.lr_scale if group.lr is None else group.lr
        setting = (parameter_rate, decay if takes_weight_decay else None)
        parameters_by_setting.setdefault(setting, []).append(parameter)

    torch_groups: list[dict[str, Any]] = []
    for (_, decay), parameters in parameters_by_setting.items():
        torch_groups.append({"params": parameters} if decay is None else {"params": parameters, "weight_decay": decay})
    return torch_groups, [group_rate for group_rate, _ in parameters_by_setting]


# --- clipping -------------------------------------------------------------------------------------


def clip_gradients(parameters: Iterable[nn.Parameter], section: ClipGradNorm | None) -> torch.Tensor:
    """Return the 2-norm of the full gradient over all shards; scale the gradient down to ``max_norm`` if given.

    Like ``torch.nn.utils.clip_grad_norm_``, which rejects gradients with
    different shardings (pytorch#180346). Here only local shards are touched, and
    shards of the same sharding are summed over the ranks that share them.
    """
    gradients_by_mesh: dict[ShardingMesh | None, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradients_by_mesh.setdefault(_sharding_mesh(parameter.grad), []).append(_local(parameter.grad))
    squares = []
    for mesh, gradients in gradients_by_mesh.items():
        local_square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        squares.append(_sum_over(local_square, mesh))
    norm = torch.stack(squares).sum().sqrt()
    if section is not None:
        scale = (section.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradients in gradients_by_mesh.values():
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
    return norm


def _sharding_mesh(gradient: torch.Tensor) -> ShardingMesh | None:
    """Return the mesh and dimensions over which ``gradient`` is sharded; None if every rank has all of it."""
    if not isinstance(gradient, DTensor):
        return None
    dims = tuple(i for i, placement in enumerate(gradient.placements) if not placement.is_replicate())
    return gradient.device_mesh, dims


def _sum_over(square: torch.Tensor, sharding: ShardingMesh | None) -> torch.Tensor:
    if sharding is not None:
        mesh, dims = sharding
        for dim in dims:
            dist.all_reduce(square, group=mesh.get_group(dim))
    return square


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
