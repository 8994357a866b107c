"""The memory files, and who owns the streams during a hand-over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
from shim_porto_runtime.keeper.crilog import RECORD_BYTES
from shim_porto_runtime.keeper.journal import (
    CELL_BYTES,
    CHUNK_BYTES,
    DATA,
    STAGING_BYTES,
    Claim,
    Journal,
    Staging,
    make_staging,
    make_state,
)


@pytest.fixture
def state() -> Iterator[int]:
    fd = make_state()
    yield fd
    os.close(fd)


def test_a_cell_keeps_what_was_put_in_it(state: int) -> None:
    journal = Journal(state)
    for rest in (b"short", b"l" * RECORD_BYTES, b"", b"x" * 1900, b"y" * 1901):
        cell = journal.allocate()
        journal.fill(cell, 3, 70, rest)
        assert Journal(state).cell(cell) == (3, 70, rest)


def test_what_is_prepared_counts_only_once_it_is_declared(state: int) -> None:
    journal = Journal(state)
    cell = journal.allocate()
    journal.begin(DATA, cell, 0, 100, 5)
    half = journal.prepare(cell, 1, 2, b"new")
    assert Journal(state).cell(cell) == (0, 0, b"")
    journal.finish(cell, half)
    assert Journal(state).cell(cell) == (1, 2, b"new")


def test_a_batch_is_under_way_from_its_beginning_to_its_end(state: int) -> None:
    journal = Journal(state)
    assert journal.under_way() is None
    cell = journal.allocate()
    journal.begin(DATA, cell, 4096, 2**40, 1_700_000_000_123_456_789, 2)
    batch = Journal(state).under_way()
    assert batch is not None
    assert (batch.kind, batch.cell, batch.start, batch.log_offset) == (DATA, cell, 4096, 2**40)
    assert (batch.time_ns, batch.attempts) == (1_700_000_000_123_456_789, 2)
    journal.finish(cell, journal.half(cell))
    assert Journal(state).under_way() is None


def test_what_is_valid_is_never_written_over(state: int) -> None:
    """A kill in the middle of writing a record must leave the one before it whole."""
    journal = Journal(state)
    cell = journal.allocate()
    for turn in range(4):
        before = os.pread(state, CELL_BYTES, 0), os.pread(state, CELL_BYTES, cell * CELL_BYTES)
        valid = slice(64, 128) if before[0][0] == 0 else slice(128, 192)
        journal.begin(DATA, cell, turn, 2**64 - 1 - turn, 2**63 + turn)
        assert os.pread(state, CELL_BYTES, 0)[valid] == before[0][valid]
        half = journal.prepare(cell, 7, turn, b"%d" % turn * 16384)
        valid = slice(4096, 20480) if before[1][0] == 0 else slice(20480, 36864)
        assert os.pread(state, CELL_BYTES, cell * CELL_BYTES)[valid] == before[1][valid]
        journal.finish(cell, half)


def test_cells_grow_and_are_used_again_empty(state: int) -> None:
    journal = Journal(state)
    cells = [journal.allocate() for _ in range(100)]
    assert len(set(cells)) == 100
    assert 0 not in cells
    journal.fill(cells[7], 1, 9, b"z" * 5000)
    journal.release(cells[7])
    assert journal.allocate() == cells[7]
    assert journal.cell(cells[7]) == (0, 0, b"")


def test_a_successor_frees_the_cells_that_nobody_has(state: int) -> None:
    journal = Journal(state)
    cells = [journal.allocate() for _ in range(5)]
    for cell in cells:
        journal.fill(cell, 1, 1, b"x")
    successor = Journal(state)
    successor.adopt({cells[1], cells[4]})
    fresh = {successor.allocate() for _ in range(3)}
    assert fresh == {cells[0], cells[2], cells[3]}
    assert all(successor.cell(cell) == (0, 0, b"") for cell in fresh)
    assert successor.cell(cells[1]) == (1, 1, b"x")
    assert successor.allocate() == cells[4] + 1


def test_memory_of_a_released_cell_is_given_back(state: int) -> None:
    journal = Journal(state)
    cell = journal.allocate()
    before = os.fstat(state).st_blocks
    journal.fill(cell, 0, 0, b"x" * RECORD_BYTES)
    assert os.fstat(state).st_blocks > before
    journal.release(cell)
    assert os.fstat(state).st_blocks <= before


def test_staging_tells_a_successor_what_was_taken() -> None:
    fd, transit, pipe = make_staging(), os.pipe2(os.O_NONBLOCK), os.pipe2(os.O_NONBLOCK)
    staging = Staging(fd, transit)
    with pytest.raises(BlockingIOError):
        staging.take(pipe[0])
    for round_number in range(20):  # more than the area holds: it begins again at the front
        start = staging.start()
        assert start + CHUNK_BYTES <= STAGING_BYTES
        data = bytes([round_number]) * 30_000
        os.write(pipe[1], data)
        assert staging.take(pipe[0]) == data
        assert Staging(fd, transit).left_behind(start) == data
        following = staging.start()
        assert Staging(fd, transit).left_behind(following) == b""
    os.close(pipe[1])
    assert staging.take(pipe[0]) == b""
    for end in (fd, *transit, pipe[0]):
        os.close(end)


def test_staging_takes_from_a_terminal_and_sees_its_end() -> None:
    fd, transit = make_staging(), os.pipe2(os.O_NONBLOCK)
    master, slave = os.openpty()
    os.set_blocking(master, False)
    staging = Staging(fd, transit)
    with pytest.raises(BlockingIOError):
        staging.take_terminal(master)
    os.write(slave, b"on a terminal")
    assert staging.take_terminal(master) == b"on a terminal"
    os.close(slave)
    assert staging.take_terminal(master) == b""
    for end in (fd, *transit, master):
        os.close(end)


def test_what_is_in_transit_is_not_forgotten() -> None:
    fd, transit = make_staging(), os.pipe2(os.O_NONBLOCK)
    os.write(transit[1], b"killed in between")
    assert Staging(fd, transit).left_behind(0) == b"killed in between"
    for end in (fd, *transit):
        os.close(end)


def test_an_offer_is_taken_once_and_then_stands(state: int) -> None:
    claim = Claim(state)
    number = claim.offer()
    assert claim.take(number)
    assert not claim.withdraw()
    assert not claim.withdraw()


def test_an_offer_that_is_taken_back_cannot_be_taken(state: int) -> None:
    claim = Claim(state)
    number = claim.offer()
    assert claim.withdraw()
    assert not claim.take(number)
    again = claim.offer()
    assert again != number or claim.take(again)
    assert claim.take(claim.offer())


def test_without_an_offer_there_is_nothing_to_take(state: int) -> None:
    assert Claim(state).withdraw()
    assert not Claim(state).take(1)


def test_of_two_who_race_one_wins(state: int) -> None:
    """The lock is between processes, so each side is one."""
    for _ in range(50):
        number = Claim(state).offer()
        reading, writing = os.pipe()
        pids = []
        for move in (partial(Claim(state).take, number), Claim(state).withdraw):
            pid = os.fork()
            if pid == 0:
                os.write(writing, b"1" if move() else b"0")
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        assert sorted(os.read(reading, 2)) == sorted(b"01")
        os.close(reading)
        os.close(writing)
        os.pwrite(state, bytes(8), 256)
