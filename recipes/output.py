"""Words and streams of our output: counts with their noun, and terminals that lack a character."""

from __future__ import annotations

import os
import sys

PIPE_CLOSED = 141
"""Exit code after the reader of our output has closed it, as ``| head`` does (128 plus SIGPIPE's number)."""


def counted(number: int, noun: str) -> str:
    """Return a count with its noun: ``1 shard``, ``2 shards``, ``1,024 shards``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def tolerate_unreadable_output() -> None:
    """Print a question mark for a character that the terminal cannot show, and accept closed output streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
