"""Who may run plugins when (CNI section 3, lifecycle): one operation for a container at a time, garbage collection
alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from shim_core.errors import Unavailable


class OperationLocks:
    """Locks for ADD, DEL and CHECK of containers, and for GC."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy: set[str] = set()
        self._exclusive = False

    @contextmanager
    def sandbox(self, sandbox_id: str, timeout_s: float) -> Iterator[None]:
        """Be the only operation for a sandbox, while no garbage collection runs.

        :raises Unavailable: another one is still running when the time is up.
        """
        with self._changed:
            if not self._changed.wait_for(
                lambda: sandbox_id not in self._busy and not self._exclusive, timeout=timeout_s
            ):
                raise Unavailable(
                    f"another network operation for sandbox {sandbox_id[:13]} is still running: try again"
                )
            self._busy.add(sandbox_id)
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(sandbox_id)
                self._changed.notify_all()

    @contextmanager
    def everything(self, timeout_s: float) -> Iterator[None]:
        """Be the only operation of all. New ones wait from now on.

        :raises Unavailable: others are still running when the time is up.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            if not self._changed.wait_for(lambda: not self._exclusive, timeout=timeout_s):
                raise Unavailable("another garbage collection is still running: try again")
            self._exclusive = True
            if not self._changed.wait_for(lambda: not self._busy, timeout=deadline - time.monotonic()):
                self._exclusive = False
                self._changed.notify_all()
                raise Unavailable("network operations are still running: try again")
        try:
            yield
        finally:
            with self._changed:
                self._exclusive = False
                self._changed.notify_all()
