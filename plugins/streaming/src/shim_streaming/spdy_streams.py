"""The server's end of a SPDY connection, without I/O: which streams there are and which halves of them are open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from shim_streaming import spdy
from shim_streaming.spdy import GoAwayStatus, ResetStatus, SpdyError
from shim_streaming.transport import Buffer

Write = Callable[..., None]
"""Called with the buffers to be sent, in order."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream the client wants: to be accepted or refused at once."""

    stream_id: int
    headers: Mapping[str, str]
    fin: bool
    """The client won't send on it."""


@dataclass(frozen=True, slots=True)
class Received:
    """Data of a stream; with ``fin``, the last."""

    stream_id: int
    payload: memoryview
    fin: bool


@dataclass(frozen=True, slots=True)
class Reset:
    """The client has given the stream up, both halves of it."""

    stream_id: int


Event = Opened | Received | Reset


class _Stream:
    __slots__ = ("receiving", "sending")

    def __init__(self, *, receiving: bool) -> None:
        self.receiving = receiving
        self.sending = True


class SpdyEndpoint:
    """Streams over one SPDY/3.1 connection, as moby/spdystream's clients use them.

    Flow control is TCP's: that library neither keeps to SPDY's windows nor updates them.

    :param write: sends bytes to the client.
    :param max_streams: how many may be open at once; more are refused.
    """

    def __init__(self, write: Write, max_streams: int) -> None:
        self._write = write
        self._max_streams = max_streams
        self._decoder = spdy.Decoder()
        self._encoder = spdy.Encoder()
        self._streams: dict[int, _Stream] = {}
        self._last_id = 0
        self._going_away = False

    def receive(self, data: bytes) -> Iterator[Event]:
        """What these bytes mean.

        :raises SpdyError: while iterating.
        """
        for frame in self._decoder.feed(data):
            event = self._frame(frame)
            if event is not None:
                yield event

    def _frame(self, frame: spdy.Frame) -> Event | None:
        if isinstance(frame, spdy.Data):
            return self._received(frame.stream_id, frame.payload, frame.fin)
        if isinstance(frame, spdy.SynStream):
            return self._opened(frame)
        if isinstance(frame, spdy.Headers):
            return self._received(frame.stream_id, memoryview(b""), frame.fin) if frame.fin else None
        if isinstance(frame, spdy.RstStream):
            return Reset(frame.stream_id) if self._streams.pop(frame.stream_id, None) is not None else None
        if isinstance(frame, spdy.Ping):
            # Clients number theirs oddly; an even one answers a ping that was never sent.
            if frame.ping_id % 2:
                self._write(self._encoder.ping(frame.ping_id))
            return None
        self._going_away = True
        return None

    def _opened(self, frame: spdy.SynStream) -> Event | None:
        if frame.stream_id % 2 == 0 or frame.stream_id <= self._last_id:
            raise SpdyError("a new stream needs an odd number above all before it")
        self._last_id = frame.stream_id
        if self._going_away or len(self._streams) >= self._max_streams:
            self.refuse(frame.stream_id)
            return None
        self._streams[frame.stream_id] = _Stream(receiving=not frame.fin)
        return Opened(frame.stream_id, frame.headers, frame.fin)

    def _received(self, stream_id: int, payload: memoryview, fin: bool) -> Event | None:
        stream = self._streams.get(stream_id)
        # On the way while the stream was closed here, as like as not: no fault of the client's.
        if stream is None or not stream.receiving:
            return None
        if fin:
            stream.receiving = False
            self._drop_if_done(stream_id, stream)
        return Received(stream_id, payload, fin)

    def accept(self, stream_id: int) -> None:
        """Tell the client that its stream is taken; nothing can be sent on it before."""
        self._write(self._encoder.syn_reply(stream_id))

    def refuse(self, stream_id: int) -> None:
        """Turn a stream down."""
        self._streams.pop(stream_id, None)
        self._write(self._encoder.rst_stream(stream_id, ResetStatus.REFUSED_STREAM))

    def send(self, stream_id: int, payload: Buffer) -> None:
        """Send data; without effect on a stream whose sending half is closed."""
        stream = self._streams.get(stream_id)
        if stream is not None and stream.sending and payload:
            self._write(self._encoder.data_head(stream_id, len(payload)), payload)

    def end(self, stream_id: int) -> None:
        """Close the sending half."""
        stream = self._streams.get(stream_id)
        if stream is not None and stream.sending:
            stream.sending = False
            self._write(self._encoder.data_head(stream_id, 0, fin=True))
            self._drop_if_done(stream_id, stream)

    def reset(self, stream_id: int) -> None:
        """Give a stream up, both halves of it."""
        if self._streams.pop(stream_id, None) is not None:
            self._write(self._encoder.rst_stream(stream_id, ResetStatus.CANCEL))

    def go_away(self, status: GoAwayStatus = GoAwayStatus.OK) -> None:
        """Say that the connection is over."""
        self._going_away = True
        self._write(self._encoder.go_away(self._last_id, status))

    def probe(self) -> None:
        """Send a frame that needs no answer.

        A ping won't do. A client that can't write just now would stop reading over its answer.
        """
        self._write(self._encoder.window_update(0, 1))

    @property
    def open_streams(self) -> int:
        """Streams with a half open."""
        return len(self._streams)

    def _drop_if_done(self, stream_id: int, stream: _Stream) -> None:
        if not stream.receiving and not stream.sending:
            self._streams.pop(stream_id, None)
