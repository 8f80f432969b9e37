"""Files behind HTTP, read as if they were local: any byte range, retried until it arrives.

Servers reject requests for a while (429), fail (5xx), stop sending, or close a connection in the middle. After each,
the reader waits, longer every time or as long as the server asks (``Retry-After``), and resumes at the byte where it
stopped. Only many failures in a row without a single byte are an error.
"""

from __future__ import annotations

import io
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any

from amlaunch.preprocess.errors import ExternalFailure
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import Lock, fsync_folder

MAX_ATTEMPTS = 12
"""In a row without a byte; with the waits below that is about eight minutes."""
FIRST_WAIT_SECONDS = 0.5
MAX_WAIT_SECONDS = 90.0
MAX_RETRY_AFTER_SECONDS = 900.0
"""Longest wait that a server may ask for."""
TIMEOUT_SECONDS = 60.0
"""Without a byte from the server."""
BUFFER_BYTES = 1 << 20
NO_ACCESS_STATUS = (401, 403, 404, 410)
RETRYABLE_STATUS = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 524, 529)


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL, with its size known."""

    url: str
    name: str
    size: int
    cache_path: Path | None = None
    """Local path that it is downloaded to before it is read; None: read it by byte range."""
    token: str | None = field(default=None, repr=False)

    @property
    def location(self) -> str:
        """Its URL."""
        return self.url

    def open(self) -> IO[bytes]:
        """Open it as a seekable binary file.

        Raises BadInput if there is no such file or no access to it, and ExternalFailure if reading keeps failing.
        """
        if self.cache_path is not None:
            return open(download(self, self.cache_path), "rb")
        return io.BufferedReader(RangeReader(self), BUFFER_BYTES)


class RangeReader(io.RawIOBase):
    """The bytes of a remote file; one request serves all reads until a seek."""

    def __init__(self, file: RemoteFile, wait: Callable[[float], None] = time.sleep):
        self.file = file
        self._wait = wait
        self._position = 0
        self._response: HTTPResponse | None = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte; the next read requests it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.file.size}[whence]
        if base + offset != self._position:
            self._close_response()
        self._position = base + offset
        return self._position

    def close(self) -> None:
        """End the request."""
        self._close_response()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fill the front of ``buffer`` with at least one byte, unless the file ends here; return the byte count."""
        if self._position >= self.file.size:
            return 0
        view = memoryview(buffer)[: self.file.size - self._position]
        for attempt in range(MAX_ATTEMPTS):
            try:
                return self._read_once(view)
            except (OSError, HTTPException) as error:
                # URLError, timeouts and ssl errors are OSErrors.
                self._close_response()
                retry_after = self._retry_after(error)
                if attempt == MAX_ATTEMPTS - 1:
                    raise ExternalFailure(
                        f"{self.file.url}: {MAX_ATTEMPTS} requests in a row failed ({error})"
                    ) from None
                self._wait(backoff(attempt) if retry_after is None else retry_after)
        raise AssertionError("unreachable")

    def _read_once(self, view: memoryview) -> int:
        if self._response is None:
            self._response = self._request()
        count = self._response.readinto(view)
        if not count:
            raise ConnectionError(f"the connection ended at byte {self._position:,} of {self.file.size:,}")
        self._position += count
        return count

    def _request(self) -> HTTPResponse:
        request = urllib.request.Request(
            self.file.url, headers={"Range": f"bytes={self._position}-", "Accept-Encoding": "identity"}
        )
        if self.file.token:
            # Unredirected: the token must not reach the store that the hub redirects to.
            request.add_unredirected_header("Authorization", f"Bearer {self.file.token}")
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)

        # A server that ignores ranges sends the file from its start: discard what we already have.
        if response.status == 200 and self._position:
            remaining = self._position
            while remaining and (data := response.read(min(remaining, BUFFER_BYTES))):
                remaining -= len(data)
        return response

    def _retry_after(self, error: Exception) -> float | None:
        """Return the seconds that the server asks to wait, None if it does not say.

        Raises BadInput or ExternalFailure if a retry cannot help.
        """
        if not isinstance(error, urllib.error.HTTPError):
            return None
        with error:
            if error.code in NO_ACCESS_STATUS:
                raise BadInput(
                    f"{self.file.url}: {error.code} {error.reason}: the file does not exist, or you have no access to "
                    f"it. For a gated dataset, accept its terms and export HF_TOKEN"
                )
            if error.code not in RETRYABLE_STATUS:
                raise ExternalFailure(f"{self.file.url}: {error.code} {error.reason}")
            retry_after = error.headers.get("Retry-After", "")
        return min(float(retry_after), MAX_RETRY_AFTER_SECONDS) if retry_after.strip().isdigit() else None

    def _close_response(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def backoff(attempt: int) -> float:
    """Return the seconds to wait before the next attempt.

    They double each time, with jitter, so that many workers do not retry at the same moment.
    """
    return min(MAX_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0**attempt) * random.uniform(0.5, 1.0)


def download(file: RemoteFile, path: Path) -> Path:
    """Download the file to ``path`` unless it is there; resume a partial download. Return ``path``."""
    if _is_downloaded(file, path):
        return path
    lock = Lock(path.with_name(path.name + ".lock"))
    lock.acquire(wait=True)
    try:
        if not _is_downloaded(file, path):
            _download(file, path)
        return path
    finally:
        lock.release()


def _is_downloaded(file: RemoteFile, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _download(file: RemoteFile, path: Path) -> None:
    partial = path.with_name(path.name + ".incomplete")
    with open(partial, "ab") as handle, RangeReader(file) as reader:
        reader.seek(min(handle.tell(), file.size))
        while data := reader.read(BUFFER_BYTES):
            handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)
    fsync_folder(path.parent)
