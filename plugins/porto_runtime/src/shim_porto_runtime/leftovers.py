"""What calls that failed could not take back, because portod was away or didn't answer in time.

Its records are gone, so that the call can be repeated. What is left of it is taken away once portod is back, or with
its sandbox; after a restart of the daemon, recovery finds it on disk.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from shim_core.errors import ShimError
from shim_porto_runtime import sandbox

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

logger = logging.getLogger("shim.porto_runtime.leftovers")


class Leftovers:
    """Containers by id, with their names in Porto."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[str, str] = {}

    def add(self, container_id: str, name: str) -> None:
        self._names[container_id] = name

    def clear(self, rt: Runtime) -> None:
        """Take away what can be; the rest is kept for another time."""
        if not self._names:
            return
        with self._lock:
            for container_id, name in list(self._names.items()):
                try:
                    sandbox.destroy(rt, name)
                except ShimError as err:
                    logger.warning("container %s is still left of a failed call: %s", container_id, err)
                    continue
                if rt.directories.remove_files(container_id):
                    del self._names[container_id]
