"""The trainer's smaller modules: schedule, groups, clipping, ranks, stopping, metrics, sampling, verifying."""

from __future__ import annotations

import inspect
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from amlaunch.launcher.execution.stop_request import lead_seconds
from amlaunch.recipes.errors import BAD_INPUT, FAILED, BadInput
from amlaunch.recipes.files import append_json_line, sha256_file, write_json
from amlaunch.recipes.format.schema import ClipGradNorm, LRScheduler, ParameterGroup
from amlaunch.recipes.format.targets import TargetPolicy
from amlaunch.recipes.run_layout import ElementDir
from amlaunch.trainer.checkpoints import checkpoint
from amlaunch.trainer.checkpoints.saver import owned_by_rank
from amlaunch.trainer.loop.training_loop import seed_step
from amlaunch.trainer.metrics.writers import (
    LossSpikeDetector,
    Metrics,
    StepRecord,
    open_wandb,
    peak_of_name,
    summarise_metrics,
)
from amlaunch.trainer.models.gpt2 import build_gpt2_model
from amlaunch.trainer.models.sampling import draw, generate
from amlaunch.trainer.optim import optimizers as optim
from amlaunch.trainer.optim.muon import ShardedMuon
from amlaunch.trainer.parallel.world import _device
from amlaunch.trainer.process.errors import LocalBadInput, LocalTrainingFailed, TrainingFailed, run_guarded
from amlaunch.trainer.process.rank_environment import RankEnvironment, read_rank_environment
from amlaunch.trainer.process.stop_request import StopFlag
from amlaunch.trainer.tools.export import check_out_folder

CPU = torch.device("cpu")


def rates(section: LRScheduler | None, steps: list[int], last_step: int = 100) -> list[float]:
    schedule = optim.LearningRateSchedule(section, 1.0, last_step, step_tokens=1000)
    return [schedule.rate(step) for step in steps]


def test_the_rate_warms_up_to_its_peak_and_falls_to_its_floor() -> None:
    section = LRScheduler(lr_warmup_steps=10, init_lr=0.2, min_lr=0.1)
    assert rates(section, [1, 5, 10, 55, 100, 1000]) == pytest.approx([0.28, 0.6, 1.0, 0.55, 0.1, 0.1])
    assert rates(section, [32])[0] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 0.7193398003386512))  # cos(pi * 22/90)
    linear = LRScheduler(lr_decay_style="linear", lr_decay_steps=50)
    assert rates(linear, [1, 25, 50, 60]) == pytest.approx([0.98, 0.5, 0.0, 0.0])
    constant = LRScheduler(lr_decay_style="constant", lr_warmup_steps=2)
    assert rates(constant, [1, 2, 99]) == [0.5, 1.0, 1.0]
    assert rates(None, [1, 99]) == [1.0, 1.0]


def test_the_rate_stays_then_falls_with_wsd_and_by_the_root_of_the_step() -> None:
    wsd = LRScheduler(lr_decay_style="WSD", lr_warmup_steps=10, min_lr=0.2)  # a fifth of the steps decays
    assert rates(wsd, [5, 10, 50, 80, 90, 100, 101]) == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.6, 0.2, 0.2])
    for style, half in (("cosine", 0.5), ("minus_sqrt", 1 - 0.5**0.5), ("exponential", 2 * 0.5**0.5 - 1)):
        wsd = LRScheduler(lr_decay_style="WSD", lr_wsd_decay_steps=40, lr_wsd_decay_style=style)
        assert rates(wsd, [60, 80, 100]) == pytest.approx([1.0, half, 0.0]), style
    root = LRScheduler(lr_decay_style="inverse-square-root", lr_warmup_steps=4, min_lr=0.25)
    assert rates(root, [2, 4, 16, 64, 1000]) == pytest.approx([0.5, 1.0, 0.5, 0.25, 0.25])


def test_a_schedule_in_tokens_is_one_in_steps_rounded_up() -> None:
    tokens = LRScheduler(
        lr_decay_style="WSD", lr_warmup_tokens=9_001, lr_decay_tokens=60_000, lr_wsd_decay_tokens=20_000
    )
    steps = LRScheduler(lr_decay_style="WSD", lr_warmup_steps=10, lr_decay_steps=60, lr_wsd_decay_steps=20)
    assert rates(tokens, list(range(1, 101))) == rates(steps, list(range(1, 101)))
    assert rates(LRScheduler(lr_warmup_tokens=0), [1])[0] > 0.9


def test_a_decay_that_ends_before_the_warmup_is_refused_but_a_short_trial_is_not() -> None:
    with pytest.raises(BadInput, match="the decay ends at step 5, before the warmup ends at step 10"):
        rates(LRScheduler(lr_warmup_steps=10, lr_decay_steps=5), [1])
    assert rates(LRScheduler(lr_warmup_steps=10), [3], last_step=3) == pytest.approx([0.3])


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))


ADAMW = {"_target_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.1}


def settings(optimizers: optim.Optimizers, model: nn.Module, key: str) -> dict[str, float]:
    values = {id(parameter): group[key] for group in optimizers.groups for parameter in group["params"]}
    return {name: values[id(parameter)] for name, parameter in model.named_parameters()}


def test_only_matrices_decay_and_adamw_is_fused() -> None:
    model = small_model()
    optimizers = optim.build_optimizers(ADAMW, [], TargetPolicy(), model)
    assert settings(optimizers, model, "weight_decay") == {
        "0.weight": 0.1,
        "1.weight": 0.1,
        "1.bias": 0.0,
        "2.weight": 0.0,
        "2.bias": 0.0,
    }
    assert [optim.can_skip_on_device(part) for part in optimizers.members] == [True]
    plain = optim.build_optimizers({"_target_": "torch.optim.Rprop", "lr": 1e-3}, [], TargetPolicy(), model)
    assert len(plain.groups) == 1 and not optim.can_skip_on_device(plain.members[0])


def test_groups_by_name_have_rates_and_decays_of_their_own() -> None:
    model = small_model()
    groups = [ParameterGroup("0.*", lr=5e-4, weight_decay=0.3), ParameterGroup("*.bias", lr_scale=2.0)]
    optimizers = optim.build_optimizers(ADAMW, groups, TargetPolicy(), model)
    optimizers.set_learning_rate(1e-4)  # a tenth of the peak
    rates = settings(optimizers, model, "lr")
    assert rates == pytest.approx(
        {"0.weight": 5e-5, "1.weight": 1e-4, "1.bias": 2e-4, "2.weight": 1e-4, "2.bias": 2e-4}
    )
    assert settings(optimizers, model, "weight_decay") == {
        "0.weight": 0.3,
        "1.weight": 0.1,
        "1.bias": 0.0,
        "2.weight": 0.0,
        "2.bias": 0.0,
    }
    with pytest.raises(
        BadInput,
        match=r"parameter_groups.0.match: '1.wieght' matches no parameter of the model; did you mean '1.weight'",
    ):
        optim.build_optimizers(ADAMW, [ParameterGroup("1.wieght")], TargetPolicy(), model)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return build_gpt2_model(vocab_size=97, n_positions=16, n_embd=16, n_layer=2, n_head=2)


MUON = {
    "_target_": "torch.optim.Muon",
    "lr": 0.02,
    "weight_decay": 0.1,
    "others": {"_target_": "torch.optim.AdamW", "lr": 3e-3},
}


def test_muon_has_the_hidden_matrices_and_another_the_rest() -> None:
    model = gpt2()
    optimizers = optim.build_optimizers(MUON, [], TargetPolicy(), model)
    muon_ids = {id(parameter) for group in optimizers.members[0].param_groups for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in muon_ids}
    assert names == {
        f"h.{i}.{part}.weight" for i in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    optimizers.set_learning_rate(0.01)
    assert {group["lr"] for group in optimizers.members[0].param_groups} == {0.01}
    assert [group["lr"] for group in optimizers.members[1].param_groups] == pytest.approx([1.5e-3] * 2)
    with pytest.raises(BadInput, match=r"Add optimizer\.others for the other parameters"):
        optim.build_optimizers({"_target_": "torch.optim.Muon", "lr": 0.02}, [], TargetPolicy(), model)


TORCHS_MUON = {
    ((9, 6), None): (-0.309469832573086, 26.615247620735317),
    ((9, 6), "match_rms_adamw"): (-0.15160856116563082, 26.610409541986883),
    ((6, 9), None): (-0.3128232331946492, 26.80284276138991),
    ((6, 9), "match_rms_adamw"): (-0.18769396096467972, 26.72752320021391),
    ((6, 9), "spectral_unclamped"): (-0.25541916210204363, 26.753416624851525),
}
"""Sum and sum of magnitudes of the weights below after three steps of torch.optim.Muon (torch 2.15), for torch before
2.9, which has no Muon."""


@pytest.mark.torch_range
@pytest.mark.parametrize(("shape", "adjust"), list(TORCHS_MUON), ids=str)
def test_our_muon_is_torchs_on_whole_matrices(shape: tuple[int, int], adjust: str | None) -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 54).view(shape))
    optimizer = ShardedMuon([weight], lr=0.1, weight_decay=0.1, adjust_lr_fn=adjust)
    for step in (1, 2, 3):
        weight.grad = torch.sin(torch.arange(54.0) * step).view(shape)
        optimizer.step()
    sums = weight.double().sum().item(), weight.double().abs().sum().item()
    assert sums == pytest.approx(TORCHS_MUON[shape, adjust], abs=1e-5)


@pytest.mark.torch_range
def test_our_muon_has_torchs_keywords_and_defaults() -> None:
    keywords = {
        "lr": 0.001,
        "weight_decay": 0.1,
        "momentum": 0.95,
        "nesterov": True,
        "ns_coefficients": (3.4445, -4.775, 2.0315),
        "eps": 1e-07,
        "ns_steps": 5,
        "adjust_lr_fn": None,
    }
    for muon in (ShardedMuon, getattr(torch.optim, "Muon", ShardedMuon)):
        parameters = list(inspect.signature(muon).parameters.values())[1:]
        assert {parameter.name: parameter.default for parameter in parameters} == keywords


@pytest.mark.parametrize(
    ("keywords", "problem"),
    [
        ({"lr": -1.0}, "lr -1.0 is negative"),
        ({"adjust_lr_fn": "spectral"}, "adjust_lr_fn 'spectral' is not supported; use one of: original,"),
        ({"ns_steps": 100}, "ns_steps between 1 and 99"),
    ],
)
def test_muon_refuses_keywords_out_of_range(keywords: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        optim.build_optimizers({**MUON, **keywords}, [], TargetPolicy(), gpt2())


@pytest.mark.parametrize(
    "section", [ADAMW, MUON, {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}], ids=["adamw", "muon", "sgd"]
)
def test_a_step_that_is_not_finite_changes_nothing(section: dict[str, Any]) -> None:
    model = gpt2()
    optimizers = optim.build_optimizers(section, [], TargetPolicy(), model)

    def step(poison: float) -> dict[str, Any]:
        model(torch.arange(16)[None]).square().mean().backward()
        if poison:
            model.wte.weight.grad[3, 1] = model.h[1].mlp.c_fc.weight.grad[0, 0] = poison
        optimizers.step(torch.tensor(not poison))
        optimizers.zero_grad()
        states = [value for part in optimizers.members for state in part.state.values() for value in state.values()]
        return {str(i): tensor.clone() for i, tensor in enumerate([*model.parameters(), *states])}

    before = step(0.0)
    for poison in (math.nan, math.inf):
        after = step(poison)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(before[name], tensor) for name, tensor in step(0.0).items())


def test_what_all_ranks_have_whole_is_written_by_one_of_them_each() -> None:
    state = {"model": {f"w{i}": torch.zeros(i + 1) for i in range(9)}, "optimizer": {"m": torch.zeros(40), "lr": 0.1}}
    parts = [owned_by_rank(state, rank, 3) for rank in range(3)]
    names = [
        name
        for part in parts
        for values in part.values()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    ]
    assert sorted(names) == sorted([*state["model"], "m"]), "each once"
    assert all(part["optimizer"]["lr"] == 0.1 for part in parts)
    sizes = [
        sum(value.nbytes for values in part.values() for value in values.values() if isinstance(value, torch.Tensor))
        for part in parts
    ]
    assert max(sizes) == 160 and min(sizes) >= 80


def test_a_loss_far_above_the_others_is_a_spike() -> None:
    spikes = LossSpikeDetector()
    wobbling = [3.0 + 0.02 * (i % 5) for i in range(40)]
    assert not any(map(spikes.is_spike, wobbling))
    assert spikes.is_spike(3.5) and not spikes.is_spike(3.1)
    assert not any(map(LossSpikeDetector().is_spike, [*wobbling[:20], 99.0])), "too little to tell"


def test_the_norm_is_reported_with_and_without_clipping() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert optim.clip_gradients([parameter], None).item() == 5.0
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert optim.clip_gradients([parameter], ClipGradNorm(1.0)).item() == 5.0
    assert parameter.grad.norm().item() == pytest.approx(1.0, abs=1e-5)


def test_ranks_come_from_torchrun_or_slurm_or_are_one() -> None:
    assert read_rank_environment({}) == RankEnvironment()
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2", "MASTER_ADDR": "a"}
    assert read_rank_environment(torchrun) == read_rank_environment({**slurm, **torchrun}) == RankEnvironment(3, 4, 1)
    assert read_rank_environment(slurm) == RankEnvironment(5, 8, 2)
    with pytest.raises(BadInput, match="MASTER_ADDR"):
        read_rank_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    with pytest.raises(BadInput, match="variable RANK: expected a non-negative integer, got 'x'"):
        read_rank_environment({"RANK": "x"})


@pytest.mark.parametrize(("local", "seen", "expected"), [(0, 1, 0), (7, 1, 0), (3, 4, 3), (4, 4, None), (0, 0, None)])
def test_a_rank_takes_the_gpu_that_is_its_own(
    local: int, seen: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the one with its local rank, or the only one, as Slurm's --gpus-per-task 1 binds them."""
    chosen: list[torch.device] = []
    for name, patch in (("is_available", lambda: True), ("device_count", lambda: seen), ("set_device", chosen.append)):
        monkeypatch.setattr(torch.cuda, name, patch)
    monkeypatch.delenv("AMLAUNCH_DEVICE", raising=False)
    if expected is None:
        with pytest.raises(LocalBadInput, match=f"local rank {local}, but sees {seen} GPUs"):
            _device(RankEnvironment(local, 8, local))
    else:
        assert _device(RankEnvironment(local, 8, local)) == torch.device("cuda", expected)
        assert chosen == [torch.device("cuda", expected)]


@pytest.mark.torch_range
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU that torch can use")
def test_a_rank_with_a_gpu_that_torch_cannot_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMLAUNCH_DEVICE", "cuda")
    reason = "Found no NVIDIA driver on your system" if torch.version.cuda else r"torch \S+ is built for the CPU only"
    with pytest.raises(LocalTrainingFailed, match=rf"^rank 3 on \S+ has a GPU, but torch cannot use it: {reason}"):
        _device(RankEnvironment(3, 8, 3))


def test_the_reason_of_torch_names_what_hides_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("No CUDA GPUs\nare available")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("AMLAUNCH_DEVICE", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(LocalTrainingFailed, match=r"use it: No CUDA GPUs are available \(CUDA_VISIBLE_DEVICES=''\)$"):
        _device(RankEnvironment(0, 1, 0))


@pytest.mark.parametrize(
    ("error", "rank", "code", "message"),
    [
        (BadInput("all see it"), "0", BAD_INPUT, "error: all see it\n"),
        (BadInput("all see it"), "1", BAD_INPUT, ""),
        (LocalBadInput("mine"), "1", BAD_INPUT, "error: mine\n"),
        (TrainingFailed("diverged"), "0", FAILED, "error: diverged\n"),
        (TrainingFailed("diverged"), "2", FAILED, ""),
        (LocalTrainingFailed("no GPU"), "2", FAILED, "error: no GPU\n"),
    ],
)
def test_an_error_that_all_ranks_have_is_said_once(
    error: Exception,
    rank: str,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> int:
        raise error

    monkeypatch.setenv("RANK", rank)
    assert run_guarded(work) == code
    assert capsys.readouterr().err == message


def test_an_unexpected_error_names_its_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "7")
    assert run_guarded(lambda: 1 // 0) == FAILED
    message = capsys.readouterr().err
    assert message.startswith("rank 7 on ") and "ZeroDivisionError" in message


def test_signals_and_the_file_ask_to_stop(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        for number in before:
            flag = StopFlag()
            flag.install()
            assert not flag.requested()
            os.kill(os.getpid(), number)
            assert flag.requested()
        with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C is meant
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    flag = StopFlag()
    flag.file = tmp_path / "stop"
    assert not flag.requested()
    flag.file.touch()
    assert flag.requested()
    flag.polls_file = False  # another rank looks at every step; this one while it waits
    assert not flag.requested() and flag.requested(poll=True)


def test_dropout_is_a_function_of_seed_step_and_rank() -> None:
    def drawn(*place: int) -> float:
        seed_step(*place)
        return torch.rand(()).item()

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({drawn(1, 2, 3), drawn(0, 2, 3), drawn(1, 3, 3), drawn(1, 2, 0), drawn(1, 23, 0), drawn(12, 3, 0)}) == 6


def test_peaks_are_the_dense_ones_and_the_longest_name_wins() -> None:
    assert peak_of_name("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of_name("NVIDIA H100 PCIe") == 756e12
    assert peak_of_name("NVIDIA H200") == 989e12
    assert peak_of_name("NVIDIA H200 NVL") == 835e12
    assert [peak_of_name(f"NVIDIA {name}") for name in ("L4", "L40", "L40S")] == [121e12, 181e12, 362e12]
    assert peak_of_name("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of_name("Radeon") is None


def metrics(folder: Path, peak: float | None = None) -> Metrics:
    return Metrics(ElementDir(folder), CPU, ranks=2, last_step=9, flops_per_token=1e6, peak_flops=peak)


def line(step: int, loss: float | None = None) -> StepRecord:
    value = 4.0 - step if loss is None else loss
    return StepRecord(step, step / 4, step * 128, value, 1.0, 1e-3, step_tokens=128, step_time_s=0.5, data_time_s=0.1)


def test_steps_are_written_once_even_when_they_are_taken_again(tmp_path: Path) -> None:
    writer = metrics(tmp_path)
    writer.resume_at(0)
    for step in (1, 2):
        writer.log_step(line(step))
    writer.log_validation(2, {"": 3.5}, 0.1)
    writer.log_step(line(3, loss=math.nan))
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 4, "lo')  # a kill tears the last line
    resumed = metrics(tmp_path)
    resumed.resume_at(2)
    assert resumed.val_loss == 3.5
    assert resumed.has_validation(2) and not resumed.has_validation(1)
    assert resumed.skipped_steps == 0
    resumed.log_step(line(3))
    resumed.log_step(line(4, loss=math.inf))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [entry["step"] for entry in map(json.loads, text.splitlines())] == [1, 2, 2, 3, 4]
    assert "NaN" not in text and "Infinity" not in text, "strict readers know no such words"
    assert json.loads(text.splitlines()[-1])["skipped_steps"] == 1
    summary = summarise_metrics(tmp_path / "metrics.jsonl")
    assert (summary["loss_first"], summary["loss_last"], summary["val_loss"]) == (3.0, 1.0, 3.5)


def test_a_line_has_what_a_reader_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics(tmp_path, peak=1e9).log_step(line(2))
    entry = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert entry["tokens_per_s"] == 256.0 and entry["tokens_per_s_per_gpu"] == 128.0
    assert entry["mfu"] == pytest.approx(256 * 1e6 / (2 * 1e9), abs=1e-4)
    assert entry["tokens"] == 256 and entry["epoch"] == 0.5 and entry["peak_memory_gib"] > 0
    assert (entry["checkpoint_time_s"], entry["validation_time_s"], entry["skipped_steps"], entry["spike"]) == (
        0.0,
        0.0,
        0,
        False,
    )
    assert "step 2/9 | loss 2.0000" in capsys.readouterr().out
    beat = json.loads((tmp_path / "progress.json").read_text())
    assert (beat["unit"], beat["done"], beat["total"], beat["eta_s"]) == ("step", 2, 9, 3.5)


def test_a_heartbeat_tells_the_driver_how_long_a_step_and_a_save_take(tmp_path: Path) -> None:
    before = metrics(tmp_path)
    before.log_step(line(2))
    before.checkpoint_saved(2, 41.5)
    before.close()
    assert lead_seconds(ElementDir(tmp_path)) == 2 * (0.5 + 41.5)
    after = metrics(tmp_path)
    after.log_step(line(3))
    assert lead_seconds(ElementDir(tmp_path)) == 2 * (0.5 + 41.5), "known before this start has saved anything"


def test_wandb_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_wandb(None, "x", Path()) is None
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not, where it is
    with pytest.raises(BadInput, match=r"pip install 'amlaunch\[wandb\]'"):
        open_wandb({"project": "p"}, "x", Path())


def fake_checkpoint(root: Path, step: int) -> Path:
    folder = checkpoint.checkpoint_folder(root, step)
    folder.mkdir(parents=True)
    write_json(folder / "meta.json", {"step": step, "model": {"n": 1}, "data": {"tokens": 5}})
    (folder / "__0_0.distcp").write_bytes(bytes(range(200)))
    names = ("meta.json", "__0_0.distcp")
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}
    write_json(folder / "manifest.json", entries)
    return folder


def test_damage_is_found_whatever_it_is(tmp_path: Path) -> None:
    folder = fake_checkpoint(tmp_path, 1)
    data = folder / "__0_0.distcp"
    assert checkpoint.find_damage(folder) is None
    for harm, word in ((b"x" * 200, "checksum mismatch"), (bytes(range(199)), "expected 200 bytes, got 199")):
        data.write_bytes(harm)
        assert word in str(checkpoint.find_damage(folder))
        assert sum(checkpoint.find_damage(folder, rank, 3) is not None for rank in range(3)) == 1
    data.unlink()
    assert "is missing" in str(checkpoint.find_damage(folder))
    whole = (folder / "manifest.json").read_text()
    for key in ("bytes", "sha256"):
        (folder / "manifest.json").write_text(whole.replace(key, key.upper(), 1))
        assert "manifest.json has no valid entry for meta.json" in str(checkpoint.find_damage(folder))
    (folder / "manifest.json").write_bytes(b"\xff" + whole.encode())
    assert "manifest.json cannot be read" in str(checkpoint.find_damage(folder))
    (folder / "manifest.json").write_text("{")
    assert "not valid JSON" in str(checkpoint.find_damage(folder))
    (folder / "manifest.json").unlink()
    assert "manifest.json is missing" in str(checkpoint.find_damage(folder))


def test_a_reader_takes_the_newest_whole_one_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (9, 10, 200):
        fake_checkpoint(tmp_path, step)
    (tmp_path / "step-00000300.tmp").mkdir()
    (checkpoint.checkpoint_folder(tmp_path, 200) / "meta.json").unlink()
    assert checkpoint.select_checkpoint(tmp_path).step == 10
    assert "step-00000200 is damaged (meta.json is missing)" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(BadInput, match="no intact checkpoint"):
        checkpoint.select_checkpoint(tmp_path / "elsewhere")


def test_a_checkpoint_of_another_run_is_refused_by_its_keys(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path, 1)
    candidate = checkpoint.select_checkpoint(tmp_path)
    checkpoint.check_identity(candidate, checkpoint.Identity({"n": 1}, {"tokens": 5}))
    with pytest.raises(
        BadInput, match=r"its model differs \(n: 1 in the checkpoint, 2 in the recipe; m: None in the checkpoint, 0 in"
    ):
        checkpoint.check_identity(candidate, checkpoint.Identity({"n": 2, "m": 0}, {"tokens": 5}))
    with pytest.raises(BadInput, match=r"its data differs \(tokens: 5 in the checkpoint, 6"):
        checkpoint.check_identity(candidate, checkpoint.Identity({"n": 1}, {"tokens": 6}))


class Counting(nn.Module):
    """Predicts the last token plus one, and records the longest input."""

    longest = 0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest, input_ids.shape[1])
        return nn.functional.one_hot((input_ids + 1) % 12, 12) * 100.0


def test_sampling_stays_in_vocabulary_and_context_and_stops() -> None:
    model = Counting()
    assert generate(model, [3], 4, context=3, vocab_size=12) == [4, 5, 6, 7]
    assert model.longest == 3
    assert generate(model, [3], 9, context=3, vocab_size=12, stop_token=6) == [4, 5]
    assert all(token < 5 for token in generate(model, [3], 9, context=3, vocab_size=5))


def test_drawing_respects_temperature_top_k_and_seed() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)

    def drawn(temperature: float, top_k: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(logits, temperature, top_k, generator) for _ in range(60)]

    assert set(drawn(0.0, 4, 0)) == {3}
    assert set(drawn(1.0, 2, 0)) == {2, 3}
    assert set(drawn(9.0, 50, 0)) == {0, 1, 2, 3}
    assert drawn(1.0, 4, 1) == drawn(1.0, 4, 1) != drawn(1.0, 4, 2)


def test_a_summary_of_nothing_is_empty(tmp_path: Path) -> None:
    assert summarise_metrics(tmp_path / "none") == {}
    append_json_line(tmp_path / "m", {"step": 1, "val_loss": 2.0})
    assert summarise_metrics(tmp_path / "m") == {"val_loss_first": 2.0, "val_loss": 2.0}


def test_an_export_that_cannot_write_offers_out_instead_of_blaming_it(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(BadInput) as error:
        check_out_folder(tmp_path / "new")
    reason = f"{tmp_path} is not writable (read-only file system)"
    assert str(error.value) == f"{reason}. Choose another folder with --out DIR"


@pytest.mark.parametrize("module", ["amlaunch.trainer", "amlaunch.trainer.tools.export"])
def test_a_torch_that_is_too_old_is_named_in_the_first_second(tmp_path: Path, module: str) -> None:
    metadata = tmp_path / "torch-2.6.0.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.6.0a0+ecf3bae40a.nv25.1\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent / 'src'}"}
    done = subprocess.run(
        [sys.executable, "-m", module, "quickstart"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == BAD_INPUT
    assert (
        "has torch 2.6.0a0+ecf3bae40a.nv25.1, but amlaunch needs torch 2.8 or newer; use a newer image" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_checkpoint_of_a_newer_torch_names_both(tmp_path: Path) -> None:
    """Torch pickles its metadata in a form that older releases cannot read."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps(range(3)))
    for version, hint in (("99.1.0+cu999", "It was written with torch 99.1.0+cu999, and this is torch"), ("2.8.0", "")):
        with pytest.raises(TrainingFailed) as raised:
            checkpoint.load_weights(checkpoint.StoredCheckpoint(tmp_path, {"step": 1, "torch": version}), gpt2())
        assert f"{tmp_path} cannot be loaded" in str(raised.value) and hint in str(raised.value)
        assert ("use the newer one" in str(raised.value)) == bool(hint)
