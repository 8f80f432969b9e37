"""Tensor parallelism: each rank holds a shard of every matrix and computes with it.

(Shoeybi et al. 2019, Korthikanti et al. 2022.) Parameters are DTensors, which FSDP2, checkpoints and optimizers
understand. The forward sees the local shard as a plain tensor, so the model's own code runs with fewer heads and
narrower layers, and collectives run where the plan says. A model's plan maps patterns of module names to one of
:data:`STYLES`:

``enter``
    A module whose input all ranks share: it contains column layers.
``column``, ``row``
    Linear layers sharded by outputs or by inputs; after ``row`` the ranks' results are summed.
``fused``
    A column layer with query, key and value stacked; each is sharded by heads. Its parameter is stored like any other
    matrix and its rows are regrouped in the forward, so checkpoints do not depend on ``tp_size``.
``vocabulary``
    The token embedding, sharded by rows.
``positions``
    A position embedding, replicated.
``summed``
    A replicated module between matrices, such as a norm of each head: the ranks' gradients are summed.
``head``
    A linear layer that returns logits. A model that multiplies with the embedding calls ``self.head(x, weight)`` before
    that instead (see :func:`gathered_head`).

Everything else is replicated. With ``sequence_parallel``, everything between the matrices (norms, dropout, the residual
stream) is sharded by positions: that reduces its memory, too, and sends the same number of bytes.

The loss is always sharded by positions: each rank gathers the head's weight and computes the logits of its share of the
positions. So any loss function works, no logits are sent, and each rank holds only its share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from amlaunch.recipes.errors import BadInput
from amlaunch.trainer.models.base import config_value
from amlaunch.trainer.parallel.collectives import (
    Group,
    all_gather_concat,
    all_gather_stacked,
    all_reduce_sum,
    all_to_all,
    copy_to_ranks,
    local_chunk,
    reduce_scatter,
)
from amlaunch.trainer.performance.activation_checkpointing import keep_recomputed_blocks_eager

HF_STYLES = {
    "colwise": "shared_column",
    "rowwise": "row",
    "colwise_rep": "head",
    "colwise_gather_output": "head",
    "embedding_rowwise": "vocabulary",
    "replicated_with_grad_allreduce": "summed",
}
"""Styles of transformers, mapped to ours."""


@dataclass(frozen=True)
class TensorParallelGroup:
    """The ranks that share a model's matrices, and the collectives around them."""

    mesh: DeviceMesh
    """One-dimensional mesh of the ranks."""
    sequence_parallel: bool

    @property
    def group(self) -> Group:
        """Process group of the ranks."""
        return self.mesh.get_group()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """Index of this rank in the group."""
        return self.mesh.get_local_rank()

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Return all positions of ``x (B, T, C)`` on all ranks, as input of sharded matrices."""
        return all_gather_concat(x, 1, self.group) if self.sequence_parallel else copy_to_ranks(x, self.group)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Sum all ranks' ``x (B, T, C)``; with sequence parallelism, return the sum at local positions only."""
        return reduce_scatter(x, 1, self.group) if self.sequence_parallel else all_reduce_sum(x, self.group)

    def loss_positions(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x (B, T, C)`` at the positions whose loss this rank computes."""
        return x if self.sequence_parallel else local_chunk(x, 1, self.group)


# --- parameters -----------------------------------------------------------------------------------------


def shard_parameter(
    module: nn.Module, name: str, dim: int | None, ranks: TensorParallelGroup, module_name: str
) -> None:
    """Turn a parameter into a DTensor, sharded along ``dim`` or replicated. Raises BadInput if it does not divide."""
    parameter = module._parameters[name]
    if parameter is None or isinstance(parameter, DTensor):
        return
    if dim is not None and parameter.shape[dim] % ranks.size:
        raise BadInput(
            f"distributed.tp_size {ranks.size} does not divide dimension {dim} of {module_name}.{name} "
            f"{tuple(parameter.shape)}; change one of them"
        )
    local = parameter.data if dim is None else parameter.data.chunk(ranks.size, dim)[ranks.rank].clone()
    placement: Placement = Replicate() if dim is None else Shard(dim)
    sharded = DTensor.from_local(local, ranks.mesh, [placement], run_check=False)
    module._parameters[name] = nn.Parameter(sharded, requires_grad=parameter.requires_grad)


Transform = Callable[[torch.Tensor, TensorParallelGroup], torch.Tensor]
Forward = Callable[[Any, torch.Tensor], torch.Tensor]


def use_local_parameters(
    module: nn.Module,
    ranks: TensorParallelGroup,
    partial_gradients: bool = False,
    transform: Transform | None = None,
    forward: Forward | None = None,
) -> None:
    """Make ``module`` read the local shards of its parameters as plain tensors.

    ``transform`` is applied to each local shard and ``forward`` replaces the module's forward. ``partial_gradients``:
    each rank uses replicated parameters for its own positions only, so their gradients are summed.
    """
    # An attribute of the module and not of its class: a process can have several meshes, one after the other.
    module.tp_ranks = ranks  # type: ignore[assignment]
    base: Any = type(module)
    module.__class__ = local_parameter_class(base, tuple(module._parameters), partial_gradients, transform, forward)


@cache
def local_parameter_class(
    base: type[nn.Module],
    names: tuple[str, ...],
    partial_gradients: bool,
    transform: Transform | None,
    forward: Forward | None,
) -> type[nn.Module]:
    """Derive a class from ``base`` whose parameters ``names`` read as local shards.

    Modules that are alike share one class: otherwise dynamo would compile each block anew and give up after eight.
    """

    def reader(name: str) -> property:
        def read(self: Any) -> Any:
            return local_parameter(self._parameters[name], self.tp_ranks, partial_gradients, transform)

        return property(read)

    members: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    if forward is not None:
        members["forward"] = forward
    return type(base.__name__, (base,), {name: reader(name) for name in names} | members)


def local_parameter(
    parameter: torch.Tensor | None,
    ranks: TensorParallelGroup,
    partial_gradients: bool = False,
    transform: Transform | None = None,
) -> Any:
    """Return the local shard of a parameter in the forward.

    Outside of it, FSDP2 has sharded the parameter over a second mesh dimension, and it is returned unchanged.
    """
    if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:
        return parameter
    local = parameter.to_local(grad_placements=[Partial()] if partial_gradients else None)
    return local if transform is None else transform(local, ranks)


# --- styles ---------------------------------------------------------------------------------------------


def _enter(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    module.register_forward_pre_hook(lambda _, inputs: (ranks.enter(inputs[0]), *inputs[1:]))


def _shard_rows(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    for parameter in ("weight", "bias"):
        shard_parameter(module, parameter, 0, ranks, name)


def _column(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    _shard_rows(module, name, ranks)
    use_local_parameters(module, ranks)


def _shared_column(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    _column(module, name, ranks)
    _enter(module, name, ranks)


def _fused(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    _shard_rows(module, name, ranks)
    use_local_parameters(module, ranks, transform=_regroup_query_key_value)


def _regroup_query_key_value(rows: torch.Tensor, ranks: TensorParallelGroup) -> torch.Tensor:
    return regroup_fused_rows(rows, 3, ranks.group)


def regroup_fused_rows(rows: torch.Tensor, matrices: int, group: Group) -> torch.Tensor:
    """Exchange this rank's consecutive rows ``(R / n, ...)`` of stacked matrices for its rows of each matrix.

    ``matrices * n`` divides R, so rows move in blocks of ``R / (matrices * n)``.
    """
    ranks, rank = group.size(), group.rank()
    # Block b of rank r has the number r * matrices + b; each matrix consists of n consecutive blocks.
    blocks = rows.unflatten(0, (matrices, -1))
    destinations = [[(r * matrices + b) % ranks for b in range(matrices)] for r in range(ranks)]
    # sum, because torch.compile of torch 2.8 cannot trace list.count
    slots = max(sum(d == destination for d in row) for row in destinations for destination in range(ranks))
    padding = torch.zeros_like(blocks[0])

    outgoing = []
    for destination in range(ranks):
        selected = [blocks[b] for b in range(matrices) if destinations[rank][b] == destination]
        outgoing.append(torch.stack(selected + [padding] * (slots - len(selected))))
    incoming = all_to_all(torch.stack(outgoing), group)

    # In the order of block numbers, and so of the matrices.
    return torch.cat(
        [incoming[r, slot] for r in range(ranks) for slot in range(sum(d == rank for d in destinations[r]))]
    )


def _row(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    shard_parameter(module, "weight", 1, ranks, name)
    shard_parameter(module, "bias", None, ranks, name)
    use_local_parameters(module, ranks, forward=_row_forward)


def _row_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.tp_ranks.leave(F.linear(x, self.weight))
    bias = local_parameter(self._parameters["bias"], self.tp_ranks, self.tp_ranks.sequence_parallel)
    return y if bias is None else y + bias


def _vocabulary(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    shard_parameter(module, "weight", 0, ranks, name)
    module.first_row = module._parameters["weight"].to_local().shape[0] * ranks.rank  # type: ignore[union-attr]
    use_local_parameters(module, ranks, forward=_vocabulary_forward)


def _vocabulary_forward(self: Any, input_ids: torch.Tensor) -> torch.Tensor:
    weight = self.weight
    row = input_ids - self.first_row
    is_local = (row >= 0) & (row < weight.shape[0])
    embedded = F.embedding(torch.where(is_local, row, 0), weight)
    return self.tp_ranks.leave(embedded * is_local.unsqueeze(-1))


def _positions(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    _replicated(module, name, ranks)
    if ranks.sequence_parallel:
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0].chunk(ranks.size, -1)[ranks.rank],))


def _head(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    _shard_rows(module, name, ranks)
    use_local_parameters(module, ranks, forward=_head_forward)


def _head_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    bias = self.bias
    x, weight = gathered_head(x, self.weight, ranks=self.tp_ranks)
    return F.linear(x, weight, None if bias is None else _gather_rows(bias, self.tp_ranks))


def _replicated(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    _replicate(module, name, ranks, partial_gradients=ranks.sequence_parallel)


def _summed(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    _replicate(module, name, ranks, partial_gradients=True)


def _replicate(module: nn.Module, name: str, ranks: TensorParallelGroup, partial_gradients: bool) -> None:
    for parameter in module._parameters:
        shard_parameter(module, parameter, None, ranks, name)
    use_local_parameters(module, ranks, partial_gradients)


def gathered_head(
    x: torch.Tensor, weight: torch.Tensor, *, ranks: TensorParallelGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states ``x (B, T, C)`` at this rank's loss positions, and all rows of the head's sharded weight."""
    return ranks.loss_positions(x), _gather_rows(weight, ranks)


def _gather_rows(x: torch.Tensor, ranks: TensorParallelGroup) -> torch.Tensor:
    return all_gather_stacked(x, ranks.group).flatten(0, 1)


STYLES: dict[str, Callable[[nn.Module, str, TensorParallelGroup], None]] = {
    "enter": _enter,
    "column": _column,
    "shared_column": _shared_column,
    "fused": _fused,
    "row": _row,
    "vocabulary": _vocabulary,
    "positions": _positions,
    "head": _head,
    "whole": _replicated,
    "summed": _summed,
}


# --- models ---------------------------------------------------------------------------------------------


def apply_tensor_parallel(model: nn.Module, ranks: TensorParallelGroup) -> None:
    """Shard the parameters of ``model`` by its plan. Raises BadInput if it has no plan or does not divide."""
    plan = tensor_parallel_plan(model, ranks)
    _check_heads(model, ranks.size)
    tied = _tied_parameters(model)
    for name, module in list(model.named_modules()):
        style = next((style for pattern, style in plan.items() if fnmatchcase(name, pattern)), None)
        if style is not None:
            STYLES[style](module, name, ranks)
        parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
        if not all(isinstance(parameter, DTensor) for parameter in parameters):
            _replicated(module, name, ranks)
    _tie_parameters(model, tied)

    # For meshes of DTensors torch 2.13 saves the state of the CPU's generator, which attention uses.
    if ranks.mesh.device_type == "cpu":
        keep_recomputed_blocks_eager(model)
    if hasattr(model, "head"):
        model.head = partial(gathered_head, ranks=ranks)  # type: ignore[assignment]
    elif "head" not in plan.values():
        model.register_forward_hook(lambda _, __, output: _logits_at_loss_positions(output, ranks))


def tensor_parallel_plan(model: nn.Module, ranks: TensorParallelGroup) -> dict[str, str]:
    """Map patterns of module names to styles: the model's ``tp_plan``, or ``_tp_plan`` of a transformers model."""
    name = type(model).__name__
    plan = getattr(model, "tp_plan", None) if not hasattr(model, "set_attn_implementation") else None
    if plan:
        return dict(plan)

    hf_plan = getattr(model, "_tp_plan", None) or {}
    if not hf_plan:
        raise BadInput(
            f"distributed.tp_size: {name} has no plan for tensor parallelism. Set tp_size: 1, "
            "or give the model a tp_plan (see amlaunch.trainer.parallel.tensor_parallel)"
        )
    if ranks.sequence_parallel:
        raise BadInput(
            f"distributed.sequence_parallel: {name} uses the plan of transformers, which does not support it; "
            "set it to false"
        )
    unsupported = sorted(set(hf_plan.values()) - HF_STYLES.keys())
    if unsupported:
        raise BadInput(
            f"distributed.tp_size: the plan of {name} has unsupported tensor-parallel styles: "
            f"{', '.join(unsupported)}. Set tp_size: 1"
        )
    plan = {pattern: HF_STYLES[style] for pattern, style in hf_plan.items()}
    embedding = _tied_embedding(model)
    return plan if embedding is None else {**plan, embedding: "vocabulary"}


def _tied_embedding(model: Any) -> str | None:
    """Return the name of the token embedding if it is tied to the head: then both must be sharded by rows."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs is None or outputs is None or inputs.weight is not outputs.weight:
        return None
    return next(name for name, module in model.named_modules() if module is inputs)


def _check_heads(model: nn.Module, size: int) -> None:
    for names in (("num_attention_heads", "n_head"), ("num_key_value_heads",)):
        heads = config_value(model, *names)
        if heads is not None and heads % size:
            raise BadInput(f"distributed.tp_size {size} does not divide model.{names[-1]} {heads}; change one of them")


ParameterOwners = list[tuple[nn.Module, str]]
"""The modules that share one parameter, and its name in each."""


def _parameters_with_owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _tied_parameters(model: nn.Module) -> list[ParameterOwners]:
    """Return the owners of each parameter that has several."""
    owners: dict[int, ParameterOwners] = {}
    for module, name, parameter in _parameters_with_owners(model):
        owners.setdefault(id(parameter), []).append((module, name))
    return [modules for modules in owners.values() if len(modules) > 1]


def _tie_parameters(model: nn.Module, tied: list[ParameterOwners]) -> None:
    for (first_module, first_name), *others in tied:
        shared: Any = first_module._parameters[first_name]
        for module, name in others:
            parameter: Any = module._parameters[name]
            if parameter.placements != shared.placements:
                raise BadInput(
                    f"distributed.tp_size: the plan of {type(model).__name__} shards a tied weight in two different "
                    "ways. Set tp_size: 1"
                )
            module._parameters[name] = shared


def _logits_at_loss_positions(output: Any, ranks: TensorParallelGroup) -> Any:
    """Reduce the output of a model with a replicated head to the logits at this rank's loss positions."""
    if isinstance(output, torch.Tensor):
        return ranks.loss_positions(output)
    output.logits = ranks.loss_positions(output.logits)
    return output
