"""Batches: read samples on the host and move them to the device as inputs and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from amlaunch.recipes.errors import BadInput
from amlaunch.trainer.data.datasets import read_samples, sample_length
from amlaunch.trainer.data.packing import PIECE_BEGINS, UNLABELLED
from amlaunch.trainer.data.prefetch import PrefetcherPool
from amlaunch.trainer.data.sample_order import Indices, SampleOrder, rank_positions
from amlaunch.trainer.loss import IGNORE_INDEX
from amlaunch.trainer.parallel.context_parallel import local_positions
from amlaunch.trainer.parallel.world import World
from amlaunch.trainer.process.errors import LocalBadInput

HostBatch = tuple[torch.Tensor, ...]
"""Windows ``(M, L + 1)``; or inputs and labels, each ``(M, L)``, with marks ``(M, L)`` if rows hold several documents.

Tokens have their type on disk. See :mod:`amlaunch.trainer.data.packing` for the marks.
"""


@dataclass(frozen=True)
class Batch:
    """Inputs and labels, each ``(M, L)`` int64 on the device; a label of -100 has no loss."""

    inputs: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None
    """Positions of the inputs, int64; None means 0 to L - 1."""
    documents: torch.Tensor | None = None
    """Number of each input's document, int32; None means one document."""

    @property
    def forward_kwargs(self) -> dict[str, torch.Tensor]:
        """Arguments of a model's forward besides the inputs, without those that are None."""
        kwargs = {"position_ids": self.position_ids, "documents": self.documents}
        return {name: tensor for name, tensor in kwargs.items() if tensor is not None}

    def split(self, size: int) -> list[Batch]:
        """Split into micro-batches of ``size``."""
        count = -(-len(self.inputs) // size)
        columns = [[None] * count if tensor is None else tensor.split(size) for tensor in self._tensors]
        return [Batch(*row) for row in zip(*columns, strict=True)]

    def local_to(self, world: World) -> Batch:
        """Return the positions that this rank computes, and the labels whose loss it computes.

        The batch is shared by the rank's tensor- and context-parallel peers.
        """
        batch = self
        if world.cp_size > 1:
            positions = self.position_ids
            if positions is None:
                positions = torch.arange(self.inputs.shape[1], device=self.inputs.device).expand_as(self.inputs)

            def local(tensor: torch.Tensor) -> torch.Tensor:
                return local_positions(tensor, 1, world.cp_rank, world.cp_size)

            documents = None if self.documents is None else local(self.documents)
            batch = Batch(local(self.inputs), local(self.labels), local(positions), documents)
        if world.tp_size > 1:
            batch = replace(batch, labels=batch.labels.chunk(world.tp_size, 1)[world.tp_rank])
        return batch

    @property
    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        return (self.inputs, self.labels, self.position_ids, self.documents)


def read_host_batch(dataset: Any, samples: Indices, vocab: int | None, pin: bool) -> HostBatch:
    """Read ``samples`` into host memory, pinned if ``pin``.

    Raises LocalBadInput for a token id beyond the vocabulary, which would be an illegal address on the GPU.
    """
    arrays = read_samples(dataset, samples)
    if vocab is not None:
        max_token = max(int(array.max()) for array in arrays[:2])
        if max_token >= vocab:
            raise LocalBadInput(
                f"the data contains token id {max_token}, but model.vocab_size is {vocab}; "
                "increase model.vocab_size to the tokenizer's size"
            )
    tensors = tuple(torch.from_numpy(array) for array in arrays)
    return tuple(tensor.pin_memory() for tensor in tensors) if pin else tensors


def move_to_device(host: HostBatch, device: torch.device) -> Batch:
    """Copy a batch to the device and widen it to int64 there, which sends a quarter of the bytes."""
    tensors = [tensor.to(device, non_blocking=True) for tensor in host]
    if len(tensors) == 1:
        tokens = tensors[0].to(torch.int64)
        return Batch(tokens[:, :-1], tokens[:, 1:])

    inputs, labels = (tensor.to(torch.int64) for tensor in tensors[:2])
    if len(tensors) == 2:
        return Batch(inputs, labels)

    marks = tensors[2]
    labels = labels.masked_fill(marks & UNLABELLED != 0, IGNORE_INDEX)
    return Batch(inputs, labels, *document_positions(marks & PIECE_BEGINS))


def document_positions(begins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the position in its document, int64, and the document's number, int32, of each token.

    ``begins (M, L)`` is 1 where a document begins.
    """
    indices = torch.arange(begins.shape[1], device=begins.device)
    first = torch.where(begins == 1, indices, 0).cummax(dim=1).values
    return indices - first, begins.cumsum(dim=1, dtype=torch.int32)


class StepBatches:
    """This rank's share of every step's global batch, prefetched by threads."""

    def __init__(self, dataset: Any, order: SampleOrder, global_batch: int, vocab: int | None, world: World):
        self.dataset = dataset
        self.order = order
        self.global_batch = global_batch
        self.step_tokens = global_batch * sample_length(dataset)
        self._vocab = vocab
        self._world = world
        self._prefetcher: PrefetcherPool[HostBatch] | None = None

    def start(self, first: int, last: int, depth: int, workers: int = 1) -> None:
        """Start to read the steps ``first`` to ``last - 1``, counted from 0, up to ``depth`` steps ahead."""
        self._prefetcher = PrefetcherPool(self._read, range(first, last), workers, depth)

    def _read(self, step: int) -> HostBatch:
        positions = rank_positions(step, self.global_batch, self._world.dp_rank, self._world.dp_size)
        pin = self._world.device.type == "cuda"
        return read_host_batch(self.dataset, self.order.samples(positions), self._vocab, pin)

    def next(self, cancelled: Callable[[], bool] = lambda: False) -> Batch | None:
        """Return the next step's ``global_batch / ranks`` samples; None if ``cancelled()`` during the wait for them."""
        if self._prefetcher is None:
            raise RuntimeError("call start() before next()")
        host = self._prefetcher.next(cancelled)
        return None if host is None else move_to_device(host, self._world.device)

    def epoch(self, step: int) -> float:
        """Return the number of epochs in ``step`` steps."""
        return step * self.global_batch / self.order.size

    def epochs(self, step: int) -> dict[str, float]:
        """Return the epochs of each source in ``step`` steps; empty if there is a single source."""
        return self.order.epochs(step * self.global_batch)

    def close(self) -> None:
        """Stop the reading threads."""
        if self._prefetcher is not None:
            self._prefetcher.close()


class ValidationBatches:
    """The same samples in each validation: the first of the split's order, distributed over the ranks.

    If the split is too short, samples without labels give all ranks the same number of micro-batches, because sharded
    models wait for one another in each.
    """

    def __init__(
        self, dataset: Any, order: SampleOrder, micro_batch: int, max_samples: int, vocab: int | None, world: World
    ):
        if len(dataset) == 0:
            raise BadInput("validation_dataset has no window; use more tokens or a smaller seq_len")
        self.dataset = dataset
        self._vocab = vocab
        self._world = world
        self._micro_batch = micro_batch
        count = min(max_samples, len(dataset))
        self.rounds = -(-count // (micro_batch * world.dp_size))
        self._samples = order.samples(np.arange(count, dtype=np.int64))

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's micro-batches."""
        for index in range(self.rounds):
            yield self._batch((index * self._world.dp_size + self._world.dp_rank) * self._micro_batch)

    def _batch(self, start: int) -> Batch:
        samples = self._samples[start : start + self._micro_batch]
        padding = np.full(self._micro_batch - len(samples), self._samples[0])
        host = read_host_batch(self.dataset, np.concatenate([samples, padding]), self._vocab, pin=False)
        batch = move_to_device(host, self._world.device)
        labels = batch.labels.clone()
        labels[len(samples) :] = IGNORE_INDEX
        return replace(batch, labels=labels)
