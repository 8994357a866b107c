"""How volumes are built, by backend."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import kernel
from shim_embedded_porto.errors import Fault, invalid_path, invalid_value, not_supported, system_call
from shim_embedded_porto.volumes import mounts
from shim_embedded_porto.volumes.volume import Space, Volume


def _wrong(text: str) -> Fault:
    return Fault(pb.InvalidProperty, text)


def _no_quota() -> Fault:
    return Fault(pb.NotSupported, "Cannot enable project quota", errno.ESRCH)


def _flags(volume: Volume) -> int:
    """Outside of containers volumes have neither device files nor set-user-id programs."""
    return kernel.MS_NODEV | kernel.MS_NOSUID | (kernel.MS_RDONLY if volume.read_only else 0)


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to make a volume.

    ``check`` refuses what doesn't go together; ``build`` mounts; ``layers`` are directories, top first.
    """

    check: Callable[[Volume], None]
    build: Callable[[Volume, list[str]], None]
    merges_layers: bool = True
    """True when layers are copied into it, rather than mounted below."""


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_dir(volume: Volume) -> None:
    if volume.auto_path:
        raise _wrong("Dir backend requires path")
    for wrong, what in (
        (volume.space_limit or volume.inode_limit, "quota"),
        (volume.read_only, "read_only"),
        (volume.storage, "storage"),
        (volume.layers, "layers"),
    ):
        if wrong:
            raise _wrong(f"Dir back{'end' if what == 'quota' else 'ed'} doesn't support {what}")
    volume.storage_path, volume.keep_storage = volume.path, True


def _check_plain(volume: Volume) -> None:
    if volume.space_limit or volume.inode_limit:
        raise _wrong("Plain backend have no support of quota")


def _check_bind(volume: Volume) -> None:
    if not volume.storage:
        raise _wrong(f"{volume.backend} backed require storage")
    if volume.space_limit or volume.inode_limit:
        raise _wrong(f"{volume.backend} backend doesn't support quota")
    if volume.layers:
        raise _wrong(f"{volume.backend} backend doesn't support layers")
    if volume.binds_file:
        if volume.path == volume.internal("volume"):
            volume.path = volume.internal_path
        elif os.path.isdir(volume.path):
            raise invalid_path(f"Volume path {volume.path} must be a directory")


def _check_tmpfs(volume: Volume) -> None:
    if not volume.space_limit:
        raise _wrong("tmpfs backend requires space_limit")
    if volume.storage:
        raise _wrong("tmpfs backed doesn't support storage")
    if volume.layers:
        raise _wrong("tmpfs backed doesn't support layers")


def _check_native(volume: Volume) -> None:
    if volume.space_limit or volume.inode_limit:
        raise _no_quota()


def _check_quota(volume: Volume) -> None:
    if volume.auto_path:
        raise _wrong("Quota backend requires path")
    if not volume.space_limit:
        raise _wrong("Quota backend requires space_limit")
    for wrong, what in ((volume.read_only, "read_only"), (volume.storage, "storage"), (volume.layers, "layers")):
        if wrong:
            raise _wrong(f"Quota backed doesn't support {what}")
    raise _no_quota()


def _check_overlay(volume: Volume) -> None:
    if not volume.layers:
        raise _wrong("overlay require layers")
    if volume.space_limit or volume.inode_limit:
        raise _no_quota()


# -- building ----------------------------------------------------------------------------------------------------------


def _build_nothing(_volume: Volume, _layers: list[str]) -> None:
    pass


def _build_bind(volume: Volume, _layers: list[str]) -> None:
    recursive = kernel.MS_REC if volume.backend == "rbind" else 0
    mounts.bind(volume.storage_path, volume.internal_path, _flags(volume) | recursive)


def _tmpfs_options(volume: Volume, space_limit: int, inode_limit: int) -> str:
    options = ["huge=always"] if volume.backend == "hugetmpfs" else []
    options += [f"size={space_limit}"] if space_limit else []
    options += [f"nr_inodes={inode_limit}"] if inode_limit else []
    return ",".join(options)


def _build_tmpfs(volume: Volume, _layers: list[str]) -> None:
    options = _tmpfs_options(volume, volume.space_limit, volume.inode_limit)
    with system_call("mount tmpfs"):
        kernel.mount(f"porto_tmpfs_{volume.id}", volume.internal_path, "tmpfs", _flags(volume), options)
        kernel.propagate(volume.internal_path, kernel.MS_SHARED)


def _build_overlay(volume: Volume, layers: list[str]) -> None:
    upper, work = f"{volume.storage_path}/upper", f"{volume.storage_path}/work"
    descriptors: dict[tuple[int, int], int] = {}
    own: list[int] = []
    try:
        for layer in layers:
            fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            found = os.fstat(fd)
            # The kernel refuses the same directory twice.
            if descriptors.setdefault((found.st_dev, found.st_ino), fd) != fd:
                os.close(fd)
        own = [os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for path in (upper, work)]
        # By descriptors: options have no more than a page, and paths may hold commas and colons.
        lower = ":".join(f"/proc/self/fd/{fd}" for fd in descriptors.values())
        options = f"lowerdir={lower},upperdir=/proc/self/fd/{own[0]},workdir=/proc/self/fd/{own[1]}"
        if not volume.keep_storage and not volume.storage:
            options += ",volatile"  # nothing of it is kept: no need to wait for the disk
        if len(options) >= os.sysconf("SC_PAGE_SIZE"):
            raise invalid_value(f"Too many layers: {len(descriptors)} don't fit in the options of a mount")
        with system_call("mount overlay"):
            kernel.mount("overlay", volume.internal_path, "overlay", _flags(volume), options)
            kernel.propagate(volume.internal_path, kernel.MS_SHARED)
    finally:
        for fd in (*descriptors.values(), *own):
            os.close(fd)


def resize(volume: Volume, space_limit: int, inode_limit: int) -> None:
    """Change the limits of a volume.

    :raises Fault: NotSupported: its backend can't.
    """
    if volume.backend not in ("tmpfs", "hugetmpfs"):
        raise _no_quota() if volume.backend in ("native", "overlay") else not_supported("not implemented")
    options = _tmpfs_options(volume, space_limit, inode_limit)
    with system_call("remount tmpfs"):
        source = f"porto_tmpfs_{volume.id}"
        kernel.mount(source, volume.internal_path, "tmpfs", _flags(volume) | kernel.MS_REMOUNT, options)


def check(volume: Volume) -> None:
    """:raises Fault: NotSupported: there is no quota to be checked."""
    if volume.backend in ("native", "overlay"):
        raise not_supported("Volume has no quota or project doesn't exist")


def measure(volume: Volume) -> Space:
    """What is used and left where the volume lies."""
    try:
        found = os.statvfs(volume.path if volume.backend == "dir" else volume.internal_path)
    except OSError:
        return volume.space
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    return Space(used, found.f_bavail * found.f_frsize, found.f_files - found.f_ffree, found.f_favail)


BACKENDS: dict[str, Backend] = {
    "dir": Backend(_check_dir, _build_nothing),
    "plain": Backend(_check_plain, _build_bind),
    "bind": Backend(_check_bind, _build_bind),
    "rbind": Backend(_check_bind, _build_bind),
    "tmpfs": Backend(_check_tmpfs, _build_tmpfs),
    "hugetmpfs": Backend(_check_tmpfs, _build_tmpfs),
    "native": Backend(_check_native, _build_bind),
    "quota": Backend(_check_quota, _build_nothing),
    "overlay": Backend(_check_overlay, _build_overlay, merges_layers=False),
}
_KNOWN_ELSEWHERE = frozenset({"squash", "loop", "lvm", "rbd", "nbd"})


def backend(volume: Volume) -> Backend:
    """:raises Fault: NotSupported."""
    found = BACKENDS.get(volume.backend)
    if found is None:
        if volume.backend in _KNOWN_ELSEWHERE:
            raise not_supported(f"the embedded Porto has no volume backend {volume.backend}")
        raise not_supported(f"Unknown volume backend: {volume.backend}")
    return found


def choose(volume: Volume) -> str:
    """The backend of a volume that names none."""
    if volume.space_limit or volume.inode_limit or os.path.isfile(volume.storage_path or "/"):
        return "loop"
    return "overlay" if volume.layers else "plain"
