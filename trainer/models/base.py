"""What the trainer asks of a model, ours, the user's or Hugging Face's.

A model is an ``nn.Module`` whose ``forward(input_ids)`` takes ``(B, T)`` int64
and returns logits ``(B, T, V)``, or an object that has them as ``.logits``.
Everything else is optional:

``linear_loss``, ``labels``
    Arguments of ``forward`` by which it is given a loss that works on the last
    hidden states: then it returns ``linear_loss.from_hidden(hidden, weight, labels)``.
``wrap_blocks``
    Names of the ``nn.ModuleList`` whose items are sharded and compiled one by
    one. Without it: the longest list that lies in no other.
``context``
    The most positions it takes; sampling crops to it.
``flops_per_token(seq_len)``
    Forward and backward; without it :func:`flops_per_token` estimates.
``hf_export(tensors, vocab_size)``
    ``(config, tensors)`` of a Hugging Face folder; see :mod:`amlaunch.trainer.checkpoints.hf_folder`.
``init_parameter(name, tensor)``
    Write a parameter's initial value into ``tensor``, float32 on the CPU, drawn
    from torch's default generator. A model whose class has it (a target that is
    the class, or a function annotated to return it) is built without memory,
    each rank fills in its own part, and none ever holds the whole. It must
    have no buffers.
``forward(input_ids, position_ids, documents)`` and ``self.attend``
    For packed documents and context parallelism; see :mod:`amlaunch.trainer.models.attention`.
``tp_plan``
    For tensor parallelism; see :mod:`amlaunch.trainer.parallel.tensor_parallel`.
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
    """The transformer blocks of ``model``, in order; empty where it has no ``nn.ModuleList``."""
    names = getattr(model, "wrap_blocks", None)
    if names is not None:
        return [block for name in names for block in model.get_submodule(name).children()]
    return max((list(found) for found in _outer_lists(model)), key=len, default=[])


def _outer_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The module lists that lie in no other: the experts of a mixture are part of their block."""
    if isinstance(module, nn.ModuleList):
        return [module]
    return [found for child in module.children() for found in _outer_lists(child)]


def build_initialized(make: Callable[[], ModelT]) -> ModelT:
    """What ``make`` builds, a model with ``init_parameter``, with its initial weights; on the meta device: without any."""
    device = torch.get_default_device()
    with torch.device("meta"):
        model = make()
    if device.type != "meta":
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    )
        initialize_parameters(model)
    return model


@torch.no_grad()
def initialize_parameters(model: nn.Module) -> None:
    """Write the initial weights into the parameters of ``model``, whole or this rank's parts of them.

    They are drawn whole, one after the other, and those of all ranks from the
    same generator: so they do not depend on how the model is spread.
    """
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        model.init_parameter(name, whole)  # type: ignore[operator]
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            local.copy_(whole[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))])
        else:
            parameter.copy_(whole)


def supports_deferred_init(target: Any) -> bool:
    """Whether what ``target`` builds has ``init_parameter``: it is such a class, or is annotated to return one."""
    try:
        made = target if isinstance(target, type) else get_type_hints(target).get("return")
    except (NameError, TypeError):  # annotations that only a type checker can resolve
        return False
    return hasattr(made, "init_parameter")


def head(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What our models multiply last, hidden states ``(B, T, C)`` and the head's ``(V, C)``; tensor parallelism puts another in its place."""
    return x, weight


def logits_of(output: Any) -> torch.Tensor:
    """The logits ``(B, T, V)`` in what a model's forward returned."""
    return output if isinstance(output, torch.Tensor) else output.logits


def parameter_count(model: nn.Module) -> int:
    """Numbers the model learns; a tied tensor counts once, a sharded one with its full size."""
    return sum(parameter.numel() for parameter in model.parameters())


def config_value(model: nn.Module, *names: str) -> int | None:
    """The first of ``names`` that the model, its ``settings``, or its Hugging Face config states as a number."""
    for place in (model, getattr(model, "settings", None), getattr(model, "config", None)):
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int):
                return value
    return None


def vocab_rows(model: nn.Module) -> int | None:
    """One more than the largest token id that the model takes; None where it does not say."""
    return config_value(model, "vocab_size")


def context_length(model: nn.Module) -> int | None:
    """The most positions that the model takes; None where it does not say."""
    return config_value(model, "context", "max_position_embeddings", "n_positions")


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Floating-point operations a token, forward and backward: nanoGPT's ``6N + 12 L d T``.

    N leaves out embeddings that are only looked up. Attention counts as if it
    were not causal, as everybody's published MFU does (karpathy/nanoGPT#464,
    PaLM appendix B).
    """
    own = getattr(model, "flops_per_token", None)
    if own is not None:
        return float(own(seq_len))
    width = config_value(model, "hidden_size", "n_embd") or 0
    return 6.0 * (parameter_count(model) - _only_looked_up(model)) + 12.0 * len(blocks(model)) * width * seq_len


def _only_looked_up(model: nn.Module) -> int:
    """Numbers in embeddings that are not the head's: of tokens where the two are not tied, and of positions.

    Where the model does not say what its head is, a table may be that, and all count.
    """
    head_of = getattr(model, "get_output_embeddings", None)
    last = head_of() if head_of is not None else None
    if last is None:
        return 0
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(table.numel() for key, table in tables.items() if key != id(last.weight))
