"""Standard streams: where they lead, opening them for a start, reading back what was written, cutting it short."""

from __future__ import annotations

import ctypes
import os
import stat

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits, paths, text
from shim_embedded_porto.client import Client, process_start
from shim_embedded_porto.container import Container, Stream
from shim_embedded_porto.errors import Fault, invalid_value, permission, system

_FALLOC_COLLAPSE_RANGE = 0x08
_libc = ctypes.CDLL(None, use_errno=True)


def set_path(stream: Stream, path: str, client: Client) -> None:
    """Lead a stream elsewhere: to a descriptor of the client's, or to a path in the container's root.

    :raises Fault: there is no such descriptor.
    """
    inode = device = 0
    if path.startswith("/dev/fd/"):
        number = _descriptor(path, f"Cannot set {stream.number} stream as {path}")
        name = f"/proc/{client.pid}/fd/{number}"
        try:
            found = os.stat(name)
        except OSError as err:
            raise Fault(pb.Unknown, f"Can not make stat for {name}: {err.strerror}") from None
        inode, device = found.st_ino, found.st_dev
    stream.path, stream.outside, stream.inode, stream.device = path, False, inode, device


def _descriptor(path: str, where: str) -> int:
    try:
        return text.parse_int(path[len("/dev/fd/") :], -(1 << 31), (1 << 31) - 1, "int") % (1 << 32)
    except Fault as fault:
        raise fault.within(where) from None


def location(stream: Stream, ct: Container) -> str:
    """The file Porto itself finds the stream's data in; empty when there is none."""
    if stream.null or stream.redirect:
        return ""
    if stream.outside:
        return stream.path if stream.path.startswith("/") else paths.join(ct.workdir, stream.path)
    if stream.path.startswith("/"):
        return paths.join(ct.root_path, stream.path)
    return paths.join(paths.join(ct.root_path, ct.working_directory()), stream.path)


def open_outside(stream: Stream, ct: Container, client: Client) -> int | None:
    """A descriptor for a start; None when the container's process has to open the stream in its root.

    :raises Fault: it can't be opened, or isn't the client's to use.
    """
    stream.offset = 0
    if stream.null:
        return os.open("/dev/null", (os.O_WRONLY if stream.number else os.O_RDONLY) | os.O_CLOEXEC)
    if stream.redirect:
        return _open_redirect(stream, client)
    if stream.outside:
        return _open(location(stream, ct), stream.number, ct)
    return None


def _open_redirect(stream: Stream, client: Client) -> int:
    if not client.pid:
        raise invalid_value("Cannot open redirect without client pid")
    name = f"/proc/{client.pid}/fd/{_descriptor(stream.path, stream.path)}"
    fd = _open(name, stream.number, None)
    try:
        found = os.fstat(fd)
        if stream.inode and (found.st_ino, found.st_dev) != (stream.inode, stream.device):
            raise permission(f"Inode of std stream changed: {stream.inode} != {found.st_ino}")
        bit = stat.S_IWOTH if stream.number else stat.S_IROTH
        if not any(
            _may(found, cred.uid, cred.member_of(found.st_gid), bit) for cred in (client.task_cred, client.cred)
        ):
            raise permission(f"Not enough permissions for redirect: {stream.path}")
        # The pid may have passed to another process since the client connected.
        if process_start(client.pid) != client.start_ticks:
            raise permission(f"Client process changed: pid {client.pid}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _may(found: os.stat_result, uid: int, in_group: bool, bit: int) -> bool:
    if uid == found.st_uid:
        bit <<= 6
    elif in_group:
        bit <<= 3
    return uid == 0 or bool(found.st_mode & bit)


def _open(path: str, number: int, owner: Container | None) -> int:
    """Open a stream without waiting for the other end of a FIFO, and without taking a terminal over."""
    flags = (os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY) | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
    if owner is not None:
        flags |= os.O_NOFOLLOW  # the directory may be the container user's
    try:
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:
            if not number:
                raise
            fd = os.open(path, flags | os.O_CREAT, 0o660)
            if owner is not None:
                os.fchown(fd, owner.cred.uid, owner.cred.gid)
    except OSError as err:
        raise Fault(pb.InvalidValue, f"open {path}", err.errno or 0) from err
    if os.isatty(fd):
        terminal = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        os.close(fd)
        return terminal
    os.set_blocking(fd, True)
    return fd


# -- what was written --------------------------------------------------------------------------------------------------


def read(stream: Stream, ct: Container, window: str = "") -> str:
    """Stored output: the last of it, or ``[offset][:length]``.

    :raises Fault: InvalidData: there is none, or no longer.
    """
    path = location(stream, ct)
    if not path:
        raise Fault(pb.InvalidData, "Data not available")
    fd = _open_data(path)
    try:
        size = os.fstat(fd).st_size
        offset_text, _, length_text = window.partition(":")
        offset = 0
        if offset_text:
            offset = text.parse_uint(offset_text)
            if offset < stream.offset:
                raise Fault(pb.InvalidData, f"Requested offset lower than current {stream.offset}")
            offset -= stream.offset
        length = text.parse_uint(length_text) if length_text else ct.stdout_limit
        if size <= offset:
            length = 0
        elif size <= offset + length:
            length = size - offset
        elif not offset_text:
            offset = size - length
        most = min(ct.stdout_limit, limits.STDOUT_READ_MAX)
        if length > most:
            offset += 0 if offset_text else length - most
            length = most
        return os.pread(fd, length, offset).decode("utf-8", "replace")
    finally:
        os.close(fd)


def _open_data(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Fault(pb.InvalidData, "File not found") from None
    except OSError as err:
        raise system(err, f"open {path}") from err
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Fault(pb.InvalidData, "File is non-regular")
    if os.path.realpath(path) != path:
        os.close(fd)
        raise permission(f"Real path doesn't match: {path}")
    return fd


def rotate(stream: Stream, ct: Container) -> int:
    """Cut stored output to half its limit once it is longer; the number of bytes lost."""
    path = location(stream, ct)
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return 0
    limit = ct.stdout_limit
    if not stat.S_ISREG(found.st_mode) or found.st_size <= max(limit, found.st_blksize):
        return 0
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        hole = found.st_size - limit // 2
        hole -= hole % found.st_blksize
        if _libc.fallocate(fd, _FALLOC_COLLAPSE_RANGE, ctypes.c_long(0), ctypes.c_long(hole)) < 0:
            hole = found.st_size
            os.ftruncate(fd, 0)
        else:
            # The first line is cut in two: blank out what is left of it.
            head = os.pread(fd, min(limit // 2, 1 << 16), 0)
            end = head.find(b"\n")
            if end >= 0:
                os.pwrite(fd, b" " * (end + 1), 0)
    finally:
        os.close(fd)
    stream.offset += hole
    return hole


def remove(stream: Stream, ct: Container) -> None:
    """Remove stored output; files the user has named stay."""
    if not stream.outside or stream.path.startswith("/"):
        return
    path = location(stream, ct)
    try:
        if path and stat.S_ISREG(os.lstat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        pass
