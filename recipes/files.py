"""Files that appear whole or not at all, locks that die with their holder, and digests.

Everything a run leaves behind goes through these few functions, so that a
reader on another node never sees half a file.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable (a rename is lost on power failure without it)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path, *, durable: bool = True, durable_name: bool = True) -> Iterator[Any]:
    """A binary file handle whose content becomes ``path`` on a clean exit, and nothing otherwise.

    ``durable=False`` leaves out fsync, for heartbeats that are rewritten every second; ``durable_name=False`` that of
    the folder alone, where a file that vouches for this one is written next to it and makes both names durable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(temp, "wb") as handle:
            yield handle
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    if durable and durable_name:
        fsync_folder(path.parent)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace ``path`` by ``text`` (UTF-8), atomically."""
    with whole_file(path, durable=durable) as handle:
        handle.write(text.encode())


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace ``path`` by ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n", durable=durable)


def write_private(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file that nobody else can read, at no moment of its making."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temp.unlink(missing_ok=True)
    handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)


def read_json(path: Path) -> Any | None:
    """The JSON in ``path``; None where there is no such file. A damaged file raises ``ValueError`` naming it."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def append_json_line(path: Path, value: Any) -> None:
    """Add ``value`` as one line with a single write; a line that a kill tore is ended first, so that it tears no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as handle:
        handle.seek(0, os.SEEK_END)
        if handle.tell():
            handle.seek(-1, os.SEEK_END)
            torn = handle.read(1) != b"\n"
        else:
            torn = False
        handle.write(b"\n" * torn + json.dumps(value).encode() + b"\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects among the lines of ``path``; what a kill tore or a disk damaged is left out."""
    try:
        text = path.read_text(errors="replace")
    except (FileNotFoundError, IsADirectoryError):
        return []
    values = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            values.append(value)
    return values


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is none that can be read, for readers that must go on."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes (about 1.8 GB/s a core; ``hashlib.file_digest`` came with Python 3.11)."""
    import hashlib  # brings OpenSSL with it, which status and help do without

    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Eight hex digits that stand for a JSON value, whatever the order of its keys."""
    import hashlib

    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Lock:
    """An exclusive ``flock`` on a file: released by the kernel when its last holder dies, never stale.

    The descriptor can be passed to children (``fileno()`` in ``pass_fds``): the
    lock then lasts until the last of them is gone.
    """

    def __init__(self, path: Path):
        self.path = path
        self._handle: int | None = None

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock; False where another process has it (only with ``wait=False``)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        if wait:
            fcntl.flock(handle, fcntl.LOCK_EX)
        elif not _try_lock(handle):
            os.close(handle)
            return False
        self._handle = handle
        return True

    @property
    def held(self) -> bool:
        """Whether this object has it."""
        return self._handle is not None

    def fileno(self) -> int:
        """The descriptor that carries the lock."""
        if self._handle is None:
            raise ValueError(f"{self.path}: the lock is not held")
        return self._handle

    def release(self) -> None:
        """Give the lock back (a no-op when it is not held)."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _try_lock(handle: int, seconds: float = 0.3) -> bool:
    """Several tries: :func:`is_locked` holds a shared lock for the blink of an eye."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)


def is_locked(path: Path) -> bool:
    """Whether some live process holds the lock on ``path``; never creates the file."""
    try:
        handle = os.open(path, os.O_RDONLY)  # other users may look, too
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def holders(lock: Path) -> list[int]:
    """The processes that hold a lock, as the kernel of this machine tells; none of another machine's, nor of another user's.

    A pid that was written down says less: on another host, or after a while,
    it is some other process.
    """
    found = set()
    with suppress(OSError):
        wanted = lock.stat()
        for info in glob.iglob("/proc/[0-9]*/fdinfo/*"):
            with suppress(OSError):  # it has ended meanwhile, or is somebody else's
                if _is_lock_on(Path(info).read_text(), wanted.st_ino) and os.path.samestat(
                    os.stat(info.replace("fdinfo", "fd")), wanted
                ):
                    found.add(int(info.split("/")[2]))
    return sorted(found - {os.getpid()})


def _is_lock_on(fdinfo: str, inode: int) -> bool:
    """Whether a descriptor holds an exclusive flock on the file with this number: ``lock: 1: FLOCK ADVISORY WRITE 77 08:01:5 0 EOF``."""
    lines = [line.split() for line in fdinfo.splitlines() if line.startswith("lock:")]
    return any(words[2:5] == ["FLOCK", "ADVISORY", "WRITE"] and words[6].endswith(f":{inode}") for words in lines)


def signal_holders(lock: Path, number: int) -> int:
    """Send a signal to the processes that hold a lock, and to no other; how many there were."""
    found = holders(lock)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(found)
