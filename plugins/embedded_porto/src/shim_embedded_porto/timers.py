"""Things to do later, and things to do elsewhere: one thread that waits, and a few that work."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

logger = logging.getLogger("shim.embedded_porto.timers")


class Timers:
    """Runs callables after a delay, in the order they are due."""

    def __init__(self, workers: int = 8) -> None:
        self._condition = threading.Condition()
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._stopped = False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="event")
        self._thread = threading.Thread(target=self._run, name="timers", daemon=True)
        self._thread.start()

    def later(self, delay_s: float, action: Callable[[], object]) -> None:
        with self._condition:
            heapq.heappush(self._queue, (time.monotonic() + delay_s, next(self._numbers), action))
            self._condition.notify()

    def soon(self, action: Callable[[], object]) -> None:
        """At once, in another thread."""
        try:
            self._pool.submit(_guarded, action)
        except RuntimeError:
            pass  # shutting down

    def stop(self) -> None:
        """Forget what is not yet due, finish what is."""
        with self._condition:
            self._stopped = True
            self._condition.notify()
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._stopped and (not self._queue or self._queue[0][0] > time.monotonic()):
                    self._condition.wait(self._queue[0][0] - time.monotonic() if self._queue else None)
                if self._stopped:
                    return
                _, _, action = heapq.heappop(self._queue)
            self.soon(action)


def _guarded(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception:
        logger.exception("an event failed")
