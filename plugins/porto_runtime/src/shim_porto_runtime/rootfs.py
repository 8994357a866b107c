"""Paths inside a container's root filesystem, resolved as the container itself would: no symlink leads out of it."""

from __future__ import annotations

import ctypes
import errno
import os

_SYS_OPENAT2 = 437  # the same number on every architecture (Linux 5.6)
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE_IN_ROOT = 0x10
_MAX_TRIES = 32
_MAX_LINKS = 40  # as the kernel

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_inside(root: str, path: str, flags: int, mode: int = 0) -> int:
    """Open ``path`` with ``root`` as the root directory: ``..`` and absolute symlinks stay below it.

    :returns: a descriptor, close-on-exec.
    :raises OSError: as open(2); ELOOP for magic links such as those in /proc.
    """
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _openat2(directory, path, flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    finally:
        os.close(directory)


def open_directory_below(directory: int, path: str) -> int:
    """Open a directory below another one, which is open: on the same mount, and by no symbolic link.

    A bind mount is another mount even where it shows the same filesystem.

    :returns: a descriptor to read it by, close-on-exec.
    :raises OSError: EXDEV: it is on another mount; ELOOP: a symbolic link; ENOTDIR.
    """
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_XDEV | _RESOLVE_NO_SYMLINKS
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return _openat2(directory, path, flags, 0, resolve)


def resolve(root: str, path: str) -> str:
    """``path`` with every symlink resolved as below ``root``, whether it exists or not; absolute, without ``..``.

    For trees that nobody changes at the same time.

    :raises OSError: ELOOP.
    """
    pending = [part for part in reversed(path.split("/")) if part]
    done: list[str] = []
    links = 0
    while pending:
        part = pending.pop()
        if part == ".":
            continue
        if part == "..":
            done = done[:-1]
            continue
        here = os.path.join(root, *done, part)
        try:
            target = os.readlink(here)
        except OSError:
            done.append(part)
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        if target.startswith("/"):
            done = []
        pending += [part for part in reversed(target.split("/")) if part]
    return "/" + "/".join(done)


def _openat2(directory: int, path: str, flags: int, mode: int, resolve: int) -> int:
    how = _OpenHow(flags, mode, resolve)
    for _ in range(_MAX_TRIES):
        fd: int = _libc.syscall(_SYS_OPENAT2, directory, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        # EAGAIN: something was renamed while the kernel walked the path, so it can't vouch for it.
        if number not in (errno.EAGAIN, errno.EINTR):
            raise OSError(number, os.strerror(number), path)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
