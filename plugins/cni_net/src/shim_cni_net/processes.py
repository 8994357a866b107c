"""Plugin processes that an earlier run of the daemon left: found, waited for, ended at last.

Killed with SIGKILL, the daemon can't end the plugin it waits for. A DEL beside an ADD that still runs would miss what
the ADD makes afterwards, and a GC that still runs would take from pods that have come since, so whoever takes over
looks for it first. Plugins, and those they delegate to, are known by their environment, which holds the operation's
name. Between fork and exec a process still shows the daemon's; it is known by the file that holds its configuration,
which is named after the operation as well. The name is the container's id, or that of a shim's garbage collection.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import time

logger = logging.getLogger("shim.cni_net")

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_KILL_WAIT_S = 5.0
_LOOK_AGAIN_S = 0.05
_OPERATION = "PORTOSHIM_CNI_OPERATION"
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def now_ticks() -> int:
    """The present, as the kernel dates the start of processes (proc(5), ``starttime``)."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS_PER_S)


def configuration_name(operation: str) -> str:
    """What the file in memory is called that a plugin reads its configuration from."""
    return f"cni-{operation}"


def environment(operation: str) -> dict[str, str]:
    """What a plugin's environment holds, to be known by."""
    return {_OPERATION: operation}


def end_leftovers(operation: str, since_ticks: int, grace_s: float) -> None:
    """Return once no plugin process of an operation runs any more that was started at or after ``since_ticks``.

    :param grace_s: how long they may finish by themselves; then they are killed. Half-done work is worse than work
        that DEL undoes.
    """
    kill_at = time.monotonic() + grace_s
    give_up_at = kill_at + _KILL_WAIT_S
    while True:
        try:
            found = _find(operation, since_ticks)
        except OSError as err:
            # That we can't look doesn't mean that nothing is there.
            if time.monotonic() < give_up_at:
                time.sleep(_LOOK_AGAIN_S)
                continue
            logger.error("plugin processes for %s can't be looked for: %s", operation, err.strerror)
            return
        if not found:
            return
        try:
            now = time.monotonic()
            if now < kill_at:
                logger.info("waiting for plugin processes that still run for %s: %s", operation, _names(found))
                _wait(found, kill_at - now)
            elif now < give_up_at:
                # Each time anew: one may have started another before it was killed.
                logger.warning("killing plugin processes that still run for %s: %s", operation, _names(found))
                for pidfd in found.values():
                    _kill(pidfd)
                _wait(found, give_up_at - now)
            else:
                logger.error("plugin processes for %s can't be killed: %s", operation, _names(found))
                return
        finally:
            for pidfd in found.values():
                os.close(pidfd)


def _names(found: dict[int, int]) -> str:
    return ", ".join(str(pid) for pid in found)


def _find(operation: str, since_ticks: int) -> dict[int, int]:
    """Process ids and descriptors of the plugin processes of an operation.

    :raises OSError: there are no descriptors or no memory left to look for them.
    """
    found: dict[int, int] = {}
    try:
        for entry in os.listdir("/proc"):
            if not entry.isdecimal() or int(entry) == os.getpid():
                continue
            try:
                pidfd = os.pidfd_open(int(entry))
            except OSError as err:
                _raise_if_exhausted(err)
                continue  # it has ended
            try:
                # What is read here belongs to the process that the descriptor holds, or to none.
                if _started_since(entry, since_ticks) and _is_plugin(entry, operation) and not _wait({0: pidfd}, 0):
                    found[int(entry)] = pidfd
            finally:
                if int(entry) not in found:
                    os.close(pidfd)
    except OSError:
        for pidfd in found.values():
            os.close(pidfd)
        raise
    return found


def _raise_if_exhausted(err: OSError) -> None:
    """Tell a process that has ended, or isn't ours to look at, from one that we lack the means to look at."""
    if err.errno in _EXHAUSTED:
        raise err


def _started_since(pid: str, since_ticks: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in parentheses, may hold anything; the start time is the 20th field after it.
            return int(file.read().rpartition(b")")[2].split()[19]) >= since_ticks
    except OSError as err:
        _raise_if_exhausted(err)
        return False
    except (IndexError, ValueError):
        return False


def _is_plugin(pid: str, operation: str) -> bool:
    configuration = f"/memfd:{configuration_name(operation)} (deleted)"
    try:
        # The descriptors first: a process that execs meanwhile has its environment afterwards.
        if any(_target(f"/proc/{pid}/fd/{fd}") == configuration for fd in os.listdir(f"/proc/{pid}/fd")):
            return True
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{_OPERATION}={operation}".encode() in file.read().split(b"\0")
    except OSError as err:
        _raise_if_exhausted(err)
        return False


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _wait(pidfds: dict[int, int], timeout_s: float) -> bool:
    """Wait until all have ended; False when the time is up."""
    deadline = time.monotonic() + timeout_s
    for pidfd in pidfds.values():
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return False
    return True


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
