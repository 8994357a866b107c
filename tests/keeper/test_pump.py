"""Each byte once: with a keeper killed at every single instruction, and with disks that are full."""

from __future__ import annotations

import errno
import os
import random
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from unittest import mock

import pytest
from shim_porto_runtime.keeper import logfile, process
from shim_porto_runtime.keeper.journal import Journal, Staging, make_staging, make_state
from shim_porto_runtime.keeper.logfile import LogFile, open_log
from shim_porto_runtime.keeper.pump import Output, Pump

from tests.keeper import crirecords


class Streams:
    """The descriptors of a keeper with one container, and a keeper's view of them that can be thrown away."""

    def __init__(self, directory: Path, *, tty: bool = False) -> None:
        self.path = directory / "0.log"
        self.state, self.staging, self.transit = make_state(), make_staging(), os.pipe2(os.O_NONBLOCK)
        self.tty = tty
        if tty:
            self.reading, self.writing = os.openpty()
            attributes = termios.tcgetattr(self.writing)
            attributes[1] &= ~termios.OPOST
            termios.tcsetattr(self.writing, termios.TCSANOW, attributes)
        else:
            self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.log_fd = open_log(str(directory), "0.log").fd
        self.cell = Journal(self.state).allocate()
        self.renew()

    def renew(self) -> None:
        """A new keeper takes the place of one that was killed, and brings to an end what that one began."""
        self.journal = Journal(self.state)
        self.pump = Pump(self.journal, Staging(self.staging, self.transit))
        self.log: LogFile = LogFile(self.log_fd)
        self.output = Output("c/stdout", "stdout", self.reading, self.cell, terminal=self.tty)
        batch = self.journal.under_way()
        self.pump.adopt(self.output)
        if batch is not None:
            self.pump.recover(batch, self.output, self.log)

    def take(self) -> bytes | None:
        try:
            return self.pump.take(self.output, self.log)
        except BlockingIOError:
            return None

    def take_all(self) -> None:
        while self.take():
            pass
        self.pump.finish_line(self.output, self.log)

    def close(self) -> None:
        for fd in {self.state, self.staging, *self.transit, self.reading, self.writing, self.log_fd}:
            os.close(fd)

    @property
    def text(self) -> bytes:
        return crirecords.read(self.path)["stdout"]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    made: list[Streams] = []

    def make_one(**options: bool) -> Streams:
        directory = tmp_path / str(len(made))
        directory.mkdir()
        made.append(Streams(directory, **options))
        return made[-1]

    yield make_one
    for streams in made:
        streams.close()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(process, "log", lines.append)
    return lines


# -- killed ------------------------------------------------------------------------------------------------------------


def killed_at(instruction: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a process that is gone before its n-th bytecode instruction; False if it came to its end."""
    pid = os.fork()
    if pid == 0:
        left = instruction

        def trace(frame: FrameType, event: str, _arg: object) -> Any:
            nonlocal left
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left < 0:
                    os._exit(9)
            return trace

        sys.settrace(trace)
        action()
        sys.settrace(None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


SCENARIOS = {
    "lines": (b"", b"one\ntwo\nthree\n"),
    "rest": (b"begin", b"ning\nnext"),
    "long": (b"x" * 9000, b"y" * 40_000 + b"\nz"),
    "only a rest": (b"a", b"b"),
    "long rest": (b"l" * 2000, b"m" * 14_384),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("tty", [False, True])
def test_killed_at_any_instruction_each_byte_is_there_once(make: Any, scenario: str, tty: bool) -> None:
    before, text = SCENARIOS[scenario]
    step = 1 if scenario == "rest" and not tty else 7
    instruction, killed = 0, True
    while killed:
        streams = make(tty=tty)
        write(streams, before)
        write(streams, text)
        killed = killed_at(instruction, streams.take)
        streams.renew()
        streams.take_all()
        assert streams.text == before + text, f"killed at instruction {instruction}"
        instruction += step
    assert instruction > 100, "the tracing doesn't work"


@pytest.mark.parametrize("text", [b"rest", b"r" * 16384])
def test_killed_while_the_last_line_is_written(make: Any, text: bytes) -> None:
    instruction, killed = 0, True
    while killed:
        streams = make()
        write(streams, b"line\n" + text)
        streams.take()
        killed = killed_at(instruction, lambda: streams.pump.finish_line(streams.output, streams.log))  # noqa: B023
        streams.renew()
        streams.take_all()
        assert streams.text == b"line\n" + text
        instruction += 3
    assert instruction > 50


def test_killed_again_while_recovering(make: Any) -> None:
    instruction, killed = 0, True
    while killed:
        streams = make()
        write(streams, b"carried")
        os.write(streams.writing, b" over\nand a rest")
        assert killed_at(150, streams.take)
        killed = killed_at(instruction, streams.renew)
        streams.renew()
        streams.take_all()
        assert streams.text == b"carried over\nand a rest"
        instruction += 7


def test_killed_while_the_write_is_half_done(make: Any) -> None:
    """The kernel may stop a big write in the middle when the writer is killed."""
    text = b"".join(b"line %d\n" % number for number in range(1000))
    for half in (1, 20, 1000, 30_000):
        streams = make()
        real_append = LogFile.append

        def append(log: LogFile, out: bytes, offset: int, already: int = 0, half: int = half) -> NoReturn:
            os.write(log.fd, out[:half])
            os._exit(9)

        os.write(streams.writing, text)
        pid = os.fork()
        if pid == 0:
            with mock.patch.object(LogFile, "append", append):
                streams.take()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        assert LogFile.append is real_append
        assert streams.path.stat().st_size == half
        streams.renew()
        streams.take_all()
        assert streams.text == text


def test_a_reader_that_follows_never_sees_the_log_shrink_or_repeat(make: Any) -> None:
    """What a killed keeper has written stays as it is: the successor only adds to it."""
    streams = make()
    os.write(streams.writing, b"first\nsecond\n")
    assert killed_at(10_000, streams.take) is False
    seen = streams.path.read_bytes()
    streams.renew()
    assert streams.path.read_bytes() == seen


def test_a_batch_that_kills_every_keeper_is_dropped(make: Any, said: list[str]) -> None:
    streams = make()
    os.write(streams.writing, b"poison\nmore of it")

    def die(*_: object) -> NoReturn:
        os._exit(9)

    def keeper() -> None:
        with mock.patch.object(streams.pump, "_append", die):
            streams.take()

    def successor() -> None:
        with mock.patch.object(Pump, "_append", die):
            streams.renew()

    assert killed_at(10**9, keeper)
    for _ in range(3):
        assert killed_at(10**9, successor)
    streams.renew()
    os.write(streams.writing, b" poison\nhealthy\n")
    streams.take_all()
    assert streams.text == b"healthy\n"
    assert streams.output.dropped == len(b"poison\nmore of it poison\n")
    assert "dropped" in said[0]


def write(streams: Streams, data: bytes) -> None:
    """Write, and have it taken as a batch of its own where it is too much for a terminal at once."""
    for start in range(0, len(data), 1000):
        os.write(streams.writing, data[start : start + 1000])
        if streams.tty or start + 1000 < len(data):
            streams.take()


# -- full disks --------------------------------------------------------------------------------------------------------


class FullDisk:
    """A disk with room for so many more bytes."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._patch = mock.patch.object(logfile, "os", self)

    def __enter__(self) -> None:
        self._patch.start()

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, fd: int, data: bytes) -> int:
        if self._room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        size = os.write(fd, data[: self._room])
        self._room -= size
        return size

    def ftruncate(self, fd: int, size: int) -> None:
        self._room += os.fstat(fd).st_size - size
        os.ftruncate(fd, size)


def test_a_full_disk_costs_whole_lines_and_they_are_counted(make: Any, said: list[str]) -> None:
    streams = make()
    lines = [b"line %03d\n" % number for number in range(100)]
    os.write(streams.writing, b"".join(lines[:10]))
    streams.take()
    with FullDisk(200):
        os.write(streams.writing, b"".join(lines[10:90]) + lines[90][:4])
        streams.take()
        assert streams.path.read_bytes().endswith(b"\n")
    os.write(streams.writing, lines[90][4:] + b"".join(lines[91:]))
    streams.take()
    kept = streams.text.splitlines(keepends=True)
    assert kept[:10] == lines[:10]
    assert kept[-10:] == lines[-10:]
    assert 10 < len(kept) - 10 < 20, "what fits is written"
    assert streams.output.dropped == len(b"".join(lines)) - len(streams.text)
    assert len(said) == 2, "once when it begins, once when it is over"


def test_a_line_half_of_which_is_lost_is_ended_and_its_rest_dropped(make: Any, said: list[str]) -> None:
    streams = make()
    os.write(streams.writing, b"a" * 20_000)
    streams.take()  # one part is in the log, the rest carried
    with FullDisk(5):
        os.write(streams.writing, b"b" * 20_000)
        streams.take()
        os.write(streams.writing, b"c" * 500)
        streams.take()
    os.write(streams.writing, b"still of the line\nnext line\n")
    streams.take()
    assert streams.text == b"a" * 16384 + b"\n" + b"next line\n"
    assert streams.output.dropped == 40_000 + 500 + len(b"still of the line\n") - 16384


def test_a_lost_line_end_is_made_up_for(make: Any, said: list[str]) -> None:
    streams = make()
    os.write(streams.writing, b"begun")
    streams.take()
    streams.pump.finish_line(streams.output, streams.log)
    with FullDisk(3):
        os.write(streams.writing, b" and ended\nsecond\n")
        streams.take()
    os.write(streams.writing, b"third\n")
    streams.take()
    assert streams.text == b"begun\nthird\n"
    assert streams.output.dropped == len(b" and ended\nsecond\n")


def test_random_full_disks_leave_whole_records_and_right_counts(make: Any, said: list[str]) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        streams = make()
        sent = b""
        for _ in range(30):
            piece = b"".join(
                rng.choice([b"x" * rng.randrange(40), b"\n", b"\r\n", b"\0", b"L" * rng.randrange(30_000)])
                for _ in range(rng.randrange(1, 6))
            )
            os.set_blocking(streams.writing, False)
            sent += piece[: os.write(streams.writing, piece)] if piece else b""
            if rng.random() < 0.5:
                with FullDisk(rng.choice([0, 1, 50, 500, 20_000])):
                    streams.take()
                    if rng.random() < 0.3:
                        streams.pump.finish_line(streams.output, streams.log)
            elif rng.random() < 0.2:
                killed_at(rng.randrange(400), streams.take)
                streams.renew()
            else:
                streams.take()
        streams.take_all()
        text = streams.text
        made_up = len(text) - (len(sent) - streams.output.dropped)
        assert made_up >= 0, f"seed {seed}: bytes are neither in the log nor counted"
        assert made_up <= text.count(b"\n")
        assert is_subsequence(text.replace(b"\n", b""), sent), f"seed {seed}: out of order"


def is_subsequence(part: bytes, whole: bytes) -> bool:
    position = 0
    for byte in part:
        position = whole.find(byte, position) + 1
        if position == 0:
            return False
    return True


def test_the_other_stream_does_not_write_onto_a_torn_record(make: Any, said: list[str]) -> None:
    """A disk so broken that half a record can't even be taken back."""
    streams = make()
    os.write(streams.log_fd, b"2023-11-14T22:13:20.123456789Z stderr F hal")
    streams.renew()
    os.write(streams.writing, b"whole\n")
    streams.take()
    torn, whole = streams.path.read_bytes().splitlines()
    assert torn.endswith(b"hal")
    assert whole.endswith(b"stdout F whole")


# -- without a log -----------------------------------------------------------------------------------------------------


def test_without_a_log_output_is_taken_all_the_same(make: Any) -> None:
    streams = make()
    os.write(streams.writing, b"x" * 60_000)
    assert streams.pump.take(streams.output, None) == b"x" * 60_000
    assert streams.output.dropped == 0
    assert streams.path.stat().st_size == 0
