"""Reading tar: ustar, PAX and GNU headers, strictly. What Go's reader takes is taken; what is ambiguous is refused."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from shim_core.errors import UnknownError

BLOCK: Final = 512
REGULAR, HARD_LINK, SYMLINK, CHAR_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
KINDS: Final = frozenset({REGULAR, HARD_LINK, SYMLINK, CHAR_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO})

_READ_BYTES = 1024 * 1024
_MAX_NAME_BYTES = 8192
_MAX_PAX_BYTES = 1024 * 1024
_MAX_SPARSE_PARTS = 65536
_MAX_SIZE = 1 << 62
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")
_OCTAL = re.compile(rb"[0-7]{1,12}")
_ZEROS = bytes(BLOCK)
_USTAR = b"ustar\x0000"
_XATTR = b"SCHILY.xattr."
_PAX_WANTED = frozenset({b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"})


class BadLayer(UnknownError):
    """A layer that is no good tar, or that tries what a layer must not; the message names the entry."""


@dataclass(slots=True)
class Entry:
    """One header, extensions applied. ``size`` is that of the file, holes included."""

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    link: bytes
    device: tuple[int, int]
    mtime_fraction: bytes = b""
    """Digits after the point."""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    sparse: list[tuple[int, int]] | None = None
    """Offset and length of the parts that are in the archive; the rest is zeros."""
    stored: int = 0
    """Bytes in the archive after the header (and the sparse map)."""


class TarReader:
    """Entries of an archive, one after the other, each followed by its payload.

    :param read: gives up to that many bytes, none at the end.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._buffer = b""
        self._position = 0
        self._left = 0
        """Of the entry's payload, not read yet."""
        self._padding = 0

    def next(self) -> Entry | None:
        """The next entry; None at the end of the archive.

        :raises BadLayer: it is malformed.
        """
        self._skip(self._left + self._padding)
        self._left = self._padding = 0
        pax: dict[bytes, bytes] = {}
        long_name = long_link = b""
        while True:
            block = self._take(BLOCK)
            if not block or block == _ZEROS:
                if pax or long_name or long_link:
                    raise BadLayer("the tar ends in the middle of an entry")
                return None
            kind, entry = _parse_header(block)
            if kind == b"L":
                long_name = self._take_data(entry.size, _MAX_NAME_BYTES).partition(b"\0")[0]
            elif kind == b"K":
                long_link = self._take_data(entry.size, _MAX_NAME_BYTES).partition(b"\0")[0]
            elif kind in (b"x", b"X"):
                pax = _parse_pax(self._take_data(entry.size, _MAX_PAX_BYTES))
            elif kind == b"g":
                # Global headers say nothing about files (git writes a comment).
                self._take_data(entry.size, _MAX_PAX_BYTES)
            else:
                break
        if long_name:
            entry.name = long_name
        if long_link:
            entry.link = long_link
        if pax:
            _apply_pax(entry, pax)
        self._finish(entry, kind, block, pax)
        return entry

    def payload(self) -> Iterator[bytes | memoryview]:
        """What the archive holds of the current entry, in pieces.

        :raises BadLayer: the archive ends before.
        """
        while self._left:
            if self._position == len(self._buffer):
                self._fill()
                if not self._buffer:
                    raise BadLayer("the tar ends in the middle of a file")
            end = min(self._position + self._left, len(self._buffer))
            piece = memoryview(self._buffer)[self._position : end]
            self._left -= len(piece)
            self._position = end
            yield piece

    def drain(self) -> None:
        """Read what follows the end of the archive."""
        while self._buffer:
            self._fill()

    # -- headers ---------------------------------------------------------------------------------------------------

    def _finish(self, entry: Entry, kind: bytes, block: bytes, pax: dict[bytes, bytes]) -> None:
        """What depends on name and type together."""
        if kind in (b"\0", b"7"):
            kind = REGULAR
        if kind == REGULAR and entry.name.endswith(b"/"):
            kind = DIRECTORY  # as tars before POSIX wrote directories
            if entry.size:
                raise BadLayer("a file's name ends with a slash")
        stored = entry.size if kind in (REGULAR, b"S") else 0
        self._left, self._padding = stored, -stored % BLOCK
        if kind == b"S":
            kind = REGULAR
            entry.sparse, entry.size = self._old_sparse(block)
        elif kind == REGULAR and any(key.startswith(b"GNU.sparse.") for key in pax):
            entry.sparse = self._pax_sparse(entry, pax)
        entry.kind = kind
        entry.stored = self._left
        if kind != REGULAR:
            entry.size = 0
        if entry.sparse is not None:
            _check_sparse(entry)

    def _old_sparse(self, block: bytes) -> tuple[list[tuple[int, int]], int]:
        """The map of a GNU sparse entry: four parts in the header, more in blocks after it."""
        size = _number(block[483:495], "size")
        parts, more, where = 4, block[482], block[386:482]
        found: list[tuple[int, int]] = []
        while True:
            for index in range(parts):
                pair = where[24 * index : 24 * index + 24]
                if pair[0]:
                    found.append((_number(pair[:12], "sparse offset"), _number(pair[12:], "sparse length")))
            if not more:
                return found, size
            if len(found) > _MAX_SPARSE_PARTS:
                raise BadLayer("a sparse file has too many parts")
            block = self._take(BLOCK)
            if not block:
                raise BadLayer("the tar ends in the middle of an entry")
            parts, more, where = 21, block[504], block[:504]

    def _pax_sparse(self, entry: Entry, pax: dict[bytes, bytes]) -> list[tuple[int, int]]:
        """The map of a PAX sparse entry, format 1.0: decimal numbers, a line each, before the data."""
        if pax.get(b"GNU.sparse.major") != b"1" or pax.get(b"GNU.sparse.minor") != b"0":
            raise BadLayer("a sparse file is in a format before 1.0")
        entry.name = pax.get(b"GNU.sparse.name", entry.name)
        entry.size = _decimal(pax.get(b"GNU.sparse.realsize", b""), "GNU.sparse.realsize")
        text = b""

        def line() -> int:
            nonlocal text
            while b"\n" not in text:
                if self._left < BLOCK or len(text) > BLOCK:
                    raise BadLayer("a sparse file's map is malformed")
                self._left -= BLOCK
                text += self._take(BLOCK)
            number, _, text = text.partition(b"\n")
            return _decimal(number, "the map of a sparse file")

        count = line()
        if count > _MAX_SPARSE_PARTS:
            raise BadLayer("a sparse file has too many parts")
        return [(line(), line()) for _ in range(count)]

    # -- bytes -----------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        self._buffer = self._read(_READ_BYTES)
        self._position = 0

    def _take(self, count: int) -> bytes:
        """Exactly that many bytes; none at all at the end of the stream."""
        end = self._position + count
        if end <= len(self._buffer):
            data = self._buffer[self._position : end]
            self._position = end
            return data
        data = self._buffer[self._position :]
        while len(data) < count:
            self._fill()
            if not self._buffer:
                if data:
                    raise BadLayer("the tar ends in the middle of an entry")
                return b""
            missing = count - len(data)
            data += self._buffer[:missing]
            self._position = min(missing, len(self._buffer))
        return data

    def _take_data(self, size: int, limit: int) -> bytes:
        if size > limit:
            raise BadLayer(f"an extended header of {size} bytes is larger than {limit} bytes")
        data = self._take(size) if size else b""
        self._skip(-size % BLOCK)
        return data

    def _skip(self, count: int) -> None:
        while count:
            if self._position == len(self._buffer):
                self._fill()
                if not self._buffer:
                    raise BadLayer("the tar ends in the middle of a file")
            step = min(count, len(self._buffer) - self._position)
            self._position += step
            count -= step


def _parse_header(block: bytes) -> tuple[bytes, Entry]:
    (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, _, _, major, minor, prefix, tail) = _HEADER.unpack(
        block
    )
    digits = checksum.strip(b" \0")
    stated = int(digits, 8) if _OCTAL.fullmatch(digits) else -1
    actual = sum(block) - sum(checksum) + 8 * 0x20
    # Some old tars summed signed bytes.
    if stated != actual and stated != actual - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise BadLayer("the layer is no tar archive: a header's checksum is wrong")
    name = name.partition(b"\0")[0]
    if magic == _USTAR:  # in other dialects there is no prefix: GNU keeps times there
        if tail.endswith(b"tar\0"):
            prefix = prefix[:131]
        prefix = prefix.partition(b"\0")[0]
        if prefix:
            name = prefix + b"/" + name
    is_device = kind in (CHAR_DEVICE, BLOCK_DEVICE)
    return kind, Entry(
        name,
        kind,
        _number(mode, "mode") & 0o7777,
        _number(uid, "uid"),
        _number(gid, "gid"),
        _number(size, "size"),
        max(_number(mtime, "mtime", signed=True), 0),
        link.partition(b"\0")[0],
        (_number(major, "device"), _number(minor, "device")) if is_device else (0, 0),
    )


def _number(text: bytes, what: str, *, signed: bool = False) -> int:
    """A number in octal, or in GNU's base 256."""
    if text[0] & 0x80:
        value = int.from_bytes(text, "big") & ((1 << (8 * len(text) - 1)) - 1)
        if text[0] & 0x40:
            if not signed:
                raise BadLayer(f"an entry's {what} is negative")
            value -= 1 << (8 * len(text) - 1)
        if value >= _MAX_SIZE:
            raise BadLayer(f"an entry's {what} is out of range")
        return value
    digits = text.strip(b" \0").partition(b"\0")[0]
    if not digits:
        return 0
    if not _OCTAL.fullmatch(digits):
        raise BadLayer(f"an entry's {what} is not a number")
    return int(digits, 8)


def _decimal(text: bytes, what: str) -> int:
    if not text.isdigit() or len(text) > 19 or (value := int(text)) >= _MAX_SIZE:
        raise BadLayer(f"{what} is not a number in range")
    return value


def _parse_pax(data: bytes) -> dict[bytes, bytes]:
    """``<length> <key>=<value>\\n``, again and again (POSIX pax, extended header)."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        digits = data[position:space] if space > 0 else b""
        if not digits.isdigit():
            raise BadLayer("an extended header is malformed")
        end = position + int(digits)
        record = data[space + 1 : end]
        key, equals, value = record.partition(b"=")
        if end > len(data) or end <= space or not equals or not value.endswith(b"\n") or not key:
            raise BadLayer("an extended header is malformed")
        records[key] = value[:-1]
        position = end
    return records


def _apply_pax(entry: Entry, pax: dict[bytes, bytes]) -> None:
    for key, value in pax.items():
        if key.startswith(_XATTR):
            entry.xattrs[key.removeprefix(_XATTR)] = value
        elif key not in _PAX_WANTED or not value:
            continue  # an empty value takes a key back
        elif b"\0" in value:
            raise BadLayer(f"an extended header's {key.decode()} holds a NUL byte")
        elif key == b"path":
            entry.name = value
        elif key == b"linkpath":
            entry.link = value
        elif key == b"mtime":
            whole, _, fraction = value.partition(b".")
            before_1970 = whole.startswith(b"-")
            entry.mtime = 0 if before_1970 else _decimal(whole, "mtime")
            entry.mtime_fraction = b"" if before_1970 or not fraction.isdigit() else fraction[:9]
        elif key == b"size":
            entry.size = _decimal(value, "size")
        elif key == b"uid":
            entry.uid = _decimal(value, "uid")
        else:
            entry.gid = _decimal(value, "gid")


def _check_sparse(entry: Entry) -> None:
    """Parts must follow one another, lie within the file, and be as long together as what is stored."""
    assert entry.sparse is not None
    end = total = 0
    for offset, length in entry.sparse:
        if offset < end or offset + length > entry.size:
            raise BadLayer("a sparse file's map is malformed")
        end = offset + length
        total += length
    if total != entry.stored:
        raise BadLayer("a sparse file's map doesn't fit its data")
