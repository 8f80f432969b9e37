"""A copy of the training state in host memory, so that training continues while the copy is written.

One arena per run is reused by every save. The first touch of fresh memory costs
more than the copy itself (docs/log.md), so a thread touches the arena before
the first save.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

ALIGNMENT = 512
"""Alignment of each tensor in the arena, in bytes; suits every element type."""


class HostCopy:
    """Host buffers for a state dict, pinned on a GPU machine so that copies run asynchronously."""

    def __init__(self, device: torch.device):
        self._device = device
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._allocation: threading.Thread | None = None
        self._copied: torch.cuda.Event | None = None

    def reserve(self, state: Mapping[str, Any]) -> None:
        """Allocate room for ``state`` in the background; :meth:`copy` waits for it."""
        size = sum(_aligned_size(tensor) for tensor in _tensors(state))
        if size > self._arena.numel() and self._allocation is None:
            self._allocation = threading.Thread(target=self._allocate, args=(size,), name="host copy", daemon=True)
            self._allocation.start()

    def _allocate(self, size: int) -> None:
        set_thread_device(self._device)
        self._arena = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self._arena.zero_()

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of ``state`` in this rank's arena; sharded tensors stay DTensors.

        On a GPU the copies are queued behind the work already submitted; call :meth:`wait` before reading them.
        """
        self.reserve(state)
        if self._allocation is not None:
            self._allocation.join()
            self._allocation = None
        offset = 0

        def copied(value: Any) -> Any:
            nonlocal offset
            if isinstance(value, Mapping):
                return {key: copied(child) for key, child in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            local = _local(value)
            size = local.numel() * local.element_size()
            target = self._arena[offset : offset + size].view(local.dtype).view(local.shape)
            offset += _aligned_size(value)
            target.copy_(local, non_blocking=True)
            return DTensor(target, value._spec, requires_grad=False) if isinstance(value, DTensor) else target

        with torch.no_grad():
            result = copied(state)
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
        return dict(result)

    def wait(self) -> None:
        """Wait until the newest copy has reached host memory."""
        if self._copied is not None:
            self._copied.synchronize()


def set_thread_device(device: torch.device) -> None:
    """Select this rank's GPU in a new thread, which would otherwise create a CUDA context on the first GPU."""
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


def _aligned_size(tensor: torch.Tensor) -> int:
    local = _local(tensor)
    return -(-local.numel() * local.element_size() // ALIGNMENT) * ALIGNMENT
