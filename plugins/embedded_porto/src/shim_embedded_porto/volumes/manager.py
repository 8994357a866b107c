"""Volumes from creation to destruction."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits, paths, text
from shim_embedded_porto.client import Client
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.lifecycle import stop
from shim_embedded_porto.lifecycle.state import save_quietly
from shim_embedded_porto.properties import registry as properties
from shim_embedded_porto.properties.base import Context
from shim_embedded_porto.volumes import backends, mounts
from shim_embedded_porto.volumes import build as building
from shim_embedded_porto.volumes import configure as configuring
from shim_embedded_porto.volumes import volume as states
from shim_embedded_porto.volumes.links import ALL, Links
from shim_embedded_porto.volumes.registry import Registry
from shim_embedded_porto.volumes.storage import LAYER, STORAGE, Item
from shim_embedded_porto.volumes.volume import Link, Volume

if TYPE_CHECKING:
    from shim_embedded_porto.porto import Porto

logger = logging.getLogger("shim.embedded_porto.volumes")

_TUNABLE = ("space_limit", "inode_limit", "space_guarantee", "inode_guarantee")


class Volumes:
    """The volumes of all containers. Methods take action locks themselves unless they say otherwise."""

    def __init__(self, porto: Porto, registry: Registry) -> None:
        self._porto = porto
        self.registry = registry
        self.links = Links(registry, lambda ct: save_quietly(porto, ct))

    def _held(self, ct: Container) -> AbstractContextManager[None]:
        """Keep a container from going away. The root never goes; nobody has to wait for it."""
        return self._porto.tree.locked(ct, shared=ct.is_root)

    # -- creation --------------------------------------------------------------------------------------------------

    def create(self, spec: pb.TVolumeSpec, client: Client) -> Volume:
        """Create a volume and link it.

        :raises Fault: InvalidPath, InvalidValue, InvalidProperty, LayerNotFound, Busy, Permission, ...
        """
        porto, registry = self._porto, self.registry
        configuring.check_private(spec.private_value)
        place = porto.storages.resolve_place(spec.place, client.container)
        porto.storages.prepare_place(place)
        target_root = client.container.root_path
        if spec.HasField("container"):
            target_root = client.find_for_write(spec.container, child=True).root_path
        owner = client.container
        if spec.HasField("owner_container"):
            owner = client.find_for_write(spec.owner_container, child=True)
        volume = configuring.load(spec, registry.next_id(), place, client)
        common = self._register(volume, spec, target_root, owner, client)
        try:
            building.build(volume, spec, registry, client)
            self._link_initially(volume, spec, client)
            registry.save(volume)
            if volume.path != volume.internal_path or volume.backend in ("dir", "quota"):
                self.links.mount(common, client)
            self._mount_links(volume, client)
            with registry.changed:
                registry.set_state(volume, states.READY)
                common.busy = False
            registry.save(volume)
        except BaseException:
            common.busy = False
            try:
                self.destroy(volume)
            except Fault as fault:
                logger.error("cannot remove the unfinished volume %s: %s", volume.path, fault)
            raise
        volume.space = backends.measure(volume)
        return volume

    def _register(
        self, volume: Volume, spec: pb.TVolumeSpec, target_root: str, owner: Container, client: Client
    ) -> Link:
        """Check everything and take the volume's path."""
        registry = self.registry
        with self._porto.tree.locked(owner, shared=True), registry.changed:
            most = limits.VOLUMES_MAX + (limits.SUPERUSER_EXTRA if client.superuser else 0)
            if len(registry.volumes) >= most:
                raise Fault(pb.ResourceNotAvailable, f"number of volumes reached limit: {most}")
            if spec.HasField("path"):
                configuring.check_path(spec.path, target_root, registry)
            configuring.configure(volume, target_root, registry, client)
            common = registry.common_link(volume)
            common.busy = True
            registry.add_dependencies(volume, [building.layer_path(volume, layer) for layer in volume.layers])
            if volume.path == volume.internal_path and volume.backend not in ("dir", "quota"):
                registry.mounted(common)
            registry.add(volume, owner)
            registry.set_state(volume, states.BUILDING)
        return common

    def _link_initially(self, volume: Volume, spec: pb.TVolumeSpec, client: Client) -> None:
        if not spec.links:
            with self._held(client.container):
                self.links.link(volume, client.container, client)
        for link in spec.links:
            ct = client.find_for_write(link.container, child=True)
            with self._held(ct):
                self.links.link(volume, ct, client, link.target, read_only=link.read_only, required=link.required)
                ctx = Context(self._porto, client)
                if link.container_root and ct.parent is not None:
                    properties.set_value(ct, "root", paths.inner(ct.parent.root_path, volume.path), ctx)
                if link.container_cwd:
                    properties.set_value(ct, "cwd", paths.inner(ct.root_path, volume.path), ctx)
                if link.container_root or link.container_cwd:
                    save_quietly(self._porto, ct)

    def _mount_links(self, volume: Volume, client: Client) -> None:
        """Mount what was linked before there was anything to mount."""
        while True:
            with self.registry.changed:
                link = next((link for link in volume.links if link.target and not link.host_target), None)
                if link is None:
                    return
                link.busy = True
            try:
                self.links.mount(link, client)
            finally:
                link.busy = False

    # -- destruction -----------------------------------------------------------------------------------------------

    def destroy_all(self, unlinked: list[Volume]) -> None:
        """Destroy volumes nobody is linked with any more."""
        for volume in unlinked:
            try:
                self.destroy(volume)
            except Fault as fault:
                logger.warning("cannot destroy volume %s: %s", volume.path, fault)

    def destroy(self, volume: Volume) -> None:
        """Destroy a volume and those that lie in it; containers that require one of them are stopped.

        Call it without any action lock.

        :raises Fault: the first thing that went wrong; the volume is gone nevertheless.
        """
        plan = self._plan_destruction(volume)
        if any(other.has_dependents for other in plan):
            self._stop_dependents()
        first: Fault | None = None
        for other in reversed(plan):
            try:
                self._destroy_one(other)
            except Fault as fault:
                logger.warning("volume %s: %s", other.path, fault)
                first = first or fault
        if first is not None:
            raise first

    def _plan_destruction(self, volume: Volume) -> list[Volume]:
        registry = self.registry
        plan = [volume]
        with registry.changed:
            for other in plan:
                while (other.state == states.BUILDING and other is not volume) or other.state == states.DESTROYING:
                    registry.changed.wait()
                if other.state != states.DESTROYED:
                    registry.set_state(other, states.TO_DESTROY)
                plan += [nested for nested in other.nested if nested not in plan]
        return plan

    def _stop_dependents(self) -> None:
        for ct in reversed(self._porto.tree.all()):
            if not ct.required_volumes or not ct.has_resources or ct.is_root:
                continue
            try:
                self.registry.check_required(ct)
                continue
            except Fault as fault:
                logger.info("stop %s because: %s", ct.name, fault)
            try:
                with self._porto.tree.locked(ct):
                    stop.stop(self._porto, ct, 0)
            except Fault as fault:
                logger.warning("cannot stop %s: %s", ct.name, fault)

    def _destroy_one(self, volume: Volume) -> None:
        registry = self.registry
        with registry.changed:
            while volume.state == states.DESTROYING:
                registry.changed.wait()
            if volume.state == states.DESTROYED:
                return
            registry.set_state(volume, states.DESTROYING)
        further: list[Volume] = []
        while volume.links:
            link = volume.links[-1]
            try:
                with self._held(link.container):
                    further += self.links.unlink(volume, link.container, link.target)
            except Fault as fault:
                logger.warning("cannot unlink volume %s: %s", volume.path, fault)
                with registry.changed:
                    if link in volume.links:
                        volume.links.remove(link)
        try:
            building.destroy(volume)
        finally:
            registry.remove(volume)
            self._release(volume)
            self.destroy_all(further)

    def _release(self, volume: Volume) -> None:
        """Weak layers and storages go with the last volume made of them."""
        storages = self._porto.storages
        items = [Item(LAYER, volume.place, layer) for layer in volume.layers if not layer.startswith("/")]
        if volume.storage and volume.keep_storage and not volume.user_storage and not volume.remote:
            items.append(Item(STORAGE, volume.place, volume.storage))
        for item in items:
            try:
                if item.weak:
                    storages.remove(item, self._porto.client, weak=True)
                else:
                    item.touch()
            except (Fault, OSError) as err:
                if not (isinstance(err, Fault) and err.code == pb.Busy):
                    logger.warning("%s %s: %s", item.kind, item.name, err)

    # -- changes ---------------------------------------------------------------------------------------------------

    def tune(self, volume: Volume, values: Mapping[str, str]) -> None:
        """Change limits and guarantees.

        :raises Fault: InvalidProperty, InvalidValue, NotSupported, NoSpace, VolumeNotReady.
        """
        for name in values:
            if name not in _TUNABLE:
                raise Fault(pb.InvalidProperty, f"Volume property {name} cannot be changed")
        registry = self.registry
        with registry.changed:
            while volume.state == states.TUNING:
                registry.changed.wait()
            if volume.state != states.READY:
                raise Fault(pb.VolumeNotReady, f"Volume not ready: {volume.path}")
            registry.set_state(volume, states.TUNING)
        try:
            wanted = {name: getattr(volume, name) for name in _TUNABLE}
            wanted |= {name: text.parse_size(value) for name, value in values.items()}
            if "space_limit" in values or "inode_limit" in values:
                backends.resize(volume, wanted["space_limit"], wanted["inode_limit"])
            with registry.changed:
                configuring.check_guarantee(volume, wanted["space_guarantee"], wanted["inode_guarantee"], registry)
                for name, value in wanted.items():
                    setattr(volume, name, value)
        finally:
            with registry.changed:
                if volume.state == states.TUNING:
                    registry.set_state(volume, states.READY)
        registry.save(volume)

    def check_required(self, ct: Container) -> None:
        """:raises Fault: VolumeNotFound, VolumeNotReady."""
        self.registry.check_required(ct)

    def unlink_all(self, ct: Container) -> list[Volume]:
        """See :meth:`Links.unlink_all`. Call it with the container's action lock held."""
        return self.links.unlink_all(ct)

    def unlink(self, volume: Volume, ct: Container, target: str = ALL, *, strict: bool = False) -> None:
        """Remove a link, and the volume with the last one.

        :raises Fault: VolumeNotLinked, Busy.
        """
        with self._held(ct):
            unlinked = self.links.unlink(volume, ct, target, strict=strict)
        self.destroy_all(unlinked)

    # -- restoring -------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Take up the volumes there were; what isn't whole any more is destroyed, and what nobody knows removed.

        Call it once the containers are there.
        """
        broken: list[Volume] = []
        mounted = set(mounts.mount_points())
        records = sorted(self._porto.store.volumes(), key=lambda record: int(record["id"]))
        for record in records:
            volume = Volume.from_record(record)
            if lost := self._restore_one(volume, record, mounted):
                logger.warning("the volume %s is lost: %s", volume.path, lost)
                broken.append(volume)
        for _ in broken:
            self._porto.statistics.add("volume_lost")
        self.destroy_all(broken)

    def _restore_one(self, volume: Volume, record: Mapping[str, Any], mounted: set[str]) -> str:
        """Take up one volume; why it can't be, if so."""
        registry, tree = self.registry, self._porto.tree
        owner = tree.get(record["owner_container"]) or tree.root
        registry.add(volume, owner)
        common = registry.common_link(volume)
        registry.mounted(common)
        for name, target, host_target, read_only, required in record["links"]:
            ct = tree.get(name)
            if ct is None:
                if host_target and host_target in mounted:
                    mounts.unmount(host_target)
                continue
            if host_target and (host_target not in mounted or registry.links.get(host_target, common) is not common):
                continue
            link = Link(volume, ct, target, host_target, read_only, required)
            volume.links.append(link)
            ct.volume_links.append(link)
            if host_target:
                registry.mounted(link)
        try:
            layers = [building.layer_path(volume, layer) for layer in volume.layers]
            registry.add_dependencies(volume, layers)
        except Fault as fault:
            return str(fault)
        if volume.state != states.READY:
            return f"it was {volume.state}"
        if volume.backend not in ("dir", "quota") and volume.path not in mounted:
            return "it is not mounted any more"
        if not volume.links:
            registry.set_state(volume, states.UNLINKED)
            return "no container holds it"
        volume.space = backends.measure(volume)
        return "" if os.path.exists(volume.path) else "its directory is gone"
