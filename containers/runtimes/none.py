"""No container: the command as it stands, in the environment that submitted it."""

from __future__ import annotations

from collections.abc import Sequence

from amlaunch.containers.runtimes.launch import Image, Launch


def launch(image: Image, command: Sequence[str]) -> Launch:
    """Of the image's settings only ``env`` means something here."""
    return Launch(tuple(command), dict(image.env))
