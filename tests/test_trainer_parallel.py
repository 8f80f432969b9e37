"""A run is the same under any parallelism: losses and gradient norms in each type, initial weights bit for bit.

Float64 shows that nothing is missing. Other types take other paths through torch's collectives (torch 2.8 sums where it
should average, in all types but float64), so they are compared, too, within the rounding of the type.

All cases of two ranks share one start of two ranks, and all cases of four ranks one start of four.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from parallel_ranks import Task, in_ranks, train
from test_trainer_runs import TIGHT, masked, on_cpu
from trainer_runs import Run, environment, recipe

from amlaunch.recipes.errors import BAD_INPUT, OK
from amlaunch.recipes.format.schema import Distributed
from amlaunch.trainer.models.attention import attend
from amlaunch.trainer.models.gpt2 import build_gpt2_model
from amlaunch.trainer.models.llama import build_llama_model
from amlaunch.trainer.parallel.context_parallel import context_parallel_attend, local_positions, position_slices
from amlaunch.trainer.parallel.tensor_parallel import regroup_fused_rows
from amlaunch.trainer.parallel.world import join_world, parallelize
from amlaunch.trainer.process.rank_environment import read_rank_environment

pytestmark = [pytest.mark.slow, pytest.mark.torch_range]

__all__ = ["on_cpu"]  # an autouse fixture
GPT2: dict[str, Any] = {"vocab_size": 104, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4}
LLAMA: dict[str, Any] = {
    "vocab_size": 104,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
FAMILIES = {
    "gpt2": ("amlaunch.trainer.models.gpt2.build_gpt2_model", GPT2),
    "llama": ("amlaunch.trainer.models.llama.build_llama_model", LLAMA),
}
BUILDERS: dict[str, Callable[[], torch.nn.Module]] = {
    "gpt2": lambda: build_gpt2_model(**GPT2),
    "llama": lambda: build_llama_model(**LLAMA, tie_word_embeddings=True),
}
TWO: dict[str, dict[str, Any]] = {
    "ddp2": {"strategy": "ddp"},
    "fsdp2-selective-offload": {"activation_checkpointing": "selective", "cpu_offload": True},
    "tp2": {"tp_size": 2, "strategy": "none"},
    "tp2-sequence-full": {"tp_size": 2, "sequence_parallel": True, "activation_checkpointing": "full"},
    "cp2": {"cp_size": 2, "reshard_after_forward": False},
}
FOUR: dict[str, dict[str, Any]] = {
    "ddp4": {"strategy": "ddp"},
    "fsdp4": {},
    "hsdp2x2": {"dp_replicate_size": 2},
    "fsdp2xtp2": {"tp_size": 2},
    "fsdp2xcp2": {"cp_size": 2},
    "ddp2xtp2": {"strategy": "ddp", "tp_size": 2},
    "ddp2xcp2": {"strategy": "ddp", "cp_size": 2},
    "cp2xtp2-sequence": {"cp_size": 2, "tp_size": 2, "sequence_parallel": True},
}
OF_ONE_FAMILY = {"ddp2xtp2": "gpt2", "ddp2xcp2": "llama", "cp2xtp2-sequence": "llama"}
"""Combinations of methods that are each tested with both families."""
FEW_STEPS = 6
"""Enough if the test is not about the growth of errors."""
TYPES = {"float32": 1e-6, "bfloat16": 4e-3}
"""Bounds of the relative difference from one rank in float64. A unit of rounding is 6e-8 and 4e-3."""
TYPED: dict[str, Any] = {
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.5},
    "clip_grad_norm": {"max_norm": 0.2},
}
"""A rate and a clipping that pass on a wrong scale of the gradients to the next loss, which AdamW would hide."""
TYPED_STEPS = 3
SUMMED = {"strategy": "fsdp2", "dtype": "bfloat16"}
LINEAR = {"_target_": "amlaunch.trainer.loss.LinearCrossEntropy", "chunk_tokens": 8}
MUON = {
    "optimizer": {"_target_": "torch.optim.Muon", "lr": 0.02, "others": {"_target_": "torch.optim.AdamW", "lr": 1e-3}}
}


def case(
    folder: Path, name: str, family: str, distributed: dict[str, Any], max_steps: int = 20, **sections: Any
) -> Run:
    """Create a run whose windows differ in their number of labels; one rank alone takes two micro-batches."""
    target, sizes = FAMILIES[family]
    share = distributed.get("tp_size", 1) * distributed.get("cp_size", 1)
    parts = {"one": 1, "two": 2, "four": 4}[name.split("-")[0]] // share
    steps = {
        "max_steps": max_steps,
        "global_batch_size": 8,
        "local_batch_size": max(1, 4 // parts),
        "val_every_steps": 10,
        "val_batches": 1,
    }
    run = masked(folder, f"{family}-{name}", distributed=distributed, step_scheduler=steps, **sections)
    tree = {**run.tree, "model": {"_target_": target, **sizes, "bos_token_id": 0, "eos_token_id": 0}}
    return Run(run.folder, tree)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


def runs_of(folder: Path, size: str, cases: dict[str, dict[str, Any]]) -> dict[str, Run]:
    return {
        f"{family} {name}": case(folder, f"{size}-{name}", family, keys)
        for family in FAMILIES
        for name, keys in cases.items()
        if tried(family, name)
    }


def typed_runs(folder: Path, size: str, cases: dict[str, dict[str, Any]]) -> dict[str, Run]:
    """Create each case in each type; where FSDP2 reduces gradients, in bfloat16 also summed in bfloat16."""
    runs = {}
    for name, keys in cases.items():
        family = OF_ONE_FAMILY.get(name, "gpt2")
        types = {dtype: {"dtype": dtype} for dtype in TYPES}
        if "fsdp" in name or "hsdp" in name:
            types["bfloat16 reduced"] = {"dtype": "bfloat16", "reduce_dtype": "bfloat16"}
        for label, dtype in types.items():
            run_name = f"{size}-{name}-{label.replace(' ', '-')}"
            runs[f"{name} {label}"] = case(folder, run_name, family, {**keys, **dtype}, TYPED_STEPS, **TYPED)
    return runs


def summed(run: Run) -> int:
    """Train with FSDP2 summing the gradients instead of averaging them."""
    from torch.distributed.fsdp import FSDPModule

    from amlaunch.trainer.parallel import world

    def sum_only(model: torch.nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)

    real, world.sum_gradients_on_cpu = world.sum_gradients_on_cpu, sum_only
    try:
        return train(run)
    finally:
        world.sum_gradients_on_cpu = real


def tried(family: str, name: str) -> bool:
    return OF_ONE_FAMILY.get(name, family) == family


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[Any]]:
    runs = runs_of(folder, "two", TWO)
    tasks = [Task(name, train, (run,)) for name, run in runs.items()]
    tasks.append(Task("linear", train, (case(folder, "two-linear", "gpt2", {"tp_size": 2}, loss_fn=LINEAR),)))
    tasks += [Task(name, train, (run,)) for name, run in typed_runs(folder, "two", TWO).items()]
    tasks.append(Task("summed", summed, (case(folder, "two-summed", "gpt2", SUMMED, TYPED_STEPS, **TYPED),)))
    tasks += [Task(f"initial {family}", initial, (family, {"tp_size": 2})) for family in BUILDERS]
    return in_ranks(2, folder / "ranks2", [*tasks, *hugging_face(folder)])


@pytest.fixture(scope="module")
def four(folder: Path) -> dict[str, list[Any]]:
    tasks = [Task("memory", peak_memory)]
    tasks += [Task(name, train, (run,)) for name, run in runs_of(folder, "four", FOUR).items()]
    tasks += [Task(name, train, (run,)) for name, run in typed_runs(folder, "four", FOUR).items()]
    tasks.append(Task("muon", train, (case(folder, "four-muon", "gpt2", {"tp_size": 2}, FEW_STEPS, **MUON),)))
    tasks.append(
        Task(
            "poisoned",
            poisoned,
            (case(folder, "four-poisoned", "gpt2", {"tp_size": 2, "sequence_parallel": True}, FEW_STEPS),),
        )
    )
    tasks += [
        Task(f"initial {family} {name}", initial, (family, FOUR[name])) for family in BUILDERS for name in INITIAL
    ]
    tasks += [Task(f"attention {shape}", attention, shape) for shape in ATTENTION]
    tasks.append(Task("heads", fused_rows))
    return in_ranks(4, folder / "ranks4", tasks)


@pytest.fixture(scope="module")
def one(folder: Path) -> Callable[..., Run]:
    """Create and train a run on one rank, once per name."""
    runs: dict[str, Run] = {}

    def run(name: str, family: str, start: Callable[[Run], int] = Run.train_inline, **sections: Any) -> Run:
        key = f"{family} {name}"
        if key not in runs:
            runs[key] = case(folder, f"one-{name}", family, {"strategy": "none"}, **sections)
            assert start(runs[key]) == OK
        return runs[key]

    return run


def assert_same(run: Run, reference: Run, steps: int = 20) -> None:
    for name, count in (("loss", steps), ("grad_norm", steps), ("val_loss", max(1, steps // 10))):
        a, b = np.array(run.column(name)), np.array(reference.column(name))
        assert len(a) == count
        assert np.abs(a / b - 1).max() < TIGHT, name


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("name", list(TWO))
def test_two_ranks_are_as_one(folder: Path, one: Any, two: dict[str, list[Any]], family: str, name: str) -> None:
    assert two[f"{family} {name}"] == [OK, OK]
    assert_same(case(folder, f"two-{name}", family, TWO[name]), one("plain", family))


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for name in FOUR if tried(family, name)]
)
def test_four_ranks_are_as_one(folder: Path, one: Any, four: dict[str, list[Any]], family: str, name: str) -> None:
    assert four[f"{family} {name}"] == [OK] * 4
    assert_same(case(folder, f"four-{name}", family, FOUR[name]), one("plain", family))


def type_error(run: Run, reference: Run) -> float:
    """Return the largest relative difference of losses and gradient norms."""
    columns = [(np.array(run.column(name)), np.array(reference.column(name))) for name in ("loss", "grad_norm")]
    assert all(len(a) == len(b) == TYPED_STEPS for a, b in columns)
    return float(max(np.abs(a / b - 1).max() for a, b in columns))


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_each_type_is_near_one_rank_in_float64(
    folder: Path, one: Any, two: dict[str, list[Any]], four: dict[str, list[Any]], name: str, dtype: str
) -> None:
    size, cases, results = ("two", TWO, two) if name in TWO else ("four", FOUR, four)
    reference = one("typed", OF_ONE_FAMILY.get(name, "gpt2"), max_steps=TYPED_STEPS, **TYPED)
    runs = typed_runs(folder, size, {name: cases[name]})
    for label in (label for label in runs if label.startswith(f"{name} {dtype}")):
        assert set(results[label]) == {OK}, results[label]
        error = type_error(runs[label], reference)
        print(f"{label}: {error:.1e}")
        assert error < TYPES[dtype], f"{label}: {error:.1e}"
        assert error > 1e-9, f"{label}: an exact result would not be {dtype}"


def test_a_sum_for_an_average_is_far_outside_the_bounds(folder: Path, one: Any, two: dict[str, list[Any]]) -> None:
    """Show that the test above can fail: this is what FSDP2 did over gloo with torch 2.8."""
    assert two["summed"] == [OK, OK]
    run = case(folder, "two-summed", "gpt2", SUMMED, TYPED_STEPS, **TYPED)
    reference = one("typed", "gpt2", max_steps=TYPED_STEPS, **TYPED)
    assert run.column("grad_norm")[0] / reference.column("grad_norm")[0] == pytest.approx(2, rel=TYPES["bfloat16"])
    assert type_error(run, reference) > 0.9


@pytest.mark.parametrize("family", list(FAMILIES))
def test_accumulation_is_as_one_batch(folder: Path, one: Any, family: str) -> None:
    whole = case(folder, "one-whole", family, {"strategy": "none"})
    assert whole.train_inline("--step_scheduler.local_batch_size", "8") == OK
    assert_same(whole, one("plain", family))


def test_a_loss_of_hidden_states_has_the_whole_head_under_tensor_parallelism(
    folder: Path, one: Any, two: dict[str, list[Any]]
) -> None:
    assert two["linear"] == [OK] * 2
    assert_same(case(folder, "two-linear", "gpt2", {"tp_size": 2}, loss_fn=LINEAR), one("plain", "gpt2"))


def test_muon_orthogonalises_whole_matrices_under_tensor_parallelism(
    folder: Path, one: Any, four: dict[str, list[Any]]
) -> None:
    assert four["muon"] == [OK] * 4
    assert_same(
        case(folder, "four-muon", "gpt2", {"tp_size": 2}, FEW_STEPS, **MUON),
        one("muon", "gpt2", max_steps=FEW_STEPS, **MUON),
        FEW_STEPS,
    )


# --- steps that are skipped -----------------------------------------------------------------------------


def poisoned(run: Run, start: Callable[[Run], int] = train, rank: int = 1) -> int:
    """Train with an infinite gradient in step 3 on one rank."""
    from amlaunch.trainer.loop import forward_backward

    real = forward_backward.batch_loss

    def spoilt(job: forward_backward.TrainingState, batch: Any) -> torch.Tensor:
        loss = real(job, batch)
        return loss * float("inf") if job.step == 3 and torch.is_grad_enabled() and job.world.rank == rank else loss

    forward_backward.batch_loss = spoilt
    try:
        return start(run)
    finally:
        forward_backward.batch_loss = real


def test_tensor_parallel_ranks_leave_out_the_same_step(folder: Path, one: Any, four: dict[str, list[Any]]) -> None:
    assert four["poisoned"] == [OK] * 4
    alone = one("poisoned", "gpt2", start=lambda run: poisoned(run, Run.train_inline, rank=0), max_steps=FEW_STEPS)
    four_ranks = case(folder, "four-poisoned", "gpt2", {"tp_size": 2, "sequence_parallel": True}, FEW_STEPS)
    for name in ("loss", "grad_norm"):
        columns = (run.column(name) for run in (four_ranks, alone))
        a, b = (np.array([np.nan if value is None else value for value in column]) for column in columns)
        assert np.isnan(a[2]) and np.isnan(b[2]) and not np.isnan(np.delete(a, 2)).any()
        assert np.abs(np.delete(a, 2) / np.delete(b, 2) - 1).max() < TIGHT


# --- initial weights ------------------------------------------------------------------------------------


INITIAL = ("fsdp4", "hsdp2x2", "fsdp2xtp2", "ddp4")


def digests(named: Any) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in named}


def initial(family: str, keys: dict[str, Any]) -> dict[str, str]:
    """Return digests of the weights of a model that was initialised sharded."""
    section = Distributed(dtype="float32", **keys)
    world = join_world(section, read_rank_environment(os.environ))
    with torch.device("meta"):
        model = BUILDERS[family]()
    sharded = parallelize(model, section, world, seed=7)
    bare = sharded.module if hasattr(sharded, "module") else sharded
    named = [(name, p.detach()) for name, p in bare.named_parameters()]
    return digests((name, p.full_tensor() if hasattr(p, "full_tensor") else p) for name, p in named)


@pytest.mark.parametrize("family", list(BUILDERS))
def test_initial_weights_are_those_of_a_plain_build_bitwise(
    two: dict[str, list[Any]], four: dict[str, list[Any]], family: str
) -> None:
    torch.manual_seed(7)
    named = [(name, p.detach()) for name, p in BUILDERS[family]().named_parameters()]
    plain = digests(named)
    assert all(p.std() > 0 for _, p in named if p.dim() > 1)
    assert two[f"initial {family}"] == [plain] * 2
    for name in INITIAL:
        assert four[f"initial {family} {name}"] == [plain] * 4, name


def memory(field: str) -> float:
    """Return ``VmRSS`` or ``VmHWM`` of this process in MB."""
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1e3


def peak_memory() -> tuple[float, float]:
    """Return a model's size and a rank's peak memory while it initialises its shards, in MB."""
    section = Distributed(dtype="float32", tp_size=2)
    world = join_world(section, read_rank_environment(os.environ))
    with torch.device("meta"):
        tiny = build_gpt2_model(vocab_size=64, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    parallelize(tiny, section, world, seed=7)  # what torch imports at the first use does not count
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    with torch.device("meta"):
        model = build_gpt2_model(vocab_size=8192, n_positions=256, n_embd=512, n_layer=15, n_head=8)
    size = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6
    parallelize(model, section, world, seed=7)
    return size, memory("VmHWM") - before


def test_no_rank_ever_holds_the_whole_model(four: dict[str, list[Any]]) -> None:
    for size, peak in four["memory"]:
        assert size > 200
        assert size / 5 < peak < size / 2  # a quarter, of which a little lies in memory that was free before


# --- attention over ranks -------------------------------------------------------------------------------

ATTENTION = [
    (heads, keys, length, packed)
    for heads, keys in ((4, 4), (4, 2), (8, 1), (3, 3), (6, 2))
    for length in (16, 12)
    for packed in (False, True)
]
"""Head counts that 4 divides and others, fewer key-value heads, lengths with and without mirrored slices."""


def attention(heads: int, keys: int, length: int, packed: bool) -> float:
    """Return the largest difference of outputs and gradients between four ranks and one."""
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(heads * length)
    q, k, v = (torch.randn(2, n, length, 8, dtype=torch.float64, requires_grad=True) for n in (heads, keys, keys))
    weight = torch.randn(2, heads, length, 8, dtype=torch.float64)
    documents = torch.sort(torch.randint(3, (2, length), dtype=torch.int32)).values if packed else None
    expected = attend(q, k, v, documents=documents)
    (expected * weight).sum().backward()
    local_inputs = [local_positions(x.detach(), 2, rank, ranks).requires_grad_() for x in (q, k, v)]
    local_documents = None if documents is None else local_positions(documents, 1, rank, ranks)
    output = context_parallel_attend(*local_inputs, documents=local_documents, group=group)
    (output * local_positions(weight, 2, rank, ranks)).sum().backward()
    pairs = [(output, expected), *((a.grad, b.grad) for a, b in zip(local_inputs, (q, k, v), strict=True))]
    return max((a - local_positions(b, 2, rank, ranks)).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("shape", ATTENTION)
def test_attention_over_ranks_is_attention(four: dict[str, list[Any]], shape: Any) -> None:
    assert max(four[f"attention {shape}"]) < TIGHT


@pytest.mark.parametrize(("length", "ranks"), [(16, 4), (12, 4), (8, 4), (6, 2), (1024, 8), (9, 3), (5, 1)])
def test_pieces_cover_every_position_once_and_mirrored_ones_are_equal_work(length: int, ranks: int) -> None:
    by_rank = [
        [position for positions in slices for position in range(length)[positions]]
        for slices in position_slices(length, ranks)
    ]
    assert sorted(position for positions in by_rank for position in positions) == list(range(length))
    assert {len(positions) for positions in by_rank} == {length // ranks}
    if length % (2 * ranks) == 0:
        assert len({sum(positions) for positions in by_rank}) == 1


def fused_rows() -> bool:
    """Return True if this rank gets its heads of three stacked matrices, and gradients return to their place."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    full = torch.arange(3 * 8 * 5, dtype=torch.float64).view(24, 5)
    local = full.chunk(ranks)[rank].clone().requires_grad_()
    regrouped = regroup_fused_rows(local, 3, dist.group.WORLD)
    expected = torch.cat([matrix.chunk(ranks)[rank] for matrix in full.chunk(3)])
    (regrouped * expected).sum().backward()
    return torch.equal(regrouped, expected) and torch.equal(local.grad, local.detach())


def test_a_fused_projection_is_dealt_out_by_heads(four: dict[str, list[Any]]) -> None:
    assert four["heads"] == [True] * 4


# --- models of transformers and of a user -----------------------------------------------------------------

HF_SIZES: dict[str, Any] = {
    "vocab_size": 104,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HF: dict[str, dict[str, Any]] = {
    "llama": {"_target_": "transformers.LlamaConfig", **HF_SIZES, "num_key_value_heads": 2},
    "qwen2": {
        "_target_": "transformers.Qwen2Config",
        **HF_SIZES,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "gpt2": {"_target_": "transformers.GPT2Config", **GPT2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
HF_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tp2": ("llama", {"tp_size": 2}),
    "qwen2 tp2": ("qwen2", {"tp_size": 2}),
    "qwen2 cp2": ("qwen2", {"cp_size": 2}),
    "gpt2 cp2": ("gpt2", {"cp_size": 2}),
    "gpt2 fsdp2": ("gpt2", {}),
    "gpt2 tp2": ("gpt2", {"tp_size": 2}),
    "own fsdp2": ("own", {}),
    "own cp2": ("own", {"cp_size": 2}),
}
OWN = """
from torch import nn

class Own(nn.Module):
    def __init__(self, vocab: int):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, 8), nn.Linear(8, vocab, bias=False)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)
"""


def hf_case(folder: Path, name: str, kind: str, distributed: dict[str, Any]) -> Run:
    config = {**HF.get(kind, {}), "bos_token_id": 0, "eos_token_id": 0}
    tree = recipe(
        folder,
        distributed=distributed,
        step_scheduler={"max_steps": 4, "local_batch_size": 4, "val_batches": 1},
        validation_dataset=None,
    )
    tree["model"] = {"_target_": "transformers.AutoModelForCausalLM.from_config", "config": config}
    if kind == "own":
        tree["model"] = {"_target_": "own.py:Own", "vocab": 104}
    run = Run(folder / f"hf-{name.replace(' ', '-')}", {**tree, "checkpoint": {"enabled": False}, "export": None})
    (run.folder / "own.py").write_text(OWN)
    return run


def hugging_face(folder: Path) -> list[Task]:
    return [Task(f"hf {name}", train, (hf_case(folder, name, kind, keys),)) for name, (kind, keys) in HF_CASES.items()]


@pytest.mark.parametrize("name", [name for name in HF_CASES if name not in ("gpt2 tp2", "own cp2")])
def test_models_of_others_are_spread_too(folder: Path, two: dict[str, list[Any]], name: str) -> None:
    kind, keys = HF_CASES[name]
    assert two[f"hf {name}"] == [OK, OK]
    alone = hf_case(folder, f"{kind} alone", kind, {"strategy": "none"})
    if not alone.lines():
        assert alone.train_inline() == OK
    columns, reference = (
        np.array([run.column("loss"), run.column("grad_norm")]) for run in (hf_case(folder, name, kind, keys), alone)
    )
    assert columns.shape == (2, 4)
    exact = kind in ("gpt2", "own")  # the norms of the others round float64 to float32
    assert np.abs(columns / reference - 1).max() < (TIGHT if exact else 1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2 tp2", "GPT2LMHeadModel has no plan"),
        ("own cp2", "Own has no attention that supports context parallelism"),
    ],
)
def test_models_that_cannot_be_spread_so_are_refused(
    folder: Path, two: dict[str, list[Any]], name: str, message: str
) -> None:
    assert two[f"hf {name}"] == [BAD_INPUT, BAD_INPUT]
    assert message in (folder / "ranks2" / "rank0.log").read_text()


# --- without the launcher ---------------------------------------------------------------------------------

BLOCKER = """
import sys

BLOCKED = {"submitit", "datasets", "tiktoken", "rich", "shtab", "transformers", "pyarrow"}

class Blocker:
    '''Makes these packages unavailable.'''
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("amlaunch.launcher", "amlaunch.containers")) or name in BLOCKED:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
"""


def as_a_task_of_srun(rank: int, size: int) -> None:
    """Prepare a rank: srun's variables instead of torchrun's, and only the trainer's own packages."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name)
    os.environ.update(SLURM_PROCID=str(rank), SLURM_NTASKS=str(size), SLURM_LOCALID=str(rank))
    exec(BLOCKER, {})


def started(folder: Path, name: str) -> Run:
    return Run(
        folder / name, recipe(folder, step_scheduler={"max_steps": 3, "val_batches": 1}, distributed={"cp_size": 2})
    )


def test_it_trains_as_tasks_of_srun_without_the_launchers_packages(tmp_path: Path) -> None:
    run = started(tmp_path, "srun")
    run.start(2, prepare={rank: partial(as_a_task_of_srun, rank, 2) for rank in range(2)})
    assert run.wait()[0] == [OK, OK]
    assert len(run.column("loss")) == 3


def test_it_trains_under_torchrun_without_the_launchers_packages(tmp_path: Path) -> None:
    run, direct = started(tmp_path, "torchrun"), started(tmp_path, "direct")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[1])])
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        environment(2)["MASTER_PORT"],
        "-m",
        "amlaunch.trainer",
    ]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *torchrun, *run.arguments("amlaunch.trainer")[4:]],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == OK, done.stderr[-3000:]
    direct.train(2)
    assert run.column("loss") == direct.column("loss")
