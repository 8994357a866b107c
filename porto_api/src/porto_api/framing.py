"""Porto's framing, without I/O: a base-128 varint length, then that many bytes of one protobuf message."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from porto_api.errors import ProtocolError

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""The largest message portod takes (its ``daemon.max_msg_len``)."""

_MAX_VARINT_BYTES = (
    5  # 35 bits hold any length up to MAX_MESSAGE_BYTES; a longer varint is an attack or another protocol
)


class Serializable(Protocol):
    """What this module needs of a protobuf message."""

    def SerializeToString(self) -> bytes: ...  # noqa: N802 - protobuf's name


def encode(message: Serializable, limit: int = MAX_MESSAGE_BYTES) -> bytes:
    """One message as it goes over the wire.

    :raises ProtocolError: the message is larger than ``limit`` bytes.
    """
    payload = message.SerializeToString()
    if len(payload) > limit:
        raise ProtocolError(f"message of {len(payload)} bytes exceeds Porto's limit of {limit} bytes")
    return encode_length(len(payload)) + payload


def encode_length(value: int) -> bytes:
    """``value`` as a varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Decoder:
    """Cuts a byte stream into message payloads.

    ``feed`` takes bytes as they come, in pieces of any size, and yields each payload that became complete.
    A length above ``limit`` is refused before any of its bytes are kept.
    """

    def __init__(self, limit: int = MAX_MESSAGE_BYTES) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payloads completed by ``data``, in order.

        :raises ProtocolError: the length is malformed or above the limit; the stream can't be read on.
        """
        self._buffer += data
        while (header := self._header()) is not None:
            length, start = header
            if len(self._buffer) < start + length:
                return
            payload = bytes(self._buffer[start : start + length])
            del self._buffer[: start + length]
            yield payload

    @property
    def partial(self) -> bool:
        """True while part of a message has come and the rest has not."""
        return bool(self._buffer)

    def _header(self) -> tuple[int, int] | None:
        length = 0
        for index, byte in enumerate(self._buffer[:_MAX_VARINT_BYTES]):
            length |= (byte & 0x7F) << (7 * index)
            if not byte & 0x80:
                if length > self._limit:
                    raise ProtocolError(f"message of {length} bytes exceeds the limit of {self._limit} bytes")
                return length, index + 1
        if len(self._buffer) >= _MAX_VARINT_BYTES:
            raise ProtocolError("malformed message length")
        return None
