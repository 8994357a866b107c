"""The CRI log format, as pure functions of bytes.

A record is ``RFC3339Nano stream P|F payload\\n``. ``F`` ends a line; ``P`` is a part of one, and readers (kubelet,
crictl) drop the newline behind it. So the bytes come back exactly: CR, NUL and invalid UTF-8 are left alone, and a last
line without a newline is written as ``P``.

What comes out depends only on what goes in: after a crash the same text is formatted again, and has to be the same.
"""

from __future__ import annotations

import time

RECORD_BYTES = 16384
"""The longest payload of one record: containerd's and CRI-O's figure."""

_TIMESTAMP_BYTES = len("2006-01-02T15:04:05.000000000Z")


class Stamp:
    """Formats timestamps; remembers the last second, which most of them share."""

    __slots__ = ("_second", "_text")

    def __init__(self) -> None:
        self._second = -1
        self._text = b""

    def header(self, time_ns: int, stream: bytes) -> bytes:
        """What every record of a batch begins with: ``2006-01-02T15:04:05.000000000Z stdout`` and a space.

        :param time_ns: nanoseconds since the epoch.
        :param stream: ``stdout`` or ``stderr``.
        """
        second, rest = divmod(time_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()
        return b"%b.%09dZ %b " % (self._text, rest, stream)


def records(text: bytes, header: bytes) -> tuple[bytes, int, bool]:
    """Format the lines of ``text`` that are complete, and the full parts of those that are too long.

    :returns: the records; how many bytes of ``text`` they hold (the rest, at most :data:`RECORD_BYTES`, is the
        beginning of a line that goes on); whether the last record leaves its line unfinished.
    """
    size = len(text)
    # A line of RECORD_BYTES and its newline fit: each look back from there ends lines without touching every one.
    reach = RECORD_BYTES + 1
    if size and text.find(b"\n") < 0 and size <= RECORD_BYTES:
        return b"", 0, False
    out = []
    start = position = 0
    unfinished = False
    while position < size:
        end = text.rfind(b"\n", position, position + reach)
        if end >= 0:
            position = end + 1
            continue
        if size - position <= RECORD_BYTES:
            break
        if position > start:
            out.append(_lines(text[start : position - 1], header))
        start = position + RECORD_BYTES
        out += (header, b"P ", text[position:start], b"\n")
        position = start
        unfinished = True
    if position > start:
        out.append(_lines(text[start : position - 1], header))
        unfinished = False
    return b"".join(out), position, unfinished


def partial(text: bytes, header: bytes) -> bytes:
    """The record of an unfinished line, at most :data:`RECORD_BYTES` long."""
    return b"%bP %b\n" % (header, text)


def line_end(header: bytes) -> bytes:
    """The record that ends a line whose parts are in the log and whose rest is lost."""
    return header + b"F \n"


def whole_records(out: bytes, written: int) -> int:
    """Of ``written`` bytes of records, how many belong to whole ones."""
    return out.rfind(b"\n", 0, written) + 1


def is_partial(out: bytes, end: int, stream: bytes) -> bool:
    """Whether the record that ends at ``end`` (not 0) is a part of a line."""
    begin = out.rfind(b"\n", 0, end - 1) + 1
    return out[begin + _TIMESTAMP_BYTES + len(stream) + 2] == ord("P")


def payload_bytes(out: bytes, stream: bytes) -> int:
    """How many bytes of the container's output whole records hold, newlines included."""
    fixed = _TIMESTAMP_BYTES + len(stream) + len("  P ")
    total = 0
    for record in out.split(b"\n")[:-1]:
        total += len(record) - fixed + (record[fixed - 2] == ord("F"))
    return total


def _lines(text: bytes, header: bytes) -> bytes:
    """Whole lines, given without their last newline."""
    full = header + b"F "
    return b"%b%b\n" % (full, text.replace(b"\n", b"\n" + full))
