"""Attached clients: what they see, what they send, and that nobody has to wait for them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shim_porto_runtime.keeper import AttachEnd, KeeperClient

from shim_core import errors
from shim_core.context import CallContext
from tests.keeper.conftest import Node, eventually


class Session:
    """An attached session: a thread in ``attach``, and the other ends of its streams."""

    def __init__(
        self, node: Node, container_id: str = "c", *, stdin: bool = False, stderr: bool = False, sockets: bool = False
    ) -> None:
        self.output = b""
        self.error_output = b""
        self.end: AttachEnd | None = None
        self.failure: BaseException | None = None
        self._context = CallContext("Attach", "1")
        self._node = node
        self._container_id = container_id
        self._theirs: dict[str, int] = {}
        self.stdin: int | None = None
        if stdin:
            self._theirs["stdin"], self.stdin = pair(sockets)
        self.stdout, self._theirs["stdout"] = pair(sockets)
        self.stderr = None
        if stderr:
            self.stderr, self._theirs["stderr"] = pair(sockets)
        self._thread = threading.Thread(target=self._run)
        before = self._clients()
        self._thread.start()
        eventually(lambda: self._clients() > before or not self._thread.is_alive())

    def _clients(self) -> int:
        return next(s.clients for s in self._node.client.list() if s.id == self._container_id)

    def _run(self) -> None:
        try:
            self.end = self._node.client.attach(self._container_id, cancel=self._context.on_cancel, **self._theirs)
        except errors.ShimError as err:
            self.failure = err
        for fd in self._theirs.values():
            os.close(fd)

    def read(self, until: bytes, timeout_s: float = 10.0) -> bytes:
        os.set_blocking(self.stdout, False)

        def arrived() -> bool:
            try:
                data = os.read(self.stdout, 65536)
            except BlockingIOError:
                return False
            self.output += data
            return until in self.output or not data

        eventually(arrived, timeout_s)
        return self.output

    def cancel(self) -> None:
        self._context.cancel()

    def wait(self) -> AttachEnd | None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the session hasn't ended"
        if self.failure is not None:
            raise self.failure
        return self.end

    def close_stdin(self) -> None:
        assert self.stdin is not None
        os.close(self.stdin)
        self.stdin = None

    def close(self) -> None:
        self._context.cancel()
        self._thread.join(60)
        for fd in (self.stdin, self.stdout, self.stderr):
            if fd is not None:
                os.close(fd)


def pair(sockets: bool) -> tuple[int, int]:
    """A reading and a writing end."""
    if not sockets:
        return os.pipe()
    first, second = socket.socketpair()
    return first.detach(), second.detach()


@pytest.fixture
def attach(node: Node) -> Iterator[Callable[..., Session]]:
    sessions: list[Session] = []

    def attach_one(*arguments: Any, **options: Any) -> Session:
        sessions.append(Session(node, *arguments, **options))
        return sessions[-1]

    yield attach_one
    for session in sessions:
        session.close()


@pytest.mark.parametrize("sockets", [False, True])
def test_a_session_sees_both_streams_apart(node: Node, attach: Callable[..., Session], sockets: bool) -> None:
    with node.open() as streams:
        os.write(streams.stdout, b"before\n")
        node.client.flush("c")
        session = attach(stderr=True, sockets=sockets)
        os.write(streams.stdout, b"out")
        os.write(streams.stderr, b"err")
        assert session.read(b"out") == b"out", "not what was before"
    assert session.wait() == "ended"
    assert session.stderr is not None
    assert os.read(session.stderr, 100) == b"err"
    assert node.read() == {"stdout": b"before\nout", "stderr": b"err"}


@pytest.mark.parametrize("sockets", [False, True])
@pytest.mark.parametrize("tty", [False, True])
def test_a_shell_is_spoken_to(node: Node, attach: Callable[..., Session], tty: bool, sockets: bool) -> None:
    process = node.run(node.open(tty=tty, stdin=True), "sh")
    session = attach(stdin=True, sockets=sockets)
    assert session.stdin is not None
    os.write(session.stdin, b"echo $((6 * 7))\n")
    assert b"42" in session.read(b"42")
    os.write(session.stdin, b"exit 3\n")
    assert process.wait(60) == 3
    assert session.wait() == "ended"
    eventually(lambda: b"42" in node.read()["stdout"])


@pytest.mark.parametrize("sockets", [False, True])
def test_the_end_of_input_closes_stdin_once(node: Node, attach: Callable[..., Session], sockets: bool) -> None:
    process = node.run(node.open(stdin=True, stdin_once=True), "cat")
    session = attach(stdin=True, sockets=sockets)
    assert session.stdin is not None
    os.write(session.stdin, b"all there is")
    session.close_stdin()
    assert process.wait(60) == 0
    assert session.wait() == "ended"
    assert session.read(b"is") == b"all there is"


def test_the_end_of_input_does_not_close_stdin_otherwise(node: Node, attach: Callable[..., Session]) -> None:
    process = node.run(node.open(stdin=True), "cat")
    first = attach(stdin=True)
    assert first.stdin is not None
    os.write(first.stdin, b"from the first\n")
    first.close_stdin()
    assert first.read(b"first\n") == b"from the first\n", "output goes on"
    second = attach(stdin=True)
    assert second.stdin is not None
    os.write(second.stdin, b"from the second\n")
    second.read(b"second\n")
    assert process.poll() is None
    node.client.close_stdin("c")
    assert process.wait(60) == 0


def test_a_terminal_stays_open_when_input_ends(node: Node, attach: Callable[..., Session]) -> None:
    process = node.run(node.open(tty=True, stdin=True, stdin_once=True), "sh", "-c", "read x; echo got $x; sleep 60")
    session = attach(stdin=True)
    assert session.stdin is not None
    os.write(session.stdin, b"it\n")
    session.close_stdin()
    assert b"got it" in session.read(b"got it")
    assert process.poll() is None


def test_more_input_than_the_container_reads_waits(node: Node, attach: Callable[..., Session]) -> None:
    process = node.run(node.open(stdin=True, stdin_once=True), "sh", "-c", "sleep 0.5; wc -c")
    session = attach(stdin=True)
    assert session.stdin is not None
    feeder = threading.Thread(target=feed, args=(session.stdin, 3_000_000))
    feeder.start()
    time.sleep(0.2)
    assert node.stats.resident_bytes < 20_000_000
    feeder.join(60)
    session.close_stdin()
    assert process.wait(60) == 0
    eventually(lambda: node.read()["stdout"] == b"3000000\n")


@pytest.mark.parametrize("sockets", [False, True])
def test_more_input_than_a_terminal_takes_waits(node: Node, attach: Callable[..., Session], sockets: bool) -> None:
    with node.open(tty=True, stdin=True) as streams:
        attributes = termios.tcgetattr(streams.stdout)
        attributes[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(streams.stdout, termios.TCSANOW, attributes)
        session = attach(stdin=True, sockets=sockets)
        assert session.stdin is not None
        data = bytes(range(32, 127)) * 3000
        feeder = threading.Thread(target=feed, args=(session.stdin, data))
        feeder.start()
        read = b""
        while len(read) < len(data):
            read += os.read(streams.stdout, 1000)
        feeder.join(60)
        assert read == data


def feed(fd: int, data: int | bytes) -> None:
    left = b"x" * data if isinstance(data, int) else data
    while left:
        left = left[os.write(fd, left[:65536]) :]


def test_input_for_a_container_that_closed_its_stdin_is_dropped(node: Node, attach: Callable[..., Session]) -> None:
    node.run(node.open(stdin=True), "sh", "-c", "exec <&-; echo closed; sleep 0.3; echo more; sleep 60")
    session = attach(stdin=True)
    eventually(lambda: b"closed" in node.read()["stdout"])
    feed_what_fits(session)
    session.read(b"more\n")
    assert node.client.list()[0].clients == 1


def test_without_stdin_input_goes_nowhere(node: Node, attach: Callable[..., Session]) -> None:
    with node.open() as streams:
        session = attach(stdin=True)
        feed_what_fits(session)
        os.write(streams.stdout, b"output all the same\n")
        session.read(b"same\n")


def feed_what_fits(session: Session) -> None:
    assert session.stdin is not None
    os.set_blocking(session.stdin, False)
    with contextlib.suppress(BlockingIOError):
        feed(session.stdin, 1_000_000)


def test_a_slow_client_holds_up_nobody_and_is_disconnected(node: Node, attach: Callable[..., Session]) -> None:
    streams = node.open()
    slow = attach()
    quick = os.open("/dev/null", os.O_WRONLY)
    reader = threading.Thread(target=node.client.attach, args=("c",), kwargs={"stdout": quick})
    reader.start()
    eventually(lambda: node.client.list()[0].clients == 2)
    started = time.monotonic()
    process = node.run(streams, "sh", "-c", "yes 0123456789 | head -c 5000000")
    assert process.wait(30) == 0
    assert time.monotonic() - started < 10
    with pytest.raises(errors.ResourceExhausted, match="slow"):
        slow.wait()
    reader.join(60)
    assert not reader.is_alive(), "the quick one was there to the end"
    os.close(quick)
    assert len(node.read()["stdout"]) == 5_000_000
    assert node.stats.resident_bytes < 25_000_000


def test_a_client_that_pauses_misses_nothing(node: Node, attach: Callable[..., Session]) -> None:
    with node.open() as streams:
        session = attach()
        data = os.urandom(700_000)
        feed(streams.stdout, data)
        node.client.flush("c")
    time.sleep(0.1)
    os.set_blocking(session.stdout, True)
    read = b""
    while len(read) < len(data):
        read += os.read(session.stdout, 65536)
    assert read == data
    assert session.wait() == "ended"


def test_cancelling_ends_the_session_and_not_the_container(node: Node, attach: Callable[..., Session]) -> None:
    with node.open(stdin=True, stdin_once=True) as streams:
        session = attach(stdin=True)
        session.cancel()
        assert session.wait() == "cancelled"
        eventually(lambda: node.client.list()[0].clients == 0)
        assert node.client.list()[0].stdin, "the session's stdin was not at its end"
        os.write(streams.stdout, b"goes on\n")
        node.client.flush("c")
    assert node.read()["stdout"] == b"goes on\n"


def test_cancelled_before_it_begins(node: Node) -> None:
    context = CallContext("Attach", "1")
    context.cancel()
    with node.open():
        assert node.client.attach("c", stdout=1, cancel=context.on_cancel) == "cancelled"


def test_a_client_that_leaves_is_noticed_without_output(node: Node, attach: Callable[..., Session]) -> None:
    with node.open():
        session = attach()
        os.close(session.stdout)
        session.stdout = os.dup(0)
        assert session.wait() == "gone"
        eventually(lambda: node.client.list()[0].clients == 0)


def test_a_container_that_has_ended_has_nothing_to_attach_to(node: Node, attach: Callable[..., Session]) -> None:
    node.open().close()
    eventually(lambda: not node.client.list()[0].running)
    assert attach().wait() == "ended"


def test_closing_a_container_ends_its_sessions(node: Node, attach: Callable[..., Session]) -> None:
    streams = node.open()
    session = attach()
    os.write(streams.stdout, b"last")
    node.client.close("c")
    assert session.wait() == "ended"
    assert session.read(b"last") == b"last"
    streams.close()


def test_there_are_not_more_clients_than_memory_allows(node: Node, attach: Callable[..., Session]) -> None:
    with node.open():
        for _ in range(16):
            attach()
        with pytest.raises(errors.ResourceExhausted, match="16"):
            attach().wait()


def test_a_file_can_be_attached(node: Node, tmp_path: Path) -> None:
    streams = node.open(stdin=True)
    (tmp_path / "in").write_bytes(b"from a file\n" * 1000)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
        thread = threading.Thread(
            target=node.client.attach, args=("c",), kwargs={"stdin": source.fileno(), "stdout": target.fileno()}
        )
        thread.start()
        eventually(lambda: node.client.list()[0].clients == 1)
        node.run(streams, "head", "-n", "1000")
        thread.join(60)
    assert (tmp_path / "out").read_bytes() == b"from a file\n" * 1000


def test_the_sessions_descriptors_stay_as_they_were(node: Node, attach: Callable[..., Session]) -> None:
    """Whether a descriptor blocks is shared with whoever else has it: the keeper must not change that."""
    reading, writing = os.pipe()
    with node.open():
        thread = threading.Thread(target=node.client.attach, args=("c",), kwargs={"stdin": reading, "stdout": writing})
        thread.start()
        eventually(lambda: node.client.list()[0].clients == 1)
        assert os.get_blocking(reading)
        assert os.get_blocking(writing)
    thread.join(60)
    os.close(reading)
    os.close(writing)


def test_a_session_goes_on_with_the_next_worker(node: Node, attach: Callable[..., Session]) -> None:
    process = node.run(node.open(stdin=True, stdin_once=True), "cat")
    session = attach(stdin=True)
    assert session.stdin is not None
    os.write(session.stdin, b"first\n")
    session.read(b"first\n")
    node.kill_worker()
    eventually(lambda: node.client.list()[0].clients == 1)
    os.write(session.stdin, b"second\n")
    assert session.read(b"second\n") == b"first\nsecond\n"
    session.close_stdin()
    assert process.wait(60) == 0
    assert session.wait() == "ended"


def test_a_long_session_goes_on_with_the_next_worker(node: Node, attach: Callable[..., Session]) -> None:
    """The time to take a session begins anew with each keeper."""
    node.client = KeeperClient(node.directory, timeout_s=0.5)
    with node.open() as streams:
        session = attach()
        time.sleep(0.7)
        node.kill_worker()
        eventually(lambda: node.client.list()[0].clients == 1)
        os.write(streams.stdout, b"goes on\n")
        session.read(b"goes on\n")
    assert session.wait() == "ended"


def test_a_session_whose_keeper_is_killed_for_good_has_ended(node: Node, attach: Callable[..., Session]) -> None:
    with node.open():
        session = attach()
        stats = node.stats
        os.kill(stats.holder_pid, signal.SIGSTOP)  # so that it can't notice
        for pid in (stats.pid, stats.holder_pid):
            os.kill(pid, signal.SIGKILL)
        assert session.wait() == "ended"
    assert not node.client.list()


def test_cancelled_after_the_end(node: Node) -> None:
    """Whoever cancels may be late: by then another may have the descriptor's number."""
    callbacks: list[Callable[[], None]] = []

    def late(callback: Callable[[], None]) -> Callable[[], None]:
        callbacks.append(callback)
        return lambda: None

    node.open().close()
    eventually(lambda: not node.client.list()[0].running)
    assert node.client.attach("c", stdout=1, cancel=late) == "ended"
    pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(4)]
    callbacks[0]()
    for reading, writing in pipes:
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
        os.close(reading)
        os.close(writing)


def test_a_session_whose_keeper_is_gone_for_good_has_ended(node: Node, attach: Callable[..., Session]) -> None:
    with node.open():
        session = attach()
        node.client.stop(force=True)
        assert session.wait() == "ended"


def test_a_thousand_sessions_leave_nothing_behind(node: Node, attach: Callable[..., Session]) -> None:
    with node.open(stdin=True) as streams, node.open("t", tty=True, stdin=True) as terminal:
        before = node.stats
        ours = len(os.listdir("/proc/self/fd"))
        threads = threading.active_count()
        for number in range(1000):
            container = "ct"[number % 2]
            reading, writing = pair(number % 3 == 0)
            stdin_reading, stdin_writing = pair(number % 5 == 0)
            context = CallContext("Attach", str(number))
            thread = threading.Thread(
                target=node.client.attach,
                args=(container,),
                kwargs={"stdin": stdin_reading, "stdout": writing, "cancel": context.on_cancel},
            )
            thread.start()
            if number % 2:  # the others leave at any moment of being attached
                eventually(lambda: node.stats.clients == 1)
            if number % 4:
                os.write(streams.stdout if container == "c" else terminal.stdout, b"output\n")
            if number % 7 == 0:
                os.close(stdin_writing)
                stdin_writing = -1
            context.cancel()
            thread.join(60)
            eventually(lambda: node.stats.clients == 0)
            for fd in (reading, writing, stdin_reading, stdin_writing):
                if fd >= 0:
                    os.close(fd)
        eventually(lambda: node.stats.clients == 0)
        eventually(lambda: node.stats.descriptors == before.descriptors)
        assert len(os.listdir("/proc/self/fd")) == ours
        assert threading.active_count() == threads
        assert node.stats.resident_bytes - before.resident_bytes < 2_000_000
        assert node.stats.pid == before.pid
