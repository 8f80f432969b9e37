"""Python's garbage collector, restricted to the gaps between steps.

A collection in the middle of a step leaves the device idle (0.5 s in karpathy/nanochat).
"""

from __future__ import annotations

import gc

STEPS_BETWEEN_COLLECTIONS = 1000
"""Steps between two young-generation collections; the same on all ranks, so that none waits for another."""


class StepGarbageCollector:
    """Collects garbage only between steps, from :meth:`freeze` to :meth:`restore`."""

    def freeze(self) -> None:
        """Exempt all existing objects from collection and disable automatic collections."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def step(self, steps_taken: int) -> None:
        """Collect if a collection is due after ``steps_taken`` steps since the start."""
        if steps_taken % STEPS_BETWEEN_COLLECTIONS == 0:
            gc.collect(1)

    def restore(self) -> None:
        """Return to Python's automatic collection."""
        gc.enable()
        gc.unfreeze()
