"""All volumes and where they are mounted."""

from __future__ import annotations

import logging
import os
import threading
import time

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import paths, text
from shim_embedded_porto.client import Client
from shim_embedded_porto.container import Container
from shim_embedded_porto.credentials import Cred
from shim_embedded_porto.errors import Fault, invalid_path, permission
from shim_embedded_porto.store import Store
from shim_embedded_porto.volumes import volume as states
from shim_embedded_porto.volumes.storage import LAYER, Item
from shim_embedded_porto.volumes.volume import Link, Volume

logger = logging.getLogger("shim.embedded_porto.volumes")

_UNSAVED = frozenset({states.TO_DESTROY, states.DESTROYING, states.DESTROYED})


class Registry:
    """The volumes by path and the links by where they are mounted.

    ``changed`` is the lock of both, and of all volumes; it is notified when a volume's state has changed. It is never
    held while something is mounted or copied, nor while a container's action lock is waited for.
    """

    def __init__(self, store: Store, root: Container) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.volumes: dict[str, Volume] = {}
        self.links: dict[str, Link] = {}
        self.root = root
        self._store = store
        self._last_id = 0

    # -- volumes ---------------------------------------------------------------------------------------------------

    def next_id(self) -> str:
        with self.changed:
            self._last_id += 1
            return str(self._last_id)

    def add(self, volume: Volume, owner: Container) -> None:
        with self.changed:
            self.volumes[volume.path] = volume
            volume.owner_container = owner
            owner.owned_volumes.append(volume)
            if volume.id.isdigit():
                self._last_id = max(self._last_id, int(volume.id))

    def remove(self, volume: Volume) -> None:
        """Forget a volume, and its mount at its own path."""
        with self.changed:
            for other in self.volumes.values():
                other.nested.discard(volume)
            if self.volumes.get(volume.path) is volume:
                del self.volumes[volume.path]
            link = self.links.get(volume.path)
            if link is not None and link.volume is volume:
                self.unmounted(link)
            if volume.owner_container is not None:
                volume.owner_container.owned_volumes.remove(volume)
                volume.owner_container = None
            self.set_state(volume, states.DESTROYED)
        self._store.remove_volume(volume.id)

    def set_state(self, volume: Volume, state: str) -> None:
        with self.changed:
            logger.debug("volume %s: %s, was %s", volume.path, state, volume.state)
            volume.state = state
            self.changed.notify_all()

    def save(self, volume: Volume) -> None:
        """Remember a volume; one that is to go was remembered as such."""
        with self.changed:
            if volume.state in _UNSAVED:
                return
            volume.change_time = int(time.time())
            self._store.save_volume(volume.id, volume.record())

    # -- links -----------------------------------------------------------------------------------------------------

    def common_link(self, volume: Volume) -> Link:
        """The link that stands for the volume's own path."""
        return Link(volume, self.root, volume.path, volume.path, volume.read_only)

    def mounted(self, link: Link) -> None:
        """A link takes its place; no root on the way to it may change from now on."""
        with self.changed:
            self.links[link.host_target] = link
            for ct in link.container.lineage():
                ct.volume_mounts += 1

    def unmounted(self, link: Link) -> None:
        """A link leaves its place."""
        with self.changed:
            if self.links.get(link.host_target) is link:
                del self.links[link.host_target]
                for ct in link.container.lineage():
                    ct.volume_mounts -= 1
            link.host_target = ""

    def link_at(self, path: str) -> Link | None:
        return self.links.get(path)

    def origin(self, path: str) -> Link | None:
        """The link whose volume a path lies in."""
        path = paths.normal(path)
        while path not in ("/", ""):
            link = self.links.get(path)
            if link is not None:
                return link
            path = path.rpartition("/")[0]
        return None

    def rights(self, path: str) -> tuple[Cred, bool] | None:
        """The owner of the volume a path lies in, and whether it is read-only there."""
        with self.changed:
            link = self.origin(path)
            return (link.volume.owner, link.read_only) if link is not None else None

    def inner(self, base: str, mask: str = "") -> dict[str, Link]:
        """The links below a root, by the path there."""
        with self.changed:
            found = {}
            for target in sorted(self.links):
                path = paths.inner(base, target) if base != "/" else target
                if path and (path == "/" or not mask or text.matches(path, mask)):
                    found[path] = self.links[target]
            return found

    def controlled(self, path: str, client: Client, *, read_only: bool = False) -> Volume:
        """A volume this client may change.

        :param read_only: it needn't be writable there.
        :raises Fault: VolumeNotFound, Permission.
        """
        if not client.writes:
            raise permission("Write access to porto denied")
        with self.changed:
            link = self.link_at(client.resolve_path(path))
            if link is None:
                raise Fault(pb.VolumeNotFound, f"Volume {path} not found")
            try:
                client.check_cred(link.volume.owner)
            except Fault:
                raise permission(f"Cannot control volume {path}") from None
            if not read_only and link.read_only:
                raise permission(f"Volume {path} is read-only")
            return link.volume

    # -- relations -------------------------------------------------------------------------------------------------

    def in_use(self, item: Item) -> str | None:
        """The path of a volume made of a layer or storage."""
        with self.changed:
            for volume in self.volumes.values():
                if item.kind == LAYER:
                    used = volume.place == item.place and item.name in volume.layers
                else:
                    used = volume.place == item.place and volume.storage_path == item.path
                if used:
                    return volume.path
        return None

    def check_conflicts(self, path: str) -> None:
        """:raises Fault: InvalidPath, Busy, VolumeNotReady: nothing can be mounted there."""
        if paths.is_system(path):
            raise invalid_path(f"Volume path {path} in system directory")
        for volume in self.volumes.values():
            if volume.path == path:
                raise Fault(pb.Busy, f"Volume path {path} is used by volume {volume.path}")
            if volume.backend != "bind" and paths.inside(volume.path, path):
                raise invalid_path(f"Volume path {path} overlaps with volume {volume.path}")
            if paths.inside(path, volume.path) and volume.state not in states.USABLE:
                raise Fault(pb.VolumeNotReady, f"Volume path {path} inside volume {volume.path} and it is not ready")
            if paths.inside(volume.place, path):
                raise invalid_path(f"Volume path {path} overlaps with place {volume.place}")
            self._check_storage_conflict(volume, path)
            for layer in volume.layers:
                if layer.startswith("/") and (paths.inside(layer, path) or paths.inside(path, layer)):
                    raise invalid_path(f"Volume path {path} overlaps with layer {layer}")
            for link in volume.links:
                if not link.host_target:
                    continue
                if link.host_target == path:
                    used = f"Volume path {path} is used by volume {volume.path} for {link.container.name}"
                    raise Fault(pb.Busy, used)
                if paths.inside(link.host_target, path):
                    raise invalid_path(
                        f"Volume path {path} overlaps with volume {volume.path} link {link.host_target} "
                        f"for {link.container.name}"
                    )

    @staticmethod
    def _check_storage_conflict(volume: Volume, path: str) -> None:
        if volume.remote:
            return
        storage = volume.storage_path
        overlap = invalid_path(f"Volume path {path} overlaps with volume {volume.path} storage {storage}")
        if volume.backend == "bind":
            if storage == path:
                raise invalid_path(f"Volume path {path} cannot shadow {volume.path} storage {storage}")
        elif paths.inside(storage, path) or (volume.backend != "rbind" and paths.inside(path, storage)):
            raise overlap

    def add_dependencies(self, volume: Volume, layers: list[str]) -> None:
        """Note which volumes this one lies in.

        :param layers: their directories.
        :raises Fault: VolumeNotReady, VolumeNotFound: it can't be, or can't be any longer.
        """
        wanted = [] if volume.auto_path else [volume.path.rpartition("/")[0] or "/"]
        wanted.append(volume.place)
        if not volume.remote and volume.path != volume.storage_path:
            wanted.append(volume.storage_path)
        with self.changed:
            try:
                for path in (*wanted, *layers):
                    self._depend(volume, path)
            except Fault:
                for other in self.volumes.values():
                    other.nested.discard(volume)
                raise

    def _depend(self, volume: Volume, path: str) -> None:
        if volume.state == states.READY and not os.path.exists(path):
            raise Fault(pb.VolumeNotFound, f"Volume {volume.path} depends on non-existent path {path}")
        link = self.origin(path)
        if link is None or link.volume is volume:
            return
        if link.volume.state not in states.USABLE:
            raise Fault(pb.VolumeNotReady, f"Volume {volume.path} depends on non-ready volume {link.volume.path}")
        link.volume.nested.add(volume)

    # -- containers ------------------------------------------------------------------------------------------------

    def check_required(self, ct: Container) -> None:
        """:raises Fault: VolumeNotFound, VolumeNotReady: a volume the container requires isn't there."""
        with self.changed:
            for path in ct.required_volumes:
                link = self.link_at(paths.join(ct.root_path, path))
                if link is None:
                    raise Fault(pb.VolumeNotFound, f"Required volume {path} not found")
                if link.volume.state not in states.USABLE:
                    raise Fault(pb.VolumeNotReady, f"Required volume {path} not ready")
                link.volume.has_dependents = True
