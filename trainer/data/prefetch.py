"""Results computed ahead of the training loop, in threads, and returned in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

POLL_SECONDS = 0.2
"""Seconds between two checks if a result that does not arrive is still needed."""
T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls ``make(item)`` for each item in a thread, ``depth`` results ahead; :meth:`next` raises its errors."""

    def __init__(self, make: Callable[[int], T], items: range, depth: int):
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, items), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[int], T], items: range) -> None:
        try:
            for item in items:
                if not self._put((make(item), None)):
                    return
        except BaseException as error:
            # next() raises it in the training loop.
            self._put((None, error))

    def _put(self, value: tuple[T | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next(self, cancelled: Callable[[], bool] = lambda: False) -> T | None:
        """Return the next result, or raise what ``make`` raised; None if ``cancelled()`` during the wait."""
        while True:
            try:
                value, error = self._queue.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if cancelled():
                    return None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """Stop the thread; one that is stuck in a read is abandoned, because the process can end without it."""
        self._closed.set()
        self._thread.join(timeout=1.0)


class PrefetcherPool(Generic[T]):
    """A pool of ``workers`` prefetchers that take turns: worker w makes the items w, w + workers, ...

    Without workers the caller makes each item.
    """

    def __init__(self, make: Callable[[int], T], items: range, workers: int, depth: int):
        self._make = make
        self._items = iter(items)
        depth_per_worker = -(-depth // max(workers, 1))
        self._workers = [Prefetcher(make, items[w::workers], depth_per_worker) for w in range(workers)]
        self._turn = 0

    def next(self, cancelled: Callable[[], bool] = lambda: False) -> T | None:
        """Return the next result, in the order of the items, as :meth:`Prefetcher.next` does."""
        if not self._workers:
            return self._make(next(self._items))
        result = self._workers[self._turn].next(cancelled)
        if result is not None:
            self._turn = (self._turn + 1) % len(self._workers)
        return result

    def close(self) -> None:
        """Stop all threads."""
        for worker in self._workers:
            worker.close()
