"""``torch.compile``: its scope in the model, its cache, and its cost."""

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
COMPILE_TIMERS = ("_compile.compile_inner", "backward._backward_impl")
"""Torch's names of its timers of the forward and the backward graphs."""


def compile_scope(section: Compile, distributed: Distributed, ranks: int) -> str:
    """Return ``model`` or ``blocks``: the recipe's choice, or the faster of the two that work.

    A whole model fuses across its blocks and enters its graph once. But its gradients all arrive at the end of the
    backward pass, so nothing overlaps with DDP's all-reduce, and FSDP2's hooks between the blocks would break the graph
    anyway. So several ranks compile block by block.
    """
    if section.scope != "auto":
        return section.scope
    return "model" if ranks == 1 and distributed.strategy != "fsdp2" else "blocks"


def compile_model(model: nn.Module, section: Compile, scope: str) -> None:
    """Compile ``model`` in place with static shapes; parameter names do not change."""
    if not section.enabled:
        return
    import torch._dynamo

    drop_unwritable_cache()

    # By default dynamo splits what DDP wraps into a graph per 25 MB of gradients, even within a block, so that reducing
    # begins within a graph. With blocks it begins after each block anyway. A whole model stays one graph, as the recipe
    # requests; its gradients are then reduced after the backward pass, once a step, without overlap.
    torch._dynamo.config.optimize_ddp = False
    for module in [model] if scope == "model" else blocks(model):
        module.compile(mode=section.mode, dynamic=False)


def drop_unwritable_cache() -> None:
    """Unset the compile cache's variable if its folder is not writable.

    Without the cache each start compiles again; with an unwritable one torch raises an error.
    """
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
            f"warning: {CACHE_VARIABLE} {folder} is not writable ({error.strerror}); "
            "using a local compile cache on this machine",
            flush=True,
        )


def compile_loss(loss_fn: Any, section: Compile) -> Any:
    """Compile the loss into fused kernels, so that float32 logits of the whole vocabulary never exist in memory."""
    if not section.enabled:
        return loss_fn
    if hasattr(loss_fn, "from_hidden"):
        loss_fn.compile()
        return loss_fn
    return torch.compile(loss_fn, mode=section.mode, dynamic=False)


@dataclass(frozen=True)
class CompileStats:
    """Compile time and cache use of this process so far."""

    seconds: float = 0.0
    hits: int = 0
    """Graphs loaded from the cache."""
    misses: int = 0
    """Graphs compiled."""


def compile_stats() -> CompileStats:
    """Return the time and cache use of ``torch.compile`` in this process; zeros if it was not used."""
    if "torch._dynamo" not in sys.modules:
        return CompileStats()
    from torch._dynamo.utils import compilation_time_metrics, counters

    seconds = sum(sum(compilation_time_metrics.get(timer, ())) for timer in COMPILE_TIMERS)
    graphs = counters["inductor"]
    return CompileStats(seconds, graphs["fxgraph_cache_hit"], graphs["fxgraph_cache_miss"])
