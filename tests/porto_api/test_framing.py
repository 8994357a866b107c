"""Framing: any message, cut anywhere, comes out whole; nonsense is refused before memory is spent on it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from porto_api.errors import ProtocolError

from porto_api import framing, rpc_pb2


class Raw:
    """A message that is its bytes."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def SerializeToString(self) -> bytes:  # noqa: N802
        return self.payload


@given(st.lists(st.binary(max_size=300)), st.integers(1, 50))
def test_messages_come_out_as_they_went_in(payloads: list[bytes], piece: int) -> None:
    stream = b"".join(framing.encode(Raw(payload)) for payload in payloads)
    decoder = framing.Decoder()
    got = [p for start in range(0, len(stream), piece) for p in decoder.feed(stream[start : start + piece])]
    assert got == payloads
    assert not decoder.partial


def test_the_bytes_on_the_wire_are_those_of_porto() -> None:
    request = rpc_pb2.TContainerRequest()
    request.create.name = "a"
    # length 5; field 1 (create), length 3; field 1 (name), length 1, "a"
    assert framing.encode(request) == bytes([5, 0x0A, 3, 0x0A, 1]) + b"a"
    assert framing.encode_length(300) == bytes([0xAC, 0x02])


def test_a_length_above_the_limit_is_refused_at_once() -> None:
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        list(framing.Decoder().feed(framing.encode_length(framing.MAX_MESSAGE_BYTES + 1)))


def test_a_length_that_never_ends_is_refused() -> None:
    with pytest.raises(ProtocolError, match="malformed"):
        list(framing.Decoder().feed(b"\xff" * 6))


def test_a_message_above_the_limit_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="exceeds Porto's limit"):
        framing.encode(Raw(b"x" * 11), limit=10)
