"""Secrets and settings in files that others replace while we run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_FILE_BYTES = 1024 * 1024


class WatchedFile(Generic[T]):
    """What a file holds, read anew when the file has changed. Safe to use from many threads.

    :param parse: makes a value of the file's bytes. :raises ValueError: they are no good.
    """

    def __init__(self, path: str, parse: Callable[[bytes], T]) -> None:
        self.path = path
        self._parse = parse
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._value: tuple[T] | None = None

    def get(self) -> T:
        """The value as of now.

        :raises OSError: the file can't be read. :raises ValueError: it is no good.
        """
        with self._lock:
            with Path(self.path).open("rb") as file:
                status = os.fstat(file.fileno())
                seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                if self._value is None or seen != self._seen:
                    data = file.read(MAX_FILE_BYTES + 1)
                    if len(data) > MAX_FILE_BYTES:
                        raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
                    self._value, self._seen = (self._parse(data),), seen
            return self._value[0]


def parse_secret(data: bytes) -> str:
    """A secret: one line of printable text.

    :raises ValueError: it is empty, or more than that.
    """
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("not text") from None
    if not text or not text.isprintable():
        raise ValueError("must hold one line of printable text")
    return text
