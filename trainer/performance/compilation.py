"""``torch.compile``: how much of the model at once, and what it has cost."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from amlaunch.recipes.format.schema import Compile, Distributed
from amlaunch.trainer.models.base import blocks

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
FORWARD = ("_compile.compile_inner", "entire_frame_compile")
BACKWARD = ("backward._backward_impl", "entire_backward_compile")
"""What torch's own stop watch calls them: since 2.6, and before."""


def compile_scope(section: Compile, distributed: Distributed, ranks: int) -> str:
    """``model`` or ``blocks``: the recipe's word, else the faster of the two that can work.

    A whole model fuses across its blocks and pays for the graph's entry once. But
    its gradients all come at the end of the backward pass, so that nothing of it is
    left to hide DDP's all-reduce behind, and FSDP2's hooks between the blocks would
    break the graph anyway: several ranks compile block by block.
    """
    if section.scope != "auto":
        return section.scope
    return "model" if ranks == 1 and distributed.strategy != "fsdp2" else "blocks"


def compile_model(model: nn.Module, section: Compile, scope: str) -> None:
    """Compile ``model`` where it stands, so that parameter names stay as they are; shapes are static."""
    if not section.enabled:
        return
    import torch._dynamo

    leave_a_cache_that_cannot_be_written()

    # Else dynamo cuts what DDP holds into a graph for each 25 MB of gradients, a block too, so that reducing begins
    # within a graph. By blocks it begins after each block anyway. A whole model stays whole, as the recipe asked for
    # it: its gradients are then reduced after the backward pass, with nothing beside, once a step.
    torch._dynamo.config.optimize_ddp = False
    for part in [model] if scope == "model" else blocks(model):
        part.compile(mode=section.mode, dynamic=False)


def leave_a_cache_that_cannot_be_written() -> None:
    """Without the cache a start compiles again; with one that cannot be written torch ends with an error."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder is None:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        del os.environ[CACHE_VARIABLE]
        print(
            f"warning: {CACHE_VARIABLE} {folder} cannot be written ({error.strerror}); what is compiled is kept on this machine alone",
            flush=True,
        )


def compile_loss(loss_fn: Any, section: Compile) -> Any:
    """The loss as fused kernels, so that float32 logits of the whole vocabulary never lie in memory."""
    if not section.enabled:
        return loss_fn
    if hasattr(loss_fn, "from_hidden"):
        loss_fn.compile()
        return loss_fn
    return torch.compile(loss_fn, mode=section.mode, dynamic=False)


@dataclass(frozen=True)
class CompileStats:
    """What this process has compiled so far."""

    seconds: float = 0.0
    hits: int = 0
    """Graphs that were found in the cache."""
    misses: int = 0
    """Graphs that were made."""


def compile_stats() -> CompileStats:
    """Time and cache hits of ``torch.compile`` in this process; nothing where it was not used."""
    if "torch._dynamo" not in sys.modules:
        return CompileStats()
    from torch._dynamo.utils import compilation_time_metrics, counters

    times = [
        next((compilation_time_metrics[name] for name in names if name in compilation_time_metrics), [])
        for names in (FORWARD, BACKWARD)
    ]
    graphs = counters["inductor"]
    return CompileStats(sum(map(sum, times)), graphs["fxgraph_cache_hit"], graphs["fxgraph_cache_miss"])
