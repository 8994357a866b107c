"""How much writable layers take up: measured in the background, since it means walking them."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from porto_api import Client, PortoError
from shim_porto_runtime import rootfs

logger = logging.getLogger("shim.porto_runtime.usage")

FRESH_S = 60.0
"""A measurement is asked for again when it is older."""
_BUSY_SHARE = 0.1  # at most this part of one processor goes into walking


@dataclass(frozen=True, slots=True)
class Usage:
    """What a directory tree takes up."""

    bytes: int
    inodes: int
    measured_at: int
    """Nanoseconds since the epoch."""


class UsageSampler:
    """Measures writable layers one after the other, in a thread that takes its time.

    :param porto: knows where the upper directory of a volume is.
    """

    def __init__(self, porto: Client) -> None:
        self._porto = porto
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._queue: deque[str] = deque()
        self._known: dict[str, Usage] = {}
        self._gone: set[str] = set()
        """What was forgotten while it was being measured."""
        self._uppers: dict[str, Path | None] = {}
        self._stopping = False
        self._thread: threading.Thread | None = None

    def get(self, root: str) -> Usage | None:
        """The last measurement of the volume mounted at ``root``; None before the first. Never waits."""
        with self._lock:
            found = self._known.get(root)
            stale = found is None or time.time_ns() - found.measured_at > FRESH_S * 1e9
            if stale and root not in self._queue and not self._stopping:
                self._queue.append(root)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
                    self._thread.start()
                self._wake.notify()
            return found

    def forget(self, root: str) -> None:
        """The volume is gone."""
        with self._lock:
            self._known.pop(root, None)
            self._uppers.pop(root, None)
            if root in self._queue:
                self._gone.add(root)

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    return
                root = self._queue[0]
            started = time.monotonic()
            try:
                usage = self._measure(root)
            except (OSError, PortoError) as err:
                logger.debug("%s can't be measured: %s", root, err)
                usage = None
            with self._lock:
                self._queue.popleft()
                if root in self._gone:
                    self._gone.remove(root)
                    self._uppers.pop(root, None)
                elif usage is not None:
                    self._known[root] = usage
                if not self._stopping:
                    self._wake.wait((time.monotonic() - started) / _BUSY_SHARE)

    def _measure(self, root: str) -> Usage | None:
        if root not in self._uppers:
            self._uppers[root] = self._upper(root)
        upper = self._uppers[root]
        return None if upper is None else measure(upper)

    def _upper(self, root: str) -> Path | None:
        """The directory that holds what was written (Porto keeps it at place/porto_volumes/id/overlay/upper)."""
        volumes = self._porto.get_volumes([root])
        if not volumes:
            return None
        path = Path(volumes[0].place or "/place", "porto_volumes", volumes[0].id, volumes[0].backend, "upper")
        return path if path.is_dir() else None


def measure(directory: Path) -> Usage:
    """Blocks and inodes of a tree, hard links counted once. What vanishes meanwhile is passed over.

    Whoever writes there may put a symbolic link in a directory's place at any moment: it doesn't lead us out.
    """
    total_bytes = inodes = 0
    seen: set[int] = set()
    top = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    pending = ["."]
    try:
        while pending:
            path = pending.pop()
            for status, name in _entries(top, path):
                is_directory = stat.S_ISDIR(status.st_mode)
                if is_directory:
                    pending.append(f"{path}/{name}")
                elif status.st_nlink > 1:
                    if status.st_ino in seen:
                        continue
                    seen.add(status.st_ino)
                total_bytes += status.st_blocks * 512
                inodes += 1
    finally:
        os.close(top)
    return Usage(total_bytes, inodes, time.time_ns())


def _entries(top: int, path: str) -> Iterator[tuple[os.stat_result, str]]:
    try:
        directory = rootfs.open_directory_below(top, path)
    except OSError:
        return
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    yield entry.stat(follow_symlinks=False), entry.name
                except OSError:
                    continue
    finally:
        os.close(directory)
