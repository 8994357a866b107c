"""The streams of an exec or attach session, whatever carries them: SPDY streams or WebSocket channels."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from enum import Enum
from typing import Protocol

from wsproto.frame_protocol import CloseReason

from shim_streaming.handshake import CommandProtocol
from shim_streaming.spdy import GoAwayStatus
from shim_streaming.spdy_streams import Opened, Received, SpdyEndpoint, Write
from shim_streaming.status import Status
from shim_streaming.tickets import CommandTicket
from shim_streaming.transport import Buffer
from shim_streaming.websocket import Closed, Piece, WebSocketEndpoint, WebSocketError


class Role(Enum):
    """What a stream is for."""

    STDIN = "stdin"
    STDOUT = "stdout"
    STDERR = "stderr"
    ERROR = "error"
    RESIZE = "resize"


Input = tuple[Role, memoryview | None]
"""Something from the client, for stdin or resize; None is the end of it."""


class ClientLeft(Exception):
    """The client has said that it is done, in its protocol's way."""


class CommandChannels(Protocol):
    """What carries a session's streams."""

    @property
    def ready(self) -> bool:
        """All streams the session needs are there."""

    def receive(self, data: bytes) -> Iterator[Input]:
        """What these bytes bring.

        :raises SpdyError, WebSocketError: the client has broken the protocol.
        :raises ClientLeft: nothing more will come.
        """

    def send(self, role: Role, data: Buffer) -> None:
        """Send output."""

    def conclude(self, status: Status) -> None:
        """Send how it ended, and close everything in order."""

    def abandon(self, err: Exception) -> None:
        """Tell a client that has broken the protocol so."""

    def probe(self) -> None:
        """Send something that isn't answered."""


class SpdyChannels:
    """Streams named by the header ``streamType``; versions v1 to v4 of ``channel.k8s.io``."""

    def __init__(self, ticket: CommandTicket, protocol: CommandProtocol, write: Write) -> None:
        self._spdy = SpdyEndpoint(write, max_streams=len(Role))
        self._protocol = protocol
        self._by_role: dict[Role, int] = {}
        self._by_id: dict[int, Role] = {}
        self._missing = {Role.ERROR}
        self._missing |= {Role.STDIN} if ticket.stdin else set()
        self._missing |= {Role.STDOUT} if ticket.stdout else set()
        self._missing |= {Role.STDERR} if ticket.stderr else set()
        # Output that comes before this stream is accepted could fill the client's queue, and so keep it from hearing
        # that it is: clients that resize always open it.
        self._missing |= {Role.RESIZE} if ticket.tty and protocol.resizes else set()

    @property
    def ready(self) -> bool:
        return not self._missing

    def receive(self, data: bytes) -> Iterator[Input]:
        for event in self._spdy.receive(data):
            if isinstance(event, Opened):
                role = self._opened(event)
                if role is not None and event.fin:
                    yield role, None
                continue
            role = self._by_id.get(event.stream_id)
            if role is not Role.STDIN and role is not Role.RESIZE:
                continue
            if isinstance(event, Received):
                if event.payload:
                    yield role, event.payload
                if not event.fin:
                    continue
            yield role, None

    def _opened(self, event: Opened) -> Role | None:
        try:
            role = Role(event.headers.get("streamtype", ""))
        except ValueError:
            role = None
        if role is None or role in self._by_role:
            self._spdy.refuse(event.stream_id)
            return None
        self._by_role[role] = event.stream_id
        self._by_id[event.stream_id] = role
        self._missing.discard(role)
        self._spdy.accept(event.stream_id)
        if role is Role.STDIN and self._protocol.version == 1:
            # Version 1 has the server close its half of stdin at once.
            self._spdy.end(event.stream_id)
        return role

    def send(self, role: Role, data: Buffer) -> None:
        stream_id = self._by_role.get(role)
        if stream_id is not None:
            self._spdy.send(stream_id, data)

    def conclude(self, status: Status) -> None:
        # A client of version 1 stops listening when the output ends, so the status comes first.
        self.send(Role.ERROR, status.json if self._protocol.json_status else status.text)
        for role in (Role.ERROR, Role.STDOUT, Role.STDERR, Role.RESIZE, Role.STDIN):
            if role in self._by_role:
                self._spdy.end(self._by_role[role])
        self._spdy.go_away()

    def abandon(self, err: Exception) -> None:
        self._spdy.go_away(GoAwayStatus.PROTOCOL_ERROR)

    def probe(self) -> None:
        self._spdy.probe()


class WebSocketChannels:
    """Messages that begin with a channel's number; ``channel.k8s.io`` and ``base64.channel.k8s.io``."""

    _NUMBERS = (Role.STDIN, Role.STDOUT, Role.STDERR, Role.ERROR, Role.RESIZE)
    _CLOSE = 255

    ready = True

    def __init__(self, ticket: CommandTicket, protocol: CommandProtocol, write: Write) -> None:
        self._websocket = WebSocketEndpoint(write)
        self._protocol = protocol
        self._messages = ChannelMessages(self._websocket, encoded=protocol.base64)
        # An empty message tells the client that the session is open.
        first = Role.STDOUT if ticket.stdout else Role.STDERR if ticket.stderr else Role.ERROR
        self._messages.send(self._NUMBERS.index(first), b"")

    def receive(self, data: bytes) -> Iterator[Input]:
        for number, payload in self._messages.receive(data):
            if number == self._CLOSE and self._protocol.closes:
                yield from self._close_signal(payload)
            elif 0 <= number < len(self._NUMBERS) and payload:
                role = self._NUMBERS[number]
                if role is Role.STDIN or role is Role.RESIZE:
                    yield role, memoryview(payload)

    def _close_signal(self, payload: bytes) -> Iterator[Input]:
        for number in payload:
            if number >= len(self._NUMBERS):
                raise WebSocketError(f"close signal for channel {number}, which there isn't")
            role = self._NUMBERS[number]
            if role is Role.STDIN or role is Role.RESIZE:
                yield role, None

    def send(self, role: Role, data: Buffer) -> None:
        self._messages.send(self._NUMBERS.index(role), data)

    def conclude(self, status: Status) -> None:
        message = status.json if self._protocol.json_status else status.text
        if message:
            self.send(Role.ERROR, message)
        self._websocket.close()

    def abandon(self, err: Exception) -> None:
        self._messages.abandon(err)

    def probe(self) -> None:
        self._websocket.probe()


class ChannelMessages:
    """Numbered channels over a WebSocket. Messages are passed on in the pieces they come in."""

    def __init__(self, websocket: WebSocketEndpoint, *, encoded: bool) -> None:
        self._websocket = websocket
        self._base64 = encoded
        self._channel: int | None = None
        self._rest = b""

    def receive(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Pairs of a channel and bytes for it.

        :raises WebSocketError: the client has broken the protocol.   :raises ClientLeft: it has closed the WebSocket.
        """
        for event in self._websocket.receive(data):
            if isinstance(event, Closed):
                raise ClientLeft
            yield from self._piece(event)

    def _piece(self, piece: Piece) -> Iterator[tuple[int, bytes]]:
        payload = piece.payload
        if piece.first:
            self._channel, self._rest = None, b""
        if self._channel is None and payload:
            self._channel, payload = payload[0], payload[1:]
            if self._base64:
                self._channel -= ord("0")
        if self._channel is not None:
            if self._base64:
                payload = self._decoded(payload, last=piece.last)
            yield self._channel, payload

    def _decoded(self, payload: bytes, *, last: bool) -> bytes:
        text = self._rest + payload.translate(None, b"\r\n")
        whole = len(text) // 4 * 4
        text, self._rest = text[:whole], text[whole:]
        try:
            if last and self._rest:
                raise binascii.Error
            return binascii.a2b_base64(text, strict_mode=True) if text else b""
        except binascii.Error:
            raise WebSocketError("not base64", CloseReason.INVALID_FRAME_PAYLOAD_DATA) from None

    def send(self, number: int, data: Buffer) -> None:
        """Send one message."""
        if self._base64:
            self._websocket.send_text(chr(ord("0") + number) + base64.b64encode(data).decode())
        else:
            self._websocket.send_binary(bytes((number,)), data)

    def abandon(self, err: Exception) -> None:
        """Close with what the client did wrong."""
        code = err.code if isinstance(err, WebSocketError) else CloseReason.PROTOCOL_ERROR
        self._websocket.close(code, str(err))
