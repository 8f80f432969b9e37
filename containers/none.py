"""No container: the command as it stands, in the environment that submitted it."""

from __future__ import annotations

from collections.abc import Sequence

from containers.image import Image


def launch(image: Image, command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """``(argv, extra environment)``; of the image's settings only ``env`` means something here."""
    return list(command), dict(image.env)
