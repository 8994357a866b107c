"""Mounts that are put into a container while its portoshim-init waits: exactly what the host has.

Their flags and what is mounted below them stay as they are on the host, and the host may see what is mounted inside.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import FailedPrecondition
from shim_porto_runtime import linux

OPTIONS = ("nosuid", "nodev", "noexec")
"""What CRI's ``mount_options`` may be."""

_ATTRIBUTES = {
    "nosuid": linux.MOUNT_ATTR_NOSUID,
    "nodev": linux.MOUNT_ATTR_NODEV,
    "noexec": linux.MOUNT_ATTR_NOEXEC,
}
_PROPAGATION: dict[int, int] = {
    pb.PROPAGATION_PRIVATE: linux.MS_PRIVATE,
    pb.PROPAGATION_HOST_TO_CONTAINER: linux.MS_SLAVE,
    pb.PROPAGATION_BIDIRECTIONAL: 0,
}


@dataclass(frozen=True, slots=True)
class LateMount:
    """One of them, as it is recorded."""

    host_path: str
    container_path: str
    readonly: bool
    recursive_read_only: bool
    propagation: int
    """CRI's MountPropagation."""
    options: tuple[str, ...] = ()


def attach(pid: int, mounts: Sequence[LateMount]) -> None:
    """Put them into a container whose init is waiting, in this order.

    One that the host sees into is private until all are there: the others would be mounted on the host, too, and stay.

    :param pid: its main process.
    :raises FailedPrecondition: one can't be made.
    """
    can_join = linux.has_join_peers()
    with ExitStack() as stack:
        private: list[tuple[str, int]] = []
        for number, mount in enumerate(mounts):
            others = mounts[number + 1 :]
            waits = mount.propagation == pb.PROPAGATION_BIDIRECTIONAL and bool(others)
            if waits and not can_join and any(_is_below(other, mount) for other in others):
                raise FailedPrecondition(f"mounts: {mount.container_path}: to mount below it takes Linux 5.15")
            try:
                tree = linux.clone_mounts(mount.host_path)
                stack.callback(os.close, tree)
                _configure(tree, mount)
                if waits and can_join:
                    private += _shared(tree, mount.host_path, stack)
                    linux.set_mount(tree, 0, propagation=linux.MS_PRIVATE, recursive=True)
                is_directory = os.path.isdir(mount.host_path)
                linux.in_thread(partial(_attach, pid, tree, mount.container_path, is_directory))
            except OSError as err:
                where = f"{mount.host_path} at {mount.container_path}"
                raise FailedPrecondition(f"mounts: {where}: {err.strerror}") from err
        try:
            if private:
                linux.in_thread(partial(_make_private, pid, [fd for _, fd in private]))
            for point, fd in private:
                linux.join_peers(fd, point)
        except OSError as err:
            raise FailedPrecondition(f"mounts: propagation: {err.filename}: {err.strerror}") from err


def _is_below(other: LateMount, mount: LateMount) -> bool:
    return other.container_path.startswith(mount.container_path + "/")


def _shared(tree: int, host_path: str, stack: ExitStack) -> list[tuple[str, int]]:
    """What the host may see into of a tree that is attached nowhere yet: host paths, and mounts of the tree."""
    below = host_path.rstrip("/") + "/"
    found = {host_path: tree}
    for point, propagation in linux.mount_points():
        if not point.startswith(below) or not any(item.startswith(("shared:", "master:")) for item in propagation):
            continue
        path = point.removeprefix(below)
        try:
            if _mount_id(tree, path) != _mount_id(tree, os.path.dirname(path) or "."):
                found[point] = _open(tree, path)
                stack.callback(os.close, found[point])
        except (FileNotFoundError, NotADirectoryError):
            pass  # hidden by another one, or gone
    return list(found.items())


def _mount_id(directory: int, path: str) -> int:
    fd = _open(directory, path)
    try:
        return linux.mount_id(fd)
    finally:
        os.close(fd)


def _open(directory: int, path: str) -> int:
    return os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)


def _configure(tree: int, mount: LateMount) -> None:
    if mount.readonly:
        linux.set_mount(tree, linux.MOUNT_ATTR_RDONLY, recursive=mount.recursive_read_only)
    for option in mount.options:
        linux.set_mount(tree, _ATTRIBUTES[option])
    if propagation := _PROPAGATION[mount.propagation]:
        linux.set_mount(tree, 0, propagation=propagation, recursive=True)


def _enter(pid: int) -> None:
    # setns(2) to a mount namespace asks for a root and working directory that no other thread shares.
    linux.unshare(linux.CLONE_FS)
    linux.setns(f"/proc/{pid}/ns/mnt", linux.CLONE_NEWNS)


def _make_private(pid: int, mounts: Iterable[int]) -> None:
    """Again: what is attached below a shared mount, as a container's root is to itself, becomes shared."""
    _enter(pid)
    for fd in mounts:
        linux.set_mount(fd, 0, propagation=linux.MS_PRIVATE)


def _attach(pid: int, tree: int, target: str, is_directory: bool) -> None:
    _enter(pid)
    if not os.path.lexists(target):
        os.makedirs(target if is_directory else os.path.dirname(target), mode=0o755, exist_ok=True)
        if not is_directory:
            Path(target).touch()
    linux.attach_mounts(tree, target)
