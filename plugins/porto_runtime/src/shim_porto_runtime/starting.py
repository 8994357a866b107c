"""Learning whether portoshim-init could run its command.

Init reports on a FIFO in the container's helper directory: end of file when the command runs, a line when it can't.
"""

from __future__ import annotations

import os
import secrets
import select
import time
from pathlib import Path
from types import TracebackType

_MAX_REPORT_BYTES = 4096


class Gate:
    """A FIFO on which init waits before it does anything: the host has something to do in its namespaces first."""

    def __init__(self, directory: Path) -> None:
        self.name = f"gate-{secrets.token_hex(8)}"
        self._path = directory / self.name

    def __enter__(self) -> Gate:
        os.mkfifo(self._path, 0o600)
        # Open for both, it neither blocks nor fails when init isn't there yet, and a byte waits for init to come.
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._path.unlink(missing_ok=True)

    def open(self) -> None:
        """Let init go on: now if it waits already, and as soon as it comes otherwise."""
        os.write(self._fd, b"x")


class Report:
    """A FIFO for one start. Make it before the process is started; it is gone after the block.

    :param directory: the container's helper directory.
    """

    def __init__(self, directory: Path) -> None:
        self.name = f"start-{secrets.token_hex(8)}"
        self._path = directory / self.name

    def __enter__(self) -> Report:
        os.mkfifo(self._path, 0o600)
        try:
            self.fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except BaseException:
            self._path.unlink()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self.fd)
        self._path.unlink(missing_ok=True)

    def wait(self, timeout_s: float) -> bool:
        """Wait until init has reported; False when it hasn't in time."""
        deadline = time.monotonic() + timeout_s
        poller = select.poll()
        # A FIFO nobody has opened for writing yet is silent; POLLHUP means that somebody has, and closed it.
        poller.register(self.fd, select.POLLIN)
        while not (found := poller.poll(max(deadline - time.monotonic(), 0) * 1000)):
            if time.monotonic() >= deadline:
                return False
        return bool(found)

    def text(self) -> str:
        """What init has written so far: empty when the command runs."""
        try:
            return os.read(self.fd, _MAX_REPORT_BYTES).decode("utf-8", "replace").strip()
        except BlockingIOError:
            return ""
