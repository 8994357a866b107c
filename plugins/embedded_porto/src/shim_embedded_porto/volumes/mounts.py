"""Mounts as Porto makes them, and what is mounted where."""

from __future__ import annotations

import os
from collections.abc import Iterator

from shim_embedded_porto import kernel, paths
from shim_embedded_porto.errors import Fault, system

_KEPT = {os.ST_RDONLY: kernel.MS_RDONLY, os.ST_NODEV: kernel.MS_NODEV, os.ST_NOEXEC: kernel.MS_NOEXEC}
"""Flags a bind mount keeps of what it binds."""


def bind(source: str, target: str, flags: int, *, allow_suid: bool = False, shared: bool = True) -> None:
    """A bind mount that hears of mounts below its source and passes on those below itself.

    :param flags: of kernel.MS_*; MS_REC binds what is mounted below as well.
    :raises Fault: the kernel refuses.
    """
    try:
        kernel.mount(source, target, "", kernel.MS_BIND | flags & kernel.MS_REC)
        if shared:
            kernel.propagate(target, kernel.MS_SLAVE | flags & kernel.MS_REC)
            kernel.propagate(target, kernel.MS_SHARED | flags & kernel.MS_REC)
        remount(target, flags & ~kernel.MS_REC, allow_suid=allow_suid)
    except OSError as err:
        raise system(err, str(err.filename)) from err


def remount(target: str, flags: int, *, allow_suid: bool = False) -> None:
    """Give one mount flags of its own, besides those it has."""
    found = os.statvfs(target).f_flag
    for mounted, flag in _KEPT.items():
        if found & mounted:
            flags |= flag
    if found & os.ST_NOSUID and not allow_suid:
        flags |= kernel.MS_NOSUID
    kernel.mount("", target, "", kernel.MS_REMOUNT | kernel.MS_BIND | flags)


def move(source: str, target: str) -> None:
    """Move a mount; ``target`` may be a /proc/self/fd path."""
    kernel.mount(source, target, "", kernel.MS_MOVE)


def mount_points() -> Iterator[str]:
    """Where something is mounted, in the order it was."""
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        for line in file:
            yield kernel.unescape(line.split()[4])


def is_mounted(path: str) -> bool:
    return path in set(mount_points())


def unmount_below(path: str) -> None:
    """Unmount everything at a path and below, the last mounted first."""
    targets = [point for point in mount_points() if paths.inside(point, path)]
    for target in targets:
        kernel.isolate(target)
    for target in reversed(targets):
        kernel.umount_all(target)


def unmount(path: str, *, strict: bool = False) -> None:
    """Unmount one mount.

    :param strict: only if nobody uses it.
    :raises Fault: nothing is mounted there, or it is in use.
    """
    try:
        kernel.umount(path, kernel.UMOUNT_NOFOLLOW | (0 if strict else kernel.MNT_DETACH))
    except OSError as err:
        raise _unmount_fault(err, path) from err


def _unmount_fault(err: OSError, path: str) -> Fault:
    from porto_api import rpc_pb2 as pb

    if err.errno == 22:  # EINVAL: no mount point
        return Fault(pb.NotFound, f"umount({path})", 22)
    return system(err, f"umount({path})")
