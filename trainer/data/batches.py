"""From samples on disk to inputs and labels on the device."""

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
"""``(windows (M, L + 1),)``, or ``(inputs (M, L), labels (M, L))``, and marks ``(M, L)`` (see :mod:`amlaunch.trainer.data.packing`) if there
are several documents in a row; in the type they have on disk."""


@dataclass(frozen=True)
class Batch:
    """Inputs and labels, each ``(M, L)`` int64 on the device; a label of -100 counts for nothing."""

    inputs: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None
    """Of the inputs, int64; None: 0 to L - 1."""
    documents: torch.Tensor | None = None
    """The number of the document that each input lies in, int32; None: one."""

    @property
    def forward_kwargs(self) -> dict[str, torch.Tensor]:
        """What a model's forward is given besides the inputs; nothing where it would be the usual."""
        given = {"position_ids": self.position_ids, "documents": self.documents}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of ``size``."""
        count = -(-len(self.inputs) // size)
        columns = [[None] * count if tensor is None else tensor.split(size) for tensor in self._tensors]
        return [Batch(*row) for row in zip(*columns, strict=True)]

    def local_to(self, world: World) -> Batch:
        """The positions that this rank computes, and the labels whose loss it computes, of a batch that its peers share."""
        batch = self
        if world.cp_size > 1:
            positions = torch.arange(self.inputs.shape[1], device=self.inputs.device).expand_as(self.inputs)
            whole = (
                self.inputs,
                self.labels,
                positions if self.position_ids is None else self.position_ids,
                self.documents,
            )
            batch = Batch(*(None if x is None else local_positions(x, 1, world.cp_rank, world.cp_size) for x in whole))  # type: ignore[arg-type]
        return (
            replace(batch, labels=batch.labels.chunk(world.tp_size, 1)[world.tp_rank]) if world.tp_size > 1 else batch
        )

    @property
    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        return (self.inputs, self.labels, self.position_ids, self.documents)


def read_host_batch(dataset: Any, samples: Indices, vocab: int | None, pin: bool) -> HostBatch:
    """Read ``samples``; a token id beyond the vocabulary is BadInput here, not an illegal address on the GPU."""
    arrays = read_samples(dataset, samples)
    if vocab is not None and (largest := max(int(array.max()) for array in arrays[:2])) >= vocab:
        raise LocalBadInput(
            f"the data holds the token id {largest}, but model.vocab_size is {vocab}: the tokenizer has more"
        )
    tensors = tuple(torch.from_numpy(array) for array in arrays)
    return tuple(tensor.pin_memory() for tensor in tensors) if pin else tensors


def move_to_device(host: HostBatch, device: torch.device) -> Batch:
    """Copy first, widen to int64 there: a quarter of the bytes go over the bus."""
    tensors = [tensor.to(device, non_blocking=True) for tensor in host]
    if len(tensors) == 1:
        tokens = tensors[0].to(torch.int64)
        return Batch(tokens[:, :-1], tokens[:, 1:])
    inputs, labels = (tensor.to(torch.int64) for tensor in tensors[:2])
    if len(tensors) == 2:
        return Batch(inputs, labels)
    marks = tensors[2]
    return Batch(
        inputs, labels.masked_fill(marks & UNLABELLED != 0, IGNORE_INDEX), *document_positions(marks & PIECE_BEGINS)
    )


def document_positions(begins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From ``begins (M, L)``, 1 where a document begins: each position in its document, int64, and which that is, int32."""
    indices = torch.arange(begins.shape[1], device=begins.device)
    first = torch.where(begins == 1, indices, 0).cummax(dim=1).values
    return indices - first, begins.cumsum(dim=1, dtype=torch.int32)


class StepBatches:
    """This rank's part of every step's global batch, read ahead by threads."""

    def __init__(self, dataset: Any, order: SampleOrder, global_batch: int, vocab: int | None, world: World):
        self.dataset = dataset
        self.order = order
        self.global_batch = global_batch
        self.step_tokens = global_batch * sample_length(dataset)
        self._vocab = vocab
        self._world = world
        self._ahead: PrefetcherPool[HostBatch] | None = None

    def start(self, first: int, last: int, depth: int, workers: int = 1) -> None:
        """Begin to read the steps ``first`` to ``last - 1``, counted from 0, ``depth`` of them ahead."""
        self._ahead = PrefetcherPool(self._read, range(first, last), workers, depth)

    def _read(self, step: int) -> HostBatch:
        positions = rank_positions(step, self.global_batch, self._world.dp_rank, self._world.dp_size)
        pin = self._world.device.type == "cuda"
        return read_host_batch(self.dataset, self.order.samples(positions), self._vocab, pin)

    def next(self, given_up: Callable[[], bool] = lambda: False) -> Batch | None:
        """The next step's part, ``global_batch / ranks`` samples; None where ``given_up`` says so while it is waited for."""
        if self._ahead is None:
            raise RuntimeError("start() comes before next()")
        host = self._ahead.next(given_up)
        return None if host is None else move_to_device(host, self._world.device)

    def epoch(self, step: int) -> float:
        """How many epochs ``step`` steps are."""
        return step * self.global_batch / self.order.size

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source was seen in ``step`` steps, where there are several."""
        return self.order.epochs(step * self.global_batch)

    def close(self) -> None:
        """End the reading threads."""
        if self._ahead is not None:
            self._ahead.close()


class ValidationBatches:
    """The same samples every time: the first of the split's order, dealt out to the ranks.

    Where the split is too short, padding that counts for nothing gives all
    ranks as many micro-batches: sharded models wait for one another in each.
    """

    def __init__(self, dataset: Any, order: SampleOrder, micro_batch: int, most: int, vocab: int | None, world: World):
        if len(dataset) == 0:
            raise BadInput("validation_dataset: not one window in it")
        self.dataset = dataset
        self._vocab = vocab
        self._world = world
        self._micro_batch = micro_batch
        share = micro_batch * world.dp_size
        used = min(most, len(dataset))
        self.rounds = -(-used // share)
        self._samples = order.samples(np.arange(used, dtype=np.int64))

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches."""
        for k in range(self.rounds):
            yield self._batch((k * self._world.dp_size + self._world.dp_rank) * self._micro_batch)

    def _batch(self, start: int) -> Batch:
        samples = self._samples[start : start + self._micro_batch]
        missing = self._micro_batch - len(samples)
        filled = np.concatenate([samples, np.full(missing, self._samples[0])])
        batch = move_to_device(read_host_batch(self.dataset, filled, self._vocab, pin=False), self._world.device)
        labels = batch.labels.clone()
        labels[len(samples) :] = IGNORE_INDEX
        return replace(batch, labels=labels)
