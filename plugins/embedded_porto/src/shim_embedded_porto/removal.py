"""Removing trees as root: nothing that is mounted in them is entered, and no symbolic link is followed.

A bind mount shows files of the machine's, often on the very same filesystem, which neither ``shutil.rmtree`` nor
``rm --one-file-system`` can tell. The keeper uses this module: see :mod:`kernel`.
"""

from __future__ import annotations

import errno
import os
import stat

from shim_embedded_porto import kernel

_MAX_DEPTH = 64
"""Of the stack, and of descriptors that are open at once."""


def remove_tree(path: str | os.PathLike[str], dir_fd: int | None = None) -> None:
    """Remove what is at a path, whatever it is; fine when nothing is. As much as possible goes.

    :param dir_fd: the directory the path begins at.
    :raises OSError: something is left: the first of it, such as EBUSY for a mount point.
    """
    above, name = os.path.split(os.fspath(path))
    try:
        directory = os.open(above or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    except FileNotFoundError:
        return
    removal = _Removal()
    try:
        removal.remove(directory, name, above, 0)
    finally:
        os.close(directory)
    if removal.left:
        raise removal.left[0]


def try_remove_tree(path: str | os.PathLike[str]) -> None:
    """As :func:`remove_tree`; what is left is left."""
    try:
        remove_tree(path)
    except OSError:
        pass


class _Removal:
    """One of them. Directories that are too deep are moved to the top, and removed from there."""

    def __init__(self) -> None:
        self.left: list[OSError] = []
        self._top = -1
        self._moved: list[str] = []

    def remove(self, above: int, name: str, shown_above: str, depth: int) -> None:
        """Remove an entry of an open directory, with all below it."""
        shown = os.path.join(shown_above, name)
        directory = -1
        try:
            if _unlinked(above, name):
                return
            if depth == _MAX_DEPTH:
                self._move_up(above, name)
                return
            directory = kernel.open_directory_below(above, name)
            if depth == 0:
                self._top = directory
            for child in os.listdir(directory):
                self.remove(directory, child, shown, depth + 1)
            while depth == 0 and self._moved:
                self.remove(directory, self._moved.pop(), shown, 1)
            os.rmdir(name, dir_fd=above)
        except FileNotFoundError:
            pass
        except OSError as err:
            number = errno.EBUSY if err.errno == errno.EXDEV else err.errno or 0
            if not self.left:
                self.left.append(OSError(number, os.strerror(number), shown))
        finally:
            if directory >= 0:
                os.close(directory)

    def _move_up(self, above: int, name: str) -> None:
        fresh = f"removed-{os.urandom(8).hex()}"
        os.rename(name, fresh, src_dir_fd=above, dst_dir_fd=self._top)
        self._moved.append(fresh)


def _unlinked(above: int, name: str) -> bool:
    """Remove what isn't a directory; False: it is one."""
    try:
        os.unlink(name, dir_fd=above)
    except (IsADirectoryError, PermissionError):
        if not stat.S_ISDIR(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            raise
        return False
    return True
