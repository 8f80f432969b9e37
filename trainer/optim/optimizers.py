"""The optimizers of a recipe, the learning rate as a function of the step, and clipping."""

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

from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.format.schema import ClipGradNorm, LRScheduler, ParameterGroup
from amlaunch.recipes.format.targets import TargetPolicy, build, resolve
from amlaunch.trainer.models.base import blocks

FUSED = ("AdamW", "Adam")
"""Optimizers of torch whose fused kernels take "leave everything as it is" from the device, on GPU and CPU."""
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "minus_sqrt": lambda done: 1.0 - math.sqrt(done),
    "exponential": lambda done: 2.0 * 0.5**done - 1.0,
}
"""What is left of the way from the peak down to the floor when a part of it, 0 to 1, is done."""
WSD_SHARE = 0.2
"""Of the steps, where the recipe does not say how long WSD decays (Hägele et al. 2024)."""


# --- the rate -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step; ``section`` None is a constant rate."""

    section: LRScheduler | None
    peak: float
    last_step: int
    step_tokens: int = 1

    def __post_init__(self) -> None:
        if self.section and self._given("decay") and self.end < self.warmup:
            raise BadInput(
                f"lr_scheduler: the decay ends with step {self.end}, before the warmup does, with step {self.warmup}"
            )

    def _given(self, what: str) -> int | None:
        """``lr_<what>_steps``, or ``lr_<what>_tokens`` as steps, rounded up."""
        tokens = getattr(self.section, f"lr_{what}_tokens")
        return -(-tokens // self.step_tokens) if tokens is not None else getattr(self.section, f"lr_{what}_steps")

    @property
    def warmup(self) -> int:
        """The step that has the peak."""
        return self._given("warmup") or 0

    @property
    def end(self) -> int:
        """The step that has the floor."""
        return self._given("decay") or self.last_step

    @property
    def decay_begins(self) -> int:
        """The last step that still has the peak."""
        if self.section is None or self.section.lr_decay_style != "WSD":
            return self.warmup
        return max(self.warmup, self.end - (self._given("wsd_decay") or math.ceil(WSD_SHARE * self.end)))

    def rate(self, step: int) -> float:
        """The rate that step ``step`` (the first is 1) is taken with.

        Linear from ``init_lr`` to the peak, reached at the end of the warmup;
        then down to ``min_lr`` in the section's style, and it stays there.
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
        begin = self.decay_begins
        done = min(1.0, max(0, step - begin) / max(1, self.end - begin))
        style = section.lr_wsd_decay_style if section.lr_decay_style == "WSD" else section.lr_decay_style
        return section.min_lr + (self.peak - section.min_lr) * DECAYS[style](done)


# --- the optimizers -------------------------------------------------------------------------------


class Optimizers:
    """All optimizers of a run, stepped together.

    ``scales``: what each parameter group multiplies the schedule's rate by, in their order.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer], scales: Sequence[float], rate: float):
        self.parts = list(parts)
        self.rate = rate
        """The recipe's own, the peak of the schedule."""
        self._scales = list(scales)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all of them."""
        return [group for part in self.parts for group in part.param_groups]

    def set_rate(self, rate: float) -> None:
        """Use ``rate``, each group scaled, from the next step on."""
        for group, scale in zip(self.groups, self._scales, strict=True):
            group["lr"] = rate * scale

    def step(self, finite: torch.Tensor) -> None:
        """One step, or none where ``finite`` (a bool on the device, the same on all ranks) is false.

        Fused kernels and our Muon look at it on the device; for the others it is read, which waits for a GPU.
        """
        for part in self.parts:
            if can_skip(part):
                part.grad_scale = None  # type: ignore[attr-defined]
                part.found_inf = (~finite).float().to(part.param_groups[0]["params"][0].device)  # type: ignore[attr-defined]
                part.step()
                del part.grad_scale, part.found_inf  # type: ignore[attr-defined]
            elif finite.item():
                part.step()

    def zero_grad(self) -> None:
        """Free the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step can be called off on the device (torch's own protocol, made for loss scaling)."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


Named = list[tuple[str, nn.Parameter]]


def build_optimizers(
    section: dict[str, Any], groups: Sequence[ParameterGroup], policy: TargetPolicy, model: nn.Module
) -> Optimizers:
    """The recipe's optimizer over the parameters of ``model`` (bare, or sharded by FSDP2).

    Muon takes the hidden matrices, ``optimizer.others`` the rest. Raises
    BadInput where a group's pattern fits no parameter.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    check_patterns(groups, [name for name, _ in named])
    target = resolve(section["_target_"], policy)
    rate = section.get("lr", _default(target, "lr", 1e-3))
    if target is not getattr(torch.optim, "Muon", None):
        part, scales = _one(section, groups, policy, named, rate)
        return Optimizers([part], scales, rate)
    hidden = hidden_matrices(model)
    others = section.get("others")
    if others is None and any(name not in hidden for name, _ in named):
        raise BadInput(
            "optimizer: Muon is for hidden matrices; add optimizer.others for the rest, such as {_target_: torch.optim.AdamW, lr: 3e-4}"
        )
    muon = {key: value for key, value in section.items() if key != "others"}
    first, scales = _one(muon, groups, policy, [pair for pair in named if pair[0] in hidden], rate)
    if others is None:
        return Optimizers([first], scales, rate)
    second, more = _one(others, groups, policy, [pair for pair in named if pair[0] not in hidden], rate)
    return Optimizers([first, second], [*scales, *more], rate)


def check_patterns(groups: Sequence[ParameterGroup], names: Sequence[str]) -> None:
    """BadInput where a pattern fits no parameter: it would do nothing, without a word."""
    for i, group in enumerate(groups):
        if not any(fnmatchcase(name, group.match) for name in names):
            raise BadInput(
                f"parameter_groups.{i}.match {group.match!r} fits no parameter of the model; {did_you_mean(group.match, names)}"
            )


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the two-dimensional parameters inside the blocks: neither embeddings nor the head, which Muon is not for."""
    inside = {id(parameter) for block in blocks(model) for parameter in block.parameters() if parameter.dim() == 2}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def _one(
    section: dict[str, Any], groups: Sequence[ParameterGroup], policy: TargetPolicy, named: Named, rate: float
) -> tuple[torch.optim.Optimizer, list[float]]:
    """An optimizer over ``named``, and its groups' rates as multiples of ``rate``."""
    target = resolve(section["_target_"], policy)
    own = section.get("lr", _default(target, "lr", rate))
    decays = "weight_decay" in inspect.signature(target).parameters
    made, rates = parameter_groups(named, groups, decays, own)
    extra: dict[str, Any] = {}
    if (
        target in [getattr(torch.optim, name) for name in FUSED]
        and not {"fused", "foreach", "differentiable"} & section.keys()
    ):
        extra["fused"] = True
    if target is getattr(torch.optim, "Muon", None):
        from amlaunch.trainer.optim.muon import ShardedMuon

        return ShardedMuon(made, **_keywords(section)), [mine / rate if rate else 1.0 for mine in rates]
    return build(section, policy, made, **extra), [mine / rate if rate else 1.0 for mine in rates]


def _keywords(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in section.items() if key != "_target_"
    }


def _default(target: Any, name: str, otherwise: float) -> float:
    value = getattr(inspect.signature(target).parameters.get(name), "default", otherwise)
    return float(value) if isinstance(value, (int, float)) else otherwise


def parameter_groups(
    named: Named, groups: Sequence[ParameterGroup], decays: bool, rate: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """``(groups for the optimizer, their rates)``.

    Matrices and embeddings decay as the recipe says, vectors (norms, biases)
    not at all, where there is weight decay. The first of ``groups`` that fits a
    parameter's name decides over both.
    """
    found: dict[tuple[float, float | None], list[nn.Parameter]] = {}
    for name, parameter in named:
        mine = next((group for group in groups if fnmatchcase(name, group.match)), None)
        decay = mine.weight_decay if mine and mine.weight_decay is not None else None if parameter.dim() >= 2 else 0.0
        own = rate if mine is None else mine.lr if mine.lr is not None else rate * mine.lr_scale
        found.setdefault((own, decay if decays else None), []).append(parameter)
    made = [{"params": found[key], **({} if key[1] is None else {"weight_decay": key[1]})} for key in found]
    return made, [own for own, _ in found]


def clip(parameters: Iterable[nn.Parameter], section: ClipGradNorm | None) -> torch.Tensor:
    """The 2-norm of the whole gradient, all shards together; the gradient is scaled down to ``max_norm`` where given.

    As ``torch.nn.utils.clip_grad_norm_``, which refuses gradients that are
    sharded in several ways (pytorch#180346): here only local parts are touched,
    and those of one way are summed over the ranks that share them.
    """
    found: dict[Any, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            found.setdefault(_shared_by(parameter.grad), []).append(_local(parameter.grad))
    squares = [
        _summed(torch.stack(torch._foreach_norm(parts)).double().square().sum(), where)
        for where, parts in found.items()
    ]
    norm = torch.stack(squares).sum().sqrt()
    if section is not None:
        scale = (section.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parts in found.values():
            torch._foreach_mul_(parts, scale.to(parts[0].dtype))
    return norm


def _shared_by(gradient: torch.Tensor) -> tuple[DeviceMesh, tuple[int, ...]] | None:
    """The mesh, and its dimensions over whose ranks ``gradient`` is dealt out; None: it is whole on each."""
    if not isinstance(gradient, DTensor):
        return None
    return gradient.device_mesh, tuple(
        i for i, placement in enumerate(gradient.placements) if not placement.is_replicate()
    )


def _summed(square: torch.Tensor, where: tuple[DeviceMesh, tuple[int, ...]] | None) -> torch.Tensor:
    for dim in where[1] if where else ():
        dist.all_reduce(square, group=where[0].get_group(dim))  # type: ignore[index]
    return square


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
