"""Cross entropy as a sum: dividing by the right count is the loop's job, which alone knows the whole batch.

The logits of a step are its largest tensor by far: 32 windows of GPT-2 have
6.6 GB of them in float32. :class:`LinearCrossEntropy` never has them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from amlaunch.recipes.errors import BadInput
from amlaunch.trainer.models.base import logits_of
from amlaunch.trainer.performance.trace_regions import LOSS_REGION

IGNORE_INDEX = -100
"""The label that counts for nothing, everywhere in the trainer."""
HALF_PRECISION = (torch.bfloat16, torch.float16)
IMPLEMENTATIONS = ("chunked", "torch")


class MaskedCrossEntropy:
    """Sum of the cross entropies of all labels that are not ``ignore_index``, in nats.

    ``vocab_size``: the tokens that there are, where the model has more rows than that (padding): those take no part.
    """

    def __init__(self, ignore_index: int = -100, fp32_upcast: bool = True, vocab_size: int | None = None):
        self.ignore_index = ignore_index
        self.fp32_upcast = fp32_upcast
        self.vocab_size = vocab_size

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """``logits (B, T, V)``, ``labels (B, T)`` int64, to a scalar; half precision is computed in float32."""
        if self.fp32_upcast and logits.dtype in HALF_PRECISION:
            logits = logits.float()
        if self.vocab_size is not None and self.vocab_size < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= self.vocab_size
            logits = logits.masked_fill(padding, float("-inf"))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=self.ignore_index, reduction="sum")


class LinearCrossEntropy:
    """The same sum from the last hidden states and the head's weights, ``chunk_tokens`` rows of logits at a time.

    The gradients are made with the loss, while a chunk's logits are there, so that
    none of them is computed twice. Logits are in the type that the model computes
    in; softmax and sums are in float32 or better. ``implementation``: ``chunked``,
    ours, whose softmax is one fused kernel where the recipe compiles; or ``torch``,
    ``torch.nn.functional.linear_cross_entropy`` (torch 2.13), which knows no padding.
    A model whose ``forward`` takes no ``linear_loss`` is asked for logits.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        chunk_tokens: int = 8192,
        implementation: str = "chunked",
    ):
        if implementation not in IMPLEMENTATIONS:
            raise BadInput(f"loss_fn.implementation {implementation!r}: write one of {', '.join(IMPLEMENTATIONS)}")
        if implementation == "torch" and not hasattr(F, "linear_cross_entropy"):
            raise BadInput(
                f"loss_fn.implementation torch: torch {torch.__version__} has no linear_cross_entropy (2.13 has); write chunked"
            )
        if implementation == "torch" and vocab_size is not None:
            raise BadInput(
                "loss_fn.vocab_size: torch's linear_cross_entropy knows no padding; write implementation: chunked"
            )
        if chunk_tokens < 1:
            raise BadInput(f"loss_fn.chunk_tokens {chunk_tokens}: write at least 1")
        self.ignore_index = ignore_index
        self.vocab_size = vocab_size
        self.chunk_tokens = chunk_tokens
        self.implementation = implementation
        self._from_logits = MaskedCrossEntropy(ignore_index, vocab_size=vocab_size)
        self._of_chunk: Callable[..., tuple[torch.Tensor, torch.Tensor]] = loss_and_gradient

    def compile(self) -> None:
        """Fuse what is done with a chunk's logits; their matrix products stay the library's.

        As part of a model's graph the whole would be traced chunk by chunk, so it is kept out of that.
        """
        self.from_hidden = torch.compiler.disable(self.from_hidden)  # type: ignore[method-assign]
        self._of_chunk = torch.compile(loss_and_gradient, dynamic=False)
        self._from_logits = torch.compile(self._from_logits, dynamic=False)  # type: ignore[assignment]

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """As :class:`MaskedCrossEntropy`, for a model that gives logits."""
        return self._from_logits(logits, labels)

    def from_hidden(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """``hidden (B, T, C)``, ``weight (V, C)``, ``labels (B, T)`` int64, to a scalar in float32 or better."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.profiler.record_function(LOSS_REGION):
            return self._of_rows(hidden.flatten(0, -2), weight, labels.flatten(), dtype)

    def _of_rows(
        self, rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        if self.implementation == "torch":
            options = torch.nn.LinearCrossEntropyOptions()
            losses = (
                F.linear_cross_entropy(  # its sum would be in bfloat16, into which most of what is added does not go
                    rows.to(dtype),
                    weight.to(dtype),
                    labels,
                    reduction="none",
                    ignore_index=self.ignore_index,
                    options=options,
                )
            )
            return (losses.float() if dtype in HALF_PRECISION else losses).sum()
        wanted = torch.is_grad_enabled()  # within forward it never is, and needs_input_grad does not look at it
        settings = (dtype, self.chunk_tokens, self.vocab_size, self.ignore_index, self._of_chunk, wanted)
        return _Chunked.apply(rows, weight, labels, settings)


class _Chunked(torch.autograd.Function):
    """Loss and gradients of :class:`LinearCrossEntropy`, all of them in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, settings: tuple[Any, ...]
    ) -> torch.Tensor:
        dtype, size, vocab, ignored, of_chunk, wanted = settings
        wants_hidden, wants_weight = (wanted and needs for needs in ctx.needs_input_grad[:2])
        total = torch.zeros((), device=hidden.device, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
        by_hidden = torch.empty_like(hidden) if wants_hidden else None
        by_weight = None
        cast = weight.to(dtype)
        for begin in range(0, len(hidden), size):
            rows = hidden[begin : begin + size].to(dtype)
            loss, by_logits = of_chunk(
                rows @ cast.t(), labels[begin : begin + size], vocab, ignored, wants_hidden or wants_weight
            )
            total += loss
            if by_hidden is not None:
                by_hidden[begin : begin + size] = by_logits @ cast
            if wants_weight:
                part = by_logits.t() @ rows
                by_weight = (
                    part.to(total.dtype) if by_weight is None else by_weight.add_(part)
                )  # many parts: not in half precision
        ctx.gradients = (by_hidden, None if by_weight is None else by_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *scales: torch.Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of LinearCrossEntropy can be taken once")
        scaled = [None if gradient is None else gradient.mul_(scales[0]) for gradient in ctx.gradients]
        ctx.gradients = None
        return (*scaled, None, None)


def loss_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, vocab: int | None, ignored: int, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy of ``logits (M, V)``, and its gradient by them in their own type; ``logits`` are used up.

    Columns from ``vocab`` on take no part.
    """
    wide = logits.float() if logits.dtype in HALF_PRECISION else logits
    if vocab is not None and vocab < wide.shape[-1]:
        wide[:, vocab:] = float("-inf")
    counts = labels != ignored
    chosen = torch.where(counts, labels, 0)[:, None]
    picked = wide.gather(1, chosen)
    normaliser = wide.logsumexp(-1, keepdim=True)
    loss = torch.where(counts[:, None], normaliser - picked, 0.0).sum()
    if not wants_gradient:
        return loss, logits
    nothing = torch.where(counts[:, None], normaliser, float("inf"))  # exp(x - inf) is 0: a row that does not count
    gradient = wide.sub_(nothing).exp_().to(logits.dtype)
    at_label = torch.where(
        counts[:, None], (picked - normaliser).exp() - 1.0, 0.0
    )  # before rounding: p is often near 1
    return loss, gradient.scatter_(1, chosen, at_label.to(logits.dtype))


def takes_linear_loss(model: nn.Module) -> bool:
    """Whether the forward of ``model`` can be given a :class:`LinearCrossEntropy`, in place of giving logits."""
    return "linear_loss" in inspect.signature(model.forward).parameters


def compute_loss(
    model: nn.Module, bare: nn.Module, loss_fn: Any, inputs: torch.Tensor, labels: torch.Tensor, **more: Any
) -> torch.Tensor:
    """Forward, and the sum of the losses; ``bare`` is the ``model`` out of its wrapper, ``more`` what else its forward takes."""
    if hasattr(loss_fn, "from_hidden") and takes_linear_loss(bare):
        return model(inputs, labels=labels, linear_loss=loss_fn, **more)
    return loss_fn(logits_of(model(inputs, **more)), labels)
