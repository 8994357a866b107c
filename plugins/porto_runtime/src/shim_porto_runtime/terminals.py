"""Terminals of a container's own, where tmux, gpg and others find the names of theirs."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
from typing import TYPE_CHECKING

from shim_core.context import CallContext
from shim_core.types import ExecSession
from shim_porto_runtime import exec, rootfs
from shim_porto_runtime.porto_errors import porto_errors

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

logger = logging.getLogger("shim.porto_runtime.terminals")

_PTMX = "/dev/pts/ptmx"
_PTMX_DEVICE = os.makedev(5, 2)
_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441


def for_exec(rt: Runtime, session: ExecSession, context: CallContext) -> tuple[int, int] | None:
    """Master and slave end of a new terminal in the container; None if it has no place for one.

    :raises FailedPrecondition: it doesn't run.
    """
    record = exec.running(rt, session.container_id)
    with porto_errors("looking for the container's process"):
        pid = int(rt.porto.get_property(rt.names.container(record.sandbox_id, record.id), "root_pid"))
    try:
        return open_in(f"/proc/{pid}/root")
    except OSError as err:
        logger.debug("[%s] %s of container %s: %s", context.request_id, _PTMX, record.id[:13], err.strerror)
        return None


def open_in(root: str) -> tuple[int, int]:
    """A new terminal of the devpts that is mounted below ``root``.

    :raises OSError: there is none, or no more terminals.
    """
    place = rootfs.open_inside(root, _PTMX, os.O_PATH | os.O_NOFOLLOW)
    try:
        # It is the container's to put something else there, and to open some things does something.
        found = os.fstat(place)
        if not stat.S_ISCHR(found.st_mode) or found.st_rdev != _PTMX_DEVICE:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), _PTMX)
        master = os.open(f"/proc/self/fd/{place}", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(place)
    try:
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        # Not by its name, which is the container's as well (ioctl_tty(2)).
        return master, fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except BaseException:
        os.close(master)
        raise
