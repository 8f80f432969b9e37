"""Output of a rank to its log, which a full disk must not end."""

from __future__ import annotations

import errno
import io
import sys
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a write for which the disk, a quota or a limit has no space."""


class _LossyFile(io.FileIO):
    """A file whose output is dropped while the disk is full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            return memoryview(data).nbytes


def drop_output_to_full_disk() -> None:
    """Make this process's stdout and stderr drop what a full disk cannot take, instead of raising OSError."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.flush()
        raw = _LossyFile(stream.fileno(), "w", closefd=False)
        lossy = io.TextIOWrapper(
            io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=stream.line_buffering
        )
        setattr(sys, name, lossy)
