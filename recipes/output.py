"""Output to a terminal that lacks a character, or to a reader that has gone."""

from __future__ import annotations

import os
import sys

PIPE_CLOSED = 141
"""Exit code after the reader of our output has closed it, as ``| head`` does (128 plus SIGPIPE's number)."""


def tolerate_unreadable_output() -> None:
    """Print a question mark for a character that the terminal cannot show, and accept closed output streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
