"""Building a volume: its directories, what the backend makes, and what it begins with."""

from __future__ import annotations

import os
import stat
import time

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import credentials, inroot, kernel, paths, rights
from shim_embedded_porto.client import Client
from shim_embedded_porto.errors import Fault, invalid_path, not_supported, system, system_call
from shim_embedded_porto.removal import remove_tree
from shim_embedded_porto.volumes import archive, mounts
from shim_embedded_porto.volumes.backends import backend
from shim_embedded_porto.volumes.registry import Registry
from shim_embedded_porto.volumes.storage import LAYER, STORAGE, Item
from shim_embedded_porto.volumes.volume import Volume


def layer_path(volume: Volume, layer: str) -> str:
    """Where a layer lies that is named, or given by its path."""
    return layer if layer.startswith("/") else Item(LAYER, volume.place, layer).path


def build(volume: Volume, spec: pb.TVolumeSpec, registry: Registry, client: Client) -> None:
    """Build a configured volume.

    :raises Fault: something can't be made, or isn't the client's to use.
    """
    if spec.shares:
        raise not_supported("volume shares: the embedded Porto makes no hard links into volumes")
    _make_internal(volume)
    storage = _claim_storage(volume, registry, client, furnished=bool(spec.directories or spec.symlinks))
    try:
        _build(volume, spec, storage, registry, client)
    finally:
        if storage >= 0:
            os.close(storage)


def _build(volume: Volume, spec: pb.TVolumeSpec, storage: int, registry: Registry, client: Client) -> None:
    """
    :param storage: its storage, open; -1: it has none.
    """
    if volume.backend not in ("dir", "quota"):
        _make_mount_point(volume)
    registry.save(volume)  # from here on there is something to clean up after a crash
    found = backend(volume)
    if volume.backend == "overlay":
        _build_overlay(volume, spec, registry, client)
    else:
        found.build(volume, [])
        _merge_layers(volume, registry, client)
        if spec.directories or spec.symlinks:
            # Not what was mounted: that may be read-only.
            _furnish(os.dup(storage) if storage >= 0 else _open_directory(volume.internal_path), volume, spec)
    if not volume.read_only:
        with system_call(f"set permissions of {volume.internal_path}"):
            if not volume.keep_storage or spec.HasField("cred"):
                os.chown(volume.internal_path, volume.cred.uid, volume.cred.gid)
            if not volume.keep_storage or spec.HasField("permissions"):
                os.chmod(volume.internal_path, volume.permissions)
    if not volume.device_name and volume.storage_path:
        volume.device_name = _device_name(volume.storage_path)
    volume.keep_storage = volume.keep_storage or bool(volume.storage)
    volume.build_time = int(time.time())
    registry.save(volume)


def _make_internal(volume: Volume) -> None:
    internal = volume.internal()
    try:
        os.mkdir(internal)
    except FileExistsError:
        mounts.unmount_below(internal)  # of a volume whose number was forgotten
        with system_call(f"mkdir({internal})"):
            remove_tree(internal)
            os.mkdir(internal)
    except OSError as err:
        raise system(err, f"mkdir({internal})") from err


def _claim_storage(volume: Volume, registry: Registry, client: Client, *, furnished: bool) -> int:
    """Make the storage, or see to it that the client may use the one it names.

    :param furnished: something is made in it, though the volume may be read-only.
    :returns: a descriptor of it; -1: there is none.
    """
    if volume.remote:
        return -1
    path = volume.storage_path
    if volume.user_storage:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as err:
            raise system(err, f"open({path})") from err
        try:
            if (volume.read_only and not furnished) or stat.S_ISREG(os.fstat(fd).st_mode):
                rights.check_read(fd, client, registry.rights)
            else:
                rights.check_write(fd, client, registry.rights)
        except Fault as fault:
            os.close(fd)
            raise fault.within(f"Storage {volume.storage}") from None
        return fd
    if not os.path.exists(path):
        with system_call(f"mkdir({path})"):
            os.makedirs(path)
    if volume.storage:
        item = Item(STORAGE, volume.place, volume.storage)
        item.load()
        try:
            client.check_cred(item.owner)
        except Fault as fault:
            raise fault.within(f"Storage {volume.storage}") from None
        if item.owner.unknown:
            item.save_owner(volume.owner)
        if volume.private:
            item.save_private(volume.private)
        else:
            volume.private = item.private
        item.touch()
    return _open_directory(path)


def _open_directory(path: str) -> int:
    with system_call(f"open({path})"):
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _make_mount_point(volume: Volume) -> None:
    path = volume.internal_path
    with system_call(f"mkdir({path})"):
        if volume.binds_file:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        else:
            os.mkdir(path)


def _build_overlay(volume: Volume, spec: pb.TVolumeSpec, registry: Registry, client: Client) -> None:
    upper, work = f"{volume.storage_path}/upper", f"{volume.storage_path}/work"
    with system_call(f"mkdir({upper})"):
        try:
            os.mkdir(upper)
            volume.keep_storage = False  # the storage is a new one
        except FileExistsError:
            pass
        remove_tree(work)
        os.makedirs(work)
    if spec.directories or spec.symlinks:
        _furnish(_open_directory(upper), volume, spec)
    layers = []
    for layer in volume.layers:
        path = layer_path(volume, layer)
        _check_layer(layer, path, volume, registry, client)
        layers.append(path)
    backend(volume).build(volume, layers)


def _check_layer(layer: str, path: str, volume: Volume, registry: Registry, client: Client) -> None:
    """Imported layers are there for everybody; of others the client must be able to read the directory."""
    if not layer.startswith("/"):
        Item(LAYER, volume.place, layer).touch()
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Fault(pb.LayerNotFound, f"Layer not found {path}") from None
    except NotADirectoryError:
        raise invalid_path("Layer must be a directory") from None
    except OSError as err:
        raise system(err, f"open({path})") from err
    try:
        rights.check_read(fd, client, registry.rights)
    finally:
        os.close(fd)


def _merge_layers(volume: Volume, registry: Registry, client: Client) -> None:
    """Copy layers into a volume that can't mount them."""
    for layer in volume.layers:
        path = layer_path(volume, layer)
        _check_layer(layer, path, volume, registry, client)
        archive.copy_tree(path, volume.internal_path)
        archive.sanitize(volume.internal_path)


def _furnish(root: int, volume: Volume, spec: pb.TVolumeSpec) -> None:
    """Make the directories and symbolic links a volume is to begin with.

    :param root: the directory they go to, as a descriptor, which is closed.
    """
    try:
        for directory in spec.directories:
            _check_inner(directory.path, "directory")
            cred, mode = volume.cred, volume.permissions
            if directory.HasField("cred"):
                cred = credentials.from_message(directory.cred, cred, strict=False)
            if directory.HasField("permissions"):
                mode = directory.permissions
            os.close(inroot.make_directories(root, directory.path, mode, cred.uid, cred.gid))
        for link in spec.symlinks:
            _check_inner(link.path, "symlink")
            parent = inroot.make_directories(
                root, os.path.dirname(link.path), volume.permissions, volume.cred.uid, volume.cred.gid
            )
            try:
                name = os.path.basename(link.path)
                if _is_link(name, parent):
                    os.unlink(name, dir_fd=parent)
                os.symlink(link.target_path, name, dir_fd=parent)
            finally:
                os.close(parent)
    except OSError as err:
        raise system(err, f"Cannot mkdirat {os.readlink(f'/proc/self/fd/{root}')} {err.filename}") from err
    finally:
        os.close(root)


def _check_inner(path: str, what: str) -> None:
    if path.startswith(("/", "..")) or not path or not paths.is_normal(path):
        raise invalid_path(f"{what} path {path}")


def _is_link(name: str, parent: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _device_name(path: str) -> str:
    try:
        number = os.stat(path).st_dev
        return os.path.basename(os.readlink(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"))
    except OSError:
        return ""


# -- and the reverse ---------------------------------------------------------------------------------------------------


def destroy(volume: Volume) -> None:
    """Unmount a volume and remove what isn't to be kept; as much as possible.

    :raises Fault: the first that went wrong.
    """
    faults: list[Fault] = []

    def attempt(what: str) -> None:
        try:
            remove_tree(what)
        except OSError as err:
            faults.append(system(err, f"Cannot remove {err.filename}"))

    if volume.path != volume.internal("volume"):
        kernel.umount_all(volume.path)
    if volume.backend not in ("dir", "quota"):
        kernel.umount_all(volume.internal_path)
    if not volume.keep_storage and not volume.remote and not volume.user_storage and volume.storage_path:
        attempt(volume.storage_path)
    if volume.auto_path:
        attempt(volume.path)
    attempt(volume.internal())
    if faults:
        raise faults[0]
