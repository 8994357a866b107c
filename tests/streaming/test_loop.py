"""The event loop, and the ends of copies in it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from shim_streaming import pipes
from shim_streaming.loop import Loop
from shim_streaming.pipes import Pressure, Sink, Source
from shim_streaming.threads import Threads

from tests.streaming.conftest import open_descriptors


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            pass  # the test has


def run(loop: Loop, until: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Run the loop until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < deadline, "the loop doesn't get there"
        loop.call_later(0.01, lambda: None)
        loop._round()


def test_calls_happen_in_order_and_once(loop: Loop) -> None:
    seen: list[str] = []
    now = time.monotonic()
    loop.call_at(now + 0.02, lambda: seen.append("late"))
    loop.call_at(now + 0.01, lambda: seen.append("early"))
    loop.call_at(now + 0.015, lambda: seen.append("never")).cancel()
    loop.call_soon(lambda: seen.append("soon"))
    run(loop, lambda: "late" in seen)
    assert seen == ["soon", "early", "late"]


def test_a_call_that_comes_again_does_not_starve_the_rest(loop: Loop, pipe: tuple[int, int]) -> None:
    seen: list[bytes] = []

    def again() -> None:
        loop.call_soon(again)

    again()
    loop.on_readable(pipe[0], lambda: seen.append(os.read(pipe[0], 10)))
    os.write(pipe[1], b"x")
    loop._round()
    loop._round()
    assert seen == [b"x"]


def test_calls_from_other_threads(loop: Loop) -> None:
    seen: list[int] = []
    threads = [
        threading.Thread(target=lambda: [loop.call_threadsafe(lambda: seen.append(1)) for _ in range(100)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    run(loop, lambda: len(seen) == 400)
    for thread in threads:
        thread.join()


def test_nobody_calls_after_the_end() -> None:
    before = open_descriptors()
    loop = Loop()
    loop.close()
    loop.close()
    assert not loop.call_threadsafe(lambda: None)
    assert open_descriptors() == before


def test_stop_ends_run(loop: Loop) -> None:
    loop.call_later(0.01, loop.stop)
    loop.run()


def test_reader_and_writer_of_one_descriptor(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    seen: list[str] = []

    def readable() -> None:
        seen.append("read")
        loop.on_readable(ours.fileno(), None)

    def writable() -> None:
        seen.append("write")
        loop.on_writable(ours.fileno(), None)

    loop.on_readable(ours.fileno(), readable)
    loop.on_writable(ours.fileno(), writable)
    theirs.send(b"x")
    run(loop, lambda: len(seen) == 2)
    assert sorted(seen) == ["read", "write"]
    loop.forget(ours.fileno())
    ours.close()
    theirs.close()


def test_a_hang_up_is_told_though_nobody_reads(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    seen: list[str] = []

    def hung_up() -> None:
        seen.append("gone")
        loop.on_hangup(ours.fileno(), None)

    loop.on_hangup(ours.fileno(), hung_up)
    theirs.send(b"unread")
    theirs.close()
    run(loop, lambda: seen)
    ours.close()


def test_events_of_a_descriptor_that_was_closed_go_to_nobody(loop: Loop) -> None:
    """Both are ready; the first handler closes the second, whose number is taken by a new one at once."""
    pairs = [socket.socketpair() for _ in range(2)]
    seen: list[str] = []
    fresh: list[socket.socket] = []

    def close_the_other(me: int) -> Callable[[], None]:
        def handler() -> None:
            seen.append("first")
            loop.on_readable(pairs[me][0].fileno(), None)
            other = pairs[1 - me][0]
            number = other.fileno()
            loop.forget(number)
            other.close()
            fresh.extend(socket.socketpair())
            assert fresh[0].fileno() == number
            loop.on_readable(number, lambda: seen.append("wrong"))

        return handler

    for index, (ours, theirs) in enumerate(pairs):
        loop.on_readable(ours.fileno(), close_the_other(index))
        theirs.send(b"x")
    run(loop, lambda: seen)
    assert seen == ["first"]
    loop.forget(fresh[0].fileno())
    for sock in [*fresh, *(sock for pair in pairs for sock in pair)]:
        sock.close()


# -- sources and sinks -------------------------------------------------------------------------------------------------


class Gate:
    def __init__(self) -> None:
        self.congested = False
        self.parked: list[Source] = []

    def park(self, source: Source) -> None:
        self.parked.append(source)


def test_a_source_reads_to_the_end(loop: Loop, pipe: tuple[int, int]) -> None:
    data = bytearray()
    ends: list[OSError | None] = []
    source = Source(loop, pipe[0], Gate(), data.extend, ends.append)
    os.write(pipe[1], b"one")
    run(loop, lambda: data == b"one")
    os.write(pipe[1], b"two")
    os.close(pipe[1])
    run(loop, lambda: ends)
    assert (bytes(data), ends, source.closed) == (b"onetwo", [None], True)


def test_a_source_rests_while_there_is_no_room(loop: Loop, pipe: tuple[int, int]) -> None:
    gate, data = Gate(), bytearray()
    source = Source(loop, pipe[0], gate, data.extend, lambda _err: None)
    gate.congested = True
    os.write(pipe[1], b"x")
    run(loop, lambda: gate.parked)
    assert source.resting
    assert not data
    gate.congested = False
    source.resume()
    run(loop, lambda: data == b"x")
    source.close()
    source.resume()
    os.write(pipe[1], b"y")
    loop.call_later(0, lambda: None)
    loop._round()
    assert data == b"x"


def test_a_source_that_rests_does_not_spin(loop: Loop, pipe: tuple[int, int]) -> None:
    """Its writer has gone, which epoll would tell again and again."""
    gate = Gate()
    gate.congested = True
    Source(loop, pipe[0], gate, lambda _data: None, lambda _err: None)
    os.close(pipe[1])
    run(loop, lambda: gate.parked)
    rounds = 0
    deadline = time.monotonic() + 0.1
    loop.call_at(deadline, lambda: None)
    while time.monotonic() < deadline:
        loop._round()
        rounds += 1
    assert rounds < 5


class Sinking:
    """A sink on a pipe, and what it reports."""

    def __init__(self, loop: Loop) -> None:
        self.high: list[bool] = []
        self.finished = 0
        self.pressure = Pressure(self.high.append)
        self.sink = Sink(loop, self.pressure, self._finished)

    def _finished(self) -> None:
        self.finished += 1

    def write(self, data: bytes) -> None:
        buffer = bytearray(data)
        self.sink.write(memoryview(buffer))
        self.sink.flush()
        buffer[:] = b"?" * len(buffer)  # the caller's buffer is used again


def read_all(loop: Loop, fd: int) -> bytes:
    """Everything until the end, the loop running meanwhile."""
    os.set_blocking(fd, False)
    data, ended = bytearray(), []

    def readable() -> None:
        more = os.read(fd, 100_000)
        data.extend(more)
        if not more:
            ended.append(True)
            loop.on_readable(fd, None)

    loop.on_readable(fd, readable)
    run(loop, lambda: ended)
    return bytes(data)


def test_a_sink_writes_in_order_however_full_the_pipe(loop: Loop, pipe: tuple[int, int]) -> None:
    sinking = Sinking(loop)
    sinking.write(b"before it is open;")
    sinking.sink.open(pipe[1])
    expected = b"before it is open;"
    for number in range(300):
        block = b"%d;" % number * 500
        sinking.write(block)
        expected += block
    sinking.sink.end()
    assert sinking.finished == 0

    def close_when_finished() -> None:
        if sinking.finished:
            loop.forget(pipe[1])
            os.close(pipe[1])
        else:
            loop.call_later(0.001, close_when_finished)

    close_when_finished()
    assert read_all(loop, pipe[0]) == expected
    assert sinking.finished == 1


def test_pressure_rises_and_falls(loop: Loop, pipe: tuple[int, int]) -> None:
    sinking = Sinking(loop)
    sinking.sink.open(pipe[1])
    sinking.write(bytes(pipes.SINK_LIMIT_BYTES))
    assert sinking.high == []
    sinking.write(bytes(200_000))
    assert sinking.high == [True]
    sinking.sink.close()
    assert sinking.high == [True, False]


def test_many_sinks_together_are_bounded_too(loop: Loop) -> None:
    high: list[bool] = []
    pressure = Pressure(high.append)
    sinks = [Sink(loop, pressure, lambda: None) for _ in range(20)]
    for sink in sinks:
        sink.write(memoryview(bytes(900_000)))
        sink.flush()
    assert high == [True]
    for sink in sinks:
        sink.close()
    assert high == [True, False]


def test_a_sink_nobody_reads(loop: Loop, pipe: tuple[int, int]) -> None:
    sinking = Sinking(loop)
    sinking.sink.open(pipe[1])
    os.close(pipe[0])
    sinking.write(b"x")
    assert sinking.finished == 1
    assert sinking.sink.finished
    sinking.write(b"y")
    sinking.sink.end()
    assert sinking.finished == 1


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_are_waited_for() -> None:
    threads, release = Threads(), threading.Event()

    def slow() -> None:
        release.wait(60)

    threads.start("slow", slow)
    threads.start("quick", lambda: None)
    assert threads.join(0.2) == ["slow"]
    release.set()
    assert threads.join(60) == []
