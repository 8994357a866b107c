"""The daemon as a process: signals, one at a time per state directory, start and end."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import shutil
import signal
import sys
import time
from types import FrameType

from shim_embedded_porto import kernel
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.lifecycle import recovery
from shim_embedded_porto.porto import Options, Porto
from shim_embedded_porto.server import Server
from shim_embedded_porto.statistics import CountingHandler

logger = logging.getLogger("shim.embedded_porto")


_PR_SET_PDEATHSIG = 1
_LOCK_PATIENCE_S = 10.0


def run(options: Options, *, destroy_all: bool = False, parent: int | None = None, ready: int | None = None) -> int:
    """Be the daemon until a signal ends it: SIGTERM and SIGHUP leave containers as they are, SIGINT destroys them.

    :param destroy_all: restore, destroy everything and return.
    :param parent: the process to end with, as by SIGTERM; it is the one that has started this one.
    :param ready: a descriptor that gets a byte and is closed once clients are served.
    :returns: the exit status.
    """
    missing = [name for name in ("crun", "tar") if shutil.which(name) is None]
    if missing:
        logger.error("%s not found: install the packages crun and tar", " and ".join(missing))
        return 1
    if os.geteuid() != 0:
        logger.error("containers take root: run the embedded Porto as root")
        return 1
    if parent is not None:
        kernel.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            logger.error("process %d, which is to be the parent, isn't", parent)
            return 1
    os.umask(0o022)
    os.chdir("/")
    _raise_file_limit()
    try:
        options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(options.state / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as err:
        logger.error("can't start: %s: %s", err.filename, err.strerror)
        return 1
    # One that ends with its parent may find the one before it about to end with the parent before.
    if not _lock(lock, _LOCK_PATIENCE_S if parent is not None else 0.0):
        logger.error("another daemon works with %s: end it first, or give this one another --state", options.state)
        return 1
    signals = _Signals()
    try:
        # Volumes that are mounted later have to show up in containers.
        kernel.propagate("/", kernel.MS_SHARED | kernel.MS_REC)
        porto = Porto(options)
        porto.open()
        recovery.recover(porto)
    except (Fault, OSError) as err:
        logger.error("can't start: %s", err)
        return 1
    logging.getLogger("shim").addHandler(CountingHandler(porto.statistics))
    destroy_all |= not destroy_all and _serve(porto, signals, ready)
    if destroy_all:
        porto.destroy_everything()
    else:
        porto.close()
    logging.shutdown()
    sys.stdout.flush()
    # Requests that don't end mustn't keep the process.
    os._exit(0)


def _lock(fd: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        else:
            return True


class _Signals:
    """The first signal that came, from now on."""

    def __init__(self) -> None:
        self.first = 0
        self._server: Server | None = None
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # The kernel repeats the signal for each thread of the parent that dies; this may interrupt itself.
        if not self.first:
            self.first = number
            if self._server is not None:
                self._server.stop()

    def stop_server(self, server: Server) -> None:
        """Have signals end a server, one that has come already too."""
        # A signal may arrive in another thread, or between two looks: the server waits for this as well.
        signal.set_wakeup_fd(server.waker, warn_on_full_buffer=False)
        self._server = server
        if self.first:
            server.stop()


def _serve(porto: Porto, signals: _Signals, ready: int | None) -> bool:
    """Serve clients; True when everything is to be destroyed."""
    server = Server(porto)
    server.listen()
    signals.stop_server(server)
    porto.events.run()
    logger.info("serving %s", porto.options.socket)
    if ready is not None:
        os.write(ready, b"1")
        os.close(ready)
    server.run()
    logger.info("ending after %s", signal.Signals(signals.first).name)
    return signals.first == signal.SIGINT


def _raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
