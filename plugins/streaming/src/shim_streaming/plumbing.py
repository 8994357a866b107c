"""Pipes and terminals between a session and the process it is for, and the sizes of windows."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import termios
from dataclasses import dataclass

END_OF_INPUT = b"\x04"
"""What a terminal takes for the end of its input (VEOF)."""

_PIPE_BYTES = 256 * 1024
_MAX_SIZE_TEXT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Ends:
    """One side of a session's streams: descriptors, of which several may be the same."""

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None

    def close(self) -> None:
        """Close each descriptor once."""
        for fd in {self.stdin, self.stdout, self.stderr} - {None}:
            if fd is not None:
                os.close(fd)


def open_pipes(*, stdin: bool, stdout: bool, stderr: bool) -> tuple[Ends, Ends]:
    """A pipe for each stream: our ends, and those of the process.

    :raises OSError: no more descriptors.
    """
    made: list[int] = []
    try:
        for wanted in (stdin, stdout, stderr):
            if wanted:
                made += os.pipe2(os.O_CLOEXEC)
                _enlarge(made[-1])
    except OSError:
        for fd in made:
            os.close(fd)
        raise
    ends = iter(made)
    their_in, our_in = (next(ends), next(ends)) if stdin else (None, None)
    our_out, their_out = (next(ends), next(ends)) if stdout else (None, None)
    our_err, their_err = (next(ends), next(ends)) if stderr else (None, None)
    return Ends(our_in, our_out, our_err), Ends(their_in, their_out, their_err)


def open_terminal() -> tuple[Ends, Ends]:
    """A terminal of the node's.

    :raises OSError: no more descriptors or terminals.
    """
    return ends_of_terminal(*os.openpty())


def ends_of_terminal(master: int, slave: int) -> tuple[Ends, Ends]:
    """The master end is ours, the slave end is all three streams of the process."""
    return Ends(master, master), Ends(slave, slave, slave)


def _enlarge(fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        pass  # over the system's limit for pipes: this one just stays smaller


def unread_bytes(fd: int) -> int:
    """How much can be read from a pipe or terminal now."""
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0])


def set_window_size(terminal: int, columns: int, rows: int) -> None:
    """Tell a terminal, and whoever sits on it, its size.

    :raises OSError: it is gone.
    """
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class SizeReader:
    """Window sizes from the resize stream: JSON objects, one after the other. What is no size ends the reading."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder()
        self._text: bytes | None = b""

    def feed(self, data: memoryview) -> list[tuple[int, int]]:
        """Columns and rows of the sizes that are complete now."""
        sizes: list[tuple[int, int]] = []
        if self._text is None:
            return sizes
        if len(self._text) + len(data) > _MAX_SIZE_TEXT_BYTES:
            # A client that sends sizes faster than they are read sends them in pieces smaller than this.
            self._text = None
            return sizes
        text = (self._text + data).decode("latin-1").lstrip()
        while text:
            try:
                value, end = self._decoder.raw_decode(text)
            except (ValueError, RecursionError):
                break
            size = _size(value)
            if size is None:
                self._text = None
                return sizes
            sizes.append(size)
            text = text[end:].lstrip()
        self._text = text.encode("latin-1")
        return [size for size in sizes if all(size)]


def _size(value: object) -> tuple[int, int] | None:
    if not isinstance(value, dict):
        return None
    # Go's decoder, for which clients write, doesn't mind the case of names.
    named = {key.lower(): number for key, number in value.items()}
    columns, rows = named.get("width", 0), named.get("height", 0)
    if not all(type(number) is int and 0 <= number <= 0xFFFF for number in (columns, rows)):
        return None
    return columns, rows
