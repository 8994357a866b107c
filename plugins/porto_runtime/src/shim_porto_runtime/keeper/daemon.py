"""Starts a keeper: the first process, which becomes the holder and forks the worker."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys

from shim_porto_runtime.keeper import handover, journal, process, protocol
from shim_porto_runtime.keeper.holder import Holder, Keep
from shim_porto_runtime.keeper.worker import Worker

_BACKLOG = 1024


def main(argv: list[str]) -> int:
    """Run a keeper. Called by ``KeeperClient`` and ``portoshim-keeper``, which check what they pass.

    :param argv: directory, log file, seconds until an idle keeper ends, the build's name, and the mode: ``start``
        (detached; nothing happens if there is a keeper), ``take-over`` (detached, from the keeper there is) or ``run``
        (in the foreground, whichever of the two fits).
    :returns: the exit status: 0 when a keeper serves the directory (or has ended, in the foreground), 1 when not.
    """
    directory, log, idle_exit_s, build, mode = argv
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process.set_up()
    os.makedirs(directory, mode=0o700, exist_ok=True)
    os.chmod(directory, 0o700)
    if log:
        process.log_to(log)
    ready = None
    if mode != "run":
        ready = process.detach()
        if ready is None:
            return 0
    role = _first_role(directory, float(idle_exit_s), build, mode, ready)
    gc.collect()
    gc.freeze()  # what is there now stays: looking at it would only cost the pages that both processes share
    _play(role)
    return 0


def _first_role(directory: str, idle_exit_s: float, build: str, mode: str, ready: int | None) -> Holder:
    lock = process.lock(os.path.join(directory, protocol.LOCK_NAME)) if mode != "take-over" else None
    if lock is None:
        if mode == "start":
            sys.exit(
                0
            )  # another one was faster; our parent sees that we were not ready, and who started it looks again
        try:
            keep, entries, takeover = handover.take(directory, build)
        except (OSError, protocol.ProtocolError) as err:
            process.log(f"hand-over: {err}")
            sys.exit(1)
        process.log(f"takes over {len(entries)} containers")
        return Holder(keep, entries, takeover=takeover, ready=ready)
    keep = Keep(
        directory,
        listening=_listen(directory),
        lock=lock,
        state=journal.make_state(),
        staging=journal.make_staging(),
        transit=os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK),
        idle_exit_s=idle_exit_s,
        build=build,
    )
    return Holder(keep, {}, ready=ready)


def _play(role: Holder | Worker | None) -> None:
    """Play one role after another: a process forked in one of them goes on in the other."""
    while role is not None:
        following = role.run()
        # Sockets and maps close themselves when they go: before another role opens descriptors with their numbers.
        del role
        gc.collect()
        role = following
        del following


def _listen(directory: str) -> int:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with protocol.Address(directory) as path:
        try:
            os.unlink(path)  # of a keeper that is gone: we have the lock
        except FileNotFoundError:
            pass
        previous = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(previous)
    listener.listen(_BACKLOG)
    return listener.detach()
