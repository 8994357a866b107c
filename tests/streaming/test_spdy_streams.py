"""Which streams there are, and what may still happen on them."""

from __future__ import annotations

import struct
import zlib

import pytest
from shim_streaming import spdy
from shim_streaming.spdy import SpdyError
from shim_streaming.spdy_streams import Opened, Received, Reset, SpdyEndpoint


class Peer:
    """An endpoint, and the client's frames for it."""

    def __init__(self, max_streams: int = 10) -> None:
        self.sent = bytearray()
        self.endpoint = SpdyEndpoint(self._write, max_streams)
        self._deflate = zlib.compressobj(zdict=spdy.DICTIONARY)

    def _write(self, *buffers: bytes) -> None:
        for buffer in buffers:
            self.sent += buffer

    def control(self, kind: int, payload: bytes, flags: int = 0) -> list[object]:
        return self.feed(struct.pack("!HHI", 0x8003, kind, flags << 24 | len(payload)) + payload)

    def open(self, number: int, *, fin: bool = False) -> list[object]:
        block = self._deflate.compress(bytes(4)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        return self.control(1, struct.pack("!IIH", number, 0, 0) + block, 1 if fin else 0)

    def data(self, number: int, data: bytes, *, fin: bool = False) -> list[object]:
        return self.feed(struct.pack("!II", number, (1 if fin else 0) << 24 | len(data)) + data)

    def feed(self, data: bytes) -> list[object]:
        return list(self.endpoint.receive(data))

    def take(self) -> bytes:
        sent, self.sent = bytes(self.sent), bytearray()
        return sent


RST_REFUSED = bytes.fromhex("8003000300000008 00000003 00000003")


def test_a_stream_from_beginning_to_end() -> None:
    peer = Peer()
    assert peer.open(1) == [Opened(1, {}, fin=False)]
    peer.endpoint.accept(1)
    peer.take()
    assert peer.data(1, b"in") == [Received(1, memoryview(b"in"), fin=False)]
    peer.endpoint.send(1, b"out")
    assert peer.take() == bytes.fromhex("0000000100000003") + b"out"
    assert peer.data(1, b"", fin=True) == [Received(1, memoryview(b""), fin=True)]
    assert peer.endpoint.open_streams == 1
    peer.endpoint.end(1)
    assert peer.take() == bytes.fromhex("0000000101000000")
    assert peer.endpoint.open_streams == 0


def test_a_closed_half_stays_closed() -> None:
    peer = Peer()
    peer.open(1)
    peer.data(1, b"", fin=True)
    assert peer.data(1, b"more") == []
    peer.endpoint.end(1)
    peer.take()
    peer.endpoint.send(1, b"more")
    peer.endpoint.end(1)
    peer.endpoint.reset(1)
    assert peer.take() == b""


def test_open_with_fin() -> None:
    peer = Peer()
    assert peer.open(1, fin=True) == [Opened(1, {}, fin=True)]
    assert peer.data(1, b"x") == []


def test_reset_by_the_client() -> None:
    peer = Peer()
    peer.open(1)
    assert peer.control(3, struct.pack("!II", 1, 5)) == [Reset(1)]
    assert peer.control(3, struct.pack("!II", 1, 5)) == []
    peer.endpoint.send(1, b"x")
    assert peer.take() == b""


def test_data_for_streams_that_never_were_is_ignored() -> None:
    assert Peer().data(7, b"x") == []


def test_headers_can_end_a_stream() -> None:
    peer = Peer()
    peer.open(1)
    block = peer._deflate.compress(bytes(4)) + peer._deflate.flush(zlib.Z_SYNC_FLUSH)
    assert peer.control(8, struct.pack("!I", 1) + block, 1) == [Received(1, memoryview(b""), fin=True)]


@pytest.mark.parametrize("number", [2, 1])
def test_stream_numbers_are_odd_and_grow(number: int) -> None:
    peer = Peer()
    peer.open(1)
    with pytest.raises(SpdyError, match="odd number"):
        peer.open(number)


def test_too_many_streams_are_refused() -> None:
    peer = Peer(max_streams=1)
    peer.open(1)
    assert peer.open(3) == []
    assert peer.take() == RST_REFUSED
    peer.control(3, struct.pack("!II", 1, 5))
    assert peer.open(5) == [Opened(5, {}, fin=False)]


def test_no_streams_after_goaway() -> None:
    peer = Peer()
    peer.open(1)
    assert peer.control(7, bytes(8)) == []
    assert peer.open(3) == []
    assert peer.take() == RST_REFUSED
    assert peer.data(1, b"x") == [Received(1, memoryview(b"x"), fin=False)]


def test_pings_of_the_client_are_answered_and_others_are_not() -> None:
    peer = Peer()
    peer.control(6, struct.pack("!I", 7))
    peer.control(6, struct.pack("!I", 8))
    assert peer.take() == bytes.fromhex("800300060000000400000007")


def test_goaway_names_the_last_stream() -> None:
    peer = Peer()
    peer.open(5)
    peer.endpoint.go_away()
    assert peer.take() == bytes.fromhex("80030007000000080000000500000000")
