"""Compare the predictions of plan-memory with torch's allocator in real runs, and check its output."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._profiler import _EventType

from amlaunch.recipes.errors import BAD_INPUT, OK, BadInput
from amlaunch.recipes.format.loader import load
from amlaunch.recipes.shipped import find_recipe
from amlaunch.trainer.process.arguments import parse
from amlaunch.trainer.tools import plan_memory
from amlaunch.trainer.tools.memory_model import predict
from amlaunch.trainer.tools.plan_memory import DOES_NOT_FIT, parse_bytes
from amlaunch.trainer.torch_features import simulates_compilation
from tests.trainer_runs import Run, recipe

GPT2 = {
    "_target_": "amlaunch.trainer.models.gpt2.build_gpt2_model",
    "vocab_size": 512,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {
    "_target_": "amlaunch.trainer.models.llama.build_llama_model",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def spread(strategy: str = "fsdp2", dtype: str = "float32", **more: Any) -> dict[str, Any]:
    return {"distributed": {"strategy": strategy, "dtype": dtype, **more}}


def compiled(scope: str) -> dict[str, Any]:
    """Compile with micro-batches so large that the blocks' activations are most of the memory."""
    return {
        "compile": {"enabled": True, "scope": scope},
        "step_scheduler": {"local_batch_size": 16, "global_batch_size": 32},
    }


FROM_HIDDEN = {"loss_fn": {"_target_": "amlaunch.trainer.loss.LinearCrossEntropy", "chunk_tokens": 64}}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "gpt2": (1, GPT2, spread("none")),
    "gpt2 in bfloat16, loss from hidden states": (1, GPT2, spread("none", "bfloat16") | FROM_HIDDEN),
    "llama, fsdp2 on one rank": (1, LLAMA, spread()),
    "llama, blocks computed again": (1, LLAMA, spread(activation_checkpointing="full")),
    "gpt2, packed, products kept": (
        1,
        GPT2,
        spread(activation_checkpointing="selective") | {"packed_sequence": {"packed_sequence_size": 64}},
    ),
    "gpt2, compiled whole, in bfloat16, loss from hidden states": (
        1,
        GPT2,
        spread("none", "bfloat16") | FROM_HIDDEN | compiled("model"),
    ),
    "gpt2, compiled whole, products kept": (
        1,
        GPT2,
        spread("none", activation_checkpointing="selective") | compiled("model"),
    ),
    "gpt2, compiled by blocks, fsdp2": (2, GPT2, spread() | FROM_HIDDEN | compiled("blocks")),
    "llama in bfloat16, fsdp2": (2, LLAMA, spread(dtype="bfloat16")),
    "llama, fsdp2, kept gathered": (2, LLAMA, spread(reshard_after_forward=False)),
    "gpt2, ddp, one micro-batch": (2, GPT2, spread("ddp") | {"step_scheduler": {"local_batch_size": 4}}),
    "gpt2, ddp, accumulated": (2, GPT2, spread("ddp")),
    "gpt2, tensor parallelism": (2, GPT2, spread(tp_size=2)),
    "gpt2, tensor parallelism, not sharded": (2, GPT2, spread("ddp", tp_size=2)),
    "gpt2, tensor parallelism by positions": (2, GPT2, spread(tp_size=2, sequence_parallel=True)),
    "llama, tensor parallelism": (2, LLAMA, spread(tp_size=2)),
    "llama, tensor parallelism by positions": (2, LLAMA, spread(tp_size=2, sequence_parallel=True)),
    "gpt2, context parallelism": (2, GPT2, spread(cp_size=2)),
    "llama, context parallelism": (2, LLAMA, spread(cp_size=2)),
    "gpt2, fsdp2 and tensor parallelism": (4, GPT2, spread(tp_size=2)),
    "llama, fsdp2 and tensor parallelism by positions": (4, LLAMA, spread(tp_size=2, sequence_parallel=True)),
    "gpt2, fsdp2 and context parallelism": (4, GPT2, spread(cp_size=2)),
    "llama, fsdp2 and context parallelism": (4, LLAMA, spread(cp_size=2)),
}
"""Ranks, model, sections."""
WITHIN = 0.05
"""The documentation promises 10 %; most cases are within 0.2 %.

In bfloat16 the CPU's ``scatter_`` takes 3 % for itself, unlike a GPU's.
"""


def make(folder: Path, model: dict[str, Any], sections: dict[str, Any]) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    tree = recipe(folder, **sections)
    steps = {"max_steps": 3, "val_every_steps": None, **tree["step_scheduler"], **sections.get("step_scheduler", {})}
    tree |= {"model": model, "validation_dataset": None, "export": None, "checkpoint": {"enabled": False}}
    tree["dataset"] = {**tree["dataset"], "seq_len": 64}
    tree["step_scheduler"] = {**steps, "max_steps": 3, "val_every_steps": None}
    return Run(folder / "run", tree)


# --- what real runs take ------------------------------------------------------------------------------


def count_memory(folders: Sequence[Path]) -> None:
    """Make this rank train in each of ``folders`` instead of its own; write the peak of torch's allocator to each."""
    import amlaunch.trainer.loop.job as jobs

    train = jobs.run
    let_gloo_end()

    def counted(_: Any, stop: Any) -> int:
        for folder in folders:
            torch._dynamo.reset()
            options = parse("amlaunch.trainer", "", [str(folder / "recipe.yaml"), f"--element={folder}"])
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                code = train(options, stop)
            if dist.get_rank() == 0:
                (folder / "memory.json").write_text(json.dumps(most_at_a_time(profile)))
        return code

    jobs.run = counted


def let_gloo_end() -> None:
    """Make every wait for a collective also wait until gloo's thread has released its tensors.

    It holds them until Python lets it have its lock, in a small run for several collectives more, and what it frees
    last the profiler never hears of: 5 to 30 % more memory was seen, another figure each time. NCCL has no such thread.
    """
    wait = dist.Work.wait

    def waited(work: Any, *timeout: Any) -> Any:
        result = wait(work, *timeout)
        time.sleep(0.001)
        return result

    dist.Work.wait = waited  # type: ignore[method-assign]


def most_at_a_time(profile: Any) -> int:
    """Return the peak of the profiled allocations without gloo's copies of what it sends; NCCL makes none."""
    events = [
        (event, gloos)
        for event, gloos in nested(profile.profiler.kineto_results.experimental_event_tree())
        if event.tag == _EventType.Allocation
    ]
    live: dict[int, int] = {}
    peak = current = 0
    for event, gloos in sorted(events, key=lambda pair: pair[0].start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        current -= live.pop(address, 0)  # given back, or else given out again
        if size > 0 and not gloos:
            live[address] = size
            current += size
            peak = max(peak, current)
    return peak


def nested(events: Any, in_gloo: bool = False) -> Iterator[tuple[Any, bool]]:
    """Yield all events, each with True if it is inside one of gloo's."""
    pending = [(event, in_gloo) for event in events]
    while pending:
        event, in_gloo = pending.pop()
        in_gloo = in_gloo or event.name.startswith(("c10d::", "gloo:"))
        yield event, in_gloo
        pending += [(child, in_gloo) for child in event.children]


class Measured:
    """Memory of the cases in real runs; cases with the same number of ranks share one start."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._runs: dict[str, Run] = {}

    def run_of(self, case: str) -> Run:
        """Return the run of a case, after running it if necessary."""
        ranks = CASES[case][0]
        if case not in self._runs:
            cases = [name for name, (count, *_) in CASES.items() if count == ranks]
            self._runs |= {name: make(self._folder / f"{ranks}-{i}", *CASES[name][1:]) for i, name in enumerate(cases)}
            self._start(cases)
        return self._runs[case]

    def taken(self, case: str, again: bool = False) -> int:
        """Return the peak in bytes; with ``again``, run once more and return the lower peak."""
        written = self.run_of(case).folder / "memory.json"
        before = json.loads(written.read_text())
        if again:
            self._start([case])
        return min(before, json.loads(written.read_text()))

    def _start(self, cases: list[str]) -> None:
        first, ranks = self._runs[cases[0]], CASES[cases[0]][0]
        prepare = partial(count_memory, [self._runs[case].folder for case in cases])
        first.start(ranks, prepare=dict.fromkeys(range(ranks), prepare))
        codes, output = first.wait(600)  # inductor's compiler takes most of it
        assert codes == [OK] * ranks, output


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Share the measurements among all cases."""
    return Measured(tmp_path_factory.mktemp("memory"))


# --- the prediction -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_prediction_is_what_a_real_run_takes(measured: Measured, case: str) -> None:
    need = predict(load(measured.run_of(case).folder / "recipe.yaml"), CASES[case][0], cuda=False)
    assert need.parameters + need.gradients + need.optimizer + need.activations == need.peak
    # on a busy machine gloo's thread may still be late, especially with DDP's buckets
    for again in (False, True, True):
        taken = measured.taken(case, again)
        print(f"{case}: {need.peak:,} predicted, {taken:,} measured, {need.peak / taken:.3f}")
        if need.peak == pytest.approx(taken, rel=WITHIN):
            return
        if "compiled" in case and not simulates_compilation() and taken < need.peak < 1.2 * taken:
            return  # torch 2.8 predicts what the model needs without compilation
    pytest.fail(f"{need.peak:,} predicted, {taken:,} measured")


@pytest.mark.parametrize(
    ("largest", "limit"), [(8, " (limited by step_scheduler.global_batch_size, not by memory)"), (4, "")]
)
def test_the_global_batch_is_named_if_it_is_the_limit(largest: int, limit: str) -> None:
    sizes = dict.fromkeys(
        ("parameters", "gradients", "optimizer", "activations", "peak", "on_host", "total", "gpu_memory"), 2**30
    )
    report = {"recipe": "tiny", "ranks": 2, "local_batch_size": 4, "tokens": 8, "flops": 1e12, "fits": True, "ways": []}
    report["ignores_compilation"] = False
    report |= {**sizes, "largest_local_batch_size": largest, "samples_per_rank": 8}
    lines = plan_memory.format_report(report, True).splitlines()
    assert f"largest step_scheduler.local_batch_size that fits: {largest}{limit}" in lines


@pytest.mark.slow
def test_it_says_whether_it_fits_and_what_would_make_it_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, GPT2, CASES["gpt2"][2])
    arguments = [str(run.folder / "recipe.yaml"), "--gpus=1", "--on-cpu", "--step_scheduler.local_batch_size=8"]
    assert plan_memory.main([*arguments, "--gpu-memory=1GB"]) == OK
    output = capsys.readouterr().out
    assert "it fits" in output and "largest step_scheduler.local_batch_size that fits: 8" in output
    assert plan_memory.main([*arguments, "--gpu-memory=6MB", "--json"]) == DOES_NOT_FIT
    report = json.loads(capsys.readouterr().out)
    assert not report["fits"] and report["largest_local_batch_size"] in (2, 4)
    assert [way["fits"] for way in report["ways"]][-1]
    last = report["ways"][-1]["override"]
    assert plan_memory.main([*arguments, "--gpu-memory=6MB", last]) == OK  # the advice is right


@pytest.mark.slow
@pytest.mark.torch_range
def test_what_lies_on_the_host_is_not_the_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, LLAMA, {"distributed": {"strategy": "fsdp2", "dtype": "float32"}})
    path = run.folder / "recipe.yaml"
    plain, offloaded = predict(load(path), 2), predict(load(path, ["--distributed.cpu_offload=true"]), 2)
    assert offloaded.on_host == plain.parameters + plain.optimizer > 0 == plain.on_host
    assert offloaded.total() < plain.total() - offloaded.on_host
    assert plan_memory.main([str(path), "--gpus=2", "--distributed.cpu_offload=true"]) == OK
    assert "of which in host memory" in capsys.readouterr().out


@pytest.mark.slow
def test_operations_are_those_of_the_convention_but_for_what_is_only_looked_up() -> None:
    loaded = load(find_recipe("quickstart"), ["--model.vocab_size=50304"])
    need = predict(loaded, 2, cuda=False)
    model = loaded.recipe.model
    matrices = 12 * model["n_layer"] * model["n_embd"] ** 2 + model["vocab_size"] * model["n_embd"]
    attention = 12 * model["n_layer"] * model["n_embd"] * 128
    backward = 2 * model["n_layer"] * model["n_embd"] * 128  # flash attention computes the scores again
    assert need.flops / need.tokens == pytest.approx(6 * matrices + attention + backward, rel=1e-6)


@pytest.mark.slow
@pytest.mark.torch_range
def test_compiled_blocks_keep_no_more_than_plain_ones() -> None:
    overrides = [
        "--model.n_layer=6",
        "--model.n_embd=128",
        "--step_scheduler.local_batch_size=8",
        "--distributed.strategy=none",
        "--resources.train.tasks_per_node=1",
    ]
    overrides += [
        "--loss_fn._target_=amlaunch.trainer.loss.LinearCrossEntropy",
        "--loss_fn.chunk_tokens=64",
        "--model.vocab_size=50304",
    ]
    plain, compiled = (
        predict(load(find_recipe("quickstart"), [*overrides, f"--compile.enabled={value}"]), 1)
        for value in ("false", "true")
    )
    assert compiled.parameters == plain.parameters and compiled.flops == plain.flops
    if not simulates_compilation():
        assert compiled == plain
        return
    assert 0.3 < compiled.activations / plain.activations < 1.05


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("79.5GiB", 79.5 * 2**30), ("512k", 512e3), ("1tb", 1e12)])
def test_sizes_are_read_as_they_are_written(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "80XB", "GB", "-1GB"])
def test_a_size_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=f"--gpu-memory {text}: expected a size with its unit"):
        parse_bytes(text)


def test_fewer_than_one_rank_is_refused(capfd) -> None:
    assert plan_memory.main(["quickstart", "--gpus=0"]) == BAD_INPUT
    assert "--gpus 0: expected at least 1" in capfd.readouterr().err
