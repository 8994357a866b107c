"""What this portod can do on this kernel: a property it doesn't list, it refuses."""

from __future__ import annotations

import threading

from porto_api import Client
from shim_porto_runtime.porto_errors import porto_errors


class Abilities:
    """The container properties that portod knows, asked for once."""

    def __init__(self, porto: Client) -> None:
        self._porto = porto
        self._lock = threading.Lock()
        self._known: frozenset[str] | None = None

    def has(self, name: str) -> bool:
        """True where a property can be set.

        :raises Unavailable: Porto can't be asked.
        """
        with self._lock:
            if self._known is None:
                with porto_errors("asking for Porto's properties"):
                    self._known = frozenset(entry.name for entry in self._porto.properties())
            return name in self._known
