"""What a recipe's ``container`` section asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Image:
    """An image, and what goes into the container beside it."""

    name: str | None = None
    mounts: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str | None = None
