"""Several sources: each has its share at every point of a run, as a function of the position alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer_data import shard
from test_trainer_runs import TIGHT, make, on_cpu, same_weights
from trainer_runs import SEQ_LEN, VOCAB, Run, write_tokens

from amlaunch.preprocess.shards.shard_format import write_shard
from amlaunch.recipes.errors import BAD_INPUT, OK, BadInput
from amlaunch.recipes.format.loader import load
from amlaunch.trainer.data.datasets import MixedDataset, NanogptDataset
from amlaunch.trainer.data.sample_order import MixtureOrder, SourceOrder, integer_shares, rank_positions

__all__ = ["on_cpu"]  # an autouse fixture
SHARES = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


def mixture(sizes: list[int], shares: list[int], seed: int = 0, shuffle: bool = True) -> MixtureOrder:
    names = tuple(f"s{k}" for k in range(len(sizes)))
    return MixtureOrder(names, tuple(SourceOrder(size, seed, shuffle) for size in sizes), tuple(shares))


@given(shares=SHARES, data=st.data(), count=st.integers(1, 3000))
@settings(max_examples=80, deadline=None)
@pytest.mark.slow
def test_every_source_has_its_share_of_the_first_n_samples_whatever_n(
    shares: list[int], data: st.DataObject, count: int
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 400), min_size=len(shares), max_size=len(shares)))
    mixed = mixture(sizes, shares)
    which = np.searchsorted(np.cumsum(sizes), mixed.samples(np.arange(count)), side="right")
    for k, share in enumerate(shares):
        counts = np.cumsum(which == k)
        expected = np.arange(1, count + 1) * share / sum(shares)
        assert np.abs(counts - expected).max() < max(len(shares), 2)
        assert mixed.epochs(count)[f"s{k}"] == counts[-1] / sizes[k]


@given(shares=SHARES, data=st.data(), shuffle=st.booleans())
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_each_source_is_seen_in_its_own_order_every_sample_once_an_epoch(
    shares: list[int], data: st.DataObject, shuffle: bool
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=len(shares), max_size=len(shares)))
    mixed = mixture(sizes, shares, 3, shuffle)
    samples = mixed.samples(np.arange(1500))
    for order, begin in zip(mixed.orders, mixed.offsets.tolist(), strict=True):
        of_source = samples[(samples >= begin) & (samples < begin + order.size)] - begin
        assert np.array_equal(of_source, order.samples(np.arange(len(of_source))))


@given(ranks=st.integers(1, 64), steps=st.lists(st.integers(0, 10**9), min_size=1, max_size=4), shares=SHARES)
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_ranks_and_resumes_do_not_matter(ranks: int, steps: list[int], shares: list[int]) -> None:
    mixed = mixture([97 + k for k in range(len(shares))], shares)
    for step in steps:
        parts = [mixed.samples(rank_positions(step, 2 * ranks, rank, ranks)) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(parts), mixed.samples(np.arange(2 * ranks) + step * 2 * ranks))


def test_weights_are_exact_where_they_can_be() -> None:
    assert integer_shares({"a": 0.7, "b": 0.3}) == (7, 3)
    assert integer_shares([2, 1, 1]) == (2, 1, 1)
    assert integer_shares([10**12, 10**12]) == (1, 1)
    web, code = integer_shares([123456789, 987654321])
    assert abs(web / (web + code) - 123456789 / 1111111110) < 1e-6
    assert integer_shares([1e-9, 1]) == (1, 2**20)  # never none at all


def test_rows_come_from_their_sources(tmp_path: Path) -> None:
    for k, name in enumerate("abc"):
        shard(tmp_path / f"{name}.bin", np.arange(81) + 100 * k)
    keys = {
        name: {"file_pattern": str(tmp_path / f"{name}.bin"), "weight": weight}
        for name, weight in (("a", 2), ("b", 1), ("c", 1))
    }
    mixed = MixedDataset(sources=keys, seq_len=8, shuffle_files=True)
    order = mixed.order(5)
    (rows,) = mixed.batch(order.samples(np.arange(40)))
    assert np.bincount(rows[:, 0] // 100).tolist() == [20, 10, 10]
    assert np.all(rows[:, 1:] == rows[:, :-1] + 1)
    assert len(mixed) == order.size == 30 and order.epochs(40) == {"a": 2.0, "b": 1.0, "c": 1.0}
    assert "a 50.0%: 10 windows" in mixed.describe()
    reversed_sources = MixedDataset(sources=dict(reversed(keys.items())), seq_len=8, shuffle_files=True)
    assert reversed_sources.fingerprint() == mixed.fingerprint() and np.array_equal(
        reversed_sources.order(5).samples(np.arange(40)), order.samples(np.arange(40))
    )


def test_sources_of_two_widths_are_mixed(tmp_path: Path) -> None:
    shard(tmp_path / "a.bin", np.arange(17))
    write_shard(tmp_path / "b.bin", [(np.arange(17) + 70_000).astype("<u4")], np.dtype("<u4"))
    mixed = MixedDataset(sources={name: {"file_pattern": str(tmp_path / f"{name}.bin")} for name in "ab"}, seq_len=8)
    (rows,) = mixed.batch(np.array([0, 3, 1]))
    assert rows[:, 0].tolist() == [0, 70_008, 8]


def test_what_is_wrong_with_sources_is_said_at_its_line(tmp_path: Path) -> None:
    def problem(*overrides: str) -> str:
        with pytest.raises(BadInput) as caught:
            load(tmp_path / "r.yaml", overrides)
        return str(caught.value)

    (tmp_path / "r.yaml").write_text(
        "model: {_target_: amlaunch.trainer.models.gpt2.build_gpt2_model}\n"
        "dataset:\n  seq_len: 8\n  sources:\n"
        "    web: {file_pattern: a.bin, weight: 0.7}\n    code: {file_pattern: b.bin, weight: 0.3}\n"
    )
    assert load(tmp_path / "r.yaml").recipe.dataset["_target_"] == "amlaunch.trainer.data.MixedDataset"
    assert "dataset.sources.web.wieght: unknown key of a source; did you mean 'weight'" in problem(
        "--dataset.sources.web.wieght", "1"
    )
    assert "expected a number above 0" in problem("--dataset.sources.web.weight", "0")
    assert "some sources have a weight and some do not" in problem("--dataset.sources.web.weight", "null")
    assert "must be the same for all sources" in problem("--dataset.sources.web.seq_len", "4")
    assert "expected true or false, got 3" in problem("--dataset.sources.web.align_to_bos", "3")
    assert "expected named sections" in problem("--dataset.sources", "[]")
    assert "no preprocess section" in problem("--dataset.sources.web.file_pattern", "null")
    loaded = load(tmp_path / "r.yaml")
    assert [Path(place).name for place in loaded.data_paths("dataset")] == ["a.bin", "b.bin"]
    with pytest.raises(BadInput, match=r"dataset\.sources\.x: dataset\.file_pattern: no file matches"):
        MixedDataset(sources={"x": {"file_pattern": str(tmp_path / "none*.bin")}}, seq_len=8)


# --- runs -------------------------------------------------------------------------------------------------


def write_documents(path: Path, count: int, seed: int) -> None:
    """Write a shard of documents of many lengths, each beginning with token 0."""
    rng = np.random.default_rng(seed)
    documents = [
        np.concatenate([[0], 1 + np.cumsum(rng.integers(1, 4, rng.integers(2, 45))) % (VOCAB - 1)]).astype("<u2")
        for _ in range(count)
    ]
    write_shard(path, documents, np.dtype("<u2"))


def mixed_run(folder: Path, name: str, size: int, **sections: Any) -> Run:
    for which, count in (("web", 60), ("code", 50), ("val_web", 30), ("val_code", 30)):
        if not (folder / f"{which}.bin").exists():
            write_documents(folder / f"{which}.bin", count, ord(which[-1]) + count)
    sources = {
        which: {"file_pattern": str(folder / f"{which}.bin"), "weight": weight}
        for which, weight in (("web", 0.6), ("code", 0.4))
    }
    run = make(folder, name, packed_sequence={"packed_sequence_size": size}, **sections)
    run.tree["dataset"] = {"sources": sources, "seq_len": SEQ_LEN, "shuffle_files": True}
    run.tree["validation_dataset"] = {
        which: {"file_pattern": str(folder / f"val_{which}.bin"), "seq_len": SEQ_LEN} for which in ("code", "web")
    }
    run.__post_init__()
    return run


STEPS: dict[str, Any] = {"max_steps": 24, "val_every_steps": 12, "ckpt_every_steps": None}


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 3 * SEQ_LEN])
def test_a_mixture_goes_on_to_the_bit_in_the_middle_of_an_epoch_and_on_two_ranks(
    tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"dropout": 0.1} if size else {}
    straight, resumed, wider = (
        mixed_run(tmp_path, name, size, step_scheduler=STEPS, model=model) for name in ("straight", "resumed", "wider")
    )
    assert straight.train_inline() == OK
    for at in (7, 13):
        shortened = ["--step_scheduler.max_steps", str(at), "--validation_dataset", "null"]
        assert resumed.train_inline(*shortened, "--lr_scheduler.lr_decay_steps", "24") == OK
    assert resumed.train_inline() == OK
    assert straight.column("loss") == resumed.column("loss") and same_weights(straight, resumed)
    epochs = [line["epoch/web"] for line in straight.lines() if "epoch/web" in line]
    assert len(epochs) == 24 and 0 < epochs[0] < 1 < epochs[-1], "more than one epoch"
    assert straight.column("val_loss") == straight.column("val_loss/code") != straight.column("val_loss/web")
    output = capsys.readouterr().out
    assert "of code, " in output and "(code), " in output
    if size:
        return  # dropout differs on other ranks
    wider.train(
        2, "--step_scheduler.max_steps", "5", "--validation_dataset", "null", "--lr_scheduler.lr_decay_steps", "24"
    )
    assert wider.train_inline() == OK
    assert np.allclose(wider.column("loss"), straight.column("loss"), rtol=TIGHT, atol=0)


@pytest.mark.slow
def test_packed_rows_on_other_ranks_and_other_data_refused_by_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, wider = (
        mixed_run(tmp_path, name, 3 * SEQ_LEN, step_scheduler={**STEPS, "max_steps": 6, "val_every_steps": None})
        for name in ("straight", "wider")
    )
    assert straight.train_inline() == OK
    wider.train(
        2, "--step_scheduler.max_steps", "3", "--validation_dataset", "null", "--lr_scheduler.lr_decay_steps", "6"
    )
    assert wider.train_inline() == OK
    assert np.allclose(wider.column("loss"), straight.column("loss"), rtol=TIGHT, atol=0)
    assert np.allclose(wider.column("grad_norm"), straight.column("grad_norm"), rtol=TIGHT, atol=0)
    capsys.readouterr()
    for override, key in (
        (
            ("--packed_sequence.packed_sequence_size", "32"),
            "sources.web.packed_sequence_size: 48 in the checkpoint, 32 in the recipe",
        ),
        (
            ("--dataset.sources.web.weight", "0.5", "--dataset.sources.code.weight", "0.5"),
            "weights: {'code': 2, 'web': 3} in the checkpoint, {'code': 1, 'web': 1} in the recipe",
        ),
        (
            ("--dataset.sources.web.align_to_bos", "true"),
            "sources.web.align_to_bos: None in the checkpoint, True in the recipe",
        ),
        (("--dataset.shuffle_files", "false"), "shuffle: True in the checkpoint, False in the recipe"),
    ):
        assert straight.train_inline("--step_scheduler.max_steps", "8", *override) == BAD_INPUT
        assert key in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["tp_size", "cp_size"])
def test_ranks_that_share_packed_rows_keep_documents_apart(tmp_path: Path, shared: str) -> None:
    steps = {**STEPS, "max_steps": 4, "val_every_steps": 4}
    alone, both = (
        mixed_run(tmp_path, name, 2 * SEQ_LEN, step_scheduler=steps, model={"vocab_size": VOCAB + 1})
        for name in ("alone", "both")
    )
    assert alone.train_inline() == OK
    both.train(2, f"--distributed.{shared}", "2")
    for name in ("loss", "grad_norm", "val_loss/web"):
        assert np.allclose(both.column(name), alone.column(name), rtol=TIGHT, atol=0), name


@pytest.mark.slow
def test_an_epoch_of_packed_rows_ends_the_run(tmp_path: Path) -> None:
    write_tokens(tmp_path / "val.bin", 700)
    write_documents(tmp_path / "web.bin", 80, 1)
    run = make(
        tmp_path,
        packed_sequence={"packed_sequence_size": 48},
        step_scheduler={"max_steps": None, "num_epochs": 2, "val_every_steps": None},
        validation_dataset=None,
    )
    run.tree["dataset"] = {"file_pattern": str(tmp_path / "web.bin"), "seq_len": SEQ_LEN, "shuffle_files": True}
    run.__post_init__()
    assert run.train_inline() == OK
    rows = len(NanogptDataset(file_pattern=str(tmp_path / "web.bin"), seq_len=SEQ_LEN).packed(48))
    assert run.column("step")[-1] == 2 * rows // 8
    assert run.column("tokens")[0] == 8 * 48
