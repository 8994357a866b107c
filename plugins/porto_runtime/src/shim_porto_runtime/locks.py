"""Locks by name: one sandbox's calls in turn, different sandboxes at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shim_core.context import CallContext
from shim_core.errors import DeadlineExceeded

_LONGEST_WAIT_S = 600.0


@dataclass(slots=True)
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


class NamedLocks:
    """A lock for any name, made when somebody needs it and forgotten when nobody does."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._entries: dict[str, _Entry] = {}

    @contextmanager
    def hold(self, name: str, context: CallContext) -> Iterator[None]:
        """Hold the lock of ``name``; wait for it as long as the call may take.

        :raises DeadlineExceeded: it didn't become free in time.
        """
        with self._guard:
            entry = self._entries.setdefault(name, _Entry())
            entry.users += 1
        try:
            if not entry.lock.acquire(timeout=context.remaining_s(_LONGEST_WAIT_S)):
                what = " ".join(name[:64].split())
                raise DeadlineExceeded(f"{context.rpc}: another call for {what} is still under way; try again")
            try:
                yield
            finally:
                entry.lock.release()
        finally:
            with self._guard:
                entry.users -= 1
                if not entry.users:
                    del self._entries[name]
