"""Mounts that are put into a container while its portoshim-init waits: exactly what the host has.

Their flags and what is mounted below them stay as they are on the host, and the host may see what is mounted inside.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
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


def attach(pid: int, mounts: Iterable[LateMount]) -> None:
    """Put them into a container whose init is waiting, in this order.

    :param pid: its main process.
    :raises FailedPrecondition: one can't be made.
    """
    for mount in mounts:
        try:
            tree = linux.clone_mounts(mount.host_path)
            try:
                _configure(tree, mount)
                is_directory = os.path.isdir(mount.host_path)
                linux.in_thread(partial(_attach, pid, tree, mount.container_path, is_directory))
            finally:
                os.close(tree)
        except OSError as err:
            raise FailedPrecondition(f"mounts: {mount.host_path} at {mount.container_path}: {err.strerror}") from err


def _configure(tree: int, mount: LateMount) -> None:
    if mount.readonly:
        linux.set_mount(tree, linux.MOUNT_ATTR_RDONLY, recursive=mount.recursive_read_only)
    for option in mount.options:
        linux.set_mount(tree, _ATTRIBUTES[option])
    if propagation := _PROPAGATION[mount.propagation]:
        linux.set_mount(tree, 0, propagation=propagation, recursive=True)


def _attach(pid: int, tree: int, target: str, is_directory: bool) -> None:
    # setns(2) to a mount namespace asks for a root and working directory that no other thread shares.
    linux.unshare(linux.CLONE_FS)
    linux.setns(f"/proc/{pid}/ns/mnt", linux.CLONE_NEWNS)
    if not os.path.lexists(target):
        os.makedirs(target if is_directory else os.path.dirname(target), mode=0o755, exist_ok=True)
        if not is_directory:
            Path(target).touch()
    linux.attach_mounts(tree, target)
