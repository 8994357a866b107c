"""The threads of the streaming server: started by name, and waited for when it stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Threads:
    """A set of running threads. They never keep the process from ending."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[threading.Thread] = set()

    def start(self, name: str, target: Callable[[], None]) -> None:
        """Run ``target`` in a thread of its own.

        :raises RuntimeError: the system gives no more threads.
        """
        thread = threading.Thread(target=lambda: self._run(target), name=name, daemon=True)
        with self._lock:
            self._running.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._forget(thread)
            raise

    def join(self, timeout_s: float) -> list[str]:
        """Wait until all have ended, at most so long. Names of those that have not."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            running = list(self._running)
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))
        return sorted(thread.name for thread in running if thread.is_alive())

    def _run(self, target: Callable[[], None]) -> None:
        try:
            target()
        finally:
            self._forget(threading.current_thread())

    def _forget(self, thread: threading.Thread) -> None:
        with self._lock:
            self._running.discard(thread)
