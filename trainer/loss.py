"""Cross entropy as a sum; the training loop divides by the label count, because only it knows the global batch.

The logits are by far the largest tensor of a step: 6.6 GB in float32 for 32 windows of GPT-2.
:class:`LinearCrossEntropy` never holds them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from amlaunch.recipes.errors import BadInput
from amlaunch.trainer.models.base import logits_of, router_loss_weight
from amlaunch.trainer.performance.trace_regions import LOSS_REGION
from amlaunch.trainer.torch_features import has_linear_cross_entropy

IGNORE_INDEX = -100
"""Label of a position without a loss, everywhere in the trainer."""
HALF_PRECISION = (torch.bfloat16, torch.float16)
IMPLEMENTATIONS = ("chunked", "torch")


class MaskedCrossEntropy:
    """Sum of the cross entropies of all labels other than ``ignore_index``, in nats.

    ``vocab_size``: number of real tokens; the model's rows beyond it are padding and are excluded from the softmax.
    """

    def __init__(self, ignore_index: int = -100, fp32_upcast: bool = True, vocab_size: int | None = None):
        self.ignore_index = ignore_index
        self.fp32_upcast = fp32_upcast
        self.vocab_size = vocab_size

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Map ``logits (B, T, V)`` and ``labels (B, T)`` int64 to a scalar; half precision is computed in float32."""
        if self.fp32_upcast and logits.dtype in HALF_PRECISION:
            logits = logits.float()
        if self.vocab_size is not None and self.vocab_size < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= self.vocab_size
            logits = logits.masked_fill(padding, float("-inf"))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=self.ignore_index, reduction="sum")


class LinearCrossEntropy:
    """The same sum from the last hidden states and the head's weight, ``chunk_tokens`` rows of logits at a time.

    The gradients are computed with the loss, while a chunk's logits exist, so that no logits are computed twice. Logits
    have the compute dtype; softmax and sums are in float32 or better. ``implementation`` is ``chunked`` (ours, whose
    softmax is one fused kernel if the recipe compiles) or ``torch``
    (``torch.nn.functional.linear_cross_entropy`` of torch 2.13, which does not support padding). A model whose
    ``forward`` has no ``linear_loss`` argument returns logits instead.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        chunk_tokens: int = 8192,
        implementation: str = "chunked",
    ):
        if implementation not in IMPLEMENTATIONS:
            raise BadInput(
                f"loss_fn.implementation {implementation!r} is not supported; use one of: {', '.join(IMPLEMENTATIONS)}"
            )
        if implementation == "torch" and not has_linear_cross_entropy():
            raise BadInput(
                "loss_fn.implementation torch needs torch 2.13 or newer, "
                f"but this is torch {torch.__version__}; use chunked"
            )
        if implementation == "torch" and vocab_size is not None:
            raise BadInput(
                "loss_fn.vocab_size: torch's linear_cross_entropy does not support padding; use implementation: chunked"
            )
        if chunk_tokens < 1:
            raise BadInput(f"loss_fn.chunk_tokens {chunk_tokens} is too small; use at least 1")
        self.ignore_index = ignore_index
        self.vocab_size = vocab_size
        self.chunk_tokens = chunk_tokens
        self.implementation = implementation
        self._from_logits = MaskedCrossEntropy(ignore_index, vocab_size=vocab_size)
        self._chunk_loss: Callable[..., tuple[torch.Tensor, torch.Tensor]] = loss_and_gradient

    def compile(self) -> None:
        """Compile the softmax of a chunk; matrix products still use the library.

        The loop over chunks stays out of a model's graph, which would otherwise be traced chunk by chunk.
        """
        self.from_hidden = torch.compiler.disable(self.from_hidden)  # type: ignore[method-assign]
        self._chunk_loss = torch.compile(loss_and_gradient, dynamic=False)
        self._from_logits = torch.compile(self._from_logits, dynamic=False)  # type: ignore[assignment]

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss of a model that returns logits, as :class:`MaskedCrossEntropy` does."""
        return self._from_logits(logits, labels)

    def from_hidden(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Map ``hidden (B, T, C)``, ``weight (V, C)`` and ``labels (B, T)`` int64 to a scalar in float32 or better."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.profiler.record_function(LOSS_REGION):
            return self._loss_of_rows(hidden.flatten(0, -2), weight, labels.flatten(), dtype)

    def _loss_of_rows(
        self, rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        if self.implementation == "torch":
            options = torch.nn.LinearCrossEntropyOptions()
            # Its own sum would be in bfloat16 and lose most of the summands.
            losses = F.linear_cross_entropy(
                rows.to(dtype),
                weight.to(dtype),
                labels,
                reduction="none",
                ignore_index=self.ignore_index,
                options=options,
            )
            return (losses.float() if dtype in HALF_PRECISION else losses).sum()

        # Gradients are never enabled inside forward, and needs_input_grad ignores whether they are enabled here.
        grad_enabled = torch.is_grad_enabled()
        settings = (dtype, self.chunk_tokens, self.vocab_size, self.ignore_index, self._chunk_loss, grad_enabled)
        return _ChunkedLoss.apply(rows, weight, labels, settings)


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients of :class:`LinearCrossEntropy`, all computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, settings: tuple[Any, ...]
    ) -> torch.Tensor:
        dtype, chunk_tokens, vocab, ignore_index, chunk_loss, grad_enabled = settings
        needs_hidden_grad, needs_weight_grad = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        needs_grad = needs_hidden_grad or needs_weight_grad
        total = torch.zeros((), device=hidden.device, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
        hidden_grad = torch.empty_like(hidden) if needs_hidden_grad else None
        weight_grad = None
        cast_weight = weight.to(dtype)

        for begin in range(0, len(hidden), chunk_tokens):
            chunk = slice(begin, begin + chunk_tokens)
            rows = hidden[chunk].to(dtype)
            loss, logits_grad = chunk_loss(rows @ cast_weight.t(), labels[chunk], vocab, ignore_index, needs_grad)
            total += loss
            if hidden_grad is not None:
                hidden_grad[chunk] = logits_grad @ cast_weight
            if needs_weight_grad:
                # There can be many chunks, so their sum is not in half precision.
                chunk_grad = logits_grad.t() @ rows
                weight_grad = chunk_grad.to(total.dtype) if weight_grad is None else weight_grad.add_(chunk_grad)

        ctx.gradients = (hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *scales: torch.Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("LinearCrossEntropy: backward can run only once")
        scaled = [None if gradient is None else gradient.mul_(scales[0]) for gradient in ctx.gradients]
        ctx.gradients = None
        return (*scaled, None, None)


def loss_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, vocab: int | None, ignore_index: int, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross entropy of ``logits (M, V)`` and its gradient in their dtype; overwrites ``logits``.

    Columns from ``vocab`` on are excluded from the softmax.
    """
    wide = logits.float() if logits.dtype in HALF_PRECISION else logits
    if vocab is not None and vocab < wide.shape[-1]:
        wide[:, vocab:] = float("-inf")
    counted = (labels != ignore_index)[:, None]
    targets = torch.where(counted, labels[:, None], 0)
    target_logits = wide.gather(1, targets)
    normaliser = wide.logsumexp(-1, keepdim=True)
    loss = torch.where(counted, normaliser - target_logits, 0.0).sum()
    if not needs_gradient:
        return loss, logits

    # exp(x - inf) is 0: rows without a label get no gradient.
    gradient = wide.sub_(torch.where(counted, normaliser, float("inf"))).exp_().to(logits.dtype)
    # Computed before rounding, because the probability of the target is often near 1.
    target_gradient = torch.where(counted, (target_logits - normaliser).exp() - 1.0, 0.0)
    return loss, gradient.scatter_(1, targets, target_gradient.to(logits.dtype))


def takes_linear_loss(model: nn.Module) -> bool:
    """Return True if the forward of ``model`` accepts a :class:`LinearCrossEntropy` as ``linear_loss``."""
    return "linear_loss" in inspect.signature(model.forward).parameters


def compute_loss(
    model: nn.Module, unwrapped: nn.Module, loss_fn: Any, inputs: torch.Tensor, labels: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """Run the forward pass and return the sum of the losses.

    ``unwrapped`` is ``model`` without DDP's wrapper; ``kwargs`` are further arguments of its forward. In training, a
    mixture of experts of transformers adds the loss that balances its router.
    """
    if hasattr(loss_fn, "from_hidden") and takes_linear_loss(unwrapped):
        return model(inputs, labels=labels, linear_loss=loss_fn, **kwargs)
    output = model(inputs, **kwargs)
    loss = loss_fn(logits_of(output), labels)
    weight = router_loss_weight(unwrapped)
    if not weight or not model.training:
        return loss
    # transformers adds it to the mean over the labels, and this is their sum.
    return loss + weight * (labels != IGNORE_INDEX).sum() * output.aux_loss
