"""Work done ahead of the loop, in threads, handed over in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

POLL_SECONDS = 0.2
"""Between two questions whether a batch that does not come is still wanted."""
T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls ``make(item)`` for each item in a thread, ``depth`` results ahead; an error comes out where it is used."""

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
        except BaseException as error:  # handed over to the loop, which raises it
            self._put((None, error))

    def _put(self, value: tuple[T | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next(self, given_up: Callable[[], bool] = lambda: False) -> T | None:
        """The next result; raises what ``make`` raised. None where ``given_up`` says so while it is waited for."""
        while True:
            try:
                value, error = self._queue.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if given_up():
                    return None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """End the thread; one that is stuck in a read is left behind, for the process ends without it."""
        self._closed.set()
        self._thread.join(timeout=1.0)


class PrefetcherPool(Generic[T]):
    """``workers`` prefetchers, each with its turn: thread w makes the items w, w + workers, ...; without any, the caller makes them."""

    def __init__(self, make: Callable[[int], T], items: range, workers: int, depth: int):
        self._make = make
        self._items = iter(items)
        ahead = -(-depth // max(workers, 1))
        self._workers = [Prefetcher(make, items[w::workers], ahead) for w in range(workers)]
        self._turn = 0

    def next(self, given_up: Callable[[], bool] = lambda: False) -> T | None:
        """As of :class:`Prefetcher`, of all items in order."""
        if not self._workers:
            return self._make(next(self._items))
        found = self._workers[self._turn].next(given_up)
        self._turn = (self._turn + (found is not None)) % len(self._workers)
        return found

    def close(self) -> None:
        """End all threads."""
        for worker in self._workers:
            worker.close()
