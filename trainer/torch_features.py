"""Differences between the versions of torch that amlaunch supports; docs/containers.md states the range.

Every function asks torch what it has, because NGC's images carry snapshots between two releases. The docstrings say
from which oldest supported release on a difference can be deleted. Raises BadInput where this torch cannot do what
the recipe asks for.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from amlaunch.recipes.errors import BadInput

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""New names since torch 2.13, which warns about the old ones. Delete at 2.13."""


def has_linear_cross_entropy() -> bool:
    """Return True if torch computes the loss from hidden states. Delete at 2.13."""
    return hasattr(F, "linear_cross_entropy")


def sum_gradients_on_cpu(model: nn.Module) -> None:
    """Let FSDP2 sum gradients over the ranks and divide afterwards, instead of asking gloo for averages.

    Gloo of torch 2.8 returns the sum where FSDP2 asks for the average, in all dtypes but float64. Sums are right with
    every version, so all of them take this path. Delete at 2.9.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if not hasattr(module, "set_force_sum_reduction_for_comms"):
                raise BadInput(
                    f"distributed.strategy: fsdp2 on CPUs needs torch 2.8.0 or newer, but this is torch "
                    f"{torch.__version__}, which sums gradients instead of averaging them; set strategy: ddp"
                )
            module.set_force_sum_reduction_for_comms(True)


def safetensors_writer(folder: Path) -> Any:
    """Return a checkpoint writer with which every rank writes its own shards of the weights as safetensors files.

    Torch 2.8 calls the option ``save_sharded``. Delete the older name at 2.9. Raises BadInput if torch has neither.
    """
    writer = getattr(dcp, "HuggingFaceStorageWriter", None)
    options = inspect.signature(writer).parameters if writer else {}
    for option in ("save_distributed", "save_sharded"):
        if writer and option in options:
            return writer(path=str(folder), **{option: True})
    raise BadInput(
        f"checkpoint.model_save_format: safetensors needs torch 2.8.0 or newer, but this is torch "
        f"{torch.__version__}; set it to torch_save"
    )


def register_fake_collectives() -> None:
    """Let collectives run on fake tensors, which torch 2.8 supports only after this import. Delete at 2.9."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "Meta"):
        importlib.import_module("torch.distributed._tools.fake_collectives")


@torch.compiler.assume_constant_result
def compiles_document_masks() -> bool:
    """Return True if ``torch.compile`` can trace the mask that flex_attention needs for documents.

    Torch 2.8 inspects the mask's signature in a way that its own compiler cannot trace. Delete at 2.9.
    """
    # Loads torch's compiler, a second that most runs can save.
    from torch.nn.attention import flex_attention

    inspects = getattr(flex_attention, "_get_mod_type", None)
    return inspects is None or "co_argcount" in inspects.__code__.co_names


def simulates_compilation() -> bool:
    """Return True if ``torch.compile`` works on fake tensors while their memory is counted. Delete at 2.9."""
    return hasattr(TorchDispatchMode, "ignore_compile_internals")
