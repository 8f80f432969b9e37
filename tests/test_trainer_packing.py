"""Packed documents: each token once, no document sees another, and the loss is that of the documents one by one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer_data import UINT16, world

from amlaunch.preprocess.shards.shard_format import write_shard
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Distributed
from amlaunch.trainer.data.batches import Batch, StepBatches, document_positions, move_to_device, read_host_batch
from amlaunch.trainer.data.datasets import NanogptDataset, PackedDataset, data_fingerprint
from amlaunch.trainer.data.packing import PIECE_BEGINS, UNLABELLED, assign_rows, cut_documents
from amlaunch.trainer.data.token_stream import aligned_starts
from amlaunch.trainer.loss import IGNORE_INDEX, MaskedCrossEntropy
from amlaunch.trainer.models.attention import attend, flex_attend
from amlaunch.trainer.models.base import logits_of
from amlaunch.trainer.models.document_masks import keep_documents_apart
from amlaunch.trainer.models.gpt2 import build_gpt2_model
from amlaunch.trainer.models.llama import build_llama_model
from amlaunch.trainer.torch_features import compiles_document_masks

BOS = 7
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def documents_of(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Make documents that begin with BOS and have random larger tokens."""
    rng = np.random.default_rng(seed)
    return [np.concatenate([[BOS], rng.integers(8, 90, length - 1)]).astype(UINT16) for length in lengths]


def packed_set(folder: Path, documents: list[np.ndarray], size: int, shards: int = 1, **keys: Any) -> PackedDataset:
    for number, part in enumerate(np.array_split(np.arange(len(documents)), shards)):
        if len(part):
            write_shard(folder / f"{number}.bin", [documents[i] for i in part], UINT16)
    return NanogptDataset(file_pattern=str(folder / "*.bin"), **{"seq_len": size, **keys}).packed(size)


@given(lengths=st.lists(st.integers(1, 33), min_size=1, max_size=200), size=st.integers(33, 80))
@settings(max_examples=100, deadline=None)
def test_rows_hold_every_piece_once_and_are_as_few_as_best_fit_makes_them(lengths: list[int], size: int) -> None:
    rows = assign_rows(np.array(lengths), size)
    filled = np.bincount(rows, weights=lengths)
    assert filled.max() <= size and filled.min() > 0
    firsts = [rows.tolist().index(row) for row in range(len(filled))]
    assert firsts == sorted(firsts), "rows are numbered by their first piece"
    room: list[int] = []  # a plain best fit, longest first, one piece at a time
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= length
        else:
            room.append(size - length)
    assert sorted(size - filled) == sorted(room)


@given(lengths=LENGTHS, longest=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_documents_that_are_too_long_are_cut_and_counted(lengths: list[int], longest: int) -> None:
    starts = np.cumsum([0, *lengths[:-1]])
    pieces = cut_documents(starts, sum(lengths), longest, every_label=False)
    expected = [
        (begin + at, min(longest, length - at))
        for begin, length in zip(starts.tolist(), lengths, strict=True)
        for at in range(0, length, longest)
    ]
    assert list(zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True)) == expected
    assert pieces.split_documents == sum(length > longest for length in lengths)
    ends = set(np.cumsum(lengths).tolist())
    assert pieces.labelled.tolist() == [begin + length not in ends for begin, length in expected]


@given(
    lengths=LENGTHS,
    size=st.integers(4, 50),
    seq_len=st.integers(2, 50),
    shards=st.integers(1, 5),
    epoch=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_of_packed_rows_has_every_token_and_every_target_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], size: int, seq_len: int, shards: int, epoch: int
) -> None:
    documents = [
        np.concatenate([[0], np.arange(1, length) + 50 * k]).astype(UINT16) for k, length in enumerate(lengths)
    ]
    dataset = packed_set(
        tmp_path_factory.mktemp("packed"), documents, size, shards, seq_len=seq_len, bos_token=0, shuffle_files=True
    )
    inputs, labels, marks = dataset.batch(dataset.order(3).samples(np.arange(len(dataset)) + epoch * len(dataset)))
    counted = marks & UNLABELLED == 0
    stream = np.concatenate(documents)
    assert sorted(zip(inputs[counted].tolist(), labels[counted].tolist(), strict=True)) == sorted(
        zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True)
    )
    positions, _ = document_positions(torch.from_numpy(marks & PIECE_BEGINS))
    assert int(positions.max()) < min(size, seq_len) and np.all((inputs == 0) | (positions.numpy() >= 0))
    padding = len(dataset) * size - len(stream)
    assert np.count_nonzero(~counted) == padding + 1  # nothing follows the last token
    assert dataset.documents == len(lengths) and dataset.rows.split_documents == sum(
        length > min(size, seq_len) for length in lengths
    )


def test_without_a_beginning_token_the_last_token_of_a_document_has_no_label(tmp_path: Path) -> None:
    documents = [np.array([1, 2, 3]), np.array([4, 5]), np.array([6])]
    dataset = packed_set(tmp_path, [document.astype(UINT16) for document in documents], 8)
    inputs, _, marks = dataset.batch(np.arange(1))
    assert inputs.tolist() == [[1, 2, 3, 4, 5, 6, 0, 0]]
    assert (marks & PIECE_BEGINS).tolist() == [[1, 0, 0, 1, 0, 1, 1, 1]]
    batch = move_to_device(read_host_batch(dataset, np.arange(1), 97, pin=False), torch.device("cpu"))
    assert batch.labels.tolist() == [[2, 3, IGNORE_INDEX, 5, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]]
    assert "3 documents in 1 rows of 8, 75.0% filled, 0 of them cut" in dataset.describe()


MODELS = {
    "gpt2": lambda: build_gpt2_model(vocab_size=97, n_positions=24, n_embd=16, n_layer=2, n_head=2),
    "llama": lambda: build_llama_model(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
    ),
}


def hugging_face(kind: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=97,
            n_positions=24,
            n_embd=16,
            n_layer=2,
            n_head=2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    else:
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        config = getattr(transformers, f"{kind}Config")(vocab_size=97, max_position_embeddings=24, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("which", ["gpt2", "llama", "GPT2", "Llama", "Qwen2"])
def test_the_loss_is_that_of_the_documents_one_by_one(tmp_path: Path, which: str) -> None:
    torch.manual_seed(0)
    model = (MODELS[which]() if which in MODELS else hugging_face(which)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # attention that matters
    keep_documents_apart(model, Distributed())
    documents = documents_of([5, 24, 11, 3, 17, 9, 1, 8, 60])
    dataset = packed_set(tmp_path, documents, 24)
    batch = move_to_device(read_host_batch(dataset, np.arange(len(dataset)), 97, pin=False), torch.device("cpu"))
    loss_fn = MaskedCrossEntropy()
    packed = loss_fn(logits_of(model(batch.inputs, **batch.forward_kwargs)), batch.labels)
    packed.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    alone = sum(loss_fn(logits_of(model(inputs)), labels) for inputs, labels in one_by_one(documents, 24))
    alone.backward()
    assert abs(packed.item() - alone.item()) / alone.item() < 1e-12
    expected = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for gradient, reference in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, reference, rtol=1e-10, atol=1e-11)
    crossed = loss_fn(logits_of(model(batch.inputs)), batch.labels)
    assert abs(crossed.item() - alone.item()) / alone.item() > 1e-4, "else the test would not notice"


def one_by_one(documents: list[np.ndarray], longest: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each document, or segment of one that is too long, as a batch of one.

    The label of a document's last token is the next document's BOS.
    """
    batches = []
    for k, document in enumerate(documents):
        labels = [*document[1:].tolist(), BOS if k + 1 < len(documents) else IGNORE_INDEX]
        for at in range(0, len(document), longest):
            inputs = torch.from_numpy(document[None, at : at + longest].astype(np.int64))
            batches.append((inputs, torch.tensor([labels[at : at + longest]])))
    return batches


def test_models_that_would_look_across_documents_are_refused_by_name() -> None:
    with pytest.raises(BadInput, match="packed_sequence_size: Linear cannot restrict attention to documents"):
        keep_documents_apart(torch.nn.Linear(2, 2), Distributed())
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 97,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    windowed = transformers.AutoModelForCausalLM.from_config(transformers.MistralConfig(sliding_window=8, **sizes))
    with pytest.raises(BadInput, match="MistralForCausalLM has layers without full attention"):
        keep_documents_apart(windowed, Distributed())
    eager = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(attn_implementation="eager", **sizes)
    )
    with pytest.raises(BadInput, match="uses the attention implementation eager"):
        keep_documents_apart(eager, Distributed())
    with pytest.raises(BadInput, match="cp_size"):
        keep_documents_apart(hugging_face("Llama"), Distributed(cp_size=2))


@given(marks=st.lists(st.booleans(), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_places_count_from_each_mark(marks: list[bool]) -> None:
    row = torch.tensor([[True, *marks]]).to(torch.uint8)
    positions, documents = document_positions(row)
    expected, at = [], -1
    for mark in row[0].tolist():
        at = 0 if mark else at + 1
        expected.append(at)
    assert positions[0].tolist() == expected
    assert documents[0].tolist() == np.cumsum(row[0].tolist()).tolist() and documents.dtype is torch.int32


def test_micro_batches_keep_their_documents(tmp_path: Path) -> None:
    dataset = packed_set(tmp_path, documents_of([5, 20, 11, 3, 17, 9]), 24)
    batches = StepBatches(dataset, dataset.order(0), 2, None, world())
    batches.start(0, 1, 1)
    batch = batches.next()
    batches.close()
    assert batch is not None
    parts = batch.split(1)
    assert all(
        torch.equal(torch.cat([part.forward_kwargs[name] for part in parts]), batch.forward_kwargs[name])
        for name in ("position_ids", "documents")
    )
    assert Batch(batch.inputs, batch.labels).split(1)[0].forward_kwargs == {}


def test_attention_by_documents_is_attention_of_each_alone() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 4, dtype=torch.float64) for heads in (4, 2, 2))
    documents = torch.tensor([[1, 1, 1, 1, 2, 2, 3, 3, 3]], dtype=torch.int32)
    whole = attend(q, k, v, documents=documents)
    parts = [attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 4), (4, 6), (6, 9))]
    assert torch.allclose(whole, torch.cat(parts, dim=2), rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.torch_range
@pytest.mark.filterwarnings("ignore")
def test_attention_by_blocks_is_the_same_and_other_documents_compile_nothing_again() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, heads, 256, 16, dtype=torch.float64) for heads in (4, 2, 2))
    compiled = torch.compile(flex_attend, backend="eager", fullgraph=True, dynamic=False)
    can_compile = torch.compile(compiles_document_masks, backend="eager", fullgraph=True)
    assert can_compile() is compiles_document_masks()  # attend asks while it is being compiled
    if not compiles_document_masks():
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(q, k, v, torch.zeros(2, 256, dtype=torch.int32))
        return
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            documents = torch.randint(0, 2, (2, 256)).cumsum(1).to(torch.int32)
            expected = attend(q, k, v, documents=documents)
            assert torch.allclose(compiled(q, k, v, documents), expected, rtol=0, atol=1e-13)


# --- windows that begin with a document ------------------------------------------------------------------


@given(lengths=LENGTHS, seq_len=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_aligned_windows_follow_one_another_from_document_to_document(lengths: list[int], seq_len: int) -> None:
    starts = np.cumsum([0, *lengths[:-1]])
    expected, end = [], 0
    while (later := [start for start in starts.tolist() if start >= end]) and later[0] + seq_len < sum(lengths):
        expected.append(later[0])
        end = later[0] + seq_len
    assert aligned_starts(starts, sum(lengths), seq_len).tolist() == expected


@pytest.mark.parametrize("indexed", [True, False])
def test_every_aligned_sample_begins_with_a_document(tmp_path: Path, indexed: bool) -> None:
    documents = documents_of([30, 2, 5, 41, 18, 9, 33, 12])
    for k, part in enumerate((documents[:3], documents[3:])):
        write_shard(tmp_path / f"{k}.bin", part, UINT16)
        if not indexed:
            (tmp_path / f"{k}.idx").unlink()
    dataset = NanogptDataset(file_pattern=str(tmp_path / "*.bin"), seq_len=16, align_to_bos=True, bos_token=BOS)
    (rows,) = dataset.batch(np.arange(len(dataset)))
    assert len(dataset) > 3 and set(rows[:, 0].tolist()) == {BOS}
    stream = np.concatenate(documents)
    assert all(any(np.array_equal(row, stream[at : at + 17]) for at in np.flatnonzero(stream == BOS)) for row in rows)
    plain = NanogptDataset(file_pattern=str(tmp_path / "*.bin"), seq_len=16)
    keys = {key for key, value in dataset.fingerprint().items() if plain.fingerprint().get(key) != value}
    assert keys == {"align_to_bos", "bos_token"}


def test_documents_that_cannot_be_found_are_refused_by_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", documents_of([30, 12]), UINT16)
    with pytest.raises(BadInput, match=r"a\.bin: dataset\.bos_token is 3, but its documents begin with token 7"):
        NanogptDataset(file_pattern=str(tmp_path / "a.bin"), seq_len=4, align_to_bos=True, bos_token=3)
    (tmp_path / "a.idx").unlink()
    with pytest.raises(BadInput, match=r"no document index \(a\.idx\); set dataset\.bos_token"):
        NanogptDataset(file_pattern=str(tmp_path / "a.bin"), seq_len=4, align_to_bos=True)
    with pytest.raises(BadInput, match=r"bos_token 3 does not occur in the 42 tokens"):
        NanogptDataset(file_pattern=str(tmp_path / "a.bin"), seq_len=4, align_to_bos=True, bos_token=3)


def test_a_shard_that_begins_within_a_document_loses_nothing(tmp_path: Path) -> None:
    np.array([11, 12, BOS, 13, 14, 15, BOS, 16], dtype="<u2").tofile(tmp_path / "train.bin")
    dataset = NanogptDataset(file_pattern=str(tmp_path / "train.bin"), seq_len=4, bos_token=BOS, format="raw").packed(8)
    inputs, _, marks = dataset.batch(np.arange(1))
    assert sorted(inputs[0].tolist()) == [BOS, BOS, 11, 12, 13, 14, 15, 16]
    assert dataset.documents == 3 and np.count_nonzero(marks & UNLABELLED) == 1


def test_packing_belongs_to_what_a_checkpoint_remembers(tmp_path: Path) -> None:
    dataset = packed_set(tmp_path, documents_of([5, 20, 11]), 24)
    narrow, wide = (data_fingerprint(rows, {}, 1, 8) for rows in (dataset, dataset._dataset.packed(32)))
    assert [key for key in narrow if narrow[key] != wide[key]] == ["packed_sequence_size"]
    assert math.isclose(len(dataset) * 24, 48)


def test_a_data_set_without_documents_is_refused() -> None:
    from amlaunch.trainer.data.datasets import pack_dataset

    assert pack_dataset([1, 2], 0) == [1, 2]
    with pytest.raises(BadInput, match="list has no documents to pack"):
        pack_dataset([1, 2], 8)
