"""What is printed when nobody can read it any more, or not all of it."""

from __future__ import annotations

import os
import sys

PIPE_CLOSED = 141
"""Whoever read our output has gone, as ``| head`` does (128 and SIGPIPE's number, as a shell says it)."""


def forgive_output() -> None:
    """A terminal that cannot show a character gets a question mark, and closed output is no error of ours."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
