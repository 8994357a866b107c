"""The holder: the process whose only work is that the descriptors of all containers outlive the worker.

It is told of every container with duplicates of the descriptors. When the worker ends without a word, the holder forks
another, which inherits them and goes on where the journal says; when the holder ends, the worker forks another holder.
Containers lose their streams only if both are killed within the milliseconds that takes.

The new worker is forked, and not executed: it runs the code that the old one ran, even if the files on the disk have
been replaced meanwhile, so it formats what was under way as the old one did. And most of its memory is the holder's.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time

from shim_porto_runtime.keeper import process, protocol
from shim_porto_runtime.keeper.journal import Claim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from shim_porto_runtime.keeper.container import Container
    from shim_porto_runtime.keeper.handover import Takeover
    from shim_porto_runtime.keeper.loop import Loop
    from shim_porto_runtime.keeper.worker import Worker

Entries = dict[str, tuple["dict[str, Any]", "list[int]"]]
"""By container: what ``Container.entry`` gives."""

_GOOD_LIFE_S = 1.0
"""A worker that has lived this long didn't die of what it found at its start."""
_MAX_DELAY_S = 1.0
_TIMEOUT_S = 5.0
"""How long a worker waits for a holder that doesn't read."""
_RETRY_S = 1.0
"""How long a process that can't fork waits before it tries again."""


class Keep:
    """What a keeper has besides its containers.

    :param listening: the socket that clients connect to.
    :param lock: of the directory.
    :param state: the journal's memory file.  :param staging: the staging area's.
    :param transit: a pipe, read end first.
    :param build: says which code this is.
    """

    def __init__(
        self,
        directory: str,
        *,
        listening: int,
        lock: int,
        state: int,
        staging: int,
        transit: tuple[int, int],
        idle_exit_s: float,
        build: str,
    ) -> None:
        self.directory = directory
        self.listening = listening
        self.lock = lock
        self.state = state
        self.staging = staging
        self.transit = transit
        self.idle_exit_s = idle_exit_s
        self.build = build

    @property
    def fds(self) -> set[int]:
        return {self.listening, self.lock, self.state, self.staging, *self.transit}


class Holder:
    """The holder's role in a process.

    :param worker: the connection to a worker that is there already; None to start one.
    :param takeover: the hand-over from an older keeper that is under way.
    :param ready: a descriptor to write a byte to when everything is in place.
    """

    def __init__(
        self,
        keep: Keep,
        entries: Entries,
        worker: socket.socket | None = None,
        *,
        takeover: Takeover | None = None,
        ready: int | None = None,
    ) -> None:
        self._keep = keep
        self._entries = entries
        self._worker = worker
        self._takeover = takeover
        self._ready = ready
        self._child: int | None = None
        self._delay_s = 0.0

    def run(self) -> Worker | None:
        """Hold until the keeper ends (None). In a forked child: the worker to be."""
        process.set_name("keeper-holder")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        if self._takeover is None and self._ready is None:
            process.close_other_than({fd for _, fds in self._entries.values() for fd in fds} | self._fds())
        while True:
            started = time.monotonic()
            if self._worker is None:
                role = self._start_worker()
                if role is not None:
                    return role
                if not self._begin():
                    return None
            if not self._hold():
                return None
            self._worker = None
            if not Claim(self._keep.state).withdraw():
                return None  # a successor has everything
            self._back_off(time.monotonic() - started)

    def _fds(self) -> set[int]:
        return self._keep.fds | ({self._worker.fileno()} if self._worker is not None else set())

    def _start_worker(self) -> Worker | None:
        from shim_porto_runtime.keeper.worker import Worker

        parent = os.getpid()
        while True:
            try:
                ours, theirs, self._child = _fork_connected()
                break
            except OSError as err:
                process.log(f"no new worker: {err.strerror}; trying again")
                time.sleep(_RETRY_S)  # without memory or numbers left there is nothing better to do than to hold on
        if self._child == 0:
            ours.close()
            if self._ready is not None:
                os.close(self._ready)
            return Worker(self._keep, self._entries, theirs, parent, takeover=self._takeover)
        theirs.close()
        self._worker = ours
        return None

    def _begin(self) -> bool:
        """The worker is there: take over, if that is what we are here for, and tell who waits for us."""
        assert self._worker is not None
        takeover, self._takeover = self._takeover, None
        if takeover is not None:
            if not takeover.commit(self._worker):
                return False
            takeover.close()
        ready, self._ready = self._ready, None
        if ready is not None:
            try:
                os.write(ready, b"1")
            except BrokenPipeError:
                pass  # whoever started us has lost patience; the keeper is there all the same
            os.close(ready)
        return True

    def _hold(self) -> bool:
        """Follow what the worker tells; False when it says that it is all over, True when it has been killed."""
        assert self._worker is not None
        with self._worker as worker:
            while True:
                try:
                    packet = protocol.receive(worker)
                except OSError:
                    packet = None
                if packet is None:
                    return True
                message, fds = packet
                if "hold" in message:
                    self._put(message["hold"]["id"], (message["hold"], fds))
                elif "drop" in message:
                    self._put(message["drop"], None)
                elif "quit" in message:
                    return False

    def _put(self, container_id: str, entry: tuple[dict[str, Any], list[int]] | None) -> None:
        old = self._entries.pop(container_id, None)
        if old is not None:
            protocol.close_all(old[1])
        if entry is not None:
            self._entries[container_id] = entry

    def _back_off(self, lived_s: float) -> None:
        cause = "its connection has ended"
        if self._child is not None:
            child, self._child = self._child, None
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            cause = f"signal {-status}" if status < 0 else f"exit status {status}"
        self._delay_s = 0.0 if lived_s > _GOOD_LIFE_S else min(_MAX_DELAY_S, self._delay_s * 2 + 0.01)
        count = len(self._entries)
        process.log(f"the worker has ended ({cause}); {count} containers go on with a new one in {self._delay_s:g} s")
        # A pause, so that a worker that dies at its start doesn't use up a core; meanwhile pipes hold the output.
        time.sleep(self._delay_s)

    def _pass_on(self, _number: int, _frame: object) -> None:
        if self._worker is not None:
            try:
                protocol.send(self._worker, {"end": True}, flags=socket.MSG_DONTWAIT)
            except OSError:
                pass  # it is just being replaced; whoever wants the keeper to end asks again


class Become(BaseException):
    """Raised in a forked child, to leave everything of the worker and be the holder."""

    def __init__(self, role: Holder) -> None:
        super().__init__()
        self.role = role


class HolderLink:
    """The worker's connection to the holder. A holder that has ended is replaced at once.

    :param pid: the holder's.
    :param entries: tells what a new holder needs.
    :param on_end: called when the holder was asked to end the keeper.
    """

    def __init__(
        self,
        loop: Loop,
        keep: Keep,
        connection: socket.socket,
        pid: int,
        *,
        entries: Callable[[], Entries],
        on_end: Callable[[], None],
    ) -> None:
        self.pid = pid
        self._loop = loop
        self._keep = keep
        self._connection: socket.socket | None = connection
        self._entries = entries
        self._on_end = on_end
        self._retry_at = 0.0
        self._watch()

    def hold(self, container: Container) -> None:
        """Have it keep what a container has now."""
        description, fds = container.entry()
        self._tell({"hold": description}, fds)

    def drop(self, container_id: str) -> None:
        """Have it let go of a container."""
        self._tell({"drop": container_id})

    def leave(self) -> None:
        """The worker ends, and so shall the holder."""
        if self._connection is not None:
            self._quit(self._connection)

    def look_after(self) -> float:
        """Try again to fork a holder, if there is none; in how many seconds to ask next.

        :raises Become: in the new holder.
        """
        if self._connection is not None:
            return 60.0
        if time.monotonic() >= self._retry_at:
            self._replace()
        return _RETRY_S

    def _watch(self) -> None:
        assert self._connection is not None
        self._connection.setblocking(False)
        self._loop.watch(self._connection.fileno(), select.EPOLLIN, self._hear)

    def _hear(self, _events: int) -> None:
        if self._connection is None:
            return
        try:
            packet = protocol.receive(self._connection)
        except BlockingIOError:
            return
        except OSError:
            packet = None
        if packet is None:
            process.log("the holder has ended; a new one takes its place")
            self._replace()
        elif "end" in packet[0]:
            self._on_end()

    def _tell(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        if self._connection is None:
            return  # the next one hears of everything
        try:
            try:
                protocol.send(self._connection, message, fds)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._connection, select.POLLOUT)
                poll.poll(_TIMEOUT_S * 1000)
                protocol.send(self._connection, message, fds)
        except BlockingIOError:
            process.log("the holder doesn't answer; a new one takes its place")
            os.kill(self.pid, signal.SIGKILL)  # it has its socket open, so this is still its number
            self._replace()
        except OSError:
            self._replace()

    def _replace(self) -> None:
        if self._connection is not None:
            self._loop.forget(self._connection.fileno())
            # It has ended; but if it hadn't, it would take the end of the connection for ours, and start a second
            # worker on the same streams.
            self._quit(self._connection)
            self._connection.close()
            self._connection = None
        entries = self._entries()
        try:
            ours, theirs, pid = _fork_connected()
        except OSError as err:
            process.log(f"no new holder: {err.strerror}; trying again")
            self._retry_at = time.monotonic() + _RETRY_S
            return
        if pid == 0:
            ours.close()
            signal.set_wakeup_fd(-1)
            raise Become(Holder(self._keep, entries, theirs))
        theirs.close()
        self._connection, self.pid = ours, pid
        self._watch()

    @staticmethod
    def _quit(connection: socket.socket) -> None:
        try:
            protocol.send(connection, {"quit": True})
        except OSError:
            pass


def _fork_connected() -> tuple[socket.socket, socket.socket, int]:
    """Fork, with a connection between the two; both ends, and what ``fork`` returned.

    :raises OSError: there is no memory, or no number left.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        return ours, theirs, os.fork()
    except OSError:
        ours.close()
        theirs.close()
        raise
