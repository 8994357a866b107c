"""Writing tar in one plain dialect (GNU's, with PAX for extended attributes) that every tar reads the same way."""

from __future__ import annotations

import os
from typing import Final

from shim_core.errors import ResourceExhausted
from shim_porto_runtime.images.tarread import BLOCK, DIRECTORY, REGULAR, Entry

_FLUSH_BYTES = 1024 * 1024
_DIRECT_BYTES = 128 * 1024
_ZEROS = bytes(64 * 1024)
_LONG_NAME: Final = b"././@LongLink"
_MAX_MTIME = 0o77777777777


class TarWriter:
    """Appends entries to a file.

    :param fd: the file's descriptor; stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # One buffer, used again and again: memory that is new each time costs a page fault for every 4 KiB.
        self._buffer = memoryview(bytearray(_FLUSH_BYTES))
        self._waiting = 0
        self.written = 0
        """Bytes of the archive so far."""

    def header(self, entry: Entry, name: bytes, link: bytes, xattrs: dict[bytes, bytes]) -> None:
        """An entry's header, under another name. The payload has to follow, then :meth:`pad`."""
        records = [(b"SCHILY.xattr." + key, value) for key, value in xattrs.items()]
        if entry.mtime_fraction:
            records.append((b"mtime", b"%d.%b" % (entry.mtime, entry.mtime_fraction)))
        if records:
            self._extension(b"x", b"./PaxHeaders/entry", b"".join(_pax_record(key, value) for key, value in records))
        if len(name) > 100:
            self._extension(b"L", _LONG_NAME, name + b"\0")
        if len(link) > 100:
            self._extension(b"K", _LONG_NAME, link + b"\0")
        self.put(_block(name[:100], entry, entry.kind, entry.size, link[:100]))

    def put(self, data: bytes | memoryview) -> None:
        """Bytes of a payload."""
        is_large = len(data) >= _DIRECT_BYTES
        if is_large or self._waiting + len(data) > _FLUSH_BYTES:
            self.flush()
        if is_large:
            self._write(data)
        else:
            end = self._waiting + len(data)
            self._buffer[self._waiting : end] = data
            self._waiting = end
        self.written += len(data)

    def zeros(self, count: int) -> None:
        """A hole, filled in."""
        while count:
            step = min(count, len(_ZEROS))
            self.put(_ZEROS[:step])
            count -= step

    def pad(self) -> None:
        """Fill the last block of a payload."""
        if missing := -self.written % BLOCK:
            self.put(_ZEROS[:missing])

    def finish(self) -> None:
        """The end of the archive, on its way to the disk."""
        self.put(_ZEROS[: 2 * BLOCK])
        self.flush()

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, 0
        self._write(self._buffer[:waiting])

    def _extension(self, kind: bytes, name: bytes, data: bytes) -> None:
        self.put(_block(name, _PLAIN, kind, len(data), b""))
        self.put(data)
        self.pad()

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as err:
            raise ResourceExhausted(f"can't write the layer to disk: {err.strerror}") from err


def directory(mode: int = 0o755) -> Entry:
    """A directory that the archive has no entry for."""
    return Entry(b"", DIRECTORY, mode, 0, 0, 0, 0, b"", (0, 0))


_PLAIN = Entry(b"", REGULAR, 0o644, 0, 0, 0, 0, b"", (0, 0))


def _block(name: bytes, entry: Entry, kind: bytes, size: int, link: bytes) -> bytes:
    major, minor = entry.device
    head = b"%b%07o\0%b%b%b%011o\0" % (
        name.ljust(100, b"\0"),
        entry.mode,
        _field(entry.uid, 8),
        _field(entry.gid, 8),
        _field(size, 12),
        min(entry.mtime, _MAX_MTIME),
    )
    rest = b"%b%bustar  \0%b%b%b" % (kind, link.ljust(100, b"\0"), bytes(64), _field(major, 8), _field(minor, 8))
    checksum = sum(head) + sum(rest) + 8 * 0x20
    return b"%b%06o\0 %b%b" % (head, checksum, rest, bytes(BLOCK - 156 - len(rest)))


def _field(value: int, width: int) -> bytes:
    """Octal if it fits, GNU's base 256 otherwise."""
    if value < 1 << (3 * (width - 1)):
        return b"%0*o\0" % (width - 1, value)
    return bytes([0x80]) + value.to_bytes(width - 1, "big")


def _pax_record(key: bytes, value: bytes) -> bytes:
    """A record states its own length, the digits of that length included."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) != len(str(rest)):
        length += 1
    return b"%d %b=%b\n" % (length, key, value)
