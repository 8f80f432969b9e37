"""A copy of the training state in the host's memory, so that training goes on while it is written.

One arena a run, reused by every save: memory that the kernel has not handed
out before costs more to touch than the copy itself (docs/log.md), so it is
touched ahead of the first save, by a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

ALIGNMENT = 512
"""Bytes; any element type may begin there."""


class Staging:
    """Host buffers for a state dict; pinned where there is a GPU, so that it copies by itself."""

    def __init__(self, device: torch.device):
        self._device = device
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._toucher: threading.Thread | None = None
        self._copied: torch.cuda.Event | None = None

    def reserve(self, state: Mapping[str, Any]) -> None:
        """Make room for ``state`` in the background; :meth:`copy` waits for it."""
        size = sum(_room(tensor) for tensor in _tensors(state))
        if size > self._arena.numel() and self._toucher is None:
            self._toucher = threading.Thread(target=self._grow, args=(size,), name="staging", daemon=True)
            self._toucher.start()

    def _grow(self, size: int) -> None:
        on_device(self._device)
        self._arena = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self._arena.zero_()

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """``state`` as it is now, its tensors in this rank's arena; sharded ones keep their place in the whole.

        On a GPU the copies are queued behind the work that is there: :meth:`wait` before reading them.
        """
        self.reserve(state)
        if self._toucher is not None:
            self._toucher.join()
            self._toucher = None
        offset = 0

        def staged(value: Any) -> Any:
            nonlocal offset
            if isinstance(value, Mapping):
                return {key: staged(child) for key, child in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            local = _local(value)
            room = (
                self._arena[offset : offset + local.numel() * local.element_size()].view(local.dtype).view(local.shape)
            )
            offset += _room(value)
            room.copy_(local, non_blocking=True)
            return DTensor(room, value._spec, requires_grad=False) if isinstance(value, DTensor) else room

        with torch.no_grad():
            copied = staged(state)
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
        return dict(copied)

    def wait(self) -> None:
        """Until the newest copy is in the host's memory."""
        if self._copied is not None:
            self._copied.synchronize()


def on_device(device: torch.device) -> None:
    """For a new thread, which would else make a context on the first GPU, whichever is this rank's."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, Mapping):
        for child in value.values():
            yield from _tensors(child)
    elif isinstance(value, torch.Tensor):
        yield value


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _room(tensor: torch.Tensor) -> int:
    local = _local(tensor)
    return -(-local.numel() * local.element_size() // ALIGNMENT) * ALIGNMENT
