"""Files for what is on its way, written again and again rather than made anew.

A layer takes as much room on its way to Porto as it does in the end. Written over what is in memory already it costs
little, and most of it never gets to the disk.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ScratchFiles:
    """Files in a directory, as many as are in use at once, and none when none is. Safe to use from many threads."""

    def __init__(self, directory: Path, suffix: str) -> None:
        self._directory = directory
        self._suffix = suffix
        self._lock = threading.Lock()
        self._lent = 0
        self._idle: list[Path] = []

    @contextmanager
    def borrow(self) -> Iterator[Path]:
        """A path. There may be a file, with anything in it: it is to be cut to the length of what is written.

        After an error it isn't used again: who was told the path may still be reading.
        """
        with self._lock:
            self._lent += 1
            path = self._idle.pop() if self._idle else self._directory / f"{secrets.token_hex(8)}{self._suffix}"
        gone = [path]
        try:
            yield path
            gone = []
        finally:
            with self._lock:
                self._lent -= 1
                if not gone:
                    self._idle.append(path)
                if not self._lent:
                    gone += self._idle
                    self._idle = []
            for file in gone:
                file.unlink(missing_ok=True)
