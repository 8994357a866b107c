"""Each byte once: with a keeper killed at every single instruction, and with disks that are full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest
from shim_porto_runtime.keeper import process
from shim_porto_runtime.keeper.logfile import LogFile
from shim_porto_runtime.keeper.pump import Pump

from tests.keeper import killing
from tests.keeper.killing import SCENARIOS, FullDisk, Streams, killed_at


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


def apart(tmp_path: Path, *arguments: str) -> None:
    """Run a part of :mod:`tests.keeper.killing` in a small process."""
    argv = [sys.executable, "-m", killing.__name__, str(tmp_path), *arguments]
    done = subprocess.run(argv, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("tty", [False, True])
def test_killed_at_any_instruction_each_byte_is_there_once(tmp_path: Path, scenario: str, tty: bool) -> None:
    apart(tmp_path, "taking", scenario, "terminal" if tty else "pipes")


@pytest.mark.parametrize("rest", ["rest", "part"])
def test_killed_while_the_last_line_is_written(tmp_path: Path, rest: str) -> None:
    apart(tmp_path, "finishing", rest)


def test_killed_again_while_recovering(tmp_path: Path) -> None:
    apart(tmp_path, "recovering")


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


# -- full disks --------------------------------------------------------------------------------------------------------


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


def test_random_full_disks_leave_whole_records_and_right_counts(tmp_path: Path) -> None:
    apart(tmp_path, "full-disks")


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
