"""From what a client asks for to a volume that can be built: defaults filled in, contradictions refused."""

from __future__ import annotations

import errno
import os

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import credentials, limits, names, paths, rights
from shim_embedded_porto.client import Client
from shim_embedded_porto.errors import Fault, invalid_path, invalid_value, not_supported, permission, system_call
from shim_embedded_porto.text import format_size
from shim_embedded_porto.volumes.backends import backend, choose, measure
from shim_embedded_porto.volumes.build import layer_path
from shim_embedded_porto.volumes.registry import Registry
from shim_embedded_porto.volumes.storage import STORAGE, Item
from shim_embedded_porto.volumes.volume import Volume

_CHROOT_VOLUMES = "porto"
"""The directory in a container's root that volumes without a path are mounted in."""
_BINDS = frozenset({"bind", "rbind"})


def load(spec: pb.TVolumeSpec, number: str, place: str, client: Client) -> Volume:
    """A volume with what the message says, nothing of it checked yet.

    :raises Fault: InvalidValue: no such user or group.
    """
    volume = Volume(number, place, owner=client.cred, cred=client.task_cred)
    volume.creator = f"{client.container.name} {client.cred.user} {client.cred.group}"
    volume.path = spec.path
    volume.backend = spec.backend
    volume.storage = volume.storage_path = spec.storage
    volume.keep_storage = bool(spec.storage)
    volume.read_only = spec.read_only
    volume.fs_type = spec.filesystem_type
    volume.image = spec.image
    volume.layers = list(spec.layers)
    volume.private = spec.private_value
    volume.space_limit, volume.space_guarantee = spec.space.limit, spec.space.guarantee
    volume.inode_limit, volume.inode_guarantee = spec.inodes.limit, spec.inodes.guarantee
    if spec.HasField("owner"):
        volume.owner = credentials.from_message(spec.owner, volume.owner)
    if spec.HasField("cred"):
        volume.cred = credentials.from_message(spec.cred, volume.cred, strict=False)
    if spec.HasField("permissions"):
        volume.permissions = spec.permissions
    return volume


def check_path(path: str, target_root: str, registry: Registry) -> None:
    """Whether a volume can be mounted at a path the client has chosen.

    :raises Fault: InvalidPath, VolumeAlreadyExists, Busy, VolumeNotReady.
    """
    if not path.startswith("/"):
        raise invalid_path("Volume path must be absolute")
    if not paths.is_normal(path):
        raise invalid_path("Volume path must be normalized")
    full = paths.join(target_root, path)
    if full in registry.volumes:
        raise Fault(pb.VolumeAlreadyExists, "Volume already exists")
    if not os.path.lexists(full):
        reason = Fault(pb.Unknown, f"Cannot open {full}", errno.ENOENT)
        raise invalid_path(f"Cannot open volume path: {reason}")
    real = os.path.realpath(full)
    if real != full:
        raise invalid_path(f"Volume {full} real path is {real}")
    registry.check_conflicts(full)


def configure(volume: Volume, target_root: str, registry: Registry, client: Client) -> None:
    """Fill in what the client has left out. Call it with the registry's lock held.

    :raises Fault: what was asked for can't be, or not for this client.
    """
    _check_owner(volume, client)
    volume.backend = volume.backend or choose(volume)
    if not volume.path:
        volume.auto_path = True
        volume.path = _automatic_path(volume, target_root)
    else:
        volume.path = paths.join(target_root, volume.path)
    _resolve_storage(volume, client)
    _check_storage_free(volume, registry)
    if volume.image:
        raise not_supported("Docker images are not supported")
    _resolve_layers(volume, client)
    if volume.layers and volume.backend not in ("overlay", "squash") and volume.read_only:
        raise invalid_value("Cannot copy layers to read-only volume")
    if volume.space_limit and volume.space_limit < volume.space_guarantee:
        raise invalid_value("Space guarantree bigger than limit")
    if volume.inode_limit and volume.inode_limit < volume.inode_guarantee:
        raise invalid_value("Inode guarantree bigger than limit")
    backend(volume).check(volume)
    check_guarantee(volume, volume.space_guarantee, volume.inode_guarantee, registry)


def _check_owner(volume: Volume, client: Client) -> None:
    try:
        client.check_cred(volume.owner)
    except Fault as fault:
        raise fault.within(f"Volume {volume.path}") from None
    same_group = volume.owner.gid == client.cred.gid or client.cred.member_of(volume.owner.gid)
    if not same_group and not client.superuser:
        raise permission("Changing owner group is not permitted")


def _automatic_path(volume: Volume, target_root: str) -> str:
    if target_root == "/":
        return volume.internal("volume")
    directory = paths.join(target_root, _CHROOT_VOLUMES)
    if not os.path.exists(directory):
        with system_call(f"mkdir({directory})"):
            os.mkdir(directory, 0o755)
    if os.path.realpath(directory) != directory:
        raise invalid_path(f"Volume directory {directory} is a symbolic link")
    return f"{directory}/volume_{volume.id}"


def _resolve_storage(volume: Volume, client: Client) -> None:
    if volume.remote:
        return
    if not volume.storage:
        volume.storage_path, volume.keep_storage = volume.internal(volume.backend), False
    elif volume.user_storage:
        if not paths.is_normal(volume.storage_path):
            raise invalid_path("Storage path must be normalized")
        path = client.resolve_path(volume.storage_path)
        if not os.path.exists(path):
            raise invalid_path("Storage path does not exist")
        if paths.is_system(path):
            _check_system_storage(path, client)
        volume.storage = volume.storage_path = path
        volume.keep_storage = True
    else:
        names.check_storage(volume.storage)
        volume.storage_path = Item(STORAGE, volume.place, volume.storage).path
        volume.keep_storage = os.path.exists(volume.storage_path)


def _check_system_storage(path: str, client: Client) -> None:
    refused = invalid_path("Storage in system directory and client has no write access")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        raise refused from None
    try:
        rights.check_write(fd, client, lambda _path: None)
    except Fault:
        raise refused from None
    finally:
        os.close(fd)


def _check_storage_free(volume: Volume, registry: Registry) -> None:
    if volume.remote:
        return
    for other in registry.volumes.values():
        if (
            not other.remote
            and (other.storage_path, other.place) == (volume.storage_path, volume.place)
            and not (volume.read_only and other.read_only)
            and not (volume.backend in _BINDS and other.backend in _BINDS)
        ):
            raise Fault(pb.Busy, f"Storage already in use by volume {other.path}")


def _resolve_layers(volume: Volume, client: Client) -> None:
    for index, layer in enumerate(volume.layers):
        if not paths.is_normal(layer):
            raise invalid_path("Layer path must be normalized")
        if layer.startswith("/"):
            volume.layers[index] = client.resolve_path(layer)
        else:
            names.check_storage(layer)
        path = layer_path(volume, volume.layers[index])
        if not os.path.exists(path):
            raise Fault(pb.LayerNotFound, f"Layer not found {path}")
        if paths.is_system(path):
            raise invalid_path(f"Layer path {path} in system directory")
        if not os.path.isdir(path) and volume.backend != "squash":
            raise invalid_path("Layer must be a directory")


def check_guarantee(volume: Volume, space: int, inodes: int, registry: Registry) -> None:
    """Whether a guarantee can be given, on top of those given already.

    :raises Fault: NoSpace.
    """
    if volume.remote or not (space or inodes):
        return
    directory = volume.storage_path if volume.user_storage else os.path.dirname(volume.internal())
    with system_call(f"statfs({directory})"):
        found = os.statvfs(directory)
        device = os.stat(directory).st_dev
    own = volume.space
    available = found.f_bavail * found.f_frsize + own.used
    inodes_available = found.f_favail + own.inodes_used
    if available < space:
        left = f"avail {format_size(available - own.used)}, our usage {format_size(own.used)}"
        raise Fault(pb.NoSpace, f"Not enough space for volume guarantee {format_size(space)}, {left}")
    if inodes_available < inodes:
        raise Fault(pb.NoSpace, f"Not enough inodes for volume guarantee {inodes}, avail {inodes_available}")
    for other in registry.volumes.values():
        if other is volume or other.remote or other.backend == "plain":
            continue
        if not (other.space_guarantee or other.inode_guarantee) or _device(other.storage_path) != device:
            continue
        used = measure(other)
        available -= other.space_guarantee - min(used.used, other.space_guarantee)
        inodes_available -= other.inode_guarantee - min(used.inodes_used, other.inode_guarantee)
    if available < space:
        raise Fault(
            pb.NoSpace,
            f"Not enough space for volume guarantee {format_size(space)}, unclaimed {format_size(available)}",
        )
    if inodes_available < inodes:
        raise Fault(pb.NoSpace, f"Not enough inodes for volume guarantee {inodes}, unclaimed {inodes_available}")


def _device(path: str) -> int:
    try:
        return os.stat(path).st_dev
    except OSError:
        return -1


def check_private(value: str) -> None:
    """:raises Fault: InvalidValue."""
    if len(value.encode()) > limits.PRIVATE_MAX:
        raise invalid_value(f"Private value too log, max {limits.PRIVATE_MAX} bytes")
