"""Numbers on their way from the device to the host."""

from __future__ import annotations

import torch


class Readback:
    """A small tensor, copied to the host without stopping the GPU.

    Reading a tensor directly waits for everything that was enqueued up to now;
    this waits only for what came before the copy.
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
        """The numbers, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
