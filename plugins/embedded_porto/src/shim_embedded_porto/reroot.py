"""Giving a container's mount namespace the root it is meant to have.

crun makes the root it builds on private: what is mounted below the container's root later, as volumes are, would not
show up. So the mounts crun has made are moved over to a copy of the root that still hears of such mounts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim_embedded_porto import kernel

if TYPE_CHECKING:
    from shim_embedded_porto.plan import MountPlan


def copy_root(mounts: MountPlan) -> int:
    """A copy of the container's root, mounted nowhere; a slave of what it was copied from.

    Call it in the mount namespace the container starts from.
    """
    above = os.open(mounts["parent_root"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        root = kernel.open_in(above, mounts["root"], os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(above)
    try:
        tree = kernel.open_tree_of(root)
    finally:
        os.close(root)
    # A volume is mounted nosuid for the machine's sake; inside it is a root like any other.
    readonly = kernel.MOUNT_ATTR_RDONLY if mounts["readonly"] else 0
    kernel.set_mount(tree, propagation=kernel.MS_SLAVE, set_flags=readonly, clear_flags=kernel.MOUNT_ATTR_NOSUID)
    return tree


def replace_root(tree: int, process: int) -> None:
    """Put the copy in the place of the present root, with what is mounted on that.

    :param process: /proc/self, opened where /proc shows this process.
    """
    taken = []
    # A later mount may cover an earlier one, as one on /etc does one on /etc/hosts: the last is taken off first.
    for path in reversed(_mounts_on_root(process)):
        taken.append((path, kernel.open_tree(path)))
        kernel.umount(path)
    kernel.move_mount(tree, "/")
    for path, source in reversed(taken):
        target = kernel.open_in(tree, path, kernel.O_PATH)
        kernel.move_mount_to(source, target)
        os.close(source)
        os.close(target)
    os.fchdir(tree)
    kernel.pivot_root()
    os.close(tree)


def _mounts_on_root(process: int) -> list[str]:
    """Where something is mounted directly on the root."""
    fd = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
    with open(fd, errors="surrogateescape") as file:
        entries = [line.split(" ", 5)[:5] for line in file]
    root = next(number for number, _, _, _, path in entries if path == "/")
    return [kernel.unescape(path) for _, above, _, _, path in entries if above == root and path != "/"]
