"""What ps shows of a process forked by the keeper: its purpose, rather than the keeper's command line."""

from __future__ import annotations

import ctypes

_ARG_START, _ARG_END = 45, 46
"""Fields of /proc/self/stat behind the command's name."""


class Title:
    """The memory the kernel reads a process's command line from. Forked processes have it at the same place."""

    def __init__(self) -> None:
        try:
            with open("/proc/self/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        except (OSError, IndexError, ValueError):
            start = end = 0
        self._start, self._size = start, end - start

    def set(self, text: str) -> None:
        """Show ``text``, as much of it as there is room for."""
        if self._start <= 0 or self._size < 2:
            return
        # A last byte that isn't 0 tells the kernel that the text ends at the first that is.
        data = text.encode()[: self._size - 2].ljust(self._size - 1, b"\0") + b" "
        ctypes.memmove(self._start, data, self._size)
