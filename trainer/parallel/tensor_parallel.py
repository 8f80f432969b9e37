"""Tensor parallelism: each rank holds a part of every matrix, and computes with it (Shoeybi et al. 2019, Korthikanti et al. 2022).

Parameters are DTensors, of which FSDP2, checkpoints and optimizers know; the
forward sees this rank's part as a plain tensor, so the model's own code runs
on fewer heads and narrower layers, and collectives stand where the plan says.
A model's plan maps patterns of module names to one of :data:`STYLES`:

``enter``
    A module whose input the ranks share: it holds column layers.
``column``, ``row``
    Linear layers: outputs, or inputs, are dealt out; after ``row`` the ranks' sums are added.
``fused``
    A column layer that holds query, key and value, one after the other: each is
    dealt out by heads. Its parameter is stored like any other matrix, and rows
    change places in the forward; so checkpoints do not depend on ``tp_size``.
``vocabulary``
    The token embedding: rows are dealt out.
``positions``
    An embedding of positions, whole on all ranks.
``summed``
    Whole on all ranks, but between matrices, such as a norm of each head: the ranks' gradients are added.
``head``
    A linear layer that gives logits. A model that multiplies with the embedding
    calls ``self.head(x, weight)`` before instead (see :func:`whole_head`).

Everything else is whole on all ranks. With ``sequence_parallel`` what lies
between the matrices (norms, dropout, the residual stream) is dealt out by
positions: then its memory shrinks as well, for the same bytes on the wire.

The loss is dealt out by positions, in both cases: each rank gathers the head's
weight and has the logits of its own part of the positions. So any loss works,
no logits travel, and no rank has more than its part of them.
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
from amlaunch.trainer.parallel.collectives import Group, exchange, gather, part, scatter, share, stack, total
from amlaunch.trainer.performance.activation_checkpointing import keep_recomputed_blocks_eager

HF_STYLES = {
    "colwise": "shared_column",
    "rowwise": "row",
    "colwise_rep": "head",
    "colwise_gather_output": "head",
    "embedding_rowwise": "vocabulary",
    "replicated_with_grad_allreduce": "summed",
}
"""What transformers calls ours."""


@dataclass(frozen=True)
class TensorParallelGroup:
    """The ranks that share the model, and how."""

    mesh: DeviceMesh
    """One dimension."""
    sequence: bool

    @property
    def group(self) -> Group:
        """Their process group."""
        return self.mesh.get_group()

    @property
    def size(self) -> int:
        """Their number."""
        return self.mesh.size()

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """From between the matrices into them: all positions ``(B, T, C)``, on all ranks."""
        return gather(x, 1, self.group) if self.sequence else share(x, self.group)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Out of the matrices: the sum of all ranks' ``x (B, T, C)``, of this rank's positions where they are dealt out."""
        return scatter(x, 1, self.group) if self.sequence else total(x, self.group)

    def own_positions(self, x: torch.Tensor) -> torch.Tensor:
        """``x (B, T, C)`` from between the matrices, of the positions that this rank computes the loss of."""
        return x if self.sequence else part(x, 1, self.group)


# --- parameters -----------------------------------------------------------------------------------------


def shard_parameter(module: nn.Module, name: str, dim: int | None, ranks: TensorParallelGroup, says: str) -> None:
    """Make a parameter a DTensor: this rank's part along ``dim``, or whole. Raises BadInput where it does not divide."""
    parameter = module._parameters[name]
    if parameter is None or isinstance(parameter, DTensor):
        return
    if dim is not None and parameter.shape[dim] % ranks.size:
        raise BadInput(
            f"distributed.tp_size {ranks.size} does not divide the {parameter.shape[dim]} of {says}.{name} {tuple(parameter.shape)}"
        )
    local = (
        parameter.data if dim is None else parameter.data.chunk(ranks.size, dim)[ranks.mesh.get_local_rank()].clone()
    )
    placement: Placement = Replicate() if dim is None else Shard(dim)
    spread = DTensor.from_local(local, ranks.mesh, [placement], run_check=False)
    module._parameters[name] = nn.Parameter(spread, requires_grad=parameter.requires_grad)


Change = Callable[[torch.Tensor, TensorParallelGroup], torch.Tensor]
Forward = Callable[[Any, torch.Tensor], torch.Tensor]


def use_local_parameters(
    module: nn.Module,
    ranks: TensorParallelGroup,
    partial_gradients: bool = False,
    change: Change | None = None,
    forward: Forward | None = None,
) -> None:
    """Have ``module`` read this rank's part of its own parameters, a plain tensor, through ``change``; and have it this ``forward``.

    ``partial_gradients``: for whole parameters that each rank uses for its
    positions only, so that their gradients are to be added up.
    """
    module.sharers = ranks  # type: ignore[assignment] # not part of the class: a process can have several meshes, one after the other
    base: Any = type(module)
    module.__class__ = local_parameter_class(base, tuple(module._parameters), partial_gradients, change, forward)


@cache
def local_parameter_class(
    base: type[nn.Module],
    names: tuple[str, ...],
    partial_gradients: bool,
    change: Change | None,
    forward: Forward | None,
) -> type[nn.Module]:
    """The class of such modules. One for all that are alike: dynamo would compile each block for classes of its own, and give up after eight."""

    def reader(name: str) -> property:
        return property(lambda self: local_parameter(self._parameters[name], self.sharers, partial_gradients, change))

    more: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    if forward is not None:
        more["forward"] = forward
    return type(base.__name__, (base,), {name: reader(name) for name in names} | more)


def local_parameter(
    parameter: torch.Tensor | None,
    ranks: TensorParallelGroup,
    partial_gradients: bool = False,
    change: Change | None = None,
) -> Any:
    """This rank's part of a parameter in the forward; outside of it, where FSDP2 has it sharded over a second dimension, it is as it is."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:
        return parameter
    local = parameter.to_local(grad_placements=[Partial()] if partial_gradients else None)
    return local if change is None else change(local, ranks)


# --- styles ---------------------------------------------------------------------------------------------


def _enter(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    module.register_forward_pre_hook(lambda _, inputs: (ranks.enter(inputs[0]), *inputs[1:]))


def _column(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    for parameter in ("weight", "bias"):
        shard_parameter(module, parameter, 0, ranks, name)
    use_local_parameters(module, ranks)


def _shared_column(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    _column(module, name, ranks)
    _enter(module, name, ranks)


def _fused(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    for parameter in ("weight", "bias"):
        shard_parameter(module, parameter, 0, ranks, name)
    use_local_parameters(module, ranks, change=_query_key_value)


def _query_key_value(rows: torch.Tensor, ranks: TensorParallelGroup) -> torch.Tensor:
    return regroup_fused_rows(rows, 3, ranks.group)


def regroup_fused_rows(rows: torch.Tensor, parts: int, group: Group) -> torch.Tensor:
    """From this rank's consecutive rows ``(R / n, ...)`` of ``parts`` stacked matrices to its rows of each of them.

    R is divisible by ``parts * n``, so that rows move in blocks of ``R / (parts * n)``.
    """
    n, me = group.size(), group.rank()
    blocks = rows.unflatten(0, (parts, -1))  # block b of rank r is number r * parts + b of all; matrix p has n of them
    wanted = [[(r * parts + b) % n for b in range(parts)] for r in range(n)]  # the rank that each block is for
    size = max(row.count(to) for row in wanted for to in range(n))
    empty = torch.zeros_like(blocks[0])
    to_send = [[blocks[b] for b in range(parts) if wanted[me][b] == to] for to in range(n)]
    sent = torch.stack([torch.stack(mine + [empty] * (size - len(mine))) for mine in to_send])
    came = exchange(sent, group)
    mine = [
        came[r, i] for r in range(n) for i in range(wanted[r].count(me))
    ]  # in the order of their numbers, so of the matrices
    return torch.cat(mine)


def _row(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    shard_parameter(module, "weight", 1, ranks, name)
    shard_parameter(module, "bias", None, ranks, name)
    use_local_parameters(module, ranks, forward=_row_forward)


def _row_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.sharers.leave(F.linear(x, self.weight))
    bias = local_parameter(self._parameters["bias"], self.sharers, self.sharers.sequence)
    return y if bias is None else y + bias


def _vocabulary(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    shard_parameter(module, "weight", 0, ranks, name)
    module.first_row = module._parameters["weight"].to_local().shape[0] * ranks.mesh.get_local_rank()  # type: ignore[union-attr]
    use_local_parameters(module, ranks, forward=_vocabulary_forward)


def _vocabulary_forward(self: Any, input_ids: torch.Tensor) -> torch.Tensor:
    weight = self.weight
    row = input_ids - self.first_row
    here = (row >= 0) & (row < weight.shape[0])
    found = F.embedding(torch.where(here, row, 0), weight)
    return self.sharers.leave(found * here.unsqueeze(-1))


def _positions(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    _whole(module, name, ranks)
    if ranks.sequence:
        module.register_forward_pre_hook(
            lambda _, inputs: (inputs[0].chunk(ranks.size, -1)[ranks.mesh.get_local_rank()],)
        )


def _head(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    for parameter in ("weight", "bias"):
        shard_parameter(module, parameter, 0, ranks, name)
    use_local_parameters(module, ranks, forward=_head_forward)


def _head_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    bias = self.bias
    return F.linear(
        *gathered_head(x, self.weight, ranks=self.sharers), None if bias is None else _rows(bias, self.sharers)
    )


def _whole(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    for parameter in module._parameters:
        shard_parameter(module, parameter, None, ranks, name)
    use_local_parameters(module, ranks, partial_gradients=ranks.sequence)


def _summed(module: nn.Module, name: str, ranks: TensorParallelGroup) -> None:
    for parameter in module._parameters:
        shard_parameter(module, parameter, None, ranks, name)
    use_local_parameters(module, ranks, partial_gradients=True)


def gathered_head(
    x: torch.Tensor, weight: torch.Tensor, *, ranks: TensorParallelGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of hidden states ``(B, T, C)`` and the rank's rows of the head: those that this rank computes the loss of, and all rows."""
    return ranks.own_positions(x), _rows(weight, ranks)


def _rows(x: torch.Tensor, ranks: TensorParallelGroup) -> torch.Tensor:
    return stack(x, ranks.group).flatten(0, 1)


STYLES: dict[str, Callable[[nn.Module, str, TensorParallelGroup], None]] = {
    "enter": _enter,
    "column": _column,
    "shared_column": _shared_column,
    "fused": _fused,
    "row": _row,
    "vocabulary": _vocabulary,
    "positions": _positions,
    "head": _head,
    "whole": _whole,
    "summed": _summed,
}


# --- models ---------------------------------------------------------------------------------------------


def apply_tensor_parallel(model: nn.Module, ranks: TensorParallelGroup) -> None:
    """Deal out the parameters of ``model`` as its plan says. Raises BadInput where it has none, or it does not divide."""
    plan = tensor_parallel_plan(model, ranks)
    _check_heads(model, ranks.size)
    tied = _tied(model)
    for name, module in list(model.named_modules()):
        style = next((style for pattern, style in plan.items() if fnmatchcase(name, pattern)), None)
        if style is not None:
            STYLES[style](module, name, ranks)
        if not all(
            isinstance(parameter, DTensor) for parameter in module._parameters.values() if parameter is not None
        ):
            _whole(module, name, ranks)
    _tie(model, tied)
    if (
        ranks.mesh.device_type == "cpu"
    ):  # torch 2.13 takes states of the CPU's generator, which attention has, for meshes of DTensors
        keep_recomputed_blocks_eager(model)
    if hasattr(model, "head"):
        model.head = partial(gathered_head, ranks=ranks)  # type: ignore[assignment]
    elif "head" not in plan.values():
        model.register_forward_hook(lambda _, __, output: _own_logits(output, ranks))


def tensor_parallel_plan(model: nn.Module, ranks: TensorParallelGroup) -> dict[str, str]:
    """Patterns of module names to styles: the model's ``tp_plan``, or what transformers' model says in ``_tp_plan``."""
    name = type(model).__name__
    own = getattr(model, "tp_plan", None) if not hasattr(model, "set_attn_implementation") else None
    if own:
        return dict(own)
    theirs = getattr(model, "_tp_plan", None) or {}
    if not theirs:
        raise BadInput(
            f"distributed.tp_size: {name} has no plan for tensor parallelism (tp_plan, see amlaunch.trainer.parallel.tensor_parallel); write tp_size: 1"
        )
    if ranks.sequence:
        raise BadInput(
            f"distributed.sequence_parallel: the plan of {name} is transformers', which knows no dealing out by positions; write false"
        )
    unknown = sorted(set(theirs.values()) - HF_STYLES.keys())
    if unknown:
        raise BadInput(
            f"distributed.tp_size: the plan of {name} has {', '.join(unknown)}, which is not known here; write tp_size: 1"
        )
    plan = {pattern: HF_STYLES[style] for pattern, style in theirs.items()}
    embedding = _tied_embedding(model)
    return plan if embedding is None else {**plan, embedding: "vocabulary"}


def _tied_embedding(model: Any) -> str | None:
    """The name of the token embedding, where the head has the same weight: then its rows must be dealt out alike."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs is None or outputs is None or inputs.weight is not outputs.weight:
        return None
    return next(name for name, module in model.named_modules() if module is inputs)


def _check_heads(model: nn.Module, size: int) -> None:
    for names in (("num_attention_heads", "n_head"), ("num_key_value_heads",)):
        heads = config_value(model, *names)
        if heads is not None and heads % size:
            raise BadInput(
                f"distributed.tp_size {size} does not divide model.{names[-1]} {heads}; each rank takes whole heads"
            )


Places = list[tuple[nn.Module, str]]


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _tied(model: nn.Module) -> list[Places]:
    """Where one and the same parameter stands several times."""
    found: dict[int, Places] = {}
    for module, name, parameter in _places(model):
        found.setdefault(id(parameter), []).append((module, name))
    return [places for places in found.values() if len(places) > 1]


def _tie(model: nn.Module, tied: list[Places]) -> None:
    for (first, own), *others in tied:
        for module, name in others:
            if module._parameters[name].placements != first._parameters[own].placements:  # type: ignore[union-attr]
                raise BadInput(
                    f"distributed.tp_size: the plan of {type(model).__name__} deals out a weight that two of its layers share in two ways"
                )
            module._parameters[name] = first._parameters[own]


def _own_logits(output: Any, ranks: TensorParallelGroup) -> Any:
    """A model whose head is whole on all ranks: the logits of this rank's positions."""
    if isinstance(output, torch.Tensor):
        return ranks.own_positions(output)
    output.logits = ranks.own_positions(output.logits)
    return output
