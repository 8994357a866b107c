"""One directory, several processes: the daemon, and `portoshim images load` beside it.

Everybody who works in the directory shares a lock; whoever wants to clean up has to be alone there.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FILE_NAME = "lock"


class Guard:
    """The shared lock on a directory, held until :meth:`close`."""

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory / _FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._threads = threading.Lock()
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """True when no other process works in the directory; none starts to until the end."""
        with self._threads:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                alone = False
            try:
                yield alone
            finally:
                # A failed conversion has lost the shared lock as well (flock(2)).
                fcntl.flock(self._fd, fcntl.LOCK_SH)

    def close(self) -> None:
        os.close(self._fd)
