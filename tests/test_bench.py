"""Benchmarks and fast paths: measurements, time by activity of a trace, FP8 products, compilation time."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from amlaunch.launcher.__main__ import main as amlaunch
from amlaunch.recipes.errors import BAD_INPUT, INTERRUPTED, OK, BadInput
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.format.schema import Compile, Distributed, Fp8, Recipe
from amlaunch.recipes.shipped import find_recipe
from amlaunch.trainer.data.batches import StepBatches, move_to_device
from amlaunch.trainer.data.datasets import NanogptDataset
from amlaunch.trainer.loop import training_loop
from amlaunch.trainer.loop.job import check_cuda_graphs, describe_fast_paths
from amlaunch.trainer.models.gpt2 import build_gpt2_model
from amlaunch.trainer.models.llama import build_llama_model
from amlaunch.trainer.parallel.world import World
from amlaunch.trainer.performance import attention_kernels, fp8
from amlaunch.trainer.performance.attention_kernels import BACKENDS
from amlaunch.trainer.performance.compilation import compile_scope
from amlaunch.trainer.process.garbage_collection import StepGarbageCollector
from amlaunch.trainer.process.start_time import seconds_since_start
from amlaunch.trainer.tools import roofline
from amlaunch.trainer.tools.bench import format_report, main
from amlaunch.trainer.tools.roofline import (
    StepPart,
    advise,
    covered_time,
    least_seconds,
    part_of,
    self_times,
    step_parts,
    summarise_trace,
)
from amlaunch.trainer.torch_features import compiles_document_masks, has_linear_cross_entropy
from benchmarks import gpu_suite
from tests.trainer_runs import VOCAB, Run, recipe, write_tokens

CPU = torch.device("cpu")


def event(
    name: str, begin: float, seconds: float, cat: str = "kernel", tid: int = 7, correlation: int | None = None
) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {
        "ph": "X",
        "name": name,
        "ts": begin * 1e6,
        "dur": seconds * 1e6,
        "cat": cat,
        "pid": 1,
        "tid": tid,
        "args": args,
    }


def test_kernels_are_counted_under_what_they_compute() -> None:
    for name, part in {
        "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTN": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention",
        "void pytorch_flash::flash_fwd_kernel<...>": "attention",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
        "triton_per_fused_add_native_layer_norm_3": "elementwise",
        "triton_red_fused__log_softmax_nll_loss_forward_2": "loss",
        "aten::addmm": "matrix products",
    }.items():
        assert part_of(name) == part, name


def test_time_on_a_gpu_is_that_of_kernels_and_only_lonely_communication_counts() -> None:
    trace = [
        event("amlaunch.loss", 0.0, 1.0, "user_annotation"),
        event("Optimizer.step#AdamW.step", 2.0, 1.0, "user_annotation"),
        event("cudaDeviceSynchronize", 0.1, 0.2, "cuda_runtime"),  # the profiler's own, like the last one
        event("cudaLaunchKernel", 0.5, 0.01, "cuda_runtime", correlation=1),
        event("cudaStreamSynchronize", 0.7, 0.5, "cuda_runtime"),
        event("cudaEventSynchronize", 1.3, 0.1, "cuda_runtime"),  # a number that was read late
        event("cudaLaunchKernel", 1.5, 0.01, "cuda_runtime", correlation=2),
        event("cudaLaunchKernel", 2.5, 0.01, "cuda_runtime", correlation=3),
        event("nvjet_gemm", 10.0, 2.0, correlation=1),  # the head's product, launched in the loss
        event("nvjet_gemm", 12.0, 3.0, correlation=2),
        event("vectorized_elementwise_kernel", 15.0, 1.0, correlation=3),
        event("ncclDevKernel_AllReduce", 14.0, 4.0, tid=8),  # 14 to 16 beside other kernels, 16 to 18 alone
        event("pytorch_flash::flash_fwd_kernel", 18.5, 0.5),
        event("cudaDeviceSynchronize", 19.0, 0.5, "cuda_runtime"),
    ]
    summary = summarise_trace(trace, 2)
    assert summary.on_gpu and summary.backends == ("flash_attention",) and summary.host_waits == 0.5
    assert summary.seconds == pytest.approx(
        {"loss": 1.0, "matrix products": 1.5, "optimizer": 0.5, "communication": 1.0, "attention": 0.25}
    )
    parts = {row.part: row for row in step_parts(summary, 5.0, 0.25, {"matrix products": 0.75})}
    assert parts["gaps"].seconds == pytest.approx(5.0 - 0.25 - 4.25) and parts["matrix products"].least == 0.75
    assert sum(row.share for row in parts.values()) == pytest.approx(1.0)


def test_time_on_a_cpu_is_what_operators_spend_themselves_on_the_thread_that_trains() -> None:
    trace = [
        event("aten::linear", 0.0, 4.0, "cpu_op"),
        event("aten::addmm", 1.0, 3.0, "cpu_op"),
        event("aten::gelu", 5.0, 2.0, "cpu_op"),
        event("c10d::allreduce_", 0.0, 9.0, "cpu_op", tid=8),
        event("amlaunch.loss", 8.0, 2.0, "user_annotation"),
        event("aten::mm", 8.5, 1.0, "cpu_op"),
    ]
    summary = summarise_trace(trace, 1)
    assert not summary.on_gpu
    assert summary.seconds == pytest.approx({"matrix products": 4.0, "elementwise": 2.0, "loss": 1.0})
    assert summary.step_seconds == pytest.approx(10.0)
    parts = {row.part: row.seconds for row in step_parts(summary, 5.5, 0.5, {})}  # the profiler made it twice as slow
    assert parts["matrix products"] == pytest.approx(2.0) and parts["gaps"] == pytest.approx(1.5)


def test_spans_and_self_times() -> None:
    assert covered_time([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4
    nested = self_times([event("a", 0, 10), event("b", 1, 4), event("c", 2, 1), event("d", 6, 2)])
    assert {nested_event["name"]: self_time / 1e6 for nested_event, self_time in nested} == pytest.approx(
        {"a": 4, "b": 3, "c": 1, "d": 2}
    )


def test_at_best_is_operations_over_rate_and_bytes_over_bandwidth() -> None:
    least = least_seconds(
        tokens=10, block_flops=6.0, attention_flops=2.0, head_flops=4.0, parameters=100, flops=20.0, bandwidth=700.0
    )
    assert least == pytest.approx({"matrix products": 3.0, "attention": 1.0, "loss": 2.0, "optimizer": 4.0})


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"waiting for data": 0.2}, "waiting for data"),
        ({"gaps": 0.3}, "idle for 30%"),
        ({"gaps": 0.3, "waits": 2.0}, "the host waits for the device 2 times per step"),
        ({"communication": 0.2}, "communication that does not overlap"),
        ({"elementwise": 0.4}, "Set compile.enabled to true"),
        ({"optimizer": 0.2}, "global_batch_size"),
        ({"matrix products": 0.9}, "no bottleneck stands out; matrix products reach 50%"),
    ],
)
def test_the_advice_is_about_what_takes_too_long(shares: dict[str, float], message: str) -> None:
    parts = [
        StepPart(part, 1.0, shares.get(part, 0.0), 0.5 if part == "matrix products" else None)
        for part in roofline.PARTS
    ]
    advice = advise(
        parts,
        compiled=False,
        on_gpu=True,
        backends=["cudnn_attention"],
        micro_batch=4,
        accumulates=True,
        host_waits=shares.get("waits", 0.0),
    )
    assert message in advice and "reduce-overhead" not in advice


def test_what_is_on_already_is_not_advised() -> None:
    parts = [StepPart(part, 1.0, {"elementwise": 0.4}.get(part, 0.0), None) for part in roofline.PARTS]
    keys: dict[str, Any] = {
        "compiled": True,
        "on_gpu": True,
        "backends": ["cudnn_attention"],
        "micro_batch": 4,
        "accumulates": False,
    }
    assert "distributed.bf16_residual to true" in advise(parts, **keys, has_float32_residual=True)
    assert advise(parts, **keys, has_float32_residual=False) == "no bottleneck stands out"


# --- 8-bit products -------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_products_in_eight_bits_are_near_and_exact_where_the_numbers_fit(half: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 128)
    narrow = nn.Linear(64, 128)
    narrow.load_state_dict(plain.state_dict())
    narrow.__class__ = fp8.Float8Linear
    x = torch.randn(2, 16, 64, requires_grad=True)
    results = []
    for layer in (narrow, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = layer(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (x, *layer.parameters()))])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype is expected.dtype
        assert (
            1e-3 < ((ours - expected).norm() / expected.norm()).item() < 0.1
        )  # neither wrong nor silently something else
    exact = [
        torch.randint(-1, 2, shape).float() for shape in ((16, 32), (48, 32))
    ]  # -1, 0, 1 have no rounding, and sums fit
    product = fp8.scaled_product(*(fp8.quantize(matrix, fp8.E4M3) for matrix in exact), dtype=torch.float32)
    torch.testing.assert_close(product, exact[0] @ exact[1].t(), rtol=1e-6, atol=1e-5)


def test_eight_bits_are_refused_where_there_are_none() -> None:
    model = build_gpt2_model(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    assert fp8.convert_linear_layers(model, Fp8(), CPU) == 0
    with pytest.raises(BadInput, match="this is the CPU; set it to false"):
        fp8.convert_linear_layers(model, Fp8(enabled=True), CPU)
    with pytest.raises(BadInput, match="tp_size: 1"):
        fp8.convert_linear_layers(model, Fp8(enabled=True), CPU, ranks_of_a_layer=2)


def test_eight_bits_are_for_the_blocks_linear_layers_that_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fp8, "check_support", lambda *_: None
    )  # as if there were a GPU: which layers are chosen is the same
    model = build_gpt2_model(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    names = set(model.state_dict())
    assert fp8.convert_linear_layers(model, Fp8(enabled=True, exclude=["*.c_proj"]), CPU) == 4
    assert {name for name, module in model.named_modules() if type(module) is fp8.Float8Linear} == {
        f"h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")
    }
    assert set(model.state_dict()) == names
    with pytest.raises(BadInput, match="matches no linear layer"):
        fp8.convert_linear_layers(model, Fp8(enabled=True, exclude=["nothing"]), CPU)
    with pytest.raises(BadInput, match="multiples of 16"):
        fp8.convert_linear_layers(
            build_gpt2_model(vocab_size=64, n_positions=16, n_embd=20, n_layer=1, n_head=2), Fp8(enabled=True), CPU
        )


# --- choices --------------------------------------------------------------------------------------


def test_a_whole_model_is_compiled_where_nothing_has_to_go_on_between_its_blocks() -> None:
    assert compile_scope(Compile(), Distributed(strategy="ddp"), 1) == "model"
    assert compile_scope(Compile(), Distributed(strategy="ddp"), 8) == "blocks"
    assert compile_scope(Compile(), Distributed(strategy="fsdp2"), 1) == "blocks"
    assert compile_scope(Compile(scope="model"), Distributed(strategy="ddp"), 8) == "model"


def test_the_backend_of_attention_is_known_and_the_cpu_chooses_itself() -> None:
    model = build_gpt2_model(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    choice = attention_kernels.select_backend(model, attention_kernels.backend_order(None, CPU), 16, torch.float32, CPU)
    assert choice is not None and choice.backend in attention_kernels.BACKENDS and choice.warning is None
    assert attention_kernels.backend_order(["math"], CPU) == ("math",)
    assert attention_kernels.select_backend(nn.Linear(2, 2), ("math",), 16, torch.float32, CPU) is None


def test_the_backend_is_asked_for_with_the_models_own_heads_and_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda **call: calls.append(call) or BACKENDS["math"].value)
    llama = build_llama_model(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    gpt2 = build_gpt2_model(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2, dropout=0.1)
    for model in (llama, gpt2):
        attention_kernels.select_backend(model, ("math",), 8, torch.float32, CPU)
    attention_kernels.select_backend(gpt2, ("math",), 8, torch.float32, CPU, packed=True)
    assert [
        (call["query"].shape[1], call["key"].shape[1], call["enable_gqa"], call["dropout_p"]) for call in calls
    ] == [(4, 2, True, 0.0), (2, 2, False, 0.1), (2, 2, False, 0.1)]
    assert [(call["is_causal"], call["attn_mask"] is None) for call in calls] == [
        (True, True),
        (True, True),
        (False, False),
    ]


def test_a_backend_that_is_not_the_one_that_was_wanted_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning includes torch's reason."""

    def refusing(**_: Any) -> None:
        warnings.warn("the heads are too wide", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refusing)
    model = build_gpt2_model(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2)
    gpu = torch.device("cuda")
    for capability, first in (((9, 0), "cudnn_attention"), ((8, 0), "flash_attention")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert attention_kernels.backend_order(None, gpu)[0] == first
        for had in (first, "math"):
            monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *, found=had, **_: BACKENDS[found].value)
            with FakeTensorMode():  # as if there were a GPU
                found = attention_kernels.select_backend(
                    model, attention_kernels.backend_order(None, gpu), 8, torch.bfloat16, gpu
                )
            assert found is not None and found.backend == had
            assert found.warning == (None if had == first else f"{first} is not available: the heads are too wide")


@pytest.mark.torch_range
def test_packed_rows_are_attended_to_by_blocks_where_that_is_compiled_and_else_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_gpt2_model(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2)
    order, gpu = ("flash_attention", "efficient_attention"), torch.device("cuda")
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda **_: BACKENDS["efficient_attention"].value)
    with FakeTensorMode():  # as if there were a GPU
        plain, compiled = (
            attention_kernels.select_backend(model, order, 8, torch.bfloat16, gpu, packed=True, compiled=is_compiled)
            for is_compiled in (False, True)
        )
    assert plain is not None and plain.backend == "efficient_attention"
    assert "set compile.enabled: true to avoid this" in str(plain.warning)
    if compiles_document_masks():
        assert compiled == attention_kernels.AttentionBackend("flex_attention", None)
    else:
        assert compiled is not None and compiled.backend == "efficient_attention"
        assert "an image with torch 2.9 or newer avoids this" in str(compiled.warning)


def test_a_run_says_how_its_own_rows_are_attended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(attention_kernels, "select_backend", lambda *_, **keywords: calls.append(keywords))
    run = Run(tmp_path / "run", recipe(tmp_path))
    for overrides in ([], ["--packed_sequence.packed_sequence_size=16", "--compile.enabled=true"]):
        loaded = load(run.folder / "recipe.yaml", overrides).recipe
        job = SimpleNamespace(
            recipe=loaded,
            world=World(0, 1, CPU, timedelta(minutes=1)),
            model=nn.Linear(1, 1),
            batches=SimpleNamespace(step_tokens=64, global_batch=4),
        )
        describe_fast_paths(job)
    assert calls == [{"packed": False, "compiled": False}, {"packed": True, "compiled": True}]


def test_cuda_graphs_are_refused_where_a_step_has_several_micro_batches(tmp_path: Path) -> None:
    """The rank's share counts: 8 samples on two ranks are one micro-batch of 4, or two of 2."""
    gpu = World(0, 2, torch.device("cuda"), timedelta(minutes=1))
    run = Run(tmp_path / "run", recipe(tmp_path, step_scheduler={"global_batch_size": 8}))

    def made(mode: str, local: int) -> Recipe:
        return load(
            run.folder / "recipe.yaml",
            ["--compile.enabled=true", f"--compile.mode={mode}", f"--step_scheduler.local_batch_size={local}"],
        ).recipe

    for mode in ("reduce-overhead", "max-autotune"):
        with pytest.raises(BadInput, match="local_batch_size to 4"):
            check_cuda_graphs(made(mode, 2), gpu)
        check_cuda_graphs(made(mode, 4), gpu)
        check_cuda_graphs(made(mode, 2), World(0, 2, CPU, timedelta(minutes=1)))
    check_cuda_graphs(made("max-autotune-no-cudagraphs", 2), gpu)


@pytest.mark.parametrize(
    ("name", "strategy", "gathered_again"),
    [("nanogpt", "ddp", True), ("llama-350m", "fsdp2", False), ("llama-1.3b", "fsdp2", True)],
)
def test_the_recipes_that_come_with_it_take_the_fast_paths(name: str, strategy: str, gathered_again: bool) -> None:
    """Fails if a default is slow. ``gathered_again``: FSDP2's ``reshard_after_forward``, which DDP ignores."""
    shipped = load(find_recipe(name)).recipe
    assert (shipped.compile.enabled, shipped.compile.mode, shipped.compile.scope) == (True, "default", "auto")
    assert (shipped.distributed.strategy, shipped.distributed.dtype, shipped.distributed.reshard_after_forward) == (
        strategy,
        "bfloat16",
        gathered_again,
    )
    assert shipped.distributed.bf16_residual or strategy == "fsdp2", "which has the stream in bfloat16 anyway"
    assert shipped.loss_fn == {"_target_": "amlaunch.trainer.loss.LinearCrossEntropy", "vocab_size": 50257}
    assert shipped.model["vocab_size"] == 50304 and shipped.model["vocab_size"] % 128 == 0
    assert shipped.optimizer["_target_"] == "torch.optim.AdamW" and "foreach" not in shipped.optimizer
    assert shipped.sdpa_method is None and not shipped.fp8.enabled
    assert shipped.step_scheduler.local_batch_size * shipped.dataset["seq_len"] >= 32768, "tokens at once"


class Copies(TorchDispatchMode):
    """Records which copies are non-blocking."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and "device" in (kwargs or {}):
            self.found.append(kwargs.get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def test_what_a_gpu_is_given_is_pinned_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tuple(tensor.shape)) or tensor)
    write_tokens(tmp_path / "a.bin", 100)
    dataset = NanogptDataset(file_pattern=str(tmp_path / "a.bin"), seq_len=8)
    batches = StepBatches(dataset, dataset.order(0), 4, None, World(0, 1, torch.device("cuda"), timedelta(minutes=1)))
    host = batches._read(0)
    with Copies() as copies:
        batch = move_to_device(host, torch.device("meta"))  # the one device besides the CPU that is everywhere
    assert pinned == [(4, 9)] and copies.found == [True]
    assert batch.inputs.shape == (4, 8) and batch.inputs.dtype is torch.int64


def test_the_residual_stream_is_carried_in_the_type_that_is_asked_for() -> None:
    model = build_gpt2_model(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    dtypes = []
    model.h[1].register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    for in_bfloat16 in (False, True):
        if in_bfloat16:
            attention_kernels.cast_residual_stream(model, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(1, 4, dtype=torch.int64))
    assert dtypes == [torch.float32, torch.bfloat16]


class Attended(TorchFunctionMode):
    """Records the dtypes of query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.types += [tensor.dtype for tensor in args[:3]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", ["autocast", "residual", "weights"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_computes_in_bfloat16_all_three_of_them(source: str, packed: bool) -> None:
    """Fails if float32 rotary positions make query and key float32.

    That doubles the bytes, and flex_attention of older torch rejects mixed dtypes.
    """
    gpt2 = build_gpt2_model(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    llama = build_llama_model(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    for model in (gpt2, llama):
        if source == "residual":
            attention_kernels.cast_residual_stream(model, torch.bfloat16)
        if source == "weights":  # as FSDP2 gathers them
            model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=source != "weights"), Attended() as attended:
            model(tokens, **({"position_ids": tokens, "documents": tokens.int()} if packed else {}))
        assert attended.types == [torch.bfloat16] * 6


READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
"""Operators for which the host waits for a GPU: their result is a number, or its shape depends on numbers."""


class Reads(TorchDispatchMode):
    """Counts such operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().partition(".")[0] in READS
        return func(*args, **(kwargs or {}))


MUON = {"_target_": "torch.optim.Muon", "lr": 0.02, "others": {"_target_": "torch.optim.AdamW", "lr": 3e-3}}
STEPS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp, loss from hidden states": (
        0,
        {
            "distributed": {"strategy": "ddp", "dtype": "bfloat16"},
            "loss_fn": {"_target_": "amlaunch.trainer.loss.LinearCrossEntropy"},
        },
    ),
    "fsdp2, packed": (0, {"packed_sequence": {"packed_sequence_size": 16}}),
    "muon": (
        0,
        {"distributed": {"strategy": "none"}, "optimizer": MUON},
    ),  # whole matrices: torch finds a part's place by reading the mesh, on the host
    "an optimizer that is not fused": (1, {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}}),
}
"""Reads per step, and the recipe."""


@pytest.mark.parametrize("name", list(STEPS))
def test_a_step_reads_nothing_back_and_collects_no_garbage(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the loop reads a number, which would idle a GPU. The last case proves that reads are counted."""
    monkeypatch.setenv("AMLAUNCH_DEVICE", "cpu")
    reads, sections = STEPS[name]
    observed: list[tuple[int, bool, bool]] = []
    take_step = training_loop.take_step

    def watched(*args: Any) -> Any:
        with Reads() as reads_of_step:
            pending = take_step(*args)
        observed.append((reads_of_step.count, gc.isenabled(), gc.get_freeze_count() > 0))
        return pending

    monkeypatch.setattr(training_loop, "take_step", watched)
    shorter = {
        "step_scheduler": {"max_steps": 3, "val_every_steps": None},
        "model": {"dropout": 0.1},
        "checkpoint": {"enabled": False},
        "export": None,
    }
    assert Run(tmp_path / "run", recipe(tmp_path, **shorter, **sections)).train_inline() == OK
    assert observed == [(reads, False, True)] * 3
    assert gc.isenabled()


def test_garbage_waits_until_training_is_over() -> None:
    collector = StepGarbageCollector()
    collector.freeze()
    try:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        collector.step(1000)
    finally:
        collector.restore()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_start_of_a_process_is_when_the_kernel_made_it() -> None:
    code = """
import time
started = time.time()
from amlaunch.trainer.process.start_time import seconds_since_start
print(seconds_since_start(), time.time() - started)
"""
    since, ours = map(
        float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert ours <= since < ours + 30.0
    assert seconds_since_start() > since - 30.0


# --- whole runs -----------------------------------------------------------------------------------


IMAGE = """
from importlib.machinery import PathFinder

MISSING = {"submitit", "datasets", "shtab", "pyarrow", "psutil", "huggingface_hub"}
real = PathFinder.find_spec

def find_spec(_, name, *more):
    return None if name.partition(".")[0] in MISSING else real(name, *more)

PathFinder.find_spec = classmethod(find_spec)
"""
"""Imitates the NGC image, which has torch, numpy, safetensors, tiktoken, transformers, pyyaml and rich."""


def in_the_image(folder: Path) -> dict[str, str]:
    """Return the environment of a process in that image, with its temporary files in ``folder``."""
    for name in ("site", "tmp"):
        (folder / name).mkdir()
    (folder / "site" / "sitecustomize.py").write_text(IMAGE)
    path = os.pathsep.join([str(folder / "site"), str(Path(__file__).parent.parent)])
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder / "tmp"), "AMLAUNCH_DEVICE": "cpu"}


def bench_recipe(folder: Path) -> str:
    run = Run(
        folder / "run",
        recipe(folder, loss_fn={"_target_": "amlaunch.trainer.loss.LinearCrossEntropy", "vocab_size": VOCAB}),
    )
    return str(run.folder / "recipe.yaml")


@pytest.mark.slow
@pytest.mark.torch_range
def test_bench_train_measures_the_trainer(tmp_path: Path) -> None:
    """Check all that a user sees, in separate processes without the launcher's packages.

    A trace of an earlier measurement changes nothing.
    """
    kept = tmp_path / "kept"
    (kept / "rank0/profile").mkdir(parents=True)
    (kept / "rank0/profile/to-step-00000001.rank0.json.gz").write_bytes(b"no trace")
    words = ["-P"] if sys.version_info >= (3, 11) else []
    command = [
        sys.executable,
        *words,
        "-m",
        "amlaunch.trainer.tools.bench",
        "train",
        bench_recipe(tmp_path),
        "--steps",
        "4",
        "--warmup",
        "2",
        "--profiled",
        "2",
        "--ranks",
        "2",
        "--keep",
        str(kept),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=in_the_image(tmp_path))
    assert done.returncode == OK, done.stderr
    report = json.loads(done.stdout)
    assert f"trace and metrics are in {kept}" in done.stderr and "step 9/9" in done.stderr
    assert report["steps"] == 4 and report["ranks"] == 2 and not report["synthetic_data"]
    assert (kept / "rank0/profile/to-step-00000009.rank0.json.gz").exists(), (
        "a step between those measured and the two profiled"
    )
    assert report["tokens_per_s"] == pytest.approx(128 / report["step_time_s"]["median"])
    assert sum(row["share"] for row in report["roofline"]) == pytest.approx(1.0, abs=0.05)
    assert {row["part"]: row["seconds"] > 0 for row in report["roofline"]}["loss"]
    assert report["attention"]["used"] and report["advice"] and report["mfu"] is None
    assert report["startup_s"] > 0 and report["versions"]["torch"] == torch.__version__
    assert report["host_waits_per_step"] is None, "there is no device to wait for"
    shown = format_report(report)
    for words in (
        "2 x CPU",
        f"{report['tokens_per_s']:,.0f} (",
        "(median of 4; ",
        "unknown for this device (CPU)",
        f"{report['peak_memory_gib']:.2f} GiB",
        "s to the first step (nothing was compiled)",
        f"torch {torch.__version__}",
        "matrix products",
        "advice: ",
    ):
        assert words in shown, words
    shown = format_report(
        {
            **report,
            "mfu": 0.512,
            "attention": {"wanted": "cudnn_attention", "used": ["math"]},
            "host_waits_per_step": 2.0,
        }
    )
    for words in (
        "51.2% (6N + 12LTd operations per token",
        "math; warning: cudnn_attention is unavailable",
        "2.0 per step for the device",
    ):
        assert words in shown, words


@pytest.mark.slow
def test_bench_data_reads_what_training_reads_or_makes_it_up(tmp_path: Path) -> None:
    arguments = ["data", bench_recipe(tmp_path), "--json", "--steps", "3", "--warmup", "1"]
    code = f"from amlaunch.trainer.tools.bench import main; raise SystemExit(main({arguments} + %s))"
    root = str(Path(__file__).parent.parent)
    for overrides, synthetic in (
        ([], False),
        (
            [
                "--dataset.file_pattern=null",
                "--preprocess={data_files: x, tokenizer: byte}",
                "--model.vocab_size=257",
                "--loss_fn.vocab_size=null",
            ],
            True,
        ),
    ):
        done = subprocess.run([sys.executable, "-c", code % overrides], capture_output=True, text=True, cwd=root)
        assert done.returncode == OK, done.stderr
        report = json.loads(done.stdout)
        assert report["synthetic_data"] is synthetic and report["tokens_per_s"] > 0 and report["seq_len"] == 16


@pytest.mark.slow
def test_bench_preprocess_goes_from_text_to_verified_shards(tmp_path: Path) -> None:
    """Check both sources of text: this machine, and a recipe."""
    (tmp_path / "text.txt").write_text("abcdefgh" * 1000)
    (tmp_path / "mine.yaml").write_text(
        "preprocess: {data_files: text.txt, tokenizer: byte}\n"
        "model: {_target_: amlaunch.trainer.models.gpt2.build_gpt2_model}\n"
        "dataset: {}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    for arguments, tokens, tokenizer in (
        (["--max-tokens", "50K", "--num-workers", "2"], 50_000, "gpt2"),
        ([str(tmp_path / "mine.yaml"), "--max-tokens", "1K"], 1000, "byte"),
    ):
        command = [sys.executable, "-m", "amlaunch", "bench", "preprocess", *arguments]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == OK, done.stderr
        report = json.loads(done.stdout)
        assert report["tokens"] == tokens and report["tokenizer"] == tokenizer
        assert report["tokens_per_s"] == pytest.approx(tokens / report["seconds"])
    assert (
        "1,000 tokens from"
        in subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
    )
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["mine.yaml", "text.txt"], "nothing is left"


@pytest.mark.slow
def test_ctrl_c_ends_a_measurement_and_leaves_nothing(tmp_path: Path) -> None:
    """Send the signal to all processes like a terminal.

    Fails if the launcher kills its child, which then leaves its folder behind.
    """
    arguments = [
        "bench",
        "train",
        bench_recipe(tmp_path),
        "--gpus",
        "0",
        "--steps",
        "1000",
        "--profiled",
        "0",
        "--json",
        "--step_scheduler.global_batch_size",
        "1024",
    ]  # steps that take seconds
    process = subprocess.Popen(
        [sys.executable, "-m", "amlaunch", *arguments],
        cwd=tmp_path,
        env=in_the_image(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None and any(line.startswith("step 1/") for line in process.stderr)
    time.sleep(0.5)  # into the next step, which is not left before its end
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (INTERRUPTED, "") and errors.endswith("interrupted: nothing was measured\n")
    assert list((tmp_path / "tmp").glob("amlaunch-*")) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_value_is_not_taken_for_the_recipe(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fails if the command omits the recipe, so that the next argument takes its place."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent / "src"))
    assert amlaunch(["bench", "data", "--gpus", "0", "--model.n_embed", "3"]) == BAD_INPUT
    assert "did you mean 'n_embd'?" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nanogtp"], "did you mean 'nanogpt'?"),
        (["train", "--steps", "0"], "argument --steps: expected an integer of at least 1, got '0'"),
        (["train", "--profiled=-1"], "argument --profiled: expected an integer of at least 0, got '-1'"),
        (["train", "nanogpt", "--ranks", "2", "--model.n_embed", "3"], "did you mean 'n_embd'?"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == BAD_INPUT
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--gpus", "-1"], "--gpus -1: expected an integer of at least 0"),
        (["train", "--gpus", "3"], "this machine has 2 GPUs; write --gpus 2 or less"),
        (["data", "--gpus", "2"], "bench data measures one rank; write --gpus 1"),
        (["preprocess", "--model.n_embd", "3"], "--model.n_embd: bench preprocess accepts no recipe overrides"),
    ],
)
def test_the_command_refuses_what_it_would_not_heed(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert amlaunch(["bench", *arguments]) == BAD_INPUT
    assert message in capsys.readouterr().err


def compile_into(folder: str) -> None:
    """Set the compile cache of a rank, as the driver does."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


@pytest.mark.slow
def test_everything_fast_at_once_stays_near_the_truth_and_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    """Combine bfloat16, compilation, a bfloat16 residual stream and the loss from hidden states, with real kernels.

    The deviation over 12 steps stays within the bounds of docs/performance.md.
    """
    cached = {0: partial(compile_into, str(tmp_path / "cache"))}
    steps = {"max_steps": 12, "val_every_steps": None}
    loss = {"_target_": "amlaunch.trainer.loss.LinearCrossEntropy", "vocab_size": VOCAB, "chunk_tokens": 20}
    rates = {"lr_warmup_steps": 4, "lr_decay_steps": 12}
    one = {"n_layer": 1}  # a C++ compiler is slow
    exact = Run(
        tmp_path / "exact",
        recipe(tmp_path, model=one, step_scheduler=steps, lr_scheduler=rates, distributed={"strategy": "none"}),
    )
    fast = Run(
        tmp_path / "fast",
        recipe(
            tmp_path,
            model=one,
            step_scheduler=steps,
            lr_scheduler=rates,
            distributed={"strategy": "none", "dtype": "bfloat16", "bf16_residual": True},
            compile={"enabled": True},
            loss_fn=loss,
        ),
    )
    assert exact.train_inline("--export", "null") == OK
    starts = []
    for last in ("6", "12"):
        fast.start(1, "--export", "null", "--step_scheduler.max_steps", last, prepare=cached)
        codes, output = fast.wait(600.0)
        assert codes == [OK] and "compile scope: model" in output, output
        assert re.search(
            r"first step finished [\d.]+ s after process start; "
            r"torch.compile took [\d.]+ s \(\d+ of \d+ graphs were cached\)",
            output,
        )
        starts.append(fast.result()["startup"])
    first, second = starts
    assert first["compile_cache_misses"] > 0 and first["compile_cache_hits"] == 0
    assert second["compile_cache_misses"] == 0 and second["compile_cache_hits"] == first["compile_cache_misses"]
    assert second["compile_seconds"] < first["compile_seconds"]
    for column, bound in (("loss", 1e-3), ("grad_norm", 2e-2)):
        error = np.abs(np.array(fast.column(column)) / exact.column(column) - 1).max()
        assert error < bound, f"{column}: {error}"


@pytest.mark.slow
def test_the_gpu_suite_does_on_a_cpu_what_a_cpu_can_do(tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    command = [
        sys.executable,
        "benchmarks/gpu_suite.py",
        "--dry",
        "--only",
        "124M,loss-torch,fp8-124M,doctor",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    states = {name: part["state"] for name, part in json.loads(out.read_text()).items()}
    assert states.pop("doctor").startswith(("done", "skipped")), "what it finds bad here is no failure"
    torchs = "done" if has_linear_cross_entropy() else "skipped: torch's linear_cross_entropy needs torch 2.13"
    assert states == {"124M": "done", "loss-torch": torchs, "fp8-124M": "skipped: FP8 needs a GPU"}, done.stderr
    assert done.returncode == 0 and "advice:" in done.stdout


@pytest.mark.slow
def test_the_gpu_suite_compares_types_over_two_ranks_and_sees_a_sum_for_an_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = gpu_suite.Measurement("types", gpu_suite.parity_of_types)
    suite = gpu_suite.Suite(dry=True, folder=tmp_path, deadline=time.monotonic() + 300)
    monkeypatch.setattr(gpu_suite, "ON_TWO_RANKS", {"fsdp2": gpu_suite.ON_TWO_RANKS["fsdp2"]})
    lines: dict[str, list[dict[str, Any]]] = {}
    train = gpu_suite.train

    def recorded(suite: gpu_suite.Suite, name: str, *overrides: str, **keys: Any) -> list[dict[str, Any]]:
        lines[name] = train(suite, name, *overrides, **keys)
        return lines[name]

    monkeypatch.setattr(gpu_suite, "train", recorded)
    errors = gpu_suite.parity_of_types(part, suite)["errors"]
    assert 1e-9 < errors["fsdp2 float32"] < 1e-6 and 1e-5 < errors["fsdp2 bfloat16"] < 4e-3, errors

    for wrong in (lambda norm: 2 * norm, lambda _: float("nan")):

        def spoilt(*arguments: Any, ranks: int = 1, wrong: Any = wrong, **_: Any) -> list[dict[str, Any]]:
            scale = wrong if ranks == 2 else float
            return [{**line, "grad_norm": scale(line["grad_norm"])} for line in lines[arguments[1]]]

        monkeypatch.setattr(gpu_suite, "train", spoilt)
        with pytest.raises(gpu_suite.MeasurementFailed, match=r"float32 (1.0e.00|nan)"):
            gpu_suite.parity_of_types(part, suite)


def test_the_gpu_suite_survives_parts_that_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measurements = [
        gpu_suite.Measurement("wrong", gpu_suite.bench, ("llama-of-nobody",)),
        gpu_suite.Measurement("right", lambda *_: {"note": "went on"}),
    ]
    monkeypatch.setattr(gpu_suite, "measurements", lambda: measurements)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--dry"])
    assert gpu_suite.main() == 1
    output = capsys.readouterr().out
    assert "FAILED: " in output and "llama-of-nobody" in output and "went on" in output


def hanging(folder: Path) -> Any:
    """Make a measurement that never ends, with a descendant that keeps its output open."""

    def run(measurement: gpu_suite.Measurement, suite: gpu_suite.Suite) -> dict[str, Any]:
        suite.process(["sh", "-c", f"sleep 600 & echo $! >> {folder}/pids; echo thinking; sleep 600"])
        return {}

    return run


def suite_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, measurements: list[gpu_suite.Measurement], *arguments: str
) -> tuple[int, dict[str, str]]:
    """Run the suite; return its exit code and the written states, and check that no process is left."""
    monkeypatch.setattr(gpu_suite, "measurements", lambda: measurements)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--dry", "--out", str(folder / "out.json"), *arguments])
    code = gpu_suite.main()
    for pid in map(int, (folder / "pids").read_text().split()):
        assert (
            not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        )  # which nobody has buried yet
    return code, {name: outcome["state"] for name, outcome in json.loads((folder / "out.json").read_text()).items()}


def test_the_gpu_suite_ends_parts_that_hang_and_itself_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if only the first process is killed and its output awaited, or if there is no total time limit."""
    started = time.monotonic()
    measurements = [
        gpu_suite.Measurement("late", hanging(tmp_path), limit=0.1),  # five times that in a dry run
        gpu_suite.Measurement("right", lambda *_: {"note": "went on"}),
        gpu_suite.Measurement("later", hanging(tmp_path)),
        gpu_suite.Measurement("never", hanging(tmp_path)),
    ]
    code, states = suite_of(tmp_path, monkeypatch, measurements, "--minutes", "0.05")
    assert time.monotonic() - started < 8 and code == 1
    assert (
        states["late"].startswith("FAILED: exceeded its time limit of 1 s; last output: thinking")
        and states["right"] == "done"
    )
    assert states["later"] == "no time left; last output: thinking" and states["never"] == "no time left"
    shown = capsys.readouterr().out
    assert all(name in shown for name in states) and "went on" in shown


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_gpu_suite_prints_what_it_has_when_it_is_told_to_end(
    tmp_path: Path, sent: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measurements = [
        gpu_suite.Measurement("first", lambda *_: {"note": "a figure"}),
        gpu_suite.Measurement("second", hanging(tmp_path)),
        gpu_suite.Measurement("third", hanging(tmp_path)),
    ]
    monkeypatch.setattr(gpu_suite, "GRACE_SECONDS", 30.0)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), sent))
    timer.start()
    code, states = suite_of(tmp_path, monkeypatch, measurements)
    assert code == 130 and states == {"first": "done", "second": "interrupted", "third": "not started"}
    assert "a figure" in capsys.readouterr().out


def test_the_gpu_suite_leaves_what_nothing_else_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The measurement hangs in the suite's own process."""
    (tmp_path / "pids").touch()
    monkeypatch.setattr(gpu_suite, "GRACE_SECONDS", 0.2)
    code, states = suite_of(
        tmp_path, monkeypatch, [gpu_suite.Measurement("stuck", lambda *_: time.sleep(600) or {})], "--minutes", "0.018"
    )
    assert code == 130 and states == {"stuck": "interrupted"} and "stuck" in capsys.readouterr().out


def test_the_gpu_suite_runs_under_python_3_10_which_knows_no_p(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10))
    assert "-P" not in gpu_suite.module("amlaunch.trainer.tools.bench")


def test_the_gpu_suite_begins_with_what_matters_most() -> None:
    names = [part.name for part in gpu_suite.measurements()]
    assert (
        names.index("hf-eager")
        < names.index("residual-curves")
        < names.index("350M")
        < names.index("350M-32")
        < names.index("micro-64")
    )
    assert names[-1] == "autotune"
