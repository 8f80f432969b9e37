"""Copy numbers from the device to the host without stopping the GPU."""

from __future__ import annotations

import torch


class Readback:
    """A small tensor on its way to the host.

    Reading a tensor directly waits for all work submitted so far; this class
    waits only for the work that was submitted before the copy.
    """

    def __init__(self, values: torch.Tensor):
        self._values = values
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[float]:
        """Wait for the copy and return the numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
