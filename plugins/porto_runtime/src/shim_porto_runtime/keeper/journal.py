"""What a successor has to know of a keeper that was killed: kept in memory files that outlive the process.

The files are memfds. The holder has their descriptors as it has those of the pipes, so they live exactly as long as the
data they describe: nothing to write to a disk, nothing stale after a reboot, no page of a full disk to fault on.

*Staging*
    Output on its way from a container's pipe to its log. ``splice`` moves it there, and the kernel moves the file's
    position by as much in the same call: a process killed at any instruction has either not taken the bytes or left a
    position behind that says so. (``read`` into memory could lose them; a pipe in place of the file takes two more
    calls a batch, ``tee`` and another ``read``.) One area serves all containers: one batch is under way at a time.

*Journal*
    Which stream that batch is from, where its records begin in the log, and the time they carry. With it a successor
    formats the same records again, sees by the log's size how much is in it, and writes the rest.

*Cells*
    One a stream: the unfinished line carried over from the last batch, and what a full disk has cost.

Every change is written to the half not in use; storing one byte then makes that half the valid one.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import struct

from shim_porto_runtime.keeper.crilog import RECORD_BYTES

STAGING_BYTES = 256 * 1024
CHUNK_BYTES = 64 * 1024
"""The largest batch."""

CELL_BYTES = 64 * 1024  # a multiple of every page size
_FIRST_CELLS = 32

DATA, TAIL = 1, 2
"""Kinds of a batch: what ``splice`` took from the container; the carried rest alone, at the end or for a flush."""

OPEN, SKIP, CLOSE = 1, 2, 4
"""Flags of a cell: the stream's last record is a part of a line; drop what comes up to the next newline; end the line
that is open in the log before anything else."""

# The journal, in cell 0.
_RECORD = struct.Struct("=BBBxIIQQI")  # phase, kind, half, cell, start, log offset, time in ns, attempts
_RECORD_AT = (64, 128)
_TAKING, _DONE = 1, 2
_CLAIM = struct.Struct("=II")  # offered, taken: see Claim
_CLAIM_AT = 256

# A cell.
_HEAD = struct.Struct("=B3xIQ")  # flags, bytes carried, bytes dropped
_HEAD_AT = (64, 2048)
_INLINE_BYTES = 1900
_CARRY_AT = (4096, 4096 + RECORD_BYTES)


class Batch:
    """A batch that was under way when its keeper was killed."""

    __slots__ = ("attempts", "cell", "kind", "log_offset", "start", "time_ns")

    def __init__(self, kind: int, cell: int, start: int, log_offset: int, time_ns: int, attempts: int) -> None:
        self.kind = kind
        self.cell = cell
        self.start = start
        self.log_offset = log_offset
        self.time_ns = time_ns
        self.attempts = attempts


def make_state() -> int:
    """A new memory file for journal and cells; its descriptor."""
    fd = os.memfd_create("keeper-state", os.MFD_CLOEXEC)
    os.ftruncate(fd, _FIRST_CELLS * CELL_BYTES)
    return fd


def make_staging() -> int:
    """A new memory file for staging; its descriptor. Its memory is taken now, so that it can't run out later."""
    fd = os.memfd_create("keeper-staging", os.MFD_CLOEXEC)
    os.posix_fallocate(fd, 0, STAGING_BYTES)
    return fd


class Journal:
    """Journal and cells, mapped.

    :param fd: the memory file; stays open and belongs to the caller.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self._half = self._map[0]
        self._free: list[int] = []
        self._used = 0
        """Cells up to this number have been given out."""

    def close(self) -> None:
        self._map.close()

    # -- the batch under way -------------------------------------------------------------------------------------------

    def begin(self, kind: int, cell: int, start: int, log_offset: int, time_ns: int, attempts: int = 0) -> None:
        """Note what the next batch is, before any of it is taken."""
        half = 1 - self._half
        _RECORD.pack_into(self._map, _RECORD_AT[half], _TAKING, kind, 0, cell, start, log_offset, time_ns, attempts)
        self._half = self._map[0] = half

    def finish(self, cell: int, cell_half: int) -> None:
        """The batch is in the log: from now on the cell's given half is the valid one."""
        half = 1 - self._half
        _RECORD.pack_into(self._map, _RECORD_AT[half], _DONE, 0, cell_half, cell, 0, 0, 0, 0)
        self._half = self._map[0] = half
        self._map[cell * CELL_BYTES] = cell_half

    def under_way(self) -> Batch | None:
        """The batch that a killed keeper left unfinished; to be asked once, before anything else."""
        phase, kind, cell_half, cell, start, offset, time_ns, attempts = _RECORD.unpack_from(
            self._map, _RECORD_AT[self._half]
        )
        if phase == _DONE:
            self._map[cell * CELL_BYTES] = cell_half
        return Batch(kind, cell, start, offset, time_ns, attempts) if phase == _TAKING else None

    # -- cells ---------------------------------------------------------------------------------------------------------

    def allocate(self) -> int:
        """The number of a new, empty cell.

        :raises OSError: there is no memory for it.
        """
        if self._free:
            return self._free.pop()
        number = self._used + 1
        if (number + 1) * CELL_BYTES > len(self._map):
            self._map.resize(len(self._map) * 2)
        self._used = number
        return number

    def adopt(self, numbers: set[int]) -> None:
        """Take over the cells in use; the others up to the highest are free."""
        self._used = max(numbers, default=0)
        for number in range(1, self._used + 1):
            if number not in numbers:
                self.release(number)

    def release(self, number: int) -> None:
        """Empty a cell and give its memory back."""
        self._map.madvise(mmap.MADV_REMOVE, number * CELL_BYTES, CELL_BYTES)
        self._free.append(number)

    def cell(self, number: int) -> tuple[int, int, bytes]:
        """A cell's flags, dropped bytes and carried bytes."""
        base = number * CELL_BYTES
        half = self._map[base]
        flags, size, dropped = _HEAD.unpack_from(self._map, base + _HEAD_AT[half])
        at = self._carry_at(base, half, size)
        return flags, dropped, self._map[at : at + size]

    def prepare(self, number: int, flags: int, dropped: int, carry: bytes) -> int:
        """Write what the cell shall hold to its other half; its number, for :meth:`finish`."""
        base = number * CELL_BYTES
        half = 1 - self._map[base]
        size = len(carry)
        _HEAD.pack_into(self._map, base + _HEAD_AT[half], flags, size, dropped)
        if size:
            at = self._carry_at(base, half, size)
            self._map[at : at + size] = carry
        return half

    def half(self, number: int) -> int:
        """The valid half of a cell."""
        return self._map[number * CELL_BYTES]

    def fill(self, number: int, flags: int, dropped: int, carry: bytes) -> None:
        """Set a cell outside any batch: when it is taken over from another keeper."""
        half = self.prepare(number, flags, dropped, carry)
        self._map[number * CELL_BYTES] = half

    @staticmethod
    def _carry_at(base: int, half: int, size: int) -> int:
        # A short rest stays on the first page: a line cut by a batch's edge costs a stream no second page.
        return base + (_HEAD_AT[half] + _HEAD.size if size <= _INLINE_BYTES else _CARRY_AT[half])


class Staging:
    """The staging area, mapped.

    :param fd: the memory file.
    :param transit: the ends of a pipe, read end first, for terminals: ``splice`` needs a pipe on one side.
    """

    def __init__(self, fd: int, transit: tuple[int, int]) -> None:
        self._fd = fd
        self._map = mmap.mmap(fd, STAGING_BYTES)
        self._transit_out, self._transit_in = transit
        self._position = os.lseek(fd, 0, os.SEEK_CUR)

    def close(self) -> None:
        self._map.close()

    def start(self) -> int:
        """Where the next batch will begin. Only with no batch under way."""
        if self._position + CHUNK_BYTES > STAGING_BYTES:
            self._position = os.lseek(self._fd, 0, os.SEEK_SET)
        return self._position

    def take(self, fd: int) -> bytes:
        """Move what a pipe holds into the area, at most :data:`CHUNK_BYTES`; empty at its end.

        :raises BlockingIOError: there is nothing now.
        """
        size = os.splice(fd, self._fd, CHUNK_BYTES, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        start = self._position
        self._position = start + size
        return self._map[start : start + size]

    def take_terminal(self, fd: int) -> bytes:
        """The same for a terminal's master.

        :raises BlockingIOError: there is nothing now.
        """
        try:
            try:
                os.splice(fd, self._transit_in, CHUNK_BYTES, flags=os.SPLICE_F_NONBLOCK)
            except OSError as err:
                if err.errno != errno.EINVAL:
                    raise
                # Linux 5.10 alone can't splice from a terminal: there a kill between these two calls loses the bytes.
                os.write(self._transit_in, os.read(fd, 4096))
        except OSError as err:
            if err.errno != errno.EIO:
                raise
            return b""  # nobody has the terminal open any more, and everything has been read
        return self.take(self._transit_out)

    def left_behind(self, start: int) -> bytes:
        """What a killed keeper had taken since ``start``."""
        waiting = select.poll()
        waiting.register(self._transit_out, select.POLLIN)
        if waiting.poll(0):
            self.take(self._transit_out)
        return self._map[start : self._position] if self._position > start else b""


class Claim:
    """Which of two keepers owns the streams while one hands them over: settled in the old one's memory file.

    The old keeper offers, the new one takes, or the old one (or its holder, if it was killed) takes the offer back:
    whichever comes first.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def offer(self) -> int:
        """Offer the streams; the number of this offer."""
        with _Locked(self._fd):
            offered, taken = self._read()
            number = max(offered, taken) + 1
            self._write(number, taken)
        return number

    def take(self, number: int) -> bool:
        """Take what was offered; False if the offer doesn't stand any more."""
        with _Locked(self._fd):
            offered, _ = self._read()
            if offered != number:
                return False
            self._write(number, number)
        return True

    def withdraw(self) -> bool:
        """Take back any offer; False if it has been taken: the streams are another keeper's."""
        with _Locked(self._fd):
            offered, taken = self._read()
            if taken and offered == taken:
                return False
            self._write(0, taken)
        return True

    def _read(self) -> tuple[int, int]:
        offered, taken = _CLAIM.unpack(os.pread(self._fd, _CLAIM.size, _CLAIM_AT))
        return offered, taken

    def _write(self, offered: int, taken: int) -> None:
        os.pwrite(self._fd, _CLAIM.pack(offered, taken), _CLAIM_AT)


class _Locked:
    """A lock between processes on a memory file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN)
