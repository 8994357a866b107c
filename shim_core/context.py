"""What a hook knows of the call it serves: identity, time left, and whether the client is still there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from shim_core import errors

logger = logging.getLogger("shim.core.context")

CLEANUP_TIMEOUT_S = 60.0
"""How long undoing may take when the call itself is out of time: containerd's figure."""


class CallContext:
    """One CRI call under way. Made by the dispatcher; passed through every hook.

    :param deadline: in seconds of ``time.monotonic``; None when the client set none.
    """

    def __init__(self, rpc: str, request_id: str, deadline: float | None = None) -> None:
        self.rpc = rpc
        self.request_id = request_id
        self.deadline = deadline
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<CallContext {self.rpc} {self.request_id}{' CANCELLED' if self.cancelled else ''}>"

    @property
    def cancelled(self) -> bool:
        """True once the client has gone, or its deadline has passed on the wire."""
        return self._cancelled.is_set()

    def remaining_s(self, default_s: float) -> float:
        """Seconds until the deadline, at least 0; ``default_s`` when there is none or it is further off."""
        if self.deadline is None:
            return default_s
        return min(default_s, max(self.deadline - time.monotonic(), 0.0))

    def check(self) -> None:
        """Call between steps that change something, so that an abandoned call ends early.

        :raises errors.Cancelled: the client has gone.
        :raises errors.DeadlineExceeded: the time is up.
        """
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise errors.DeadlineExceeded(f"{self.rpc}: the deadline has passed")
        if self.cancelled:
            raise errors.Cancelled(f"{self.rpc}: the client has cancelled the call")

    def wait(self, timeout_s: float) -> bool:
        """Sleep until cancelled, at most ``timeout_s`` seconds; True if cancelled."""
        return self._cancelled.wait(timeout_s)

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback`` run at cancellation, at once if that has been. Returns a function that takes it back."""
        with self._lock:
            if not self.cancelled:
                self._callbacks.append(callback)
                return lambda: self._discard(callback)
        callback()
        return lambda: None

    def cancel(self) -> None:
        """The client has left: wake everything that waits on this context."""
        with self._lock:
            self._cancelled.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                logger.exception("%s: a cancellation callback failed", self.request_id)

    def for_cleanup(self, timeout_s: float = CLEANUP_TIMEOUT_S) -> CallContext:
        """A context for undoing: same identity, a fresh deadline, not cancelled with this one."""
        return CallContext(self.rpc, self.request_id, time.monotonic() + timeout_s)

    def _discard(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)
