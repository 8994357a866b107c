"""The event loop: epoll, with streams looked at less often the less they bring.

To be woken by each small write of 200 containers would cost more than to move the bytes. So the streams hang in tiers:
after a tier has been served, it rests for its interval while the pipes fill, and the next round brings bigger batches.
A stream that is idle wakes its tier at once; one that fills its pipe faster than the interval allows moves up a tier,
and one that doesn't any more moves down. What somebody waits for (requests, terminals, attached clients) never rests.
"""

from __future__ import annotations

import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

URGENT, HOT, COLD = 0, 1, 2
_INTERVALS_S = (0.0, 0.001, 0.02)
_EVENTS = 256


class _Tier:
    __slots__ = ("due", "eager", "epoll", "interval_s")

    def __init__(self, interval_s: float) -> None:
        self.epoll = select.epoll()
        self.interval_s = interval_s
        self.due: float | None = None
        self.eager = False


class Loop:
    """Calls a handler with the events of its descriptor. All handlers must bear being called for nothing."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], object]] = {}
        self._tier_of: dict[int, int] = {}
        self._tiers = {tier: _Tier(_INTERVALS_S[tier]) for tier in (HOT, COLD)}
        for tier in self._tiers.values():
            self._epoll.register(tier.epoll.fileno(), select.EPOLLIN | select.EPOLLONESHOT)
        self._by_epoll = {tier.epoll.fileno(): tier for tier in self._tiers.values()}

    def close(self) -> None:
        for tier in self._tiers.values():
            tier.epoll.close()
        self._epoll.close()

    def watch(self, fd: int, events: int, handler: Callable[[int], object], tier: int = URGENT) -> None:
        """Call ``handler`` when there are ``events``, or an error or hang-up. Replaces an earlier watch.

        :raises PermissionError: the descriptor is a regular file, which is always ready.
        """
        self.forget(fd)
        self._epoll_of(tier).register(fd, events)
        self._handlers[fd] = handler
        self._tier_of[fd] = tier

    def change(self, fd: int, events: int) -> None:
        """Watch for other events."""
        self._epoll_of(self._tier_of[fd]).modify(fd, events)

    def move(self, fd: int, tier: int) -> None:
        """Put a stream into another tier."""
        if self._tier_of[fd] != tier:
            self.watch(fd, select.EPOLLIN, self._handlers[fd], tier)

    def forget(self, fd: int) -> None:
        """Watch it no more; nothing happens if it isn't watched. To be called before it is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll_of(self._tier_of.pop(fd)).unregister(fd)

    def hurry(self, tier: int) -> None:
        """Called by a handler: its pipe was so full that the tier must not rest before the next round."""
        if tier != URGENT:
            self._tiers[tier].eager = True

    def run_once(self, timeout_s: float) -> None:
        """Wait for events, at most this long, and handle them."""
        now = time.monotonic()
        for tier in self._tiers.values():
            if tier.due is None:
                continue
            if tier.due <= now:
                tier.due = None
                self._epoll.modify(tier.epoll.fileno(), select.EPOLLIN | select.EPOLLONESHOT)
            else:
                timeout_s = min(timeout_s, tier.due - now)
        for fd, events in self._epoll.poll(timeout_s, _EVENTS):
            woken = self._by_epoll.get(fd)
            if woken is not None:
                self._serve(woken)
            else:
                self._call(fd, events)

    def _serve(self, tier: _Tier) -> None:
        tier.eager = False
        for fd, events in tier.epoll.poll(0, _EVENTS):
            self._call(fd, events)
        tier.due = time.monotonic() + (0.0 if tier.eager else tier.interval_s)

    def _call(self, fd: int, events: int) -> None:
        handler = self._handlers.get(fd)
        if handler is not None:
            handler(events)

    def _epoll_of(self, tier: int) -> select.epoll:
        found = self._tiers.get(tier)
        return self._epoll if found is None else found.epoll
