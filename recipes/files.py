"""Write files atomically, lock them until the holder dies, and compute digests.

Everything that a run leaves behind goes through these few functions, so that a reader on another node never sees half
a file.
"""

from __future__ import annotations

import errno
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
    """Make the names in ``folder`` durable; without it a power failure can undo a rename."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason_not_writable(folder: Path) -> str:
    """Return why files cannot be created in ``folder``: its file system is read-only, or else its owner's name."""
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return "read-only file system"
    try:
        return f"owner: {folder.owner()}"
    except KeyError:  # a user ID without a name on this machine
        return f"owner: user {folder.stat().st_uid}"


@contextmanager
def atomic_file(path: Path, *, durable: bool = True, durable_name: bool = True) -> Iterator[Any]:
    """Yield a binary file handle whose content replaces ``path`` on a clean exit; on an error ``path`` is untouched.

    ``durable=False`` skips fsync, for heartbeats that are rewritten every second. ``durable_name=False`` skips only
    the folder's fsync, if a file that vouches for this one is written next to it and makes both names durable.
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
    """Replace the content of ``path`` with ``text`` (UTF-8), atomically."""
    with atomic_file(path, durable=durable) as handle:
        handle.write(text.encode())


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace the content of ``path`` with ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n", durable=durable)


def write_private(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file that only its owner can read, from the first byte on."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temp.unlink(missing_ok=True)
    handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)


def read_json(path: Path) -> Any | None:
    """Return the JSON in ``path``; None if there is no such file. Raises ValueError with the path for a damaged one."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def append_json_line(path: Path, value: Any) -> None:
    """Append ``value`` as one line, in a single write.

    If a kill or a full disk left half a line at the end, that line is ended first, so that it damages no other.
    Raises OSError, also if only a part of the line was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as handle:
        handle.seek(0, os.SEEK_END)
        if handle.tell():
            handle.seek(-1, os.SEEK_END)
            ends_mid_line = handle.read(1) != b"\n"
        else:
            ends_mid_line = False
        line = b"\n" * ends_mid_line + json.dumps(value).encode() + b"\n"
        if handle.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in the lines of ``path``; skip lines that a kill or a disk damaged."""
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
    """Return the JSON object in ``path``, or an empty one if it cannot be read: for readers that must continue."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file (about 1.8 GB/s a core; ``hashlib.file_digest`` came with Python 3.11)."""
    # Imported here because it loads OpenSSL, which `status` and `--help` do not need.
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Return eight hex digits that identify a JSON value, independent of the order of its keys."""
    import hashlib

    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Lock:
    """An exclusive ``flock`` on a file: the kernel releases it when its last holder dies, so it is never stale.

    The descriptor can be passed to children (``fileno()`` in ``pass_fds``): then the lock lasts until the last of
    them has ended.
    """

    def __init__(self, path: Path):
        self.path = path
        self._handle: int | None = None

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock; return False if another process holds it (only with ``wait=False``)."""
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
        """True if this object holds the lock."""
        return self._handle is not None

    def fileno(self) -> int:
        """Return the descriptor that holds the lock. Raises ValueError if the lock is not held."""
        if self._handle is None:
            raise ValueError(f"{self.path}: the lock is not held")
        return self._handle

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _try_lock(handle: int, seconds: float = 0.3) -> bool:
    """Try to lock for ``seconds``: :func:`is_locked` holds a shared lock for a moment."""
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
    """Return True if a live process holds the lock on ``path``; never creates the file."""
    try:
        # Read-only, so that other users can ask too.
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def lock_holders(lock: Path) -> list[int]:
    """Return the pids that hold a lock, as this machine's kernel reports them.

    Processes of other machines and of other users are not included. A pid written to a file would be less reliable:
    on another host, or after a while, it belongs to another process.
    """
    pids = set()
    with suppress(OSError):
        lock_stat = lock.stat()
        for info in glob.iglob("/proc/[0-9]*/fdinfo/*"):
            # The process may have ended meanwhile, or belong to another user.
            with suppress(OSError):
                if not _is_lock_on(Path(info).read_text(), lock_stat.st_ino):
                    continue
                if os.path.samestat(os.stat(info.replace("fdinfo", "fd")), lock_stat):
                    pids.add(int(info.split("/")[2]))
    return sorted(pids - {os.getpid()})


def _is_lock_on(fdinfo: str, inode: int) -> bool:
    """Return True if a descriptor holds an exclusive flock on this inode.

    Such a line reads ``lock: 1: FLOCK ADVISORY WRITE 77 08:01:5 0 EOF``.
    """
    locks = [line.split() for line in fdinfo.splitlines() if line.startswith("lock:")]
    return any(lock[2:5] == ["FLOCK", "ADVISORY", "WRITE"] and lock[6].endswith(f":{inode}") for lock in locks)


def signal_lock_holders(lock: Path, number: int) -> int:
    """Send a signal to the processes that hold a lock; return their number."""
    pids = lock_holders(lock)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(pids)
