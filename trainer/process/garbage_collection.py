"""Python's garbage collector, held: a collection in the middle of a step is a gap on the device (karpathy/nanochat: 0.5 s)."""

from __future__ import annotations

import gc

STEPS_BETWEEN_COLLECTIONS = 1000
"""Steps between two collections of what is young: on all ranks after the same step, so that none waits for another."""


class StepGarbageCollector:
    """Collects between steps, and only there, from :meth:`hold` to :meth:`release`."""

    def freeze(self) -> None:
        """What exists now stays, and is not looked at again."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def step(self, taken: int) -> None:
        """``taken`` steps are done since the start."""
        if taken % STEPS_BETWEEN_COLLECTIONS == 0:
            gc.collect(1)

    def restore(self) -> None:
        """As Python has it."""
        gc.enable()
        gc.unfreeze()
