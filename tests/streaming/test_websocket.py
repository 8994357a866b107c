"""WebSocket messages and the channels in them."""

from __future__ import annotations

import base64
import tracemalloc

import pytest
import wsproto.events as ws
from hypothesis import given
from hypothesis import strategies as st
from shim_streaming.channels import ChannelMessages, ClientLeft, Role, WebSocketChannels
from shim_streaming.handshake import CommandProtocol
from shim_streaming.status import Status, exited, success
from shim_streaming.tickets import CommandTicket
from shim_streaming.websocket import Piece, WebSocketEndpoint, WebSocketError
from wsproto.connection import Connection, ConnectionType


class Pair:
    """An endpoint and a client."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.endpoint = WebSocketEndpoint(self.write)
        self.client = Connection(ConnectionType.CLIENT)

    def write(self, *buffers: bytes) -> None:
        for buffer in buffers:
            self.sent += buffer

    def events(self) -> list[ws.Event]:
        """What the server has sent."""
        self.client.receive_data(bytes(self.sent))
        self.sent.clear()
        return list(self.client.events())


def messages(*data: bytes | str) -> bytes:
    """A client's messages."""
    client = Connection(ConnectionType.CLIENT)
    out = b""
    for each in data:
        out += client.send(ws.TextMessage(data=each) if isinstance(each, str) else ws.BytesMessage(data=each))
    return out


def channels(data: bytes, *, encoded: bool = False, cuts: tuple[int, ...] = ()) -> dict[int, bytes]:
    """What arrives on each channel when these bytes come, cut at those places."""
    pair = Pair()
    reader = ChannelMessages(pair.endpoint, encoded=encoded)
    arrived: dict[int, bytes] = {}
    for start, end in zip((0, *cuts), (*cuts, len(data)), strict=True):
        for number, payload in reader.receive(data[start:end]):
            arrived[number] = arrived.get(number, b"") + payload
    return arrived


def test_channels() -> None:
    assert channels(messages(b"\x00one", b"\x04two", b"\x00three")) == {0: b"onethree", 4: b"two"}


def test_base64_channels() -> None:
    assert channels(messages("0" + base64.b64encode(b"one").decode(), "4dHdv"), encoded=True) == {0: b"one", 4: b"two"}


def test_base64_in_lines_and_in_binary_messages() -> None:
    assert channels(messages(b"0b25\nl\r\n"), encoded=True) == {0: b"one"}


@given(st.binary(max_size=300), st.lists(st.integers(0, 900), max_size=8), st.booleans())
def test_channels_do_not_depend_on_how_they_are_cut(data: bytes, cuts: list[int], encoded: bool) -> None:
    if encoded:
        stream = messages("0" + base64.b64encode(data).decode(), "1" + base64.b64encode(data[::-1]).decode())
    else:
        stream = messages(b"\x00" + data, b"\x01" + data[::-1])
    places = tuple(sorted(min(cut, len(stream)) for cut in cuts))
    assert channels(stream, encoded=encoded, cuts=places) == {0: data, 1: data[::-1]}


def test_fragments_belong_to_the_channel_of_the_first() -> None:
    client = Connection(ConnectionType.CLIENT)
    stream = b"".join(
        client.send(ws.BytesMessage(data=data, message_finished=last))
        for data, last in ((b"", False), (b"\x02ab", False), (b"", False), (b"cd", True), (b"\x00x", True))
    )
    assert channels(stream) == {2: b"abcd", 0: b"x"}


@pytest.mark.parametrize("text", ["0!!!!", "0b25l=", "0b2", "0====", "0b25lb25l=b25l"])
def test_what_is_not_base64_is_an_error(text: str) -> None:
    with pytest.raises(WebSocketError, match="not base64") as raised:
        channels(messages(text), encoded=True)
    assert raised.value.code == 1007


def test_messages_of_any_size_are_passed_on_in_pieces() -> None:
    pair = Pair()
    size = 1 << 40
    head = b"\x82\xff" + size.to_bytes(8, "big") + bytes(4)
    assert list(pair.endpoint.receive(head)) == []
    tracemalloc.start()
    try:
        for count in range(50):
            pieces = list(pair.endpoint.receive(bytes(100_000)))
            assert [(p.first, p.last) for p in pieces if isinstance(p, Piece)] == [(count == 0, False)]
        current_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert current_bytes < 600_000


@pytest.mark.parametrize(
    "data",
    [
        b"\x82\x01x",  # not masked
        b"\xc2\x81\0\0\0\0x",  # reserved bit
        b"\x83\x81\0\0\0\0x",  # reserved opcode
        b"\x80\x81\0\0\0\0x",  # continuation of nothing
        b"\x09\x81\0\0\0\0x",  # fragmented ping
        b"\x89\xfe\x00\x7e\0\0\0\0",  # ping of 126 bytes
        b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0",  # negative length
        b"\x82\xfe\x00\x01\0\0\0\0x",  # length in more bytes than needed
        b"\x81\x81\0\0\0\0\xff",  # text that is not UTF-8
        b"\x88\x81\0\0\0\0x",  # close with one byte
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_hostile_frames_are_refused(data: bytes) -> None:
    with pytest.raises(WebSocketError):
        list(Pair().endpoint.receive(data))


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 1 << 18])
def test_messages_of_any_size_are_sent(length: int) -> None:
    """In as many parts as they come in, and one frame."""
    pair = Pair()
    payload = bytes(range(256)) * (length // 256 + 1)
    pair.endpoint.send_binary(payload[: length // 3], memoryview(payload)[length // 3 : length])
    pair.endpoint.send_binary(b"next")
    whole, following = b"", pair.events()
    while not (event := following.pop(0)).message_finished:  # type: ignore[attr-defined]
        whole += event.data  # type: ignore[attr-defined]
    assert whole + event.data == payload[:length]  # type: ignore[attr-defined]
    assert [event.data for event in following] == [b"next"]  # type: ignore[attr-defined]


def test_nothing_is_sent_after_our_close() -> None:
    pair = Pair()
    pair.endpoint.close()
    pair.endpoint.send_binary(b"late")
    assert [type(event) for event in pair.events()] == [ws.CloseConnection]


def test_pings_are_answered() -> None:
    pair = Pair()
    list(pair.endpoint.receive(pair.client.send(ws.Ping(payload=b"abc"))))
    assert pair.events() == [ws.Pong(payload=b"abc")]


def test_close_is_answered_once_and_nothing_follows() -> None:
    pair = Pair()
    reader = ChannelMessages(pair.endpoint, encoded=False)
    with pytest.raises(ClientLeft):
        list(reader.receive(pair.client.send(ws.CloseConnection(code=1000))))
    reader.send(1, b"late")
    pair.endpoint.close()
    assert pair.events() == [ws.CloseConnection(code=1000, reason="")]
    assert list(reader.receive(b"whatever")) == []


def test_data_after_our_close_is_ignored() -> None:
    pair = Pair()
    pair.endpoint.close()
    assert [p for p in pair.endpoint.receive(messages(b"\x00late")) if not isinstance(p, Piece)] == []


# -- exec's channels ---------------------------------------------------------------------------------------------------

TICKET = CommandTicket("exec", "r", "c", ("true",), stdin=True, stdout=True, stderr=True)
V5 = CommandProtocol("v5.channel.k8s.io", 5, websocket=True)
V4 = CommandProtocol("v4.channel.k8s.io", 4, websocket=True)
PLAIN = CommandProtocol("channel.k8s.io", 1, websocket=True)


def inputs(protocol: CommandProtocol, *data: bytes) -> list[tuple[Role, bytes | None]]:
    made = WebSocketChannels(TICKET, protocol, lambda *_: None)
    return [(role, None if data is None else bytes(data)) for role, data in made.receive(messages(*data))]


def test_input_comes_for_stdin_and_resize_alone() -> None:
    sent = (b"\x00in", b"\x01no", b"\x02no", b"\x03no", b"\x04{}", b"\x05no", b"\x80no", b"\x00")
    assert inputs(V4, *sent) == [(Role.STDIN, b"in"), (Role.RESIZE, b"{}")]


def test_close_signal_of_version_5() -> None:
    assert inputs(V5, b"\x00x", b"\xff\x00", b"\xff\x01") == [(Role.STDIN, b"x"), (Role.STDIN, None)]


def test_there_is_no_close_signal_before_version_5() -> None:
    assert inputs(V4, b"\xff\x00") == []


def test_close_signal_for_a_channel_there_is_not() -> None:
    with pytest.raises(WebSocketError, match="channel 9"):
        inputs(V5, b"\xff\x09")


@pytest.mark.parametrize(
    ("protocol", "status", "expected"),
    [
        (V5, success(), b'\x03{"metadata":{},"status":"Success"}'),
        (PLAIN, success(), None),
        (PLAIN, exited(3), b"\x03command terminated with non-zero exit code: 3"),
    ],
)
def test_the_end(protocol: CommandProtocol, status: Status, expected: bytes | None) -> None:
    pair = Pair()
    made = WebSocketChannels(TICKET, protocol, pair.write)
    made.conclude(status)
    events = pair.events()
    sent = [bytes(event.data) for event in events if isinstance(event, ws.BytesMessage)]
    assert sent == [b"\x01", *([expected] if expected else [])]
    assert events[-1] == ws.CloseConnection(code=1000, reason="")
