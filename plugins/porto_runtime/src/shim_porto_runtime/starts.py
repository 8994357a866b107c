"""Containers that end while they are being started.

Porto may tell of the end before StartContainer has recorded the start. Such an end is kept until the start is
recorded and told of: nobody hears of an end before the start, and no end is missed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Starts:
    """The starts under way, by container id."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended: dict[str, bool] = {}

    @contextmanager
    def under_way(self, container_id: str) -> Iterator[None]:
        """While a container is being started."""
        with self._lock:
            self._ended[container_id] = False
        try:
            yield
        finally:
            with self._lock:
                self._ended.pop(container_id, None)

    def finish(self, container_id: str) -> bool:
        """The start is recorded. True when the container's end has been put off meanwhile."""
        with self._lock:
            return self._ended.pop(container_id, False)

    def put_off(self, container_id: str) -> bool:
        """Something has seen the container end. True when that has to wait for :meth:`finish`."""
        with self._lock:
            if container_id not in self._ended:
                return False
            self._ended[container_id] = True
            return True
