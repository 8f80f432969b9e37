"""``torch.compile`` gets few, complete graphs under any parallelism, and the losses stay the same.

A backend that generates no kernels counts the graphs. All cases of two ranks share one start of two ranks. Among them
are complete runs with every fast path at once, compared with plain ones in float64.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import parallel_ranks
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from parallel_ranks import Task, in_ranks
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_runs import Run

from amlaunch.preprocess.shards.shard_format import write_shard
from amlaunch.recipes.errors import OK
from amlaunch.recipes.format.schema import Compile, Distributed
from amlaunch.trainer.loss import LinearCrossEntropy, compute_loss, loss_and_gradient
from amlaunch.trainer.models.gpt2 import build_gpt2_model
from amlaunch.trainer.models.llama import build_llama_model
from amlaunch.trainer.parallel.world import World, join_world, micro_step, parallelize
from amlaunch.trainer.performance.activation_checkpointing import checkpoint_activations
from amlaunch.trainer.performance.compilation import CACHE_VARIABLE, compile_model
from amlaunch.trainer.process.rank_environment import RankEnvironment, read_rank_environment
from amlaunch.trainer.torch_features import has_linear_cross_entropy

pytestmark = pytest.mark.slow  # tracing takes seconds

LAYERS = 10
"""More than dynamo's limit of recompilations of the same code, which is 8."""
STEPS = 2
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": LAYERS, "n_head": 2},
    "llama": {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
    },
}
BUILDERS: dict[str, Any] = {"gpt2": build_gpt2_model, "llama": build_llama_model}
WIDE = {"vocab_size": 64, "n_positions": 16, "n_embd": 384, "n_layer": 3, "n_head": 2}
"""42 MB in float64, 14 MB a block: DDP's first bucket has 1 MB, the others 25 MB."""
CHECKPOINTING = ("none", "full", "selective")


@contextmanager
def counting() -> Iterator[CompileCounterWithBackend]:
    """Count compiled graphs, starting from dynamo's defaults; exceeding its recompilation limit is an error."""
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    real = torch.compile
    torch._dynamo.reset()
    torch.compile = lambda model, mode=None, **more: real(model, backend=counter, **more)  # type: ignore[assignment]
    try:
        with torch._dynamo.config.patch(optimize_ddp=True, fail_on_recompile_limit_hit=True):
            yield counter
    finally:
        torch.compile = real
        torch._dynamo.reset()


def train(
    world: World, section: Distributed, scope: str | None, family: str = "gpt2", sizes: dict[str, Any] | None = None
) -> list[float]:
    """Return the losses of a few steps of two micro-batches each, compiled if there is a ``scope``."""
    torch.manual_seed(0)
    bare = BUILDERS[family](**(sizes or TINY[family]))
    compile_model(bare, Compile(enabled=scope is not None), scope or "model")
    model = parallelize(bare, section, world, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch = torch.randint(0, 64, (2, 2, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(STEPS):
        total = 0.0
        for i, part in enumerate(batch):
            with micro_step(model, last=i == 1):
                logits = model(part[:, :-1])
                labels = part[:, 1:].chunk(world.tp_size, 1)[world.tp_rank]  # as Batch.local_to does
                loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def graphs(*args: Any, **kwargs: Any) -> tuple[int, list[float]]:
    """Return the number of graphs of a compiled :func:`train`, and its losses."""
    with counting() as counter:
        losses = train(*args, **kwargs)
    return counter.frame_count, losses


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Join a world of one rank in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMLAUNCH_DEVICE", "cpu")
        torch.set_num_threads(1)
        yield join_world(Distributed(), RankEnvironment())
        if dist.is_initialized():  # a run in this process destroys it
            time.sleep(0.05)  # see trainer_runs
            dist.destroy_process_group()


# --- one graph for all blocks, and the losses of an uncompiled run ----------------------------------------


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("family", list(BUILDERS))
def test_blocks_are_one_graph_with_the_same_losses_however_they_are_checkpointed(
    world: World, family: str, kind: Any
) -> None:
    """Fails if ``checkpoint`` is a block's ``forward``, which dynamo skips, or if blocks do not share a class."""
    section = Distributed(dtype="float64", activation_checkpointing=kind)
    plain = train(world, section, None, family)
    count, losses = graphs(world, section, "blocks", family)
    assert count == 1
    assert losses == pytest.approx(plain, rel=1e-12) and plain[-1] < plain[0]


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_what_is_compiled_computes_again_what_an_uncompiled_block_does(world: World, kind: Any) -> None:
    """Fails if the compiled graph lost the checkpointing and so keeps all activations."""
    section = Distributed(strategy="none", dtype="float64", activation_checkpointing=kind)
    with counting() as counter:
        train(world, section, "blocks", sizes={**TINY["gpt2"], "n_layer": 2})
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert any("checkpoint" in target for target in targets) == (kind != "none")


def test_a_checkpointed_block_computes_again_through_any_forward_and_has_a_class_with_its_likes(world: World) -> None:
    """Fails if a ``forward`` set on a block hides that of the class, or if each block gets a separate class."""
    calls = []
    model = build_gpt2_model(**TINY["gpt2"])
    original = model.h[0].forward
    model.h[0].forward = lambda *args: (calls.append(0), original(*args))[1]  # type: ignore[method-assign]
    model.h[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(model, "full")
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    assert sorted(calls) == [0, 0, 1, 1]
    assert len({type(block) for block in model.h[1:]}) == 1 and type(model.h[1]).__name__ == "GPT2Block"


# --- two ranks --------------------------------------------------------------------------------------------

TWO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddp, whole": ("model", "gpt2", {"strategy": "ddp"}),
    "ddp, by blocks": ("blocks", "gpt2", {"strategy": "ddp"}),
    "tp": ("blocks", "gpt2", {"tp_size": 2}),
    "tp by positions": ("blocks", "llama", {"tp_size": 2, "sequence_parallel": True}),
    "tp, full": ("blocks", "gpt2", {"tp_size": 2, "activation_checkpointing": "full"}),
}


def compared(scope: str, family: str, keys: dict[str, Any]) -> tuple[int, list[float], list[float]]:
    """Return the number of graphs, and the losses, compiled and not; with DDP the model fills several buckets."""
    section = Distributed(dtype="float64", **keys)
    world = join_world(section, read_rank_environment(os.environ))
    sizes = WIDE if section.strategy == "ddp" else None
    return *graphs(world, section, scope, family, sizes), train(world, section, None, family, sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compile")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[Any]]:
    tasks = [Task(name, compared, case) for name, case in TWO.items()]
    tasks += [Task(f"reductions {strategy}", reductions, (strategy,)) for strategy in ("ddp", "fsdp2")]
    write_documents(folder / "train.bin")
    tasks += [Task(name, trained_fast, (run_of(folder, name, fast=True),)) for name in FAST]
    return in_ranks(2, folder / "ranks", tasks)


@pytest.mark.torch_range
@pytest.mark.parametrize("name", list(TWO))
def test_two_ranks_compile_one_graph_with_the_same_losses(two: dict[str, list[Any]], name: str) -> None:
    """Fails if DDP's buckets split the graph, or if tensor parallelism gives each block a separate class."""
    assert not any(isinstance(result, str) for result in two[name]), two[name]
    for count, losses, plain in two[name]:
        assert count == (0 if name == "tp, full" else 1)  # torch cannot compile it on a CPU, so it stays eager
        assert losses == pytest.approx(plain, rel=1e-12)


class Reductions(TorchDispatchMode):
    """Counts reductions over ranks."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d" and "reduce" in func.name()
        return func(*args, **(kwargs or {}))


def reductions(strategy: str) -> list[int]:
    """Return the number of gradient reductions in a step of one micro-batch, and in one of three."""
    section = Distributed(dtype="float64", strategy=strategy)
    model = parallelize(
        build_gpt2_model(**{**TINY["gpt2"], "n_layer": 2}),
        section,
        join_world(section, read_rank_environment(os.environ)),
        seed=0,
    )
    reduced = []
    for count in (1, 1, 3):  # DDP sets up its buckets in the first
        with Reductions() as mode:
            for i in range(count):
                with micro_step(model, last=i == count - 1):
                    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
        reduced.append(mode.count)
    return reduced[1:]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_gradients_are_reduced_in_the_last_micro_batch_alone(two: dict[str, list[Any]], strategy: str) -> None:
    """Fails if each micro-batch reduces its gradients."""
    for one_micro_batch, three_micro_batches in two[f"reductions {strategy}"]:
        assert one_micro_batch == three_micro_batches > 0


def test_a_cache_that_cannot_be_written_is_left_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if torch uses that cache, which would end the run with an error."""
    (tmp_path / "file").touch()
    for folder, writable in ((tmp_path / "new" / "cache", True), (tmp_path / "file" / "cache", False)):
        monkeypatch.setenv(CACHE_VARIABLE, str(folder))
        compile_model(nn.Linear(1, 1), Compile(enabled=True), "model")
        assert (os.environ.get(CACHE_VARIABLE) == str(folder)) is writable  # torch may have set another
        assert ("is not writable (Not a directory)" in capsys.readouterr().out) is not writable
    assert list((tmp_path / "new" / "cache").iterdir()) == []


def test_one_rank_is_not_wrapped_in_ddp(world: World) -> None:
    """Fails if it is, which would copy all gradients for nothing."""
    bare = build_gpt2_model(**TINY["gpt2"])
    assert parallelize(bare, Distributed(strategy="ddp"), world, seed=0) is bare


# --- everything fast at once ------------------------------------------------------------------------------

ROWS: dict[str, Any] = {"vocab_size": 104, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "_target_": "amlaunch.trainer.models.gpt2.build_gpt2_model",
        "n_positions": 32,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
    },
    "llama": {
        "_target_": "amlaunch.trainer.models.llama.build_llama_model",
        "max_position_embeddings": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
CHUNKED = {"_target_": "amlaunch.trainer.loss.LinearCrossEntropy", "vocab_size": 97, "chunk_tokens": 24}
TORCHS = {"_target_": "amlaunch.trainer.loss.LinearCrossEntropy", "implementation": "torch"}
FAST: dict[str, tuple[str, int, dict[str, Any], str, dict[str, Any]]] = {
    "gpt2, whole, ddp, residual": ("gpt2", 0, {"strategy": "ddp", "bf16_residual": True}, "model", CHUNKED),
    "gpt2, packed, blocks, fsdp2": ("gpt2", 32, {"strategy": "fsdp2"}, "blocks", CHUNKED),
    "llama, packed, whole, ddp, residual": ("llama", 32, {"strategy": "ddp", "bf16_residual": True}, "model", CHUNKED),
    "llama, blocks, fsdp2, torch's loss": ("llama", 0, {"strategy": "fsdp2"}, "blocks", TORCHS),
}
if not has_linear_cross_entropy():
    del FAST["llama, blocks, fsdp2, torch's loss"]
"""``(model, packed_sequence_size, distributed, compile.scope, loss_fn)``."""
LOSS_BOUND, NORM_BOUND = 1e-3, 2e-2
"""Bounds stated in docs/performance.md."""


def write_documents(path: Path) -> None:
    """Write documents of 4 to 25 tokens with a pattern that a model can learn."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 25, 200)
    write_shard(
        path,
        [np.concatenate([[96], np.cumsum(rng.integers(1, 4, length)) % 96]).astype("<u2") for length in lengths],
        np.dtype("<u2"),
    )


def run_of(folder: Path, name: str, *, fast: bool) -> Run:
    """Create a case of ``FAST``.

    Not ``fast``: the same training by one rank in float64, eager, in one batch, from logits, with an unfused optimizer.
    """
    family, packed, distributed, scope, loss = FAST[name]
    plain_loss = {
        "_target_": "amlaunch.trainer.loss.MaskedCrossEntropy",
        **({"vocab_size": loss["vocab_size"]} if "vocab_size" in loss else {}),
    }
    tree = {
        "model": {**MODELS[family], **ROWS},
        "dataset": {"file_pattern": str(folder / "train.bin"), "seq_len": 32, "shuffle_files": True},
        "packed_sequence": {"packed_sequence_size": packed},
        "step_scheduler": {
            "global_batch_size": 8,
            "local_batch_size": 2 if fast else 8,
            "max_steps": 12,
            "val_every_steps": None,
        },
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "lr": 3e-3,
            "weight_decay": 0.1,
            **({} if fast else {"foreach": False}),
        },
        "distributed": {**distributed, "dtype": "bfloat16"} if fast else {"strategy": "none", "dtype": "float64"},
        "compile": {"enabled": fast, "scope": scope},
        "loss_fn": loss if fast else plain_loss,
        "checkpoint": {"enabled": False},
        "export": None,
    }
    return Run(folder / f"{name}{'' if fast else ', exact'}".replace(" ", "-"), tree)


def trained_fast(run: Run) -> tuple[int, int]:
    """Train and return the exit code and the number of graphs."""
    with counting() as counter:
        code = parallel_ranks.train(run)
    return code, counter.frame_count


@pytest.mark.torch_range
@pytest.mark.parametrize("name", list(FAST))
def test_everything_fast_at_once_on_two_ranks_is_near_plain_training_in_float64(
    folder: Path, two: dict[str, list[Any]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradient norms of 12 steps: bfloat16, compiled, two ranks, micro-batches, fused loss and AdamW."""
    monkeypatch.setenv("AMLAUNCH_DEVICE", "cpu")
    codes, graph_counts = zip(*two[name], strict=True)
    assert list(codes) == [OK, OK] and min(graph_counts) > 0
    fast, exact = run_of(folder, name, fast=True), run_of(folder, name, fast=False)
    assert exact.train_inline() == OK
    for column, bound in (("loss", LOSS_BOUND), ("grad_norm", NORM_BOUND)):
        values, reference = np.array(fast.column(column)), np.array(exact.column(column))
        assert len(values) == 12
        error = np.abs(values / reference - 1).max()
        assert 1e-7 < error < bound, f"{column}: {error}"  # an exact result would not be bfloat16
    assert exact.column("loss")[-1] < 0.9 * exact.column("loss")[0]


# --- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [True, False])
def test_a_loss_without_gradients_computes_none(monkeypatch: pytest.MonkeyPatch, trains: bool) -> None:
    """Fails if validation computes gradients because the parameters require them."""
    needed = []
    loss_fn = LinearCrossEntropy(chunk_tokens=4)
    monkeypatch.setattr(loss_fn, "_chunk_loss", lambda *args: (needed.append(args[-1]), loss_and_gradient(*args))[1])
    model: nn.Module = build_gpt2_model(**TINY["gpt2"])
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with torch.set_grad_enabled(trains):
        compute_loss(model, model, loss_fn, tokens, tokens)
    assert needed == [trains] * 4
