"""WebSocket messages (RFC 6455), without I/O: wsproto does the parsing, this keeps what is sent and held small."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import wsproto.events
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError

from shim_streaming.spdy_streams import Write
from shim_streaming.transport import Buffer

_FINAL_BINARY = 0x82


class WebSocketError(Exception):
    """The peer has broken the protocol; the connection can't go on.

    :param code: the close code it is told (RFC 6455, section 7.4).
    """

    def __init__(self, message: str, code: int = CloseReason.PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a message. Messages of any size come in pieces and are never collected."""

    payload: bytes
    first: bool
    """The message begins with it."""
    last: bool
    """The message ends with it."""
    text: bool


@dataclass(frozen=True, slots=True)
class Closed:
    """The client has closed the WebSocket."""


class WebSocketEndpoint:
    """The server's end of a WebSocket, after the handshake.

    :param write: sends bytes to the client.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._connection = Connection(ConnectionType.SERVER)
        self._inside = False
        self._closed = False

    def receive(self, data: bytes) -> Iterator[Piece | Closed]:
        """What these bytes mean. Pings are answered.

        :raises WebSocketError: while iterating.
        """
        if self._closed:
            return
        self._connection.receive_data(data)
        for event in self._connection.events():
            if isinstance(event, wsproto.events.TextMessage | wsproto.events.BytesMessage):
                yield self._piece(event)
            elif isinstance(event, wsproto.events.Ping):
                self._send(event.response())
            elif isinstance(event, wsproto.events.CloseConnection):
                self._closed = True
                if self._connection.state in (ConnectionState.OPEN, ConnectionState.LOCAL_CLOSING):
                    # Not the client's goodbye: wsproto's advice after a frame that it could not parse.
                    raise WebSocketError(event.reason or "not a WebSocket frame", event.code)
                self._send(event.response())
                yield Closed()
                return

    def _piece(self, event: wsproto.events.TextMessage | wsproto.events.BytesMessage) -> Piece:
        first, self._inside = not self._inside, not event.message_finished
        text = isinstance(event.data, str)
        payload = event.data.encode() if isinstance(event.data, str) else bytes(event.data)
        return Piece(payload, first, event.message_finished, text)

    def send_binary(self, *parts: Buffer) -> None:
        """Send one binary message."""
        # All output goes this way. wsproto would copy it several times to put a head of ten bytes before it.
        if self._connection.state is ConnectionState.OPEN:
            self._write(_binary_head(sum(map(len, parts))), *parts)

    def send_text(self, text: str) -> None:
        """Send one text message."""
        self._send(wsproto.events.TextMessage(data=text))

    def probe(self) -> None:
        """Send a frame that needs no answer: a pong that nobody has asked for (RFC 6455, section 5.5.3)."""
        self._send(wsproto.events.Pong())

    def close(self, code: int = CloseReason.NORMAL_CLOSURE, reason: str = "") -> None:
        """Send a close frame, unless one has been sent."""
        self._send(wsproto.events.CloseConnection(code=code, reason=reason))

    def _send(self, event: wsproto.events.Event) -> None:
        try:
            self._write(self._connection.send(event))
        except LocalProtocolError:
            pass  # closing already: the client hears nothing more


def _binary_head(length: int) -> bytes:
    """The head of a frame that is a whole binary message, not masked, as servers send it (RFC 6455, section 5.2)."""
    if length < 126:
        return struct.pack("!BB", _FINAL_BINARY, length)
    if length < 1 << 16:
        return struct.pack("!BBH", _FINAL_BINARY, 126, length)
    return struct.pack("!BBQ", _FINAL_BINARY, 127, length)
