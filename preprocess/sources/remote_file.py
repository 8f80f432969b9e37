"""Files behind HTTP, read as if they were local: any range, again and again until it comes.

Servers refuse for a while (429), fail (5xx), go silent, or close a connection
in the middle. Each is waited for, longer every time, as long as the server asks
(``Retry-After``), and reading goes on at the byte where it stopped. Only many
failures in a row without a single byte are an error.
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

from amlaunch.preprocess.errors import Failure
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import Lock, fsync_folder

TRIES = 12
"""In a row without a byte; with the waits below that is about eight minutes."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 90.0
TIMEOUT_SECONDS = 60.0
"""Of silence."""
BUFFER_BYTES = 1 << 20
GO_AGAIN = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 524, 529)


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address, with its size known."""

    url: str
    name: str
    size: int
    kept: Path | None = None
    """Where it is downloaded to before it is read; None: it is read from where it lies."""
    token: str | None = field(default=None, repr=False)

    @property
    def place(self) -> str:
        """Its address."""
        return self.url

    def open(self) -> IO[bytes]:
        """Its bytes, seekable. Raises BadInput where there is no such file or no right to it; Failure when reading gives up."""
        if self.kept is not None:
            return open(download(self), "rb")
        return io.BufferedReader(RangeReader(self), BUFFER_BYTES)


class RangeReader(io.RawIOBase):
    """The bytes of a remote file; a request goes on until somebody seeks."""

    def __init__(self, file: RemoteFile, wait: Callable[[float], None] = time.sleep):
        self.file = file
        self._wait = wait
        self._position = 0
        self._response: HTTPResponse | None = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte; the next read asks for it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.file.size}[whence]
        if base + offset != self._position:
            self._hang_up()
        self._position = base + offset
        return self._position

    def close(self) -> None:
        """End the request."""
        self._hang_up()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fill the front of ``buffer``, with at least a byte unless the file ends here."""
        if self._position >= self.file.size:
            return 0
        view = memoryview(buffer)[: self.file.size - self._position]
        for attempt in range(TRIES):
            try:
                if self._response is None:
                    self._response = self._request()
                got = self._response.readinto(view)
                if not got:
                    raise ConnectionError(f"the connection ended at byte {self._position:,} of {self.file.size:,}")
                self._position += got
                return got
            except (OSError, HTTPException) as error:  # URLError, timeouts and ssl errors are OSErrors
                self._hang_up()
                asked = self._judge(error)
                if attempt == TRIES - 1:
                    raise Failure(f"{self.file.url}: given up after {TRIES} tries ({error})") from None
                self._wait(asked if asked is not None else backoff(attempt))
        raise AssertionError("unreachable")

    def _request(self) -> HTTPResponse:
        request = urllib.request.Request(
            self.file.url, headers={"Range": f"bytes={self._position}-", "Accept-Encoding": "identity"}
        )
        if self.file.token:  # not for the store that the hub redirects to
            request.add_unredirected_header("Authorization", f"Bearer {self.file.token}")
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        if response.status == 200 and self._position:  # it ignores ranges: what we have is read again
            left = self._position
            while left and (data := response.read(min(left, BUFFER_BYTES))):
                left -= len(data)
        return response

    def _judge(self, error: Exception) -> float | None:
        """Seconds that the server asks to wait, if it says so. Raises BadInput or Failure where waiting is no use."""
        if not isinstance(error, urllib.error.HTTPError):
            return None
        with error:
            if error.code in (401, 403, 404, 410):
                raise BadInput(
                    f"{self.file.url}: {error.code} {error.reason}: there is no such file, or no right to read it (a gated "
                    f"dataset wants its terms accepted, and HF_TOKEN exported)"
                )
            if error.code not in GO_AGAIN:
                raise Failure(f"{self.file.url}: {error.code} {error.reason}")
            asked = error.headers.get("Retry-After", "")
        return min(float(asked), 10 * LONGEST_WAIT) if asked.strip().isdigit() else None

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def backoff(attempt: int) -> float:
    """Seconds before the next try: doubling, and scattered, so that many workers do not come back at once."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt) * random.uniform(0.5, 1.0)


def download(file: RemoteFile) -> Path:
    """The whole file on this machine, downloaded where it is not; what a killed download left is gone on with."""
    assert file.kept is not None
    if _is_whole(file):
        return file.kept
    lock = Lock(file.kept.with_name(file.kept.name + ".lock"))
    lock.acquire(wait=True)
    try:
        if not _is_whole(file):
            _fetch(file, file.kept.with_name(file.kept.name + ".incomplete"), file.kept)
        return file.kept
    finally:
        lock.release()


def _is_whole(file: RemoteFile) -> bool:
    return file.kept is not None and file.kept.is_file() and file.kept.stat().st_size == file.size


def _fetch(file: RemoteFile, half: Path, whole: Path) -> None:
    with open(half, "ab") as handle, RangeReader(file) as reader:
        reader.seek(min(handle.tell(), file.size))
        while data := reader.read(BUFFER_BYTES):
            handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(half, whole)
    fsync_folder(whole.parent)
