"""The streams of a port-forward, whatever carries them.

SPDY clients open two streams for each connection, one for data and one for errors, which carry the same ``requestID``.
Over plain WebSocket there are two channels for each port, all of them there from the start.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from wsproto.frame_protocol import CloseReason

from shim_streaming.channels import ChannelMessages, ClientLeft
from shim_streaming.spdy import GoAwayStatus
from shim_streaming.spdy_streams import Opened, Received, Reset, SpdyEndpoint, Write
from shim_streaming.transport import Buffer
from shim_streaming.websocket import Closed, WebSocketEndpoint, WebSocketError

_MAX_REQUEST_ID_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Connect:
    """The client wants a connection."""

    key: int
    port: int | None
    """None when it has named none that could be one."""


@dataclass(frozen=True, slots=True)
class Input:
    """Data for a connection; ``last`` when no more will come."""

    key: int
    payload: memoryview
    last: bool


@dataclass(frozen=True, slots=True)
class Leave:
    """The client gives a connection up."""

    key: int


Event = Connect | Input | Leave


class ForwardStreams(Protocol):
    """What carries connections. Each has a key."""

    half_close: bool
    """Whether one direction can be closed without the other."""
    fixed: bool
    """Whether all connections are there from the start: when they are over, so is the session."""

    def begin(self) -> Iterator[Connect]:
        """The connections that are wanted from the start."""

    def receive(self, data: bytes) -> Iterator[Event]:
        """What these bytes bring.

        :raises SpdyError, WebSocketError: the client has broken the protocol.   :raises ClientLeft: it is done.
        """

    def send(self, key: int, data: Buffer) -> None:
        """Send what the pod has sent."""

    def end(self, key: int) -> None:
        """The pod won't send any more on this connection."""

    def fail(self, key: int, problem: str) -> None:
        """Tell why a connection can't be."""

    def done(self, key: int, *, reset: bool) -> None:
        """A connection is over; with ``reset``, it broke off."""

    def expire(self, problem: str) -> None:
        """Give up connections that were incomplete at the call before this one already."""

    def go_away(self) -> None:
        """Everything is over."""

    def abandon(self, err: Exception) -> None:
        """Tell a client that has broken the protocol so."""

    def probe(self) -> None:
        """Send something that isn't answered."""


class _Pair:
    __slots__ = ("aged", "data_id", "error_id", "key", "port", "request_id")

    def __init__(self, request_id: str, key: int) -> None:
        self.request_id = request_id
        self.key = key
        self.port: int | None = None
        self.data_id: int | None = None
        self.error_id: int | None = None
        self.aged = False


class SpdyForwardStreams:
    """``portforward.k8s.io`` over SPDY/3.1, which may itself be in binary WebSocket messages (KEP-4006's tunnel)."""

    half_close = True
    fixed = False

    def __init__(self, write: Write, max_forwards: int, *, tunnel: bool) -> None:
        self._websocket = WebSocketEndpoint(write) if tunnel else None
        self._spdy = SpdyEndpoint(self._websocket.send_binary if self._websocket else write, 2 * max_forwards)
        self._waiting: dict[str, _Pair] = {}
        self._pairs: dict[int, _Pair] = {}
        self._by_stream: dict[int, _Pair] = {}

    def begin(self) -> Iterator[Connect]:
        return iter(())

    def receive(self, data: bytes) -> Iterator[Event]:
        if self._websocket is None:
            yield from self._receive_spdy(data)
            return
        for piece in self._websocket.receive(data):
            if isinstance(piece, Closed):
                raise ClientLeft
            if piece.text:
                raise WebSocketError("a tunnel takes binary messages only", CloseReason.UNSUPPORTED_DATA)
            yield from self._receive_spdy(piece.payload)

    def _receive_spdy(self, data: bytes) -> Iterator[Event]:
        for event in self._spdy.receive(data):
            if isinstance(event, Opened):
                yield from self._opened(event)
                continue
            pair = self._by_stream.get(event.stream_id)
            if pair is None:
                continue
            if isinstance(event, Reset):
                yield from self._reset(pair, event.stream_id)
            elif event.stream_id == pair.data_id:
                yield from self._data(pair, event)

    def _opened(self, event: Opened) -> Iterator[Event]:
        kind = event.headers.get("streamtype")
        request_id = event.headers.get("requestid", "")
        if kind not in ("data", "error") or len(request_id) > _MAX_REQUEST_ID_CHARACTERS:
            self._spdy.refuse(event.stream_id)
            return
        if not request_id:
            # Clients of before 1.2 send none, and open the error stream right before the data stream.
            request_id = f"stream {event.stream_id if kind == 'error' else event.stream_id - 2}"
        pair = self._waiting.setdefault(request_id, _Pair(request_id, event.stream_id))
        if (pair.error_id if kind == "error" else pair.data_id) is not None:
            self._spdy.refuse(event.stream_id)
            return
        self._spdy.accept(event.stream_id)
        self._by_stream[event.stream_id] = pair
        if kind == "error":
            pair.error_id = event.stream_id
        else:
            pair.data_id = event.stream_id
            pair.port = _port(event.headers.get("port", ""))
        if pair.data_id is not None and pair.error_id is not None:
            del self._waiting[request_id]
            self._pairs[pair.key] = pair
            yield Connect(pair.key, pair.port)
            if event.fin and kind == "data":
                yield Input(pair.key, memoryview(b""), last=True)

    def _data(self, pair: _Pair, event: Received) -> Iterator[Event]:
        if pair.key not in self._pairs:
            # Before the error stream is there nothing can be done with it, and nothing is kept.
            self._discard(pair)
            return
        yield Input(pair.key, event.payload, event.fin)

    def _reset(self, pair: _Pair, stream_id: int) -> Iterator[Event]:
        if pair.key not in self._pairs:
            self._discard(pair)
        elif stream_id == pair.data_id:
            yield Leave(pair.key)

    def _discard(self, pair: _Pair) -> None:
        self._waiting.pop(pair.request_id, None)
        for stream_id in (pair.data_id, pair.error_id):
            if stream_id is not None:
                self._by_stream.pop(stream_id, None)
                self._spdy.reset(stream_id)

    def send(self, key: int, data: Buffer) -> None:
        pair = self._pairs.get(key)
        if pair is not None and pair.data_id is not None:
            self._spdy.send(pair.data_id, data)

    def end(self, key: int) -> None:
        pair = self._pairs.get(key)
        if pair is not None and pair.data_id is not None:
            self._spdy.end(pair.data_id)

    def fail(self, key: int, problem: str) -> None:
        pair = self._pairs.get(key)
        if pair is not None and pair.error_id is not None:
            self._spdy.send(pair.error_id, problem.encode("utf-8", "replace"))

    def done(self, key: int, *, reset: bool) -> None:
        pair = self._pairs.pop(key, None)
        if pair is None or pair.data_id is None or pair.error_id is None:
            return
        del self._by_stream[pair.data_id], self._by_stream[pair.error_id]
        self._spdy.end(pair.error_id)
        if reset:
            self._spdy.reset(pair.data_id)
        else:
            self._spdy.end(pair.data_id)

    def expire(self, problem: str) -> None:
        for pair in list(self._waiting.values()):
            if pair.aged:
                if pair.error_id is not None:
                    self._spdy.send(pair.error_id, problem.encode())
                    self._spdy.end(pair.error_id)
                self._discard(pair)
            pair.aged = True

    def go_away(self) -> None:
        self._spdy.go_away()
        if self._websocket is not None:
            self._websocket.close()

    def abandon(self, err: Exception) -> None:
        self._spdy.go_away(GoAwayStatus.PROTOCOL_ERROR)
        if self._websocket is not None:
            code = err.code if isinstance(err, WebSocketError) else CloseReason.PROTOCOL_ERROR
            self._websocket.close(code, str(err))

    def probe(self) -> None:
        (self._websocket or self._spdy).probe()


class WebSocketForwardStreams:
    """``v4.channel.k8s.io``: channel 2n is the data of the n-th port, channel 2n+1 its errors.

    Both begin with the port, in two bytes, least significant first. A channel can't be closed by itself.
    """

    half_close = False
    fixed = True

    def __init__(self, write: Write, ports: tuple[int, ...], *, encoded: bool) -> None:
        self._websocket = WebSocketEndpoint(write)
        self._messages = ChannelMessages(self._websocket, encoded=encoded)
        self._ports = ports
        for number in range(2 * len(ports)):
            self._messages.send(number, struct.pack("<H", ports[number // 2]))

    def begin(self) -> Iterator[Connect]:
        return (Connect(2 * index, port) for index, port in enumerate(self._ports))

    def receive(self, data: bytes) -> Iterator[Event]:
        for number, payload in self._messages.receive(data):
            if number % 2 == 0 and payload:
                yield Input(number, memoryview(payload), last=False)

    def send(self, key: int, data: Buffer) -> None:
        self._messages.send(key, data)

    def end(self, key: int) -> None:
        """There is no way to say so."""

    def fail(self, key: int, problem: str) -> None:
        self._messages.send(key + 1, problem.encode("utf-8", "replace"))

    def done(self, key: int, *, reset: bool) -> None:
        """There is no way to say so."""

    def expire(self, problem: str) -> None:
        """Nothing is ever incomplete."""

    def go_away(self) -> None:
        self._websocket.close()

    def abandon(self, err: Exception) -> None:
        self._messages.abandon(err)

    def probe(self) -> None:
        self._websocket.probe()


def _port(text: str) -> int | None:
    """A TCP port, or None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536 else None
