"""System calls that Python's library has no function for: mounts and namespaces."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_FS = 0x00000200
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC = 0x1, 0x2, 0x4, 0x8, 0x1000, 0x4000
MS_PRIVATE, MS_SLAVE = 0x40000, 0x80000
_MNT_DETACH, _UMOUNT_NOFOLLOW = 0x2, 0x8

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH, _AT_RECURSIVE = 0x100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 0x1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH, _MOVE_MOUNT_SET_GROUP = 0x4, 0x40, 0x100
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 0x1, 0x2, 0x4, 0x8
_ST_FLAGS = {"ro": os.ST_RDONLY, "nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}
_PROC_MAGIC, _SYSFS_MAGIC = 0x9FA0, 0x62656572
# The same numbers on every architecture (Linux 5.2 and 5.12).
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd"))


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2). :raises OSError: it names the target."""
    data = options.encode() or None
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data), target)


def unmount(target: str) -> None:
    """umount2(2), lazily and without following symlinks; nothing happens to what isn't mounted.

    What others have mounted below goes along, and stays where else it is mounted: it is cut off from its peers first,
    since unmounting a bind mount of /sys would otherwise take what is below the node's own.
    """
    attr = _MountAttr(propagation=MS_PRIVATE)
    flags = _AT_SYMLINK_NOFOLLOW | _AT_RECURSIVE
    _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), flags, ctypes.byref(attr), ctypes.sizeof(attr))
    if _libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        if number not in (_EINVAL, _ENOENT):
            raise OSError(number, os.strerror(number), target)


_EINVAL, _ENOENT = 22, 2


def unshare(flags: int) -> None:
    """unshare(2), for the calling thread."""
    _check(_libc.unshare(flags), "unshare")


def setns(file: str | int, kind: int) -> None:
    """setns(2), for the calling thread."""
    fd = file if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, kind), str(file))
    finally:
        if fd is not file:
            os.close(fd)


def sethostname(name: str) -> None:
    """sethostname(2), in the UTS namespace of the calling thread."""
    data = name.encode()
    _check(_libc.sethostname(data, len(data)), "sethostname")


def clone_mounts(path: str) -> int:
    """A detached copy of what is mounted at and below ``path``, of the same flags and propagation (open_tree(2))."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    fd: int = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)
    _check(fd, path)
    return fd


def set_mount(fd: int, attributes: int, *, propagation: int = 0, recursive: bool = False) -> None:
    """Add attributes (``MOUNT_ATTR_*``) to a mount, or to a whole tree of them (mount_setattr(2))."""
    attr = _MountAttr(set=attributes, propagation=propagation)
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, fd, b"", flags, ctypes.byref(attr), ctypes.sizeof(attr)), "mount_setattr")


def attach_mounts(fd: int, target: str) -> None:
    """Put a detached copy at ``target``, as the calling thread sees it (move_mount(2))."""
    _check(_libc.syscall(_SYS_MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH), target)


def join_peers(mount_fd: int, of: str) -> None:
    """Have a mount that is private propagate as the one does that ``of`` is on, which shows at least as much.

    :raises OSError: EINVAL: it can't, or :func:`has_join_peers` says so.
    """
    peer = os.open(of, os.O_PATH | os.O_CLOEXEC)
    try:
        _check(_join(peer, mount_fd), of)
    finally:
        os.close(peer)


def has_join_peers() -> bool:
    """True where the kernel can do :func:`join_peers` (MOVE_MOUNT_SET_GROUP, Linux 5.15)."""
    # Without descriptors it changes nothing; what it doesn't know it refuses before it looks at them.
    return _join(-1, -1) == 0 or ctypes.get_errno() == errno.EBADF


def _join(peer: int, mount_fd: int) -> int:
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH | _MOVE_MOUNT_SET_GROUP
    return int(_libc.syscall(_SYS_MOVE_MOUNT, peer, b"", mount_fd, b"", flags))


def mount_id(fd: int) -> int:
    """Which mount a descriptor is on: those that are attached nowhere have a number, too (proc(5), fdinfo)."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))


def mount_points() -> list[tuple[str, Sequence[str]]]:
    """Mount points of the host, a later one above an earlier one, with their propagation (proc(5), mountinfo)."""
    found: list[tuple[str, Sequence[str]]] = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = os.fsdecode(line).split(" ")
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
        found.append((point, fields[6 : fields.index("-")]))
    return found


_OCTAL = re.compile(r"\\([0-7]{3})")


def mount_flags(path: str) -> frozenset[str]:
    """Of ``ro``, ``nosuid``, ``nodev``, ``noexec``: what the mount is that ``path`` is on; none for no such path."""
    try:
        flags = os.statvfs(path).f_flag
    except OSError:
        return frozenset()
    return frozenset(name for name, bit in _ST_FLAGS.items() if flags & bit)


class _StatFs(ctypes.Structure):
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_char * 240))


def is_kernels(path: str) -> bool:
    """True for what is in /proc or /sys, wherever they are mounted."""
    result = _StatFs()
    failed = _libc.statfs(os.fsencode(path), ctypes.byref(result)) != 0
    return not failed and result.f_type in (_PROC_MAGIC, _SYSFS_MAGIC)


def has_mount_setattr() -> bool:
    """True where the kernel can change a tree of mounts at once (mount_setattr(2), Linux 5.12)."""
    # No kernel takes a structure of no size: asked like this, it changes nothing.
    result = _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", 0, None, 0)
    return bool(result == 0 or ctypes.get_errno() != errno.ENOSYS)


def in_thread(step: Callable[[], T]) -> T:
    """Run ``step`` in a thread of its own, whose namespaces end with it.

    :raises: what ``step`` raises.
    """
    return begin_in_thread(step)()


def begin_in_thread(step: Callable[[], T]) -> Callable[[], T]:
    """As :func:`in_thread`, without waiting.

    :returns: waits for it; returns and raises what ``step`` does.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(step())
        except BaseException as err:
            errors.append(err)

    thread = threading.Thread(target=run, name="namespaces")
    thread.start()

    def wait() -> T:
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return wait


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
