"""Text sampling from a model."""

from __future__ import annotations

import torch

from amlaunch.trainer.models.base import logits_of


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompt: list[int],
    count: int,
    *,
    context: int,
    vocab_size: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stop_token: int | None = None,
) -> list[int]:
    """Return up to ``count`` token ids after ``prompt``, ending before ``stop_token``.

    The model sees the last ``context`` tokens. Ids from ``vocab_size`` on (padding) are never drawn. ``temperature`` 0
    takes the most likely token. Each token needs a forward pass over the context: made for samples, not for serving.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(count):
        window = torch.tensor([ids[-context:]])
        logits = logits_of(model(window))[0, -1, :vocab_size].double()
        token = draw(logits, temperature, top_k, generator)
        if token == stop_token:
            break
        ids.append(token)
    return ids[len(prompt) :]


def draw(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw a token id from the ``top_k`` most likely of ``logits (V,)``."""
    if temperature == 0:
        return int(logits.argmax())
    top_logits, ids = logits.topk(min(top_k, len(logits)))
    probabilities = torch.softmax(top_logits / temperature, dim=-1)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return int(ids[choice])
