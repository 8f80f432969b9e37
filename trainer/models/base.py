"""Interface between the trainer and a model, be it ours, the user's or Hugging Face's.

A model is an ``nn.Module`` whose ``forward(input_ids)`` takes ``(B, T)`` int64 and returns logits ``(B, T, V)``, or an
object that has them as ``.logits``. Everything else is optional:

``linear_loss``, ``labels``
    Arguments of ``forward`` that pass a loss on the last hidden states; the model then returns
    ``linear_loss.from_hidden(hidden, weight, labels)``.
``wrap_blocks``
    Names of each ``nn.ModuleList`` whose items are sharded and compiled one by one. Default: the longest list that is
    not inside another list.
``context``
    Maximum number of positions; sampling crops its input to it.
``flops_per_token(seq_len)``
    Forward and backward; default: the estimate of :func:`flops_per_token`.
``hf_export(tensors, vocab_size)``
    ``(config, tensors)`` of a Hugging Face folder; see :mod:`amlaunch.trainer.checkpoints.hf_folder`.
``init_parameter(name, tensor)``
    Write a parameter's initial value into ``tensor``, float32 on the CPU, drawn from torch's default generator. If the
    target is a class with this method, or a function annotated to return one, the model is built without memory and
    each rank fills only its own shard. Such a model must have no buffers.
``forward(input_ids, position_ids, documents)`` and ``self.attend``
    Needed for packed documents and context parallelism; see :mod:`amlaunch.trainer.models.attention`.
``tp_plan``
    Needed for tensor parallelism; see :mod:`amlaunch.trainer.parallel.tensor_parallel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

ModelT = TypeVar("ModelT", bound=nn.Module)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of ``model`` in order; empty if it has no ``nn.ModuleList``."""
    names = getattr(model, "wrap_blocks", None)
    if names is not None:
        return [block for name in names for block in model.get_submodule(name).children()]
    return max((list(modules) for modules in _outer_lists(model)), key=len, default=[])


def _outer_lists(module: nn.Module) -> list[nn.ModuleList]:
    """Return the module lists that are in no other list: the experts of a mixture belong to their block."""
    if isinstance(module, nn.ModuleList):
        return [module]
    return [modules for child in module.children() for modules in _outer_lists(child)]


def build_initialized(build: Callable[[], ModelT]) -> ModelT:
    """Build a model that has ``init_parameter`` and initialise it; on the meta device, leave it without weights."""
    device = torch.get_default_device()
    with torch.device("meta"):
        model = build()
    if device.type == "meta":
        return model

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty)
    initialize_parameters(model)
    return model


@torch.no_grad()
def initialize_parameters(model: nn.Module) -> None:
    """Write the initial weights into the parameters of ``model``, or into this rank's shards of them.

    Each parameter is drawn in full, one after the other, from the same generator on all ranks. So the weights do not
    depend on how the model is sharded.
    """
    for name, parameter in model.named_parameters():
        full = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        model.init_parameter(name, full)  # type: ignore[operator]
        if not isinstance(parameter, DTensor):
            parameter.copy_(full)
            continue
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        shard = tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
        parameter.to_local().copy_(full[shard])


def supports_deferred_init(target: Any) -> bool:
    """Return True if ``target`` is a class with ``init_parameter``, or is annotated to return one."""
    try:
        model_class = target if isinstance(target, type) else get_type_hints(target).get("return")
    except (NameError, TypeError):
        # Annotations that only a type checker can resolve.
        return False
    return hasattr(model_class, "init_parameter")


def identity_head(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two factors of the logits: hidden states ``(B, T, C)`` and the head's weight ``(V, C)``.

    Our models call this as ``self.head``; tensor parallelism replaces it.
    """
    return x, weight


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits ``(B, T, V)`` in the output of a model's forward."""
    return output if isinstance(output, torch.Tensor) else output.logits


def router_loss_weight(model: nn.Module) -> float:
    """Return the weight of a mixture of experts' router loss (transformers' ``router_aux_loss_coef``); 0 for others."""
    return float(getattr(getattr(model, "config", None), "router_aux_loss_coef", None) or 0.0)


def enable_router_loss(model: nn.Module) -> None:
    """Let a mixture of experts of transformers return its router loss, which it does not by default."""
    if router_loss_weight(model):
        config: Any = model.config
        config.output_router_logits = True


def parameter_count(model: nn.Module) -> int:
    """Return the number of learned values; a tied tensor counts once, a sharded one with its full size."""
    return sum(parameter.numel() for parameter in model.parameters())


def config_value(model: nn.Module, *names: str) -> int | None:
    """Return the first integer among ``names`` in the model, its ``settings``, or its Hugging Face config."""
    for owner in (model, getattr(model, "settings", None), getattr(model, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def vocab_rows(model: nn.Module) -> int | None:
    """Return the number of token ids that the model accepts, padding rows included; None if unknown."""
    return config_value(model, "vocab_size")


def context_length(model: nn.Module) -> int | None:
    """Return the maximum number of positions that the model accepts; None if unknown."""
    return config_value(model, "context", "max_position_embeddings", "n_positions", "block_size", "max_seq_len")


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Return the floating-point operations per token, forward and backward: nanoGPT's ``6N + 12 L d T``.

    N excludes embeddings that are only looked up, and of a mixture of experts those that a token does not use.
    Attention counts as if it were not causal, as in every published MFU (karpathy/nanoGPT#464, PaLM appendix B).
    """
    override = getattr(model, "flops_per_token", None)
    if override is not None:
        return float(override(seq_len))
    width = config_value(model, "hidden_size", "n_embd") or 0
    matrix_parameters = parameter_count(model) - _lookup_parameter_count(model) - _idle_expert_parameters(model)
    return 6.0 * matrix_parameters + 12.0 * len(blocks(model)) * width * seq_len


def _idle_expert_parameters(model: nn.Module) -> float:
    """Return the parameters of the experts that a token does not use, on average; 0 without experts."""
    experts = config_value(model, "num_local_experts", "num_experts", "n_routed_experts")
    used = config_value(model, "num_experts_per_tok", "num_experts_per_token", "top_k_experts")
    if not experts or not used:
        return 0.0
    parameters = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    return parameters * (1 - used / experts)


def _lookup_parameter_count(model: nn.Module) -> int:
    """Count the parameters of embeddings that are not the head: untied token embeddings, and positions.

    If the model does not name its head, any table may be the head, and the count is 0.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None:
        return 0
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(table.numel() for key, table in tables.items() if key != id(head.weight))
