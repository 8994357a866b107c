"""A container's log file: opened below its directory without following a symlink, and never torn."""

from __future__ import annotations

import errno
import os
import stat

from shim_porto_runtime.keeper import crilog
from shim_porto_runtime.keeper.protocol import Refusal

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC


class LogFile:
    """An open log.

    :param fd: opened for appending; belongs to this object.
    """

    __slots__ = ("_doubtful", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._doubtful = True

    def close(self) -> None:
        os.close(self.fd)

    def size(self) -> int:
        """Bytes in the file: where the next record begins."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def is_torn(self, offset: int) -> bool:
        """Whether half a record stands before ``offset``: the node has crashed, or its disk won't even truncate."""
        return self._doubtful and offset > 0 and os.pread(self.fd, 1, offset - 1) not in (b"\n", b"")

    def append(self, out: bytes, offset: int, already: int = 0) -> tuple[int, OSError | None]:
        """Write records; when the disk is full, as many as fit, and none of them torn.

        :param offset: the size of the file before any of them was written.
        :param already: how many bytes of them a killed keeper had written.
        :returns: how many bytes of whole records are in the file, and what went wrong.
        """
        view = memoryview(out)
        written = already
        error = None
        while written < len(out):
            try:
                size = os.write(self.fd, view[written:] if written else out)
            except OSError as err:
                error = err
                break
            if size == 0:
                error = OSError(errno.EIO, "nothing was written")
                break
            written += size
        if error is None:
            self._doubtful = False
            return written, None
        whole = crilog.whole_records(out, written)
        self._doubtful = True
        if whole < written:
            try:
                # Readers that follow the log come back to the beginning of a line that has no end: it may go.
                if self.size() == offset + written:
                    os.ftruncate(self.fd, offset + whole)
            except OSError:
                pass  # is_torn() will see it
        return whole, error


def open_log(directory: str, path: str) -> LogFile:
    """Open ``path`` below ``directory`` for appending; missing directories are made with mode 0755, the file with 0640.

    The directories above ``directory`` may be symlinks, since whoever set up the node may have put ``/var/log``
    elsewhere; the directory itself and everything below it may not: a container that mounts the pod logs could make
    them.

    :raises Refusal: INVALID_ARGUMENT when the path leaves the directory or there is a symlink or no regular file in its
        place; RESOURCE_EXHAUSTED when the disk is full; INTERNAL for other errors.
    """
    whole = f"{directory}/{path}"
    parts = path.split("/")
    if not directory.startswith("/") or "\0" in whole or ".." in directory.split("/"):
        raise Refusal("INVALID_ARGUMENT", f"log_directory {directory!r}: give an absolute path without ..")
    if path.startswith("/") or ".." in parts or parts[-1] in ("", "."):
        raise Refusal("INVALID_ARGUMENT", f"log_path {path!r}: give a path below log_directory, without ..")
    try:
        os.makedirs(os.path.dirname(directory.rstrip("/")) or "/", mode=0o755, exist_ok=True)
        current = _enter(directory.rstrip("/") or "/", None)
        try:
            for part in parts[:-1]:
                if part not in ("", "."):
                    inner = _enter(part, current)
                    os.close(current)
                    current = inner
            fd = _open_file(parts[-1], current)
        finally:
            os.close(current)
    except OSError as err:
        if err.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EISDIR, errno.ENAMETOOLONG):
            raise Refusal(
                "INVALID_ARGUMENT", f"log {whole}: {err.strerror}; there must be no symlink and a regular file"
            ) from err
        full = err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        raise Refusal("RESOURCE_EXHAUSTED" if full else "INTERNAL", f"log {whole}: {err.strerror}") from err
    if fd is None:
        raise Refusal("INVALID_ARGUMENT", f"log {whole}: a symlink or no regular file is in its place; remove it")
    return LogFile(fd)


def _open_file(name: str, parent: int) -> int | None:
    """Open a file for appending, made if it isn't there; None if something else is."""
    while True:
        try:
            return os.open(name, _APPEND | os.O_CREAT | os.O_EXCL, 0o640, dir_fd=parent)
        except FileExistsError:
            pass
        try:
            # Looked at before it is opened: to open a FIFO may hang, and a device may do anything.
            found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except FileNotFoundError:
            continue  # gone in between
        try:
            return os.open(f"/proc/self/fd/{found}", _APPEND) if stat.S_ISREG(os.fstat(found).st_mode) else None
        finally:
            os.close(found)


def _enter(name: str, parent: int | None) -> int:
    """Open a directory, made if it isn't there."""
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        pass
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        pass  # somebody was faster
    return os.open(name, _DIRECTORY, dir_fd=parent)
