"""Differentiable collectives over a process group of n ranks, used by tensor and context parallelism.

They call torch.distributed's public functions, which work over gloo and NCCL, eagerly and in ``torch.compile``. Torch's
own differentiable collectives (``torch.distributed.nn``, functional collectives) are deprecated or private.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from amlaunch.trainer.torch_features import all_gather_single, reduce_scatter_single

Group = dist.ProcessGroup


def _reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _gather(x: torch.Tensor, group: Group) -> torch.Tensor:
    out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    all_gather_single(out, x.contiguous(), group=group)
    return out.unflatten(0, (group.size(), x.shape[0]))


def _scatter_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    out = x.new_empty(x.shape[1:])
    reduce_scatter_single(out, x.contiguous().flatten(0, 1), group=group)
    return out


def _swap(x: torch.Tensor, group: Group) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return _reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _reduce(grads[0], ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _scatter_sum(grads[0], ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _scatter_sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _gather(grads[0], ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _swap(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _swap(grads[0], ctx.group), None


class _LocalChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return x.chunk(group.size(), dim)[group.rank()].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _concat(_gather(grads[0], ctx.group), ctx.dim), None, None


def all_reduce_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the sum of all ranks' ``x`` on all ranks; all use it alike, so gradients pass unchanged."""
    return _AllReduce.apply(x, group)


def copy_to_ranks(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return ``x``, equal on all ranks, for each rank to use differently; the gradient is the sum over the ranks."""
    return _Copy.apply(x, group)


def all_gather_stacked(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Stack all ranks' ``x (...)`` to ``(n, ...)``; each rank's gradient is the sum of all ranks' gradients for it."""
    return _AllGather.apply(x, group)


def all_gather_concat(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """Concatenate all ranks' ``x`` along ``dim``; gradients as in :func:`all_gather_stacked`."""
    return _concat(all_gather_stacked(x, group), dim)


def reduce_scatter(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """Return this rank's chunk along ``dim`` of the sum of all ranks' ``x``."""
    return _ReduceScatter.apply(x.unflatten(dim, (group.size(), -1)).movedim(dim, 0), group)


def all_to_all(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Send the i-th item of ``x (n, ...)`` to rank i, and return the items that the ranks sent to this one."""
    return _AllToAll.apply(x, group)


def local_chunk(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """Return this rank's chunk along ``dim`` of ``x``, equal on all ranks; the gradient is gathered from all ranks."""
    return _LocalChunk.apply(x, dim, group)


def _concat(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Concatenate the n items of ``(n, ...)`` along ``dim``."""
    return x.movedim(0, dim).flatten(dim, dim + 1)
