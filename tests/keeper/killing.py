"""A keeper killed at every single instruction, and on disks that are full.

::

    python -m tests.keeper.killing DIRECTORY PART [...]

A process of its own, since it is forked thousands of times: the tests' own takes ten times as long to copy.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from shim_porto_runtime.keeper import logfile
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


def write(streams: Streams, data: bytes) -> None:
    """Write, and have it taken as a batch of its own where it is too much for a terminal at once."""
    for start in range(0, len(data), 1000):
        os.write(streams.writing, data[start : start + 1000])
        if streams.tty or start + 1000 < len(data):
            streams.take()


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


SCENARIOS = {
    "lines": (b"", b"one\ntwo\nthree\n"),
    "rest": (b"begin", b"ning\nnext"),
    "long": (b"x" * 9000, b"y" * 40_000 + b"\nz"),
    "only a rest": (b"a", b"b"),
    "long rest": (b"l" * 2000, b"m" * 14_384),
}


Make = Callable[..., Streams]


def taking(make: Make, scenario: str, kind: str) -> None:
    """Each byte is there once, wherever a keeper is killed that takes output."""
    before, text = SCENARIOS[scenario]
    tty = kind == "terminal"
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
        streams.close()
        instruction += step
    assert instruction > 100, "the tracing doesn't work"


def finishing(make: Make, kind: str) -> None:
    """Likewise when it writes a last line that has no end."""
    text = b"line\n" + (b"rest" if kind == "rest" else b"r" * 16384)
    instruction, killed = 0, True
    while killed:
        streams = make()
        write(streams, text)
        streams.take()
        killed = killed_at(instruction, lambda: streams.pump.finish_line(streams.output, streams.log))  # noqa: B023
        streams.renew()
        streams.take_all()
        assert streams.text == text, f"killed at instruction {instruction}"
        streams.close()
        instruction += 3
    assert instruction > 50, "the tracing doesn't work"


def recovering(make: Make) -> None:
    """Likewise when the next one is killed in its turn."""
    instruction, killed = 0, True
    while killed:
        streams = make()
        write(streams, b"carried")
        os.write(streams.writing, b" over\nand a rest")
        assert killed_at(150, streams.take)
        killed = killed_at(instruction, streams.renew)
        streams.renew()
        streams.take_all()
        assert streams.text == b"carried over\nand a rest", f"killed at instruction {instruction}"
        streams.close()
        instruction += 7
    assert instruction > 100, "the tracing doesn't work"


def full_disks(make: Make) -> None:
    """Disks full and keepers killed at random: whole records, in order, and every byte is accounted for."""
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
        assert made_up <= text.count(b"\n"), f"seed {seed}"
        assert is_subsequence(text.replace(b"\n", b""), sent), f"seed {seed}: out of order"
        streams.close()


def is_subsequence(part: bytes, whole: bytes) -> bool:
    position = 0
    for byte in part:
        position = whole.find(byte, position) + 1
        if position == 0:
            return False
    return True


PARTS: dict[str, Callable[..., None]] = {
    "taking": taking,
    "finishing": finishing,
    "recovering": recovering,
    "full-disks": full_disks,
}


def main(directory: Path, part: str, *arguments: str) -> None:
    numbers = itertools.count()

    def make(*, tty: bool = False) -> Streams:
        path = directory / str(next(numbers))
        path.mkdir()
        return Streams(path, tty=tty)

    PARTS[part](make, *arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
