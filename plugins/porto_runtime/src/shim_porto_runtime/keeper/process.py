"""What the keeper's processes need of the system: their own log, limits, and to stand alone."""

from __future__ import annotations

import fcntl
import os
import resource
import time

LOG_BYTES = 1024 * 1024
"""The log is renamed to ``.1`` when it is longer."""
_DESCRIPTORS = 65536

_log_path: list[str] = []  # set once by log_to(); a process has one log


def log_to(path: str) -> None:
    """Send what :func:`log` and a traceback write to a file. Without it they go to standard error."""
    _log_path[:] = [path]
    _open_log()


def log(message: str) -> None:
    """Write one line. Never fails: a full disk must not end the keeper."""
    text = message.replace("\r", "\\r").replace("\n", "\\n")
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        _rotate_log()
        os.write(2, f"{now} keeper[{os.getpid()}] {text}\n".encode(errors="backslashreplace"))
    except OSError:
        pass


def set_up() -> None:
    """Limits and priorities of a process that all containers' output goes through; as far as we may."""
    os.umask(0o022)
    wanted = _DESCRIPTORS
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for soft, limit in ((wanted, max(wanted, hard)), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limit))
            break
        except (OSError, ValueError):
            continue
    try:
        # Killed last when memory runs out: both of us at once would end every container that writes.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-999")
    except OSError:
        pass


def set_name(name: str) -> None:
    """What ``ps`` and ``top`` call this process; at most 15 characters."""
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(name)
    except OSError:
        pass


def detach() -> int | None:
    """Go on in a child with a session of its own.

    :returns: in the child, a descriptor to write one byte to when it is ready; in the parent, after that byte, None.
    :raises SystemExit: in the parent, with status 1: the child has ended without it.
    """
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        ready = os.read(reading, 1)
        os.close(reading)
        if not ready:
            raise SystemExit(1)
        return None
    os.close(reading)
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2) if _log_path else (0, 1):
        os.dup2(null, fd)
    os.close(null)
    if _log_path:
        _open_log()
    os.chdir("/")
    return writing


def close_other_than(kept: set[int]) -> None:
    """Close all descriptors but these and the standard ones."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in kept:
            try:
                os.close(fd)
            except OSError:
                pass  # the one that listed the directory


def lock(path: str) -> int | None:
    """Take the lock that says a keeper serves this directory; its descriptor, or None if another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def resident_bytes() -> int:
    """Memory of this process (RSS)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _open_log() -> None:
    try:
        fd = os.open(_log_path[0], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
    except OSError:
        return
    os.dup2(fd, 2)
    os.close(fd)


def _rotate_log() -> None:
    if not _log_path:
        return
    ours = os.fstat(2)
    try:
        there = os.stat(_log_path[0], follow_symlinks=False)
    except FileNotFoundError:
        there = None
    if there is not None and (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
        if ours.st_size < LOG_BYTES:
            return
        os.replace(_log_path[0], _log_path[0] + ".1")
    _open_log()
