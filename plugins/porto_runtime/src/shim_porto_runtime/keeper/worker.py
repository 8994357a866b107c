"""The worker: a single thread that moves all containers' output, and does what clients ask for."""

from __future__ import annotations

import os
import select
import signal
import socket
import time

from shim_porto_runtime.keeper import handover, process, protocol
from shim_porto_runtime.keeper.holder import Become, Entries, Holder, HolderLink, Keep
from shim_porto_runtime.keeper.loop import Loop
from shim_porto_runtime.keeper.server import Server
from shim_porto_runtime.keeper.streams import Streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Retired(BaseException):
    """Raised when a successor owns the streams: nothing may be read from them any more, not even what is ready now."""


class Worker:
    """The worker's role in a process.

    :param entries: the containers, as the holder has them.
    :param holder: the connection to it.
    :param takeover: the hand-over from an older keeper, if that isn't finished.
    """

    loop: Loop
    holder: HolderLink
    streams: Streams

    def __init__(
        self,
        keep: Keep,
        entries: Entries,
        holder: socket.socket,
        holder_pid: int,
        *,
        takeover: handover.Takeover | None = None,
    ) -> None:
        self.keep = keep
        self._entries = entries
        self._holder = holder
        self._holder_pid = holder_pid
        self._takeover = takeover
        self._leaving = False
        self._terminating = False

    def run(self) -> Holder | None:
        """Work until there is nothing left to do (None). In a forked child: the holder to be."""
        process.set_name("keeper")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        sessions = self._wait_for_takeover()
        if sessions is None:
            return None
        try:
            self._work(sessions)
        except Become as become:
            return become.role
        except Retired:
            pass
        self.holder.leave()
        return None

    def hand_over(self, successor: socket.socket, request: dict[str, Any]) -> None:
        """Offer everything to a successor.

        :raises Retired: it has taken it.
        """
        if handover.give(self.keep, self.streams, successor, request):
            raise Retired

    def leave(self, why: str) -> None:
        """End after this round: who connects from now on starts another keeper."""
        process.log(f"ends: {why}")
        try:
            with protocol.Address(self.keep.directory) as path:
                os.unlink(path)
        except OSError:
            pass  # somebody has removed it, or the whole directory
        self._leaving = True

    def _wait_for_takeover(self) -> list[handover.Session] | None:
        """The sessions taken over (there may be none), or None: the older keeper goes on, and not we."""
        takeover, self._takeover = self._takeover, None
        if takeover is None:
            return []
        with takeover:
            return takeover.sessions if takeover.wait_for_commit(self._holder) else None

    def _work(self, sessions: list[handover.Session]) -> None:
        self.loop = Loop()
        self._set_up_signals()
        self.holder = HolderLink(
            self.loop, self.keep, self._holder, self._holder_pid, entries=self._all_entries, on_end=self._terminate
        )
        self.streams = Streams(self.loop, self.keep, self._entries, self.holder)
        self._entries = {}
        handover.resume_sessions(self.streams, sessions)
        server = Server(self, self.keep.listening)
        busy_at = time.monotonic()
        while not self._leaving:
            now = time.monotonic()
            if self.streams.containers or self.streams.clients or server.connected:
                busy_at = now
            elif now - busy_at >= self.keep.idle_exit_s:
                self.leave("there has been nothing to do")
                break
            if self._terminating and not self.streams.running:
                self.leave("it was asked to")
                break
            until_idle_s = max(0.0, busy_at + self.keep.idle_exit_s - now)
            self.loop.run_once(min(until_idle_s, server.look_after(), self.holder.look_after()))

    def _all_entries(self) -> Entries:
        return self.streams.entries()

    def _set_up_signals(self) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # what matters is the byte in the pipe
        self.loop.watch(reading, select.EPOLLIN, lambda _events: self._signalled(reading))

    def _signalled(self, wakeup: int) -> None:
        try:
            os.read(wakeup, 64)
        except BlockingIOError:
            return
        self._terminate()

    def _terminate(self) -> None:
        self._terminating = True
        running = self.streams.running
        process.log(f"asked to end; {running} containers run" + (": not before they have ended" if running else ""))
