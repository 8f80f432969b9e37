"""The order of the data: every window once, whoever reads it; windows are slices of the stream."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amlaunch.preprocess.shards.shard_format import write_shard
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import write_json
from amlaunch.trainer.data.batches import Batch, StepBatches, ValidationBatches, move_to_device, read_host_batch
from amlaunch.trainer.data.datasets import NanogptDataset, read_samples, sample_length
from amlaunch.trainer.data.overlap import refuse_shared_data
from amlaunch.trainer.data.prefetch import Prefetcher, PrefetcherPool
from amlaunch.trainer.data.sample_order import SourceOrder, permute, rank_positions
from amlaunch.trainer.data.token_stream import TokenStream
from amlaunch.trainer.loss import IGNORE_INDEX
from amlaunch.trainer.parallel.world import World

UINT16 = np.dtype("<u2")


def world(rank: int = 0, size: int = 1) -> World:
    from datetime import timedelta

    return World(rank, size, torch.device("cpu"), timedelta(minutes=1))


def shard(path: Path, tokens: np.ndarray) -> Path:
    write_shard(path, [tokens.astype(UINT16)], UINT16)
    return path


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    permuted = permute(np.arange(size), size, seed, epoch)
    assert sorted(permuted.tolist()) == list(range(size))


def test_the_permutation_is_the_same_for_one_index_and_for_many_and_for_ever() -> None:
    together = permute(np.arange(1000), 1000, 42, 0)
    alone = [int(permute(np.array([i]), 1000, 42, 0)[0]) for i in range(0, 1000, 97)]
    assert alone == together[::97].tolist()
    assert together[:5].tolist() == [240, 959, 765, 987, 588]  # a change here breaks every run's resume


def test_epochs_and_seeds_shuffle_differently_and_well() -> None:
    size = 10_000
    first = permute(np.arange(size), size, 1, 0)
    for other in (permute(np.arange(size), size, 1, 1), permute(np.arange(size), size, 2, 0), np.arange(size)):
        assert np.sum(first == other) < 12  # about 1 by chance
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.05


def test_large_sizes_stay_in_range() -> None:
    size = 18_500_000_000_000 // 1024
    permuted = permute(np.arange(0, size, size // 1000), size, 0, 0)
    assert permuted.min() >= 0 and permuted.max() < size and len(set(permuted.tolist())) == len(permuted)


@given(
    ranks=st.integers(1, 64),
    local=st.integers(1, 3),
    size=st.integers(1, 400),
    shuffle=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_each_window_is_seen_once_an_epoch_whatever_the_ranks(
    ranks: int, local: int, size: int, shuffle: bool, seed: int
) -> None:
    order, batch = SourceOrder(size, seed, shuffle), ranks * local
    steps = -(-2 * size // batch)
    shares = [order.samples(rank_positions(step, batch, rank, ranks)) for step in range(steps) for rank in range(ranks)]
    seen = np.concatenate(shares)
    assert np.array_equal(seen, order.samples(np.arange(steps * batch)))
    for epoch in (0, 1):
        assert sorted(seen[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20), seq_len=st.integers(1, 33), data=st.data())
@settings(max_examples=100, deadline=None)
def test_what_is_read_are_slices_of_the_stream(lengths: list[int], seq_len: int, data: st.DataObject) -> None:
    complete = np.arange(sum(lengths)).astype(UINT16)
    stream = TokenStream(np.split(complete, np.cumsum(lengths)[:-1]))
    assert len(stream) == len(complete)
    if len(stream) <= seq_len:
        return
    starts = np.array(data.draw(st.lists(st.integers(0, len(stream) - seq_len - 1), min_size=1, max_size=9)))
    expected = np.stack([complete[i : i + seq_len + 1] for i in starts])
    assert np.array_equal(stream.read(starts, seq_len + 1), expected)


def test_no_target_of_an_epoch_is_lost_or_seen_twice(tmp_path: Path) -> None:
    for name, length in (("a", 50), ("b", 3), ("c", 76)):
        shard(tmp_path / f"{name}.bin", np.arange(length) + {"a": 0, "b": 50, "c": 53}[name])
    dataset = NanogptDataset(file_pattern=str(tmp_path / "*.bin"), seq_len=8, shuffle_files=True)
    (rows,) = dataset.batch(SourceOrder(len(dataset), 3, True).samples(np.arange(len(dataset))))
    assert sorted(rows[:, 1:].ravel().tolist()) == list(range(1, 129))
    assert sorted(rows[:, :-1].ravel().tolist()) == list(range(128))


def test_tokens_become_inputs_and_labels(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.bin", np.arange(60_000, 60_017))
    dataset = NanogptDataset(file_pattern=str(path), seq_len=8)
    batch = move_to_device(read_host_batch(dataset, np.array([1, 0]), None, pin=False), torch.device("cpu"))
    assert batch.inputs.dtype is torch.int64
    assert batch.inputs[0].tolist() == list(range(60_008, 60_016))
    assert torch.equal(batch.labels, batch.inputs + 1)
    assert [part.inputs.shape for part in batch.split(1)] == [(1, 8), (1, 8)]


def test_a_token_beyond_the_vocabulary_is_refused_before_it_reaches_the_model(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.bin", np.arange(90, 107))
    dataset = NanogptDataset(file_pattern=str(path), seq_len=8)
    with pytest.raises(BadInput, match=r"token id 106, but model\.vocab_size is 97"):
        read_host_batch(dataset, np.array([0, 1]), 97, pin=False)


def test_a_manifest_gives_the_shards_of_a_split(tmp_path: Path) -> None:
    shard(tmp_path / "x.bin", np.arange(20))
    entry = {"file": "x.bin", "tokens": 20, "sha256": "00"}
    manifest = {"version": 1, "splits": {"train": [entry], "val": []}, "tokenizer": {}}
    write_json(tmp_path / "manifest.json", manifest)
    assert len(NanogptDataset(seq_len=5, data_dir=str(tmp_path))) == 3
    with pytest.raises(BadInput, match="no split 'val'"):
        NanogptDataset(seq_len=5, data_dir=str(tmp_path), split="val")
    manifest["splits"]["train"][0]["tokens"] = 21
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(BadInput, match="expected 21 tokens as in the manifest, got 20"):
        NanogptDataset(seq_len=5, data_dir=str(tmp_path))


def test_data_that_cannot_work_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.bin", np.arange(8))
    with pytest.raises(BadInput, match="no file matches"):
        NanogptDataset(file_pattern=str(tmp_path / "none*.bin"))
    with pytest.raises(BadInput, match="8 tokens are too few for one window of seq_len 8"):
        NanogptDataset(file_pattern=str(path), seq_len=8).order(0)
    with pytest.raises(BadInput, match="pass --data DIR"):
        NanogptDataset(seq_len=4)
    (tmp_path / "dangling.bin").symlink_to("nowhere")
    with pytest.raises(BadInput, match=r"dangling\.bin: cannot be read"):
        NanogptDataset(file_pattern=str(tmp_path / "*.bin"), seq_len=4)


def test_other_shards_have_another_fingerprint(tmp_path: Path) -> None:
    one = NanogptDataset(file_pattern=str(shard(tmp_path / "a.bin", np.arange(20))), seq_len=4)
    again = NanogptDataset(file_pattern=str(tmp_path / "a.bin"), seq_len=4)
    longer = NanogptDataset(file_pattern=str(shard(tmp_path / "b.bin", np.arange(21))), seq_len=4)
    assert one.fingerprint() == again.fingerprint() != longer.fingerprint()


class Pairs:
    """A user's data set."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"input_ids": [i, i + 1], "labels": [-100, i + 2]}


def test_a_users_own_data_set_brings_its_labels() -> None:
    inputs, labels = read_samples(Pairs(), np.array([4, 1]))
    assert inputs.tolist() == [[4, 5], [1, 2]]
    assert labels.tolist() == [[-100, 6], [-100, 3]]
    assert sample_length(Pairs()) == 2


def test_ranks_share_a_step_out_of_the_prefetching_thread(tmp_path: Path) -> None:
    dataset = NanogptDataset(file_pattern=str(shard(tmp_path / "a.bin", np.arange(500))), seq_len=7)
    order = SourceOrder(len(dataset), 5, True)
    seen: list[Batch] = []
    for rank in range(2):
        batches = StepBatches(dataset, order, 4, None, world(rank, 2))
        batches.start(3, 5, depth=1)
        seen += [batches.next(), batches.next()]
        batches.close()
    first_tokens = torch.cat([seen[0].inputs, seen[2].inputs, seen[1].inputs, seen[3].inputs])[:, 0]
    assert (first_tokens // 7).tolist() == order.samples(np.arange(12, 20)).tolist()


def test_validation_gives_all_ranks_as_many_batches_and_counts_each_window_once(tmp_path: Path) -> None:
    dataset = NanogptDataset(file_pattern=str(shard(tmp_path / "a.bin", np.arange(71))), seq_len=7)  # 10 windows
    counted: list[int] = []
    for rank in range(2):
        batches = list(ValidationBatches(dataset, SourceOrder(10, 0, False), 3, 20, None, world(rank, 2)).batches())
        assert [batch.inputs.shape for batch in batches] == [(3, 7)] * 2
        counted += [int(row[0]) for batch in batches for row in batch.labels if row[0] != IGNORE_INDEX]
    assert sorted(counted) == [1 + 7 * i for i in range(10)]


def test_an_error_of_the_reading_thread_comes_out_in_the_loop() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise BadInput("no such token")
        return item

    prefetcher = Prefetcher(make, range(5), 2)
    assert [prefetcher.next(), prefetcher.next()] == [0, 1]
    with pytest.raises(BadInput, match="no such token"):
        prefetcher.next()
    prefetcher.close()


def test_closing_ends_a_thread_that_is_ahead() -> None:
    prefetcher = Prefetcher(lambda item: item, range(10**9), 2)
    time.sleep(0.01)
    prefetcher.close()
    assert not prefetcher._thread.is_alive()


# --- any number of ranks, readers and shards --------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=100),
    ranks=st.integers(1, 64),
    workers=st.integers(0, 4),
    seq_len=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=25, deadline=None)
def test_an_epoch_is_every_window_once_whatever_the_shards_ranks_and_workers(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], ranks: int, workers: int, seq_len: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    stream = np.arange(sum(lengths))  # shards shorter than one sample, too
    for k, part in enumerate(np.split(stream, np.cumsum(lengths)[:-1])):
        shard(folder / f"{k:03d}.bin", part)
    dataset = NanogptDataset(file_pattern=str(folder / "*.bin"), seq_len=seq_len, shuffle_files=True)
    size = (len(stream) - 1) // seq_len
    if size == 0:
        with pytest.raises(BadInput, match="too few for one window"):
            dataset.order(seed)
        return
    order = dataset.order(seed)
    steps = -(-size // ranks)
    seen = np.empty((steps, ranks, seq_len), dtype=np.int64)
    for rank in range(ranks):
        batches = StepBatches(dataset, order, ranks, None, world(rank, ranks))
        batches.start(0, steps, depth=3, workers=workers)
        for step in range(steps):
            batch = batches.next()
            assert batch is not None and torch.equal(batch.labels, batch.inputs + 1)
            seen[step, rank] = batch.labels[0].numpy()
        batches.close()
    epoch = seen.reshape(-1, seq_len)[:size]
    assert sorted(epoch.ravel().tolist()) == list(range(1, size * seq_len + 1)), (
        "every target once, none lost between windows"
    )


def test_workers_take_turns_and_an_error_comes_out_at_its_place() -> None:
    def make(item: int) -> int:
        if item == 5:
            raise BadInput("no such token")
        return item

    for workers in range(4):
        pool = PrefetcherPool(make, range(8), workers, 2)
        assert [pool.next() for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(BadInput, match="no such token"):
            pool.next()
        pool.close()


def damaged(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(data)
    with pytest.raises(BadInput) as caught:
        NanogptDataset(file_pattern=str(path), seq_len=4)
    return str(caught.value)


def test_files_that_are_no_whole_shards_are_refused_by_name_with_what_is_wrong(tmp_path: Path) -> None:
    complete = shard(tmp_path / "whole.bin", np.arange(20)).read_bytes()
    header = np.frombuffer(complete[:1024], dtype="<i4").copy()
    assert "empty.bin: 0 bytes are too few" in damaged(tmp_path, "empty.bin", b"")
    assert "short.bin: truncated: expected 1064 bytes (20 tokens of 2 bytes), got 1062" in damaged(
        tmp_path, "short.bin", complete[:-2]
    )
    assert "long.bin: longer than its header says" in damaged(tmp_path, "long.bin", complete + b"\0\0")
    assert "foreign.bin: not a token shard: expected magic number" in damaged(tmp_path, "foreign.bin", b"PAR1" * 500)
    header[1] = 2
    assert "new.bin: expected shard format version 1, got 2" in damaged(
        tmp_path, "new.bin", header.tobytes() + complete[1024:]
    )
    header[1:3] = 1, 0
    assert "killed.bin: its header counts 0 tokens" in damaged(
        tmp_path, "killed.bin", header.tobytes() + complete[1024:]
    )


def test_the_layouts_of_the_guide_of_llm_c_and_of_nanogpt_are_read(tmp_path: Path) -> None:
    tokens = np.arange(100, 120)
    for magic, item, dtype in (
        (278895051, 2, "<u2"),
        (278895051, 4, "<u4"),
        (20240520, 0, "<u2"),
        (20240520, 2, "<u2"),
    ):
        ints = np.zeros(256, dtype="<i4")
        ints[:4] = magic, 1, len(tokens), item
        path = tmp_path / "x.bin"
        path.write_bytes(ints.tobytes() + tokens.astype(dtype).tobytes())
        (rows,) = NanogptDataset(file_pattern=[str(path)], seq_len=4).batch(np.array([2]))
        assert rows.tolist() == [[108, 109, 110, 111, 112]]
    tokens.astype("<u2").tofile(tmp_path / "train.bin")
    (rows,) = NanogptDataset(file_pattern=str(tmp_path / "train.bin"), seq_len=4, format="raw").batch(np.array([0]))
    assert rows.tolist() == [[100, 101, 102, 103, 104]]


def test_bare_tokens_are_read_when_told_so_and_nothing_else_is_taken_for_them(tmp_path: Path) -> None:
    def raw(data: bytes) -> str:
        (tmp_path / "x.bin").write_bytes(data)
        with pytest.raises(BadInput) as caught:
            NanogptDataset(file_pattern=str(tmp_path / "x.bin"), seq_len=4, format="raw")
        return str(caught.value)

    assert "x.bin is empty (0 bytes)" in raw(b"")
    assert "7 bytes is not a multiple of 2 (uint16)" in raw(b"1234567")
    complete = shard(tmp_path / "whole.bin", np.arange(20)).read_bytes()
    assert "has the header of a token shard; set dataset.format: bin" in raw(complete)
    with pytest.raises(BadInput, match="did you mean 'raw'"):
        NanogptDataset(file_pattern=str(tmp_path / "x.bin"), format="row")


def shards_folder(
    folder: Path, source: str = "web", parts: int = 1, train: str = "2 to 9", val: str = "0 to 2"
) -> Path:
    """Make a folder of one shard each for training and validation, as preprocess leaves it."""
    folder.mkdir()
    splits = {}
    for split, records in (("train", train), ("val", val)):
        path = shard(folder / f"{split}-00000-00000.bin", np.arange(21))
        splits[split] = [{"file": path.name, "tokens": 21, "sha256": split, "source": f"part 0, records {records}"}]
    facts = {"source": {"kind": "files", "digest": source}, "options": {"parts": parts}, "tokenizer": {}}
    write_json(folder / "manifest.json", {"version": 1, "splits": splits, **facts})
    return folder


def test_a_glob_over_a_folder_of_shards_takes_one_split(tmp_path: Path) -> None:
    folder = shards_folder(tmp_path / "d")

    def names(pattern: str | list[str], split: str = "train") -> list[str]:
        return [part.path.name[:5] for part in NanogptDataset(file_pattern=pattern, split=split, seq_len=5).shards]

    assert names(f"{folder}/*.bin") == ["train"] and names(f"{folder}/*.bin", "val") == ["val-0"]
    assert names(f"{folder}/val-*.bin") == ["val-0"], "a glob that names one split takes it"
    assert names([f"{folder}/train-*.bin", f"{folder}/val-*.bin"]) == ["train", "val-0"]
    shard(folder / "more.bin", np.arange(9))
    assert names(f"{folder}/*.bin") == ["more.", "train"]


def test_a_validation_set_that_shares_files_or_documents_with_the_training_set_is_refused(tmp_path: Path) -> None:
    first = shards_folder(tmp_path / "first")
    (tmp_path / "link.bin").symlink_to(first / "train-00000-00000.bin")

    def check(train: str | list[str], validation: str) -> None:
        sets = [NanogptDataset(file_pattern=pattern, seq_len=5) for pattern in (train, validation)]
        refuse_shared_data(sets[0], {"": sets[1]})

    check(f"{first}/*.bin", f"{first}/val-*.bin")
    for train in (f"{first}/*.bin", [f"{first}/val-*.bin", f"{first}/train-*.bin"]):
        with pytest.raises(BadInput, match=r"validation_dataset: .*link.bin is also in the training set"):
            check(train, str(tmp_path / "link.bin"))

    same_text = shards_folder(tmp_path / "same_text", train="0 to 9", val="9 to 10")
    with pytest.raises(BadInput, match=r"first/val-.* documents .*same_text/train-"):
        check(f"{same_text}/*.bin", f"{first}/val-*.bin")
    check(f"{first}/*.bin", f"{same_text}/val-*.bin")
    other_text = shards_folder(tmp_path / "other_text", source="code", train="0 to 9")
    check(f"{other_text}/*.bin", f"{first}/val-*.bin")


def test_a_manifest_can_be_named_by_its_path(tmp_path: Path) -> None:
    shard(tmp_path / "x.bin", np.arange(20))
    entry = {"file": "x.bin", "tokens": 20, "sha256": "00"}
    write_json(tmp_path / "manifest.json", {"version": 1, "splits": {"train": [], "val": [entry]}, "tokenizer": {}})
    assert len(NanogptDataset(file_pattern=str(tmp_path / "manifest.json"), split="val", seq_len=5)) == 3


READ = """\
import os, resource, sys
from amlaunch.recipes.errors import BadInput
from amlaunch.trainer.data.datasets import NanogptDataset
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))
try:
    print(len(NanogptDataset(file_pattern=sys.argv[1], seq_len=5)))
except BadInput as error:
    print(error)
"""


def test_more_shards_than_descriptors(tmp_path: Path) -> None:
    """The soft limit is raised to the hard one, which is then named."""
    for i in range(100):
        shard(tmp_path / f"{i:03}.bin", np.arange(6))

    def opened() -> str:
        command = [sys.executable, "-c", READ, str(tmp_path / "*.bin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert opened() == "119\n"
    for i in range(100, 200):
        shard(tmp_path / f"{i:03}.bin", np.arange(6))
    assert "too many open files. Each shard needs a descriptor, and the limit is 128 (ulimit -Hn)" in opened()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_windows_in_random_order_are_read_without_read_ahead(tmp_path: Path, shuffle: bool, packed: bool) -> None:
    """The kernel reads megabytes ahead for each window of a cold file, unless it is told (``rr`` in smaps)."""
    path = shard(tmp_path / "cold.bin", np.arange(5000) % 50)
    dataset: Any = NanogptDataset(file_pattern=str(path), seq_len=64, shuffle_files=shuffle, bos_token=0)
    dataset = dataset.packed(128) if packed else dataset
    dataset.order(0)
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    (mapping,) = (mapping for mapping in mappings if str(path) in mapping)
    assert ("rr" in re.findall(r"^VmFlags: (.*)$", mapping, re.M)[0].split()) == shuffle
