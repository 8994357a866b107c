"""Removing trees as root: nothing that is mounted in them is entered, and no symbolic link is followed.

``shutil.rmtree`` walks through mounts. A bind mount shows files of the node, often on the very same filesystem; in one
of ``/sys`` every directory that can be removed is a cgroup. What containers have written may also be nested deeper
than any stack goes.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

from shim_porto_runtime import rootfs

_MAX_DEPTH = 64
"""Of the stack, and of descriptors that are open at once."""
_MAX_TOLD = 8


def remove_tree(path: Path | str) -> tuple[str, ...]:
    """Remove what is at a path, whatever it is; fine when nothing is.

    :returns: what is left, each with its reason, and of much of it the first few. Empty: it is gone.
    """
    above, name = os.path.split(os.path.abspath(path))
    removal = _Removal()
    try:
        directory = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ()
    except OSError as err:
        return (f"{above}: {err.strerror}",)
    try:
        removal.remove(directory, name, above, 0)
    finally:
        os.close(directory)
    return tuple(removal.left)


class _Removal:
    """One of them. Directories that are too deep are moved to the top, and removed from there."""

    def __init__(self) -> None:
        self.left: list[str] = []
        self._top = -1
        self._moved: list[str] = []

    def remove(self, above: int, name: str, shown_above: str, depth: int) -> None:
        """Remove an entry of an open directory, with all below it."""
        shown = f"{shown_above}/{name}"
        directory = -1
        try:
            if _unlinked(above, name):
                return
            if depth == _MAX_DEPTH:
                self._move_up(above, name)
                return
            directory = rootfs.open_directory_below(above, name)
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
            self._tell(err, shown)
        finally:
            if directory >= 0:
                os.close(directory)

    def _move_up(self, above: int, name: str) -> None:
        fresh = f"removed-{secrets.token_hex(8)}"
        os.rename(name, fresh, src_dir_fd=above, dst_dir_fd=self._top)
        self._moved.append(fresh)

    def _tell(self, err: OSError, shown: str) -> None:
        if err.errno == errno.ENOTEMPTY and self.left:
            return  # of what has been told already
        why = "something is mounted there" if err.errno in (errno.EXDEV, errno.EBUSY) else err.strerror
        if len(self.left) < _MAX_TOLD:
            self.left.append(f"{shown}: {why}")


def _unlinked(above: int, name: str) -> bool:
    """Remove what isn't a directory; False: it is one.

    :raises OSError: it can't be removed.
    """
    try:
        os.unlink(name, dir_fd=above)
    except (IsADirectoryError, PermissionError):
        if not stat.S_ISDIR(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            raise
        return False
    return True
