"""Collectives with gradients, over a process group of n ranks: what tensor and context parallelism are made of.

Ours call torch.distributed's public functions, which work over gloo and NCCL,
eagerly and in ``torch.compile``. Those that come with gradients in torch
(``torch.distributed.nn``, functional collectives) are deprecated or private.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup
GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Named so from torch 2.13 on, which warns of the older names."""


def _summed(x: torch.Tensor, group: Group) -> torch.Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _stacked(x: torch.Tensor, group: Group) -> torch.Tensor:
    out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    GATHER(out, x.contiguous(), group=group)
    return out.unflatten(0, (group.size(), x.shape[0]))


def _scattered(x: torch.Tensor, group: Group) -> torch.Tensor:
    out = x.new_empty(x.shape[1:])
    REDUCE_SCATTER(out, x.contiguous().flatten(0, 1), group=group)
    return out


def _exchanged(x: torch.Tensor, group: Group) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _summed(grads[0], ctx.group), None


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _stacked(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _scattered(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _stacked(grads[0], ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _exchanged(grads[0], ctx.group), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return x.chunk(group.size(), dim)[group.rank()].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return joined(_stacked(grads[0], ctx.group), ctx.dim), None, None


def total(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of all ranks' ``x``, on all of them; each uses it alike, so gradients pass as they are."""
    return _Sum.apply(x, group)


def share(x: torch.Tensor, group: Group) -> torch.Tensor:
    """``x``, the same on all ranks, for each to use differently: its gradient is the sum of theirs."""
    return _Share.apply(x, group)


def stack(x: torch.Tensor, group: Group) -> torch.Tensor:
    """All ranks' ``x (...)`` as ``(n, ...)``; a rank's gradient is the sum of what all of them found for its part."""
    return _Stack.apply(x, group)


def gather(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """All ranks' ``x``, side by side along ``dim``; gradients as of :func:`stack`."""
    return joined(stack(x, group), dim)


def scatter(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """This rank's part along ``dim`` of the sum of all ranks' ``x``."""
    return _Scatter.apply(x.unflatten(dim, (group.size(), -1)).movedim(dim, 0), group)


def exchange(x: torch.Tensor, group: Group) -> torch.Tensor:
    """``x (n, ...)``: its i-th part goes to rank i, whose part for this rank comes instead."""
    return _Exchange.apply(x, group)


def part(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """This rank's part along ``dim`` of ``x``, which is the same on all ranks; the gradient is put together from all of them."""
    return _Part.apply(x, dim, group)


def joined(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``(n, ...)`` to its n parts side by side along ``dim``."""
    return x.movedim(0, dim).flatten(dim, dim + 1)
