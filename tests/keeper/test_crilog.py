"""The log format: whatever is written comes back, however it was cut on its way."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st
from shim_porto_runtime.keeper import crilog

from tests.keeper import crirecords

HEADER = crilog.Stamp().header(1_700_000_000_123_456_789, b"stdout")
LIMIT = crilog.RECORD_BYTES

texts = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from([b"\n", b"\r\n", b"\0", b"\xff\xfe", b"x" * (LIMIT - 1), b"y" * LIMIT, b"z" * (LIMIT + 1)]),
    ),
    max_size=12,
).map(b"".join)


def log_of(pieces: list[bytes]) -> bytes:
    """The log of output that comes in these pieces and then ends."""
    log, rest = b"", b""
    for piece in pieces:
        out, used, _ = crilog.records(rest + piece, HEADER)
        rest = (rest + piece)[used:]
        assert len(rest) <= LIMIT
        log += out
    return log + (crilog.partial(rest, HEADER) if rest else b"")


def test_a_record_has_time_stream_tag_and_text() -> None:
    out, used, unfinished = crilog.records(b"hello\n", HEADER)
    assert out == b"2023-11-14T22:13:20.123456789Z stdout F hello\n"
    assert (used, unfinished) == (6, False)


@given(texts)
@example(b"x" * LIMIT + b"\n")
@example(b"x" * (LIMIT + 1) + b"\n")
@example(b"x" * (LIMIT - 1) + b"\r\n")
@example(b"\n" * 70000)
def test_every_byte_comes_back(text: bytes) -> None:
    assert crirecords.read(log_of([text]))["stdout"] == text


@given(texts, st.lists(st.integers(0, 200_000), max_size=6))
def test_where_the_batches_are_cut_leaves_no_trace(text: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert log_of(pieces) == log_of([text])


def test_a_line_of_the_limit_is_one_record_and_a_longer_one_is_parted() -> None:
    def tags(text: bytes) -> list[bytes]:
        return [record[38:39] for record in log_of([text]).split(b"\n")[:-1]]

    assert tags(b"x" * LIMIT + b"\n") == [b"F"]
    assert tags(b"x" * (LIMIT + 1) + b"\n") == [b"P", b"F"]
    assert tags(b"x" * (2 * LIMIT) + b"\n") == [b"P", b"F"]
    assert tags(b"x" * LIMIT) == [b"P"]


@given(texts)
def test_records_say_what_they_hold(text: bytes) -> None:
    out, used, unfinished = crilog.records(text, HEADER)
    assert crilog.payload_bytes(out, b"stdout") == used
    if out:
        assert crilog.is_partial(out, len(out), b"stdout") == unfinished


@given(texts, st.integers(0, 100_000))
def test_a_torn_write_ends_at_a_record(text: bytes, written: int) -> None:
    out, _, _ = crilog.records(text, HEADER)
    whole = crilog.whole_records(out, min(written, len(out)))
    assert whole <= written
    assert text.startswith(crirecords.read(out[:whole])["stdout"])


def test_the_second_is_formatted_anew_when_it_changes() -> None:
    stamp = crilog.Stamp()
    first = stamp.header(1_700_000_000_999_999_999, b"stderr")
    second = stamp.header(1_700_000_001_000_000_000, b"stderr")
    assert first == b"2023-11-14T22:13:20.999999999Z stderr "
    assert second == b"2023-11-14T22:13:21.000000000Z stderr "
