"""What is known of an image without starting it: what ``amlaunch image check`` wrote down, else a table of NGC's PyTorch images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Version = tuple[int, int]

NGC_DATE = "2026-11"
NGC = {
    (23, 5): ((3, 10), "12.1"), (23, 8): ((3, 10), "12.2"), (23, 12): ((3, 10), "12.3"), (24, 4): ((3, 10), "12.4"),
    (24, 6): ((3, 10), "12.5"), (24, 9): ((3, 10), "12.6"), (24, 11): ((3, 12), "12.6"), (25, 1): ((3, 12), "12.8"),
    (25, 5): ((3, 12), "12.9"), (25, 8): ((3, 12), "13.0"), (25, 12): ((3, 12), "13.1"), (26, 3): ((3, 12), "13.2"),
    (26, 6): ((3, 12), "13.3"), (26, 9): ((3, 12), "13.4"),
}  # fmt: skip
"""Releases of ``nvcr.io/nvidia/pytorch`` from which on Python and CUDA are these: NVIDIA's release notes, and the names
of the images that lablup/backend.ai-kernels builds on each release (``vendor/ngc-pytorch``), as of NGC_DATE."""
NGC_HOLDS = frozenset({"torch", "numpy", "safetensors", "tensorboard"})
NGC_LACKS = frozenset({"tiktoken", "datasets", "transformers", "tokenizers", "wandb", "gigatoken", "amlaunch"})
"""What Dockerfiles that build on these images install themselves."""
DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""Driver that each major version of CUDA needs at least; within one, newer minor versions run on it, too
(https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html)."""


@dataclass(frozen=True)
class ImageFacts:
    """What an image holds, as far as it is known."""

    image: str
    """As the user writes it."""
    source: str = ""
    """Who says so, and since when."""
    python: Version | None = None
    cuda: str | None = None
    holds: Mapping[str, str] = field(default_factory=dict)
    """Distributions that it has, with their versions where they are known."""
    lacks: frozenset[str] = frozenset()
    complete: bool = False
    """What is not in ``holds`` is not there."""

    def has(self, name: str) -> bool | None:
        """Whether a distribution (its canonical name) is in the image; None: nobody knows."""
        if name in self.holds:
            return True
        return False if self.complete or name in self.lacks else None

    def version(self, name: str) -> str:
        """Its version; empty: unknown."""
        return self.holds.get(name, "")


def of_table(image: str) -> ImageFacts:
    """What the name alone tells: of NGC's PyTorch images something, of others nothing."""
    match = re.search(r"nvcr\.io[/#]nvidia/pytorch:(\d\d)\.(\d\d)-py3(-igpu)?(@|$)", image)
    if not match:
        return ImageFacts(image)
    release = int(match[1]), int(match[2])
    before = [since for since in NGC if since <= release]
    newer = release > max(NGC)
    python, cuda = NGC[max(before)] if before and not newer else (None, None)
    return ImageFacts(
        image, f"NGC's PyTorch images, as of {NGC_DATE}", python, cuda, dict.fromkeys(NGC_HOLDS, ""), NGC_LACKS
    )


def of_check(image: str, found: Mapping[str, object]) -> ImageFacts:
    """What a check wrote down; ``said`` is what a user vouched for without one."""
    said = found.get("said")
    holds = {str(name): "" for name in said} if isinstance(said, list) else {}
    packages = found.get("packages")
    if not isinstance(packages, Mapping):
        table = of_table(image)
        return ImageFacts(
            image,
            table.source or "as you said",
            table.python,
            table.cuda,
            {**table.holds, **holds},
            table.lacks - set(holds),
        )
    holds |= {str(name): str(version) for name, version in packages.items()}
    numbers = re.match(r"(\d+)\.(\d+)", str(found.get("python", "")))
    torch = found.get("torch")
    cuda = torch.get("cuda") if isinstance(torch, Mapping) else None
    python = (int(numbers[1]), int(numbers[2])) if numbers else None
    return ImageFacts(
        image, f"checked {found.get('date', '')}".strip(), python, str(cuda) if cuda else None, holds, complete=True
    )
