"""Withdrawing a call that is under way in another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable


class CancelToken:
    """A one-way switch: once cancelled, calls that were given the token end with ``Cancelled``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._callbacks: set[Callable[[], None]] = set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Cancel. Safe from any thread, more than once, and while no call is under way."""
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, set()
        for callback in callbacks:
            callback()

    def add(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` run at cancellation; at once, if that has been."""
        with self._lock:
            if not self._cancelled:
                self._callbacks.add(callback)
                return
        callback()

    def discard(self, callback: Callable[[], None]) -> None:
        """Take a callback back."""
        with self._lock:
            self._callbacks.discard(callback)
