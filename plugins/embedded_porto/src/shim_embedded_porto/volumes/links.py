"""Linking volumes with containers: a hold on the volume, and a mount in the container's root if it wants one."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import kernel, paths, rights
from shim_embedded_porto.client import Client
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_path, invalid_value, system
from shim_embedded_porto.volumes import mounts
from shim_embedded_porto.volumes import volume as states
from shim_embedded_porto.volumes.registry import Registry
from shim_embedded_porto.volumes.volume import Link, Volume

logger = logging.getLogger("shim.embedded_porto.links")

_LINKABLE = states.USABLE | {states.BUILDING}
ALL = "***"
"""In place of a target: every link of the container."""


class Links:
    """Links volumes. Callers hold the action lock of the container concerned."""

    def __init__(self, registry: Registry, save_container: Callable[[Container], None]) -> None:
        self._registry = registry
        self._save_container = save_container

    # -- linking ---------------------------------------------------------------------------------------------------

    def link(
        self,
        volume: Volume,
        ct: Container,
        client: Client,
        target: str = "",
        *,
        read_only: bool = False,
        required: bool = False,
    ) -> None:
        """Link a volume; a volume that is still being built is mounted later.

        :raises Fault: VolumeAlreadyLinked, VolumeNotReady, InvalidPath, Busy.
        """
        if target and not target.startswith("/"):
            raise invalid_path(f"Volume {volume.path} link path {target} must be absolute")
        if target and not paths.is_normal(target):
            raise invalid_path(f"Volume {volume.path} link path {target} must be normalized")
        registry = self._registry
        with registry.changed:
            if any(link.container is ct and link.target == target for link in volume.links):
                raise Fault(pb.VolumeAlreadyLinked, "Volume already linked")
            if volume.state not in _LINKABLE:
                raise Fault(pb.VolumeNotReady, f"Volume not ready: {volume.path}")
            host_target = ""
            if target and volume.state in states.USABLE:
                host_target = paths.join(ct.root_path, target)
                registry.check_conflicts(host_target)
            newly_required = required and target not in ct.required_volumes
            link = Link(volume, ct, target, host_target, read_only, required or target in ct.required_volumes, True)
            volume.links.append(link)
            ct.volume_links.append(link)
            if newly_required:
                ct.required_volumes = [*ct.required_volumes, target]
            volume.has_dependents |= link.required
        try:
            registry.save(volume)
            if host_target:
                link.host_target = ""
                self.mount(link, client)
            if newly_required:
                ct.assigned.add("volumes_required")
                self._save_container(ct)
        except BaseException:
            with registry.changed:
                _drop(link)
                if newly_required:
                    ct.required_volumes = [path for path in ct.required_volumes if path != target]
            registry.save(volume)
            raise
        finally:
            link.busy = False

    def mount(self, link: Link, client: Client) -> None:
        """Mount a link at its target.

        :raises Fault: VolumeNotReady, InvalidPath, Busy, or the mount fails.
        """
        volume, registry = link.volume, self._registry
        with registry.changed:
            if volume.state not in _LINKABLE:
                raise Fault(pb.VolumeNotReady, f"Volume {volume.path} not ready")
            host_target = paths.join(link.container.root_path, link.target)
            link.host_target = ""
            if host_target != volume.path:
                registry.check_conflicts(host_target)
            link.host_target = host_target
            registry.mounted(link)
        try:
            registry.save(volume)
            fd = _open_target(link, client, registry.rights)
            try:
                _mount_at(link, fd)
            finally:
                os.close(fd)
        except BaseException:
            registry.unmounted(link)
            registry.save(volume)
            raise

    # -- unlinking -------------------------------------------------------------------------------------------------

    def unlink(self, volume: Volume, ct: Container, target: str = ALL, *, strict: bool = False) -> list[Volume]:
        """Remove a link, or all there are between a volume and a container.

        :param strict: only if nobody uses the volume.
        :returns: the volumes that nobody is linked with any more: they are to be destroyed.
        :raises Fault: VolumeNotLinked, Busy.
        """
        registry = self._registry
        unlinked: list[Volume] = []
        found = False
        while True:
            with registry.changed:
                link = next(
                    (link for link in volume.links if link.container is ct and target in (ALL, link.target)), None
                )
                if link is None:
                    if found:
                        return unlinked
                    missing = f"Container {ct.name} is not linked with volume {volume.path}"
                    raise Fault(pb.VolumeNotLinked, missing)
                found = True
                if strict and len(volume.links) > 1:
                    raise Fault(pb.Busy, f"More than one container linked with volume {volume.path}")
                if strict and volume.nested:
                    raise Fault(pb.Busy, f"Volume {volume.path} has sub-volumes")
                if link.busy:
                    raise Fault(pb.Busy, f"Volume {volume.path} link {target} is busy")
                link.busy = bool(link.host_target)
            if link.busy:
                try:
                    unlinked += self._unmount(link, strict=strict)
                finally:
                    link.busy = False
            with registry.changed:
                _drop(link)
                if not volume.links and volume.state in states.USABLE:
                    registry.set_state(volume, states.UNLINKED)
                    unlinked.append(volume)
            registry.save(volume)
            if target != ALL:
                return unlinked

    def _unmount(self, link: Link, *, strict: bool) -> list[Volume]:
        """Unmount a link, and with it the links below."""
        registry, host_target = self._registry, link.host_target
        try:
            mounts.unmount(host_target, strict=strict)
        except Fault as fault:
            if strict and fault.code != pb.NotFound:
                where = f"Cannot umount volume {link.volume.path} link {host_target} for {link.container.name}"
                raise fault.within(f"{where} target {link.target}") from None
            logger.warning("%s", fault)
        unlinked = []
        with registry.changed:
            gone = [other for target, other in registry.links.items() if paths.inside(target, host_target)]
            for other in gone:
                own_path = other.host_target == other.volume.path
                _drop(other)
                if (not other.volume.links or own_path) and other.volume.state in states.USABLE:
                    registry.set_state(other.volume, states.UNLINKED)
                    unlinked.append(other.volume)
                registry.unmounted(other)
            link.host_target = ""
        registry.save(link.volume)
        return unlinked

    def unlink_all(self, ct: Container) -> list[Volume]:
        """A container goes: its links with it; volumes it owns fall to its parent."""
        registry = self._registry
        unlinked: list[Volume] = []
        while ct.volume_links:
            link = ct.volume_links[-1]
            try:
                unlinked += self.unlink(link.volume, ct, link.target)
            except Fault as fault:
                logger.warning("cannot unlink volume %s: %s", link.volume.path, fault)
                with registry.changed:
                    _drop(link)
        with registry.changed:
            for volume in ct.owned_volumes:
                volume.owner_container = ct.parent
                if ct.parent is not None:
                    ct.parent.owned_volumes.append(volume)
                registry.save(volume)
            ct.owned_volumes = []
        return unlinked


def _drop(link: Link) -> None:
    for links in (link.volume.links, link.container.volume_links):
        if link in links:
            links.remove(link)


# -- mounting ----------------------------------------------------------------------------------------------------------


def _open_target(link: Link, client: Client, origin: rights.Origin) -> int:
    """Open what a link is to be mounted on; what is missing is made if the client may write there.

    :raises Fault: InvalidPath, Permission.
    """
    root = link.container.root_path
    directory = not link.volume.binds_file
    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise system(err, f"Cannot open {root}") from err
    try:
        components = [name for name in link.target.split("/") if name]
        for index, name in enumerate(components):
            if name == "..":
                raise invalid_path(f"Non-normal path {link.target}")
            wants_directory = directory or index + 1 < len(components)
            following = _open_component(fd, name, client, origin, directory=wants_directory)
            os.close(fd)
            fd = following
        if not directory and stat.S_ISDIR(os.fstat(fd).st_mode):
            raise invalid_value(f"{link.target} must not be directory")
        real = os.readlink(f"/proc/self/fd/{fd}")
        if real != link.host_target:
            raise invalid_path(f"Volume {link.volume.path} link {link.host_target} real path is {real}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_component(parent: int, name: str, client: Client, origin: rights.Origin, *, directory: bool) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    flags |= os.O_DIRECTORY if directory else 0
    try:
        return os.open(name, flags, dir_fd=parent)
    except OSError as err:
        if err.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            raise system(err, f"open({name})") from err
        wrong_kind = err.errno != errno.ENOENT
    rights.check_write(parent, client, origin)
    try:
        if wrong_kind:
            if not directory or not stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
            os.unlink(name, dir_fd=parent)
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=parent))
        os.chown(name, client.cred.uid, client.cred.gid, dir_fd=parent, follow_symlinks=False)
        return os.open(name, flags, dir_fd=parent)
    except OSError as err:
        raise system(err, f"make {name}") from err


def _mount_at(link: Link, target: int) -> None:
    """Bind a volume over what ``target`` is open on, so that containers' mount namespaces get it as well."""
    volume = link.volume
    flags = kernel.MS_RDONLY if volume.read_only or link.read_only else 0
    if volume.backend in ("rbind", "dir"):
        flags |= kernel.MS_REC
    work = volume.internal("volume_link")
    with volume.mounting:
        try:
            if volume.binds_file:
                os.close(os.open(work, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            else:
                os.makedirs(work, 0o700, exist_ok=True)
            # A mount can't be moved away from a shared one; and rbinds of the place mustn't pick it up here.
            kernel.mount(work, work, "", kernel.MS_BIND)
            try:
                kernel.propagate(work, kernel.MS_UNBINDABLE)
                mounts.bind(volume.internal_path, work, flags, allow_suid=True)
                mounts.move(work, f"/proc/self/fd/{target}")
            finally:
                kernel.umount_all(work)
                if volume.binds_file:
                    os.unlink(work)
                else:
                    os.rmdir(work)
        except OSError as err:
            raise system(err, f"mount volume {volume.path} link {link.host_target}: {err.filename}") from err
