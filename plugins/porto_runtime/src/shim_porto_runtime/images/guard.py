"""One directory, several processes: the daemon, and `portoshim images load` beside it.

Everybody who works in the directory shares a lock; whoever wants to clean up has to be alone there.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FILE_NAME = "lock"
_FLOCK = struct.Struct("@hhqqi4x")
"""``struct flock`` of 64-bit Linux: type, whence, start, length, pid."""


class Guard:
    """The shared lock on a directory, held until :meth:`close`."""

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory / _FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._threads = threading.Lock()
        self._lock(fcntl.F_OFD_SETLKW, fcntl.F_RDLCK)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """True when no other process works in the directory; none starts to until the end."""
        with self._threads:
            try:
                self._lock(fcntl.F_OFD_SETLK, fcntl.F_WRLCK)
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                self._lock(fcntl.F_OFD_SETLKW, fcntl.F_RDLCK)

    def close(self) -> None:
        os.close(self._fd)

    def _lock(self, command: int, kind: int) -> None:
        # Not flock(2): to make its lock exclusive is to give the shared one up first, and another may clean up then.
        fcntl.fcntl(self._fd, command, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
