"""Working inside a directory tree that its owner can change under our hands: no path leads out of it.

A root is given as a descriptor of its directory. Used by the daemon and by the processes the keeper forks.
"""

from __future__ import annotations

import os
import stat

from shim_embedded_porto import kernel


def open_path(root: int, path: str) -> int:
    """A descriptor that names what is there, without opening it; symbolic links are followed inside the root."""
    return kernel.open_in(root, path, kernel.O_PATH)


def exists(root: int, path: str) -> bool:
    try:
        os.close(open_path(root, path))
    except OSError:
        return False
    return True


def make_directories(root: int, path: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> int:
    """Make a directory and what is missing above it; a descriptor of it."""
    current = os.dup(root)
    done = ""
    try:
        for name in (part for part in path.split("/") if part and part != "."):
            done += f"/{name}"
            try:
                following = kernel.open_in(root, done, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                os.mkdir(name, mode, dir_fd=current)
                os.chown(name, uid, gid, dir_fd=current, follow_symlinks=False)
                following = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
                os.fchmod(following, mode)
            os.close(current)
            current = following
    except BaseException:
        os.close(current)
        raise
    return current


def make_file(root: int, path: str, mode: int = 0o644, uid: int = 0, gid: int = 0) -> None:
    """Make an empty file and the directories above it, unless something is there."""
    if exists(root, path):
        return
    parent = make_directories(root, os.path.dirname(path), 0o755, uid, gid)
    try:
        fd = os.open(
            os.path.basename(path), os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=parent
        )
        os.fchown(fd, uid, gid)
        os.close(fd)
    finally:
        os.close(parent)


def make_symlink(root: int, path: str, target: str, uid: int = 0, gid: int = 0) -> None:
    """Make a symbolic link, relative inside the root; an empty target removes it.

    :param path: absolute and normal, as is ``target``.
    """
    directory, name = os.path.split(path)
    if not target:
        try:
            parent = kernel.open_in(root, directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
    else:
        parent = make_directories(root, directory, 0o775, uid, gid)
    try:
        current = os.readlink(name, dir_fd=parent) if _is_link(parent, name) else None
        if not target:
            if current is not None:
                os.unlink(name, dir_fd=parent)
            return
        wanted = os.path.relpath(target, directory)
        if current == wanted:
            return
        if current is None:
            os.symlink(wanted, name, dir_fd=parent)
            os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
            return
        following = f".next_{name}"
        if _is_link(parent, following):
            os.unlink(following, dir_fd=parent)
        os.symlink(wanted, following, dir_fd=parent)
        os.chown(following, uid, gid, dir_fd=parent, follow_symlinks=False)
        os.rename(following, name, src_dir_fd=parent, dst_dir_fd=parent)
    finally:
        os.close(parent)


def make_node(
    root: int, path: str, mode: int, device: int, uid: int, gid: int, *, process: str | int = "/proc/self"
) -> None:
    """Make a device node, or give the one that is there its permissions.

    :param process: /proc/self, or a descriptor of it where /proc shows other processes.
    :raises FileExistsError: another node is there.
    """
    parent = make_directories(root, os.path.dirname(path))
    name = os.path.basename(path)
    try:
        try:
            os.mknod(name, mode, device, dir_fd=parent)
        except FileExistsError:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_IFMT(found.st_mode) != stat.S_IFMT(mode) or found.st_rdev != device:
                raise
        fd = os.open(name, kernel.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            if isinstance(process, int):
                os.chmod(f"fd/{fd}", stat.S_IMODE(mode), dir_fd=process)
            else:
                os.chmod(f"{process}/fd/{fd}", stat.S_IMODE(mode))
            os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(fd)
    finally:
        os.close(parent)


def remove(root: int, path: str) -> None:
    """Remove a node, a file or a link; fine when there is none."""
    try:
        parent = kernel.open_in(root, os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.unlink(os.path.basename(path), dir_fd=parent)
    except FileNotFoundError:
        pass
    finally:
        os.close(parent)


def _is_link(directory: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
