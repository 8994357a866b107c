"""Pipes, terminals and window sizes."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shim_streaming import plumbing
from shim_streaming.plumbing import SizeReader

from tests.streaming.conftest import open_descriptors


def sizes(*pieces: bytes) -> list[tuple[int, int]]:
    reader = SizeReader()
    return [size for piece in pieces for size in reader.feed(memoryview(piece))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"Width":80,"Height":24}', [(80, 24)]),
        (b'{"Width":80,"Height":24}\n{"Width":81,"Height":25}\n', [(80, 24), (81, 25)]),
        (b'  {"height":24, "width":80}', [(80, 24)]),
        (b'{"Width":80,"Height":24,"X":[1]}', [(80, 24)]),
        (b'{"Width":0,"Height":0}{"Width":1,"Height":2}', [(1, 2)]),
        (b'{"Width":65535,"Height":1}', [(65535, 1)]),
    ],
)
def test_sizes(text: bytes, expected: list[tuple[int, int]]) -> None:
    assert sizes(text) == expected
    assert sizes(*(text[i : i + 1] for i in range(len(text)))) == expected


@pytest.mark.parametrize(
    "text",
    [
        b"[]", b"1", b"null", b'"x"', b'{"Width":65536,"Height":1}', b'{"Width":-1,"Height":1}', b'{"Width":"80"}',
        b'{"Width":1.5,"Height":1}', b'{"Width":true,"Height":true}', b"x" * 5000, b"[" * 4000, b"\xff\xfe",
        b"9" * 4090,
    ],
)  # fmt: skip
def test_what_is_no_size_ends_the_reading(text: bytes) -> None:
    reader = SizeReader()
    assert reader.feed(memoryview(text)) == []
    assert reader.feed(memoryview(b" " * 5000)) == []
    assert reader.feed(memoryview(b'{"Width":80,"Height":24}')) == []


@given(st.lists(st.binary(max_size=600), max_size=20))
def test_garbage_does_no_harm(pieces: list[bytes]) -> None:
    sizes(*pieces)


@pytest.fixture
def nearly_no_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 2, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("nearly_no_descriptors")
def test_pipes_that_cannot_all_be_made_leave_nothing() -> None:
    before = open_descriptors()
    with pytest.raises(OSError, match="Too many open files"):
        plumbing.open_pipes(stdin=True, stdout=True, stderr=True)
    assert open_descriptors() == before


def test_pipes() -> None:
    before = open_descriptors()
    ours, theirs = plumbing.open_pipes(stdin=True, stdout=True, stderr=False)
    assert (ours.stderr, theirs.stderr) == (None, None)
    assert ours.stdin is not None
    assert ours.stdout is not None
    assert theirs.stdin is not None
    assert theirs.stdout is not None
    os.write(ours.stdin, b"in")
    assert os.read(theirs.stdin, 10) == b"in"
    os.write(theirs.stdout, b"out")
    assert plumbing.unread_bytes(ours.stdout) == 3
    assert not any(os.get_inheritable(fd) for fd in (ours.stdin, ours.stdout, theirs.stdin, theirs.stdout))
    ours.close()
    theirs.close()
    assert open_descriptors() == before


def test_terminal() -> None:
    before = open_descriptors()
    ours, theirs = plumbing.open_terminal()
    assert theirs.stdin is not None
    assert theirs.stdin == theirs.stdout == theirs.stderr
    assert os.isatty(theirs.stdin)
    assert ours.stdin is not None
    plumbing.set_window_size(ours.stdin, 100, 40)
    assert os.get_terminal_size(theirs.stdin) == (100, 40)
    assert not os.get_inheritable(theirs.stdin)
    ours.close()
    theirs.close()
    assert open_descriptors() == before
