"""The version of amlaunch, readable where the distribution is not installed (a mounted code snapshot), and of torch."""

from __future__ import annotations

import re

VERSION = "0.1.0"
OLDEST_TORCH, NEWEST_TORCH = (2, 8), (2, 15)
"""Ends of the range of torch that amlaunch is tested with (``make test-torch-range``)."""


def torch_release(version: str) -> tuple[int, int] | None:
    """Return ``(2, 13)`` for ``2.13.0a0+8145d630e8.nv26.06``; None if ``version`` does not begin with two numbers."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def is_torch_too_old(version: str) -> bool:
    """Return True if a torch is older than amlaunch supports; False if its version is unknown."""
    release = torch_release(version)
    return release is not None and release < OLDEST_TORCH
