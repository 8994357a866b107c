"""SPDY/3.1 frames, without I/O: bytes to frames and back (draft-mbelshe-httpbis-spdy-00, sections 2.2 and 2.6).

What a peer announces is checked before anything is allocated for it: the length of control frames, the size of a header
block once inflated, the number of headers. Data frames are handed on piece by piece and never collected.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

MAX_CONTROL_BYTES = 64 * 1024
"""Longest control frame that is taken. A peer of Kubernetes' sends a few hundred bytes."""

MAX_HEADER_BLOCK_BYTES = 64 * 1024
"""Longest header block, inflated."""

MAX_HEADERS = 100

VERSION = 3
FLAG_FIN = 0x01
_CONTROL_BIT = 0x8000
_STREAM_ID_MASK = 0x7FFFFFFF


class FrameType(IntEnum):
    """Control frames."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class ResetStatus(IntEnum):
    """Why a stream ends (RST_STREAM)."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    CANCEL = 5
    INTERNAL_ERROR = 6


class GoAwayStatus(IntEnum):
    """Why a connection ends (GOAWAY)."""

    OK = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class SpdyError(Exception):
    """The peer has broken the protocol; the connection can't go on."""


@dataclass(frozen=True, slots=True)
class SynStream:
    """The peer opens a stream."""

    stream_id: int
    headers: Mapping[str, str]
    fin: bool


@dataclass(frozen=True, slots=True)
class Headers:
    """More headers for a stream (HEADERS, SYN_REPLY)."""

    stream_id: int
    headers: Mapping[str, str]
    fin: bool


@dataclass(frozen=True, slots=True)
class Data:
    """A piece of a data frame. ``payload`` lies in the bytes that were fed."""

    stream_id: int
    payload: memoryview
    fin: bool
    """No more data on this stream; only ever with the last piece."""


@dataclass(frozen=True, slots=True)
class RstStream:
    """The peer gives a stream up."""

    stream_id: int
    status: int


@dataclass(frozen=True, slots=True)
class Ping:
    """To be sent back if the id is the peer's."""

    ping_id: int


@dataclass(frozen=True, slots=True)
class GoAway:
    """The peer opens no more streams."""

    status: int


Frame = SynStream | Headers | Data | RstStream | Ping | GoAway


# -- header compression ------------------------------------------------------------------------------------------------


def _dictionary() -> bytes:
    """What both ends assume to have been sent before the first header block (section 2.6.10.1)."""
    words = (
        "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age"
        " allow authorization cache-control connection content-base content-encoding content-language content-length"
        " content-location content-md5 content-range content-type date etag expect expires from host if-match"
        " if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma"
        " proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade"
        " user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie"
        " keep-alive origin"
    )
    codes = (
        "100 101 201 202 205 206 300 302 303 304 305 306 307 402 405 406 407 408 409 410 411 412 413 414 415 416 417"
        " 502 504 505"
    ).replace(" ", "")
    phrases = (
        "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
        "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    )
    dates = "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    values = (
        "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
        "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
    )
    prefixed = b"".join(
        struct.pack("!I", len(word)) + word.encode() for word in (word.replace("_", " ") for word in words.split(" "))
    )
    return prefixed + (codes + phrases + dates + values).encode()


DICTIONARY = _dictionary()


class _HeaderReader:
    """Inflates and parses header blocks. One zlib stream runs through all of them."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)

    def read(self, compressed: memoryview) -> dict[str, str]:
        try:
            block = self._inflate.decompress(compressed, MAX_HEADER_BLOCK_BYTES + 1)
        except zlib.error as err:
            raise SpdyError(f"header block can't be inflated: {err}") from None
        if len(block) > MAX_HEADER_BLOCK_BYTES:
            raise SpdyError(f"header block larger than {MAX_HEADER_BLOCK_BYTES} bytes")
        if self._inflate.eof:
            raise SpdyError("header compression ended")
        return _parse_headers(block)


def _parse_headers(block: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    try:
        (count,) = struct.unpack_from("!I", block)
        if count > MAX_HEADERS:
            raise SpdyError(f"{count} headers where at most {MAX_HEADERS} are taken")
        offset = 4
        for _ in range(count):
            name, offset = _counted(block, offset)
            value, offset = _counted(block, offset)
            if not name or name != name.lower():
                raise SpdyError("header names must be in lower case")
            if name in headers:
                raise SpdyError("a header stands twice")
            headers[name] = value
    except struct.error:
        raise SpdyError("header block is cut short") from None
    if offset != len(block):
        raise SpdyError("header block is longer than its headers")
    return headers


def _counted(block: bytes, offset: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("!I", block, offset)
    end = offset + 4 + length
    if end > len(block):
        raise SpdyError("header block is cut short")
    return block[offset + 4 : end].decode("latin-1"), end


class _HeaderWriter:
    """Writes header blocks as zlib's stored (uncompressed) blocks.

    A server's replies have no headers worth compressing, and a compressor's window for each connection would cost more
    memory than everything else the connection needs.
    """

    def __init__(self) -> None:
        # RFC 1950: deflate with a 32 KiB window, a preset dictionary, no effort to compress, and the header's checksum.
        self._prefix = b"\x78\x3f" + struct.pack("!I", zlib.adler32(DICTIONARY))

    def write(self, headers: Mapping[str, str]) -> bytes:
        block = struct.pack("!I", len(headers)) + b"".join(
            struct.pack("!I", len(text)) + text for pair in headers.items() for text in (s.encode() for s in pair)
        )
        prefix, self._prefix = self._prefix, b""
        # The empty block at the end is what a reader takes for "all of this is there" (zlib's sync flush).
        return prefix + _stored(block) + _stored(b"")


def _stored(data: bytes) -> bytes:
    return struct.pack("<BHH", 0, len(data), len(data) ^ 0xFFFF) + data


# -- reading -----------------------------------------------------------------------------------------------------------


class Decoder:
    """Frames from bytes. After :class:`SpdyError` it must not be fed again."""

    def __init__(self) -> None:
        self._partial = bytearray()
        self._needed = 8
        self._headers = _HeaderReader()
        self._data_id = 0
        self._data_left = 0
        self._data_fin = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with these bytes.

        :raises SpdyError: while iterating; the frames before it are good.
        """
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end:
            if self._data_left:
                take = min(self._data_left, end - position)
                self._data_left -= take
                fin = self._data_fin and not self._data_left
                yield Data(self._data_id, view[position : position + take], fin)
                position += take
                continue
            # Headers and control frames are short: they are collected.
            take = min(self._needed - len(self._partial), end - position)
            self._partial += view[position : position + take]
            position += take
            if len(self._partial) < self._needed:
                return
            frame = self._head() if self._needed == 8 else self._control()
            if frame is not None:
                yield frame

    def _head(self) -> Frame | None:
        first, flags_length = struct.unpack_from("!II", self._partial)
        flags, length = flags_length >> 24, flags_length & 0xFFFFFF
        if not first >> 31:
            return self._data_head(first, flags, length)
        version, kind = first >> 16 & 0x7FFF, first & 0xFFFF
        if version != VERSION:
            raise SpdyError(f"SPDY version {version} where only {VERSION} is spoken")
        if kind not in _CONTROL_LENGTHS:
            raise SpdyError(f"unknown control frame {kind}")
        shortest, longest = _CONTROL_LENGTHS[kind]
        if not shortest <= length <= longest:
            raise SpdyError(f"{FrameType(kind).name} frame of {length} bytes")
        self._needed = 8 + length
        return None

    def _data_head(self, stream_id: int, flags: int, length: int) -> Frame | None:
        if stream_id == 0:
            raise SpdyError("data on stream 0")
        self._partial.clear()
        fin = bool(flags & FLAG_FIN)
        if length == 0:
            return Data(stream_id, memoryview(b""), fin)
        self._data_id, self._data_left, self._data_fin = stream_id, length, fin
        return None

    def _control(self) -> Frame | None:
        frame = bytes(self._partial)
        self._partial.clear()
        self._needed = 8
        kind, flags, payload = FrameType(frame[2] << 8 | frame[3]), frame[4], memoryview(frame)[8:]
        fin = bool(flags & FLAG_FIN)
        if kind is FrameType.SYN_STREAM:
            return SynStream(_stream_id(payload), self._headers.read(payload[10:]), fin)
        if kind in (FrameType.SYN_REPLY, FrameType.HEADERS):
            return Headers(_stream_id(payload), self._headers.read(payload[4:]), fin)
        if kind is FrameType.RST_STREAM:
            return RstStream(_stream_id(payload), _word(payload, 4))
        if kind is FrameType.PING:
            return Ping(_word(payload, 0))
        if kind is FrameType.GOAWAY:
            return GoAway(_word(payload, 4))
        if kind is FrameType.SETTINGS and len(payload) != 4 + 8 * _word(payload, 0):
            raise SpdyError("SETTINGS frame whose length and count disagree")
        # Settings and windows: no peer of ours keeps to them, and TCP's own window does the work of both.
        return None


_CONTROL_LENGTHS: dict[int, tuple[int, int]] = {
    FrameType.SYN_STREAM: (10, MAX_CONTROL_BYTES),
    FrameType.SYN_REPLY: (4, MAX_CONTROL_BYTES),
    FrameType.RST_STREAM: (8, 8),
    FrameType.SETTINGS: (4, MAX_CONTROL_BYTES),
    FrameType.PING: (4, 4),
    FrameType.GOAWAY: (8, 8),
    FrameType.HEADERS: (4, MAX_CONTROL_BYTES),
    FrameType.WINDOW_UPDATE: (8, 8),
}


def _word(payload: memoryview, offset: int) -> int:
    return int.from_bytes(payload[offset : offset + 4], "big")


def _stream_id(payload: memoryview) -> int:
    stream_id = _word(payload, 0) & _STREAM_ID_MASK
    if stream_id == 0:
        raise SpdyError("stream 0 in a frame about a stream")
    return stream_id


# -- writing -----------------------------------------------------------------------------------------------------------


class Encoder:
    """Bytes for frames, as a server sends them."""

    def __init__(self) -> None:
        self._headers = _HeaderWriter()

    def syn_reply(self, stream_id: int) -> bytes:
        """Accept a stream. To be sent in the order of encoding: the compression runs through all of them."""
        return _control(FrameType.SYN_REPLY, struct.pack("!I", stream_id) + self._headers.write({}))

    def rst_stream(self, stream_id: int, status: ResetStatus) -> bytes:
        """Give a stream up."""
        return _control(FrameType.RST_STREAM, struct.pack("!II", stream_id, status))

    def ping(self, ping_id: int) -> bytes:
        """Answer a ping."""
        return _control(FrameType.PING, struct.pack("!I", ping_id))

    def go_away(self, last_stream_id: int, status: GoAwayStatus) -> bytes:
        """No more streams."""
        return _control(FrameType.GOAWAY, struct.pack("!II", last_stream_id, status))

    def window_update(self, stream_id: int, delta_bytes: int) -> bytes:
        """Allow the peer that much more data; stream 0 is the connection."""
        return _control(FrameType.WINDOW_UPDATE, struct.pack("!II", stream_id, delta_bytes))

    def data_head(self, stream_id: int, length: int, *, fin: bool = False) -> bytes:
        """What goes before ``length`` bytes of data, at most 2^24-1."""
        return struct.pack("!II", stream_id, (FLAG_FIN if fin else 0) << 24 | length)


def _control(kind: FrameType, payload: bytes) -> bytes:
    return struct.pack("!HHI", _CONTROL_BIT | VERSION, kind, len(payload)) + payload
