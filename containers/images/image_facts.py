"""Facts about an image that is not started: the record of ``amlaunch image check``, else a table of NGC's images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Version = tuple[int, int]

NGC_TABLE_DATE = "2026-12"
NGC_RELEASES = {
    (23, 5): ((3, 10), "12.1"), (23, 8): ((3, 10), "12.2"), (23, 12): ((3, 10), "12.3"), (24, 4): ((3, 10), "12.4"),
    (24, 6): ((3, 10), "12.5"), (24, 9): ((3, 10), "12.6"), (24, 11): ((3, 12), "12.6"), (25, 1): ((3, 12), "12.8"),
    (25, 5): ((3, 12), "12.9"), (25, 8): ((3, 12), "13.0"), (25, 12): ((3, 12), "13.1"), (26, 3): ((3, 12), "13.2"),
    (26, 6): ((3, 12), "13.3"), (26, 8): ((3, 12), "13.4"),
}  # fmt: skip
"""Python and CUDA of ``nvcr.io/nvidia/pytorch`` from each release on.

Source: NVIDIA's release notes, and the names of the images that lablup/backend.ai-kernels builds on each release
(``vendor/ngc-pytorch``), as of NGC_TABLE_DATE.
"""
NGC_TORCH = {
    (24, 12): "2.6.0a0+df5bbc09d1", (25, 2): "2.7.0a0+ecf3bae40a", (25, 4): "2.7.0a0+79aa17489c",
    (25, 5): "2.8.0a0+5228986c39", (25, 6): "2.8.0a0+5228986c39", (25, 8): "2.8.0a0+34c6371d24",
    (25, 9): "2.9.0a0+50eac811a6", (25, 10): "2.9.0a0+145a3a7bda", (25, 11): "2.10.0a0+b558c986e8",
    (25, 12): "2.10.0a0+b4e4ee81d3", (26, 1): "2.10.0a0+a36e1d39eb", (26, 2): "2.11.0a0+eb65b36914",
    (26, 3): "2.11.0a0+a6c236b9fd", (26, 4): "2.12.0a0+0291f960b6", (26, 5): "2.12.0a0+5aff3928d8",
    (26, 6): "2.13.0a0+8145d630e8", (26, 7): "2.13.0a0+9186a08b2c", (26, 8): "2.14.0a0+4fdf77b940",
    (26, 9): "2.14.0a0+b2c75dd062",
}  # fmt: skip
"""Torch of each release of ``nvcr.io/nvidia/pytorch``, as ``torch.__version__`` reports it without ``.nvYY.MM``.

Source: NVIDIA's release notes (25.12) and version reports in public repositories, looked up on 2026-12-01. Releases
that are not listed are unknown, except that those before 24.12 have an older torch than 24.12.
"""
NGC_PACKAGES = frozenset({"torch", "numpy", "safetensors", "tensorboard"})
NGC_MISSING_PACKAGES = frozenset(
    {"tiktoken", "datasets", "transformers", "tokenizers", "wandb", "gigatoken", "amlaunch"}
)
"""Packages that Dockerfiles install on top of these images."""
MIN_DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""Oldest driver for each major version of CUDA; it also runs that version's newer minor versions
(https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html)."""


@dataclass(frozen=True)
class ImageFacts:
    """Known contents of an image."""

    image: str
    """As the user writes it."""
    source: str = ""
    """Where the facts come from, and from when; empty if there are none."""
    python: Version | None = None
    cuda: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    """Distributions in the image with their versions; the version is empty if unknown."""
    missing: frozenset[str] = frozenset()
    """Distributions that are known not to be in the image."""
    complete: bool = False
    """True if ``packages`` lists all distributions."""

    def has(self, name: str) -> bool | None:
        """Return whether the image has a distribution, by its canonical name; None if unknown."""
        if name in self.packages:
            return True
        return False if self.complete or name in self.missing else None

    def version(self, name: str) -> str:
        """Return the version of a distribution; empty if unknown."""
        return self.packages.get(name, "")


def facts_from_name(image: str) -> ImageFacts:
    """Return the facts that an image's name implies; empty except for NGC's PyTorch images."""
    match = re.search(r"nvcr\.io[/#]nvidia/pytorch:(\d\d)\.(\d\d)-py3(-igpu)?(@|$)", image)
    if not match:
        return ImageFacts(image)
    release = int(match[1]), int(match[2])
    earlier = [start for start in NGC_RELEASES if start <= release]
    is_newer = release > max(NGC_RELEASES)
    python, cuda = NGC_RELEASES[max(earlier)] if earlier and not is_newer else (None, None)
    source = f"NGC's PyTorch images, as of {NGC_TABLE_DATE}"
    packages = {**dict.fromkeys(NGC_PACKAGES, ""), "torch": _ngc_torch(release)}
    return ImageFacts(image, source, python, cuda, packages, NGC_MISSING_PACKAGES)


def _ngc_torch(release: Version) -> str:
    """Return the torch of an NGC release; a version before 2.6 if it is older than the table, and empty if unknown."""
    return "2.5" if release < min(NGC_TORCH) else NGC_TORCH.get(release, "")


def facts_from_check(image: str, record: Mapping[str, object]) -> ImageFacts:
    """Return the facts in the record of a check; its ``said`` lists packages that the user vouched for."""
    vouched = record.get("said")
    packages = {str(name): "" for name in vouched} if isinstance(vouched, list) else {}
    checked = record.get("packages")
    if not isinstance(checked, Mapping):
        table = facts_from_name(image)
        return ImageFacts(
            image,
            table.source or "recorded with --has",
            table.python,
            table.cuda,
            {**table.packages, **packages},
            table.missing - set(packages),
        )

    packages |= {str(name): str(version) for name, version in checked.items()}
    numbers = re.match(r"(\d+)\.(\d+)", str(record.get("python", "")))
    python = (int(numbers[1]), int(numbers[2])) if numbers else None
    torch = record.get("torch")
    cuda = torch.get("cuda") if isinstance(torch, Mapping) else None
    source = f"checked {record.get('date', '')}".strip()
    return ImageFacts(image, source, python, str(cuda) if cuda else None, packages, complete=True)
