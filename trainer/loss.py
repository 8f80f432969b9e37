"""Cross entropy as a sum: dividing by the right count is the loop's job, which alone knows the whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED = -100
"""The label that counts for nothing, everywhere in the trainer."""


class MaskedCrossEntropy:
    """Sum of the cross entropies of all labels that are not ``ignore_index``, in nats."""

    def __init__(self, ignore_index: int = -100, fp32_upcast: bool = True):
        self.ignore_index = ignore_index
        self.fp32_upcast = fp32_upcast

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """``logits (B, T, V)``, ``labels (B, T)`` int64, to a scalar; half precision is computed in float32."""
        if self.fp32_upcast and logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=self.ignore_index, reduction="sum")
