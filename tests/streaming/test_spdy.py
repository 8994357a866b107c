"""SPDY frames: what real clients send, what hostile ones do."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shim_streaming import spdy
from shim_streaming.spdy import Data, Decoder, Encoder, Frame, GoAway, Headers, Ping, RstStream, SpdyError, SynStream

# Written by moby/spdystream 0.5.1, in this order on one connection.
SYN_ERROR = bytes.fromhex(
    "800300010000003e0000000100000000000078f9e3c6a7c202253a703a2b294a4dcc851625aca9a0808614cb45e01c606160"
    "61c0c0c0c0590489c64c50f2663400000000ffff"
)
SYN_DATA = bytes.fromhex("800300010000001800000003000000000000c2aa19540e2512d60b000000ffff")
SYN_STDIN_FIN = bytes.fromhex("800300010100001900000005000000000000021198161797a464e601000000ffff")
DATA = bytes.fromhex("000000030000000568656c6c6f")
DATA_FIN = bytes.fromhex("0000000301000000")
RST = bytes.fromhex("80030003000000080000000300000005")
PING = bytes.fromhex("800300060000000400000001")
GOAWAY = bytes.fromhex("80030007000000080000000000000000")
SETTINGS = bytes.fromhex("800300040000000c000000010000000700010000")
WINDOW_UPDATE = bytes.fromhex("800300090000000800000001000003e8")
HEADERS = bytes.fromhex("800300080000001100000001824a315680884a00000000ffff")
REAL = [SYN_ERROR, SYN_DATA, SYN_STDIN_FIN, DATA, DATA_FIN, RST, PING, GOAWAY, SETTINGS, WINDOW_UPDATE, HEADERS]


def decode(data: bytes, *sizes: int) -> list[Frame]:
    """Frames of ``data``, fed in pieces of these sizes and then the rest; payloads of data frames copied."""
    decoder, frames = Decoder(), []
    for size in (*sizes, len(data)):
        piece, data = data[:size], data[size:]
        for frame in decoder.feed(piece):
            if isinstance(frame, Data):
                frame = Data(frame.stream_id, memoryview(bytes(frame.payload)), frame.fin)
            frames.append(frame)
    return frames


def control(kind: int, payload: bytes, *, length: int | None = None, version: int = 3, flags: int = 0) -> bytes:
    head = struct.pack("!HHI", 0x8000 | version, kind, flags << 24 | (len(payload) if length is None else length))
    return head + payload


def syn_stream(block: bytes, stream_id: int = 1) -> bytes:
    """SYN_STREAM with this header block, not compressed yet."""
    deflate = zlib.compressobj(9, zdict=spdy.DICTIONARY)
    compressed = deflate.compress(block) + deflate.flush(zlib.Z_SYNC_FLUSH)
    return control(1, struct.pack("!IIH", stream_id, 0, 0) + compressed)


def counted(*texts: bytes) -> bytes:
    return b"".join(struct.pack("!I", len(text)) + text for text in texts)


def test_dictionary_is_the_one_of_the_specification() -> None:
    assert len(spdy.DICTIONARY) == 1423
    assert zlib.adler32(spdy.DICTIONARY) == 0xE3C6A7C2


def test_real_frames() -> None:
    headers = {"streamtype": "error", "port": "8080", "requestid": "0"}
    assert decode(b"".join(REAL)) == [
        SynStream(1, headers, fin=False),
        SynStream(3, {**headers, "streamtype": "data"}, fin=False),
        SynStream(5, {"streamtype": "stdin"}, fin=True),
        Data(3, memoryview(b"hello"), fin=False),
        Data(3, memoryview(b""), fin=True),
        RstStream(3, 5),
        Ping(1),
        GoAway(0),
        Headers(1, {"x": "y"}, fin=False),
    ]


@given(st.lists(st.integers(0, 40), max_size=40))
def test_frames_do_not_depend_on_how_they_are_cut(sizes: list[int]) -> None:
    def joined(frames: list[Frame]) -> list[Frame]:
        """Pieces of one data frame put together."""
        result: list[Frame] = []
        for frame in frames:
            last = result[-1] if result else None
            if isinstance(frame, Data) and isinstance(last, Data) and not last.fin and last.payload:
                result[-1] = Data(frame.stream_id, memoryview(bytes(last.payload) + bytes(frame.payload)), frame.fin)
            else:
                result.append(frame)
        return result

    stream = b"".join(REAL)
    assert joined(decode(stream, *sizes)) == joined(decode(stream))


def test_fin_comes_with_the_last_piece_only() -> None:
    frames = decode(struct.pack("!II", 1, 1 << 24 | 4) + b"abcd", 10, 1)
    assert [(bytes(f.payload), f.fin) for f in frames if isinstance(f, Data)] == [
        (b"ab", False), (b"c", False), (b"d", True),
    ]  # fmt: skip


@pytest.mark.parametrize("frame", REAL)
def test_truncated_frames_are_waited_for(frame: bytes) -> None:
    decoder = Decoder()
    for earlier in REAL[: REAL.index(frame)]:
        list(decoder.feed(earlier))
    assert [f for f in decoder.feed(frame[:-1]) if not isinstance(f, Data)] == []


HOSTILE = {
    "SETTINGS with 2^32-1 entries": (control(4, b"\xff\xff\xff\xff"), "SETTINGS"),
    "SETTINGS with fewer entries than it says": (control(4, struct.pack("!I", 2) + bytes(8)), "SETTINGS"),
    "SETTINGS of 16 MiB": (control(4, b"", length=0xFFFFFF), "SETTINGS frame of 16777215 bytes"),
    "SYN_STREAM of 16 MiB": (control(1, b"", length=0xFFFFFF), "SYN_STREAM frame of 16777215 bytes"),
    "SYN_STREAM too short for its fields": (control(1, bytes(9)), "SYN_STREAM frame of 9 bytes"),
    "GOAWAY of SPDY/2": (control(7, bytes(4)), "GOAWAY frame of 4 bytes"),
    "PING too long": (control(6, bytes(5)), "PING frame"),
    "RST_STREAM too short": (control(3, bytes(4)), "RST_STREAM frame"),
    "WINDOW_UPDATE too long": (control(9, bytes(9)), "WINDOW_UPDATE frame"),
    "unknown type": (control(10, bytes(8)), "unknown control frame 10"),
    "type 0": (control(0, b""), "unknown control frame 0"),
    "SPDY/2": (control(6, bytes(4), version=2), "version 2"),
    "data on stream 0": (struct.pack("!II", 0, 1) + b"x", "stream 0"),
    "RST_STREAM of stream 0": (control(3, struct.pack("!II", 0, 1)), "stream 0"),
    "10^6 headers": (syn_stream(struct.pack("!I", 1_000_000)), "1000000 headers"),
    "2^32-1 headers": (syn_stream(b"\xff\xff\xff\xff"), "headers where at most"),
    "header of 4 GiB": (syn_stream(struct.pack("!II", 1, 0xFFFFFFFF)), "cut short"),
    "value of 4 GiB": (syn_stream(struct.pack("!I", 1) + counted(b"a") + b"\xff\xff\xff\xff"), "cut short"),
    "header block without a count": (syn_stream(b"\0\0"), "cut short"),
    "header block with something behind": (syn_stream(struct.pack("!I", 0) + b"x"), "longer than its headers"),
    "header name in upper case": (syn_stream(struct.pack("!I", 1) + counted(b"streamType", b"x")), "lower case"),
    "header without a name": (syn_stream(struct.pack("!I", 1) + counted(b"", b"x")), "lower case"),
    "header that stands twice": (syn_stream(struct.pack("!I", 2) + counted(b"a", b"x", b"a", b"y")), "stands twice"),
    "header block that is not zlib": (control(1, struct.pack("!IIH", 1, 0, 0) + b"garbage!"), "can't be inflated"),
    "header compression that ends": (
        control(1, struct.pack("!IIH", 1, 0, 0) + zlib.compress(struct.pack("!I", 0))),
        "compression ended",
    ),
    "header bomb": (syn_stream(struct.pack("!I", 1) + counted(b"a", bytes(50_000_000))), "larger than"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_are_refused(name: str) -> None:
    data, message = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(SpdyError, match=message):
            decode(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000 + len(data)


def test_a_header_bomb_in_many_frames_stays_bounded() -> None:
    """Each block is within its limit; the window of the compression is all that is kept."""
    deflate = zlib.compressobj(9, zdict=spdy.DICTIONARY)
    decoder = Decoder()
    tracemalloc.start()
    try:
        for number in range(1, 401, 2):
            block = struct.pack("!I", 1) + counted(b"a", bytes(60_000))
            compressed = deflate.compress(block) + deflate.flush(zlib.Z_SYNC_FLUSH)
            list(decoder.feed(control(1, struct.pack("!IIH", number, 0, 0) + compressed)))
        current_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert current_bytes < 1_000_000


def test_data_frames_are_not_collected() -> None:
    decoder = Decoder()
    assert list(decoder.feed(struct.pack("!II", 1, 0xFFFFFF))) == []
    tracemalloc.start()
    try:
        for _ in range(100):
            assert len(list(decoder.feed(bytes(100_000)))) == 1
        current_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert current_bytes < 500_000


@settings(max_examples=300)
@given(st.binary(max_size=200), st.lists(st.sampled_from(REAL), max_size=6), st.integers(0, 500))
def test_garbage_raises_nothing_but_spdy_errors(garbage: bytes, frames: list[bytes], at: int) -> None:
    stream = b"".join(frames)
    data = stream[:at] + garbage + stream[at:]
    try:
        decode(data)
    except SpdyError:
        pass


# -- encoding ----------------------------------------------------------------------------------------------------------


def test_replies_inflate_as_one_stream() -> None:
    encoder, inflate = Encoder(), zlib.decompressobj(zdict=spdy.DICTIONARY)
    for number in (1, 3, 5):
        reply = encoder.syn_reply(number)
        assert reply[:4] == b"\x80\x03\x00\x02"
        assert int.from_bytes(reply[5:8], "big") == len(reply) - 8
        assert int.from_bytes(reply[8:12], "big") == number
        assert inflate.decompress(reply[12:]) == bytes(4)
        # A Go reader takes what is there when it meets an empty stored block.
        assert reply.endswith(b"\x00\x00\xff\xff")


def test_other_frames() -> None:
    encoder = Encoder()
    assert encoder.rst_stream(3, spdy.ResetStatus.CANCEL) == RST
    assert encoder.ping(1) == PING
    assert encoder.go_away(0, spdy.GoAwayStatus.OK) == GOAWAY
    assert encoder.data_head(3, 5) + b"hello" == DATA
    assert encoder.data_head(3, 0, fin=True) == DATA_FIN
