"""Moves output from a container's pipe to its log: each byte once, whenever the keeper is killed.

A batch goes like this, and the journal (see there) makes each step safe to be the last:

1. note which stream it is from, the log's size and the time;
2. ``splice`` from the pipe to the staging area;
3. format it, behind the unfinished line carried over from the last batch, and append the records to the log;
4. put the new unfinished line aside, and declare the batch done, in one store.

Killed before 2, nothing has happened. Killed after it, the successor does 3 and 4 with what it finds in staging: the
records come out the same, the log's size tells how much of them is there, and it appends the rest. A reader that
follows the log never sees a record twice, nor the file shrink.

With a full disk (or any other error) the records that don't fit are dropped and counted, and the container never waits.
The log then goes on at the beginning of a line; a line of which parts are already in the log is ended first.
"""

from __future__ import annotations

import time

from shim_porto_runtime.keeper import crilog, process
from shim_porto_runtime.keeper.journal import CLOSE, DATA, OPEN, SKIP, TAIL, Batch, Journal, Staging
from shim_porto_runtime.keeper.loop import COLD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim_porto_runtime.keeper.logfile import LogFile

_MAX_ATTEMPTS = 3
"""A batch that the keeper has died of this often is dropped: the other containers need their logs, too."""


class Output:
    """One output stream of a container.

    :param label: for messages.
    :param name: ``stdout`` or ``stderr``.
    :param fd: a pipe's read end or a terminal's master, non-blocking; None once the stream has ended.
    :param cell: the number of its cell in the journal.
    """

    __slots__ = ("calm_rounds", "carries", "cell", "dropped", "failing", "fd", "label", "name", "terminal", "tier")

    def __init__(self, label: str, name: str, fd: int | None, cell: int, *, terminal: bool) -> None:
        self.label = label
        self.name = name
        self.fd = fd
        self.cell = cell
        self.terminal = terminal
        self.dropped = 0
        """Bytes that are not in the log because it couldn't be written."""
        self.carries = False
        """Whether the cell holds a rest or flags: False saves looking."""
        self.failing = False
        self.tier = COLD
        self.calm_rounds = 0
        """How many rounds in a row it has brought too little for its tier."""


class Pump:
    """What all streams are pumped with."""

    def __init__(self, journal: Journal, staging: Staging) -> None:
        self._journal = journal
        self._staging = staging
        self._stamp = crilog.Stamp()

    def take(self, output: Output, log: LogFile | None) -> bytes:
        """Move one batch to the log; the container's bytes. Empty at the end of the stream.

        :raises BlockingIOError: there is nothing now.
        """
        assert output.fd is not None
        offset = log.size() if log is not None else 0
        now = time.time_ns()
        self._journal.begin(DATA, output.cell, self._staging.start(), offset, now)
        data = self._staging.take_terminal(output.fd) if output.terminal else self._staging.take(output.fd)
        if data:
            self._append(output, log, DATA, data, offset, now)
        return data

    def finish_line(self, output: Output, log: LogFile | None) -> None:
        """Write the unfinished line that is carried, if there is one: at the end of the stream, or for a flush."""
        if not output.carries or log is None:
            return
        offset = log.size()
        now = time.time_ns()
        self._journal.begin(TAIL, output.cell, self._staging.start(), offset, now)
        self._append(output, log, TAIL, b"", offset, now)

    def recover(self, batch: Batch, output: Output, log: LogFile | None) -> None:
        """Bring a batch to its end that a killed keeper left unfinished."""
        data = self._staging.left_behind(batch.start)
        if not data and batch.kind == DATA:
            return
        attempts = batch.attempts + 1
        self._journal.begin(batch.kind, batch.cell, batch.start, batch.log_offset, batch.time_ns, attempts)
        if attempts > _MAX_ATTEMPTS:
            flags, dropped, carry = self._journal.cell(output.cell)
            lost = len(carry) + len(data)
            process.log(f"{output.label}: {lost} bytes are dropped: the keeper died of them {batch.attempts} times")
            self._settle(output, SKIP | (CLOSE if flags & (OPEN | CLOSE) else 0), dropped + lost, b"")
            return
        # Smaller than it was: somebody has emptied the file, and what was written of the batch with it.
        already = max(0, log.size() - batch.log_offset) if log is not None else 0
        self._append(output, log, batch.kind, data, batch.log_offset, batch.time_ns, already)

    def adopt(self, output: Output) -> None:
        """Read what the stream's cell holds, when its keeper has changed."""
        flags, output.dropped, carry = self._journal.cell(output.cell)
        output.carries = bool(flags or carry)

    def _append(
        self, output: Output, log: LogFile | None, kind: int, data: bytes, offset: int, now: int, already: int = 0
    ) -> None:
        """Steps 3 and 4."""
        flags, dropped, carry = self._journal.cell(output.cell) if output.carries else (0, output.dropped, b"")
        if log is None:
            self._settle(output, flags, dropped, carry)
            return
        text = carry + data if carry else data
        if flags & SKIP:
            end = text.find(b"\n") + 1
            lost = end or len(text)
            dropped += lost
            text = text[lost:]
            if end:
                flags &= ~SKIP

        stream = output.name.encode()
        header = self._stamp.header(now, stream)
        out, used, unfinished = crilog.records(text, header)
        rest = text[used:]
        if kind == TAIL and rest:
            out, rest, unfinished = out + crilog.partial(rest, header), b"", True
        if not out:
            self._settle(output, flags, dropped, rest)
            return

        prefix = b"\n" if log.is_torn(offset) else b""
        if flags & CLOSE:
            prefix += crilog.line_end(header)
        if prefix:
            out = prefix + out
        whole, error = log.append(out, offset, min(already, len(out)))
        if error is None:
            flags = OPEN if unfinished else 0
        else:
            kept = out[len(prefix) : whole]
            dropped += len(text) - len(rest) - crilog.payload_bytes(kept, stream)
            if kept:
                is_open = crilog.is_partial(kept, len(kept), stream)
            else:
                is_open = bool(flags & (OPEN | CLOSE)) and not (flags & CLOSE and whole == len(prefix))
            flags = CLOSE if is_open else 0
            if unfinished:
                # The line goes on in the rest and in what is still to come; its beginning is lost.
                dropped += len(rest)
                rest = b""
                flags |= SKIP
        self._report(output, error, dropped)
        self._settle(output, flags, dropped, rest)

    def _settle(self, output: Output, flags: int, dropped: int, rest: bytes) -> None:
        half = self._journal.half(output.cell)
        if flags or rest or output.carries or dropped != output.dropped:
            half = self._journal.prepare(output.cell, flags, dropped, rest)
        self._journal.finish(output.cell, half)
        output.carries = bool(flags or rest)
        output.dropped = dropped

    @staticmethod
    def _report(output: Output, error: OSError | None, dropped: int) -> None:
        """Say it once when a log can't be written, and once when it can again."""
        if error is not None and not output.failing:
            process.log(f"{output.label}: the log can't be written, output is dropped until it can: {error.strerror}")
        elif error is None and output.failing:
            process.log(f"{output.label}: the log can be written again; {dropped} bytes have been lost in all")
        output.failing = error is not None
