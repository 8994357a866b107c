"""What a client may read and write of the machine's files."""

from __future__ import annotations

import os
from collections.abc import Callable

from shim_embedded_porto import paths
from shim_embedded_porto.client import Client
from shim_embedded_porto.credentials import Cred
from shim_embedded_porto.errors import Fault, permission, system

Origin = Callable[[str], tuple[Cred, bool] | None]
"""The owner of the volume a path lies in, and whether it is read-only there; None: in none."""

READ, WRITE = 4, 2
_UNTOUCHABLE = ("/proc", "/sys")


def may(found: os.stat_result, cred: Cred, bit: int) -> bool:
    """True when the permission bits let somebody in."""
    if cred.uid == found.st_uid:
        bit <<= 6
    elif cred.member_of(found.st_gid):
        bit <<= 3
    return cred.uid == 0 or bool(found.st_mode & bit)


def check_inside(path: str, client: Client) -> None:
    """:raises Fault: Permission: the path isn't in the client's root."""
    if not paths.inside(path, client.container.root_path):
        raise permission(f"Path out of chroot {path}")


def check_read(fd: int, client: Client, origin: Origin) -> None:
    """Check what a descriptor is open on.

    :raises Fault: Permission.
    """
    path = os.readlink(f"/proc/self/fd/{fd}")
    allowed = may(os.fstat(fd), client.task_cred, READ)
    if allowed and client.container.root_path == "/":
        return
    check_inside(path, client)
    if not allowed and not _owns(path, client, origin, writes=False):
        raise permission(f"{client.task_cred} has no read access to {path}")


def check_write(fd: int, client: Client, origin: Origin) -> None:
    """As :func:`check_read`. In a root of its own everybody is root."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    try:
        read_only = bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)
    except OSError as err:
        raise system(err, "fstatfs") from err
    chrooted = client.container.root_path != "/"
    allowed = not read_only and may(os.fstat(fd), client.task_cred, WRITE)
    if allowed and not chrooted:
        return
    check_inside(path, client)
    if allowed or (chrooted and not read_only):
        return
    if any(paths.inside(path, top) for top in _UNTOUCHABLE) or not _owns(path, client, origin, writes=True):
        raise permission(f"read only: {path}" if read_only else f"{client.task_cred} has no write access to {path}")


def _owns(path: str, client: Client, origin: Origin, *, writes: bool) -> bool:
    found = origin(path)
    if found is None or (writes and found[1]):
        return False
    try:
        client.check_cred(found[0])
    except Fault:
        return False
    return True
