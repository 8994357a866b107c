"""A small event loop: one thread waits on many descriptors, timers and calls from other threads.

Each client connection has a loop of its own, so a busy or broken connection is never in another's way; the listener has
one as well. Everything but :meth:`Loop.call_threadsafe` belongs to the thread that runs the loop.
"""

from __future__ import annotations

import heapq
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

Handler = Callable[[], None]

_HANGUP = select.EPOLLHUP | select.EPOLLERR
_GONE = _HANGUP | select.EPOLLRDHUP
_MAX_EVENTS = 128


class Timer:
    """A call that is due at a moment of ``time.monotonic``."""

    __slots__ = ("_callback", "when")

    def __init__(self, when: float, callback: Handler) -> None:
        self.when = when
        self._callback: Handler | None = callback

    def cancel(self) -> None:
        """Don't call. Without effect when it has been."""
        self._callback = None

    def fire(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class _Watch:
    """Who wants to know what of one descriptor."""

    __slots__ = ("hangup", "mask", "reader", "writer")

    def __init__(self) -> None:
        self.reader: Handler | None = None
        self.writer: Handler | None = None
        self.hangup: Handler | None = None
        self.mask = -1


class Loop:
    """epoll, timers and a mailbox. Close it after :meth:`run` has returned."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        try:
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:
            self._epoll.close()
            raise
        self._epoll.register(self._wake, select.EPOLLIN)
        self._watches: dict[int, _Watch] = {}
        self._fresh: set[int] = set()
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_count = 0
        self._soon: deque[Handler] = deque()
        self._lock = threading.Lock()
        self._mail: deque[Handler] = deque()
        self._closed = False
        self._stopped = False

    # -- descriptors ---------------------------------------------------------------------------------------------------

    def on_readable(self, fd: int, handler: Handler | None) -> None:
        """Call ``handler`` while ``fd`` has something to read, its end or an error included; None ends that."""
        self._change(fd, "reader", handler)

    def on_writable(self, fd: int, handler: Handler | None) -> None:
        """Call ``handler`` while ``fd`` takes data, or is broken; None ends that."""
        self._change(fd, "writer", handler)

    def on_hangup(self, fd: int, handler: Handler | None) -> None:
        """Call ``handler`` when the other end of a socket is gone, though nobody reads it; None ends that."""
        self._change(fd, "hangup", handler)

    def forget(self, fd: int) -> None:
        """Watch ``fd`` no more. To be called before it is closed."""
        if self._watches.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _change(self, fd: int, what: str, handler: Handler | None) -> None:
        watch = self._watches.get(fd)
        if watch is None:
            if handler is None or self._closed:
                return
            watch = _Watch()
        setattr(watch, what, handler)
        mask = (
            (select.EPOLLIN if watch.reader else 0)
            | (select.EPOLLOUT if watch.writer else 0)
            | (select.EPOLLRDHUP if watch.hangup else 0)
        )
        if watch.mask == mask:
            return
        if watch.mask == -1:
            self._epoll.register(fd, mask)
            self._watches[fd] = watch
            # Events of this round may be those of a closed descriptor that had the same number.
            self._fresh.add(fd)
        elif mask:
            self._epoll.modify(fd, mask)
        else:
            # A hang-up would be reported again and again to nobody.
            self.forget(fd)
            return
        watch.mask = mask

    # -- calls ---------------------------------------------------------------------------------------------------------

    def call_soon(self, callback: Handler) -> None:
        """Call at the end of this round, after the descriptors that are ready now."""
        self._soon.append(callback)

    def call_at(self, when: float, callback: Handler) -> Timer:
        """Call at that moment of ``time.monotonic``."""
        timer = Timer(when, callback)
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, timer))
        return timer

    def call_later(self, delay_s: float, callback: Handler) -> Timer:
        """Call in ``delay_s`` seconds."""
        return self.call_at(time.monotonic() + delay_s, callback)

    def call_threadsafe(self, callback: Handler) -> bool:
        """Have the loop's thread call. From any thread; False when the loop has ended and nobody will."""
        with self._lock:
            if self._closed:
                return False
            self._mail.append(callback)
            os.eventfd_write(self._wake, 1)
        return True

    # -- life ----------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        while not self._stopped:
            self._round()

    def stop(self) -> None:
        """Have :meth:`run` return after this round."""
        self._stopped = True

    def close(self) -> None:
        """Give the loop's own descriptors back. Those that were watched belong to others."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake)
        self._epoll.close()
        self._watches.clear()
        self._timers.clear()
        self._soon.clear()
        self._mail.clear()

    def _round(self) -> None:
        self._fresh.clear()
        for fd, events in self._epoll.poll(self._timeout_s(), _MAX_EVENTS):
            if fd == self._wake:
                os.eventfd_read(self._wake)
            elif fd not in self._fresh:
                self._dispatch(fd, events)
        while self._mail:
            self._mail.popleft()()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].fire()
        # Only those that are there now: a callback that calls itself again must not starve the descriptors.
        for _ in range(len(self._soon)):
            self._soon.popleft()()

    def _timeout_s(self) -> float:
        if self._soon or self._stopped:
            return 0.0
        if not self._timers:
            return -1.0
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _dispatch(self, fd: int, events: int) -> None:
        watch = self._watches.get(fd)
        if watch is None:
            return
        if watch.hangup is not None and events & _GONE:
            watch.hangup()
        # Each handler may have ended the watch.
        if self._watches.get(fd) is watch and watch.reader is not None and events & (select.EPOLLIN | _HANGUP):
            watch.reader()
        if self._watches.get(fd) is watch and watch.writer is not None and events & (select.EPOLLOUT | _HANGUP):
            watch.writer()
