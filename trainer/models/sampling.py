"""Text that a model writes."""

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
    """Up to ``count`` token ids after ``prompt``, ending before ``stop_token``.

    The model sees the last ``context`` tokens; ids from ``vocab_size`` on
    (padding) are never drawn. ``temperature`` 0 takes the likeliest. The whole
    window goes through the model for each token: a sample, not a server.
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
    """A token id, drawn from the ``top_k`` likeliest of ``logits (V,)``."""
    if temperature == 0:
        return int(logits.argmax())
    best, ids = logits.topk(min(top_k, len(logits)))
    chosen = torch.multinomial(torch.softmax(best / temperature, dim=-1), 1, generator=generator)
    return int(ids[chosen])
