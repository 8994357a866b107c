"""The part of the client that concerns volumes, layers and storage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from porto_api import rpc_pb2
from porto_api.cancel import CancelToken
from porto_api.connection import Connection


class StorageCalls:
    """Volumes, layers, storages. Mixed into :class:`porto_api.Client`."""

    def call(
        self,
        request: rpc_pb2.TContainerRequest,
        timeout_s: float | None = None,
        cancel: CancelToken | None = None,
        *,
        connection: Connection | None = None,
    ) -> rpc_pb2.TContainerResponse:
        raise NotImplementedError

    # -- volumes ---------------------------------------------------------------------------------------------------

    def new_volume(
        self, spec: rpc_pb2.TVolumeSpec, *, timeout_s: float | None = None, cancel: CancelToken | None = None
    ) -> rpc_pb2.TVolumeSpec:
        """Build a volume; the answer holds what portod chose, such as its path."""
        request = rpc_pb2.TContainerRequest()
        request.NewVolume.volume.CopyFrom(spec)
        return self.call(request, timeout_s, cancel).NewVolume.volume

    def get_volumes(
        self, paths: Iterable[str] = (), *, container: str | None = None, timeout_s: float | None = None
    ) -> list[rpc_pb2.TVolumeSpec]:
        """Volumes by path (all when none is named), as seen from ``container``."""
        request = rpc_pb2.TContainerRequest()
        request.GetVolume.SetInParent()
        request.GetVolume.path.extend(paths)
        if container is not None:
            request.GetVolume.container = container
        return list(self.call(request, timeout_s).GetVolume.volume)

    def create_volume(
        self, path: str | None = None, properties: Mapping[str, str] | None = None, *, timeout_s: float | None = None
    ) -> rpc_pb2.TVolumeDescription:
        """Build a volume from textual properties (``backend``, ``layers``, ``storage``, ``place``, ...)."""
        request = rpc_pb2.TContainerRequest()
        request.createVolume.SetInParent()
        if path is not None:
            request.createVolume.path = path
        for name, value in (properties or {}).items():
            request.createVolume.properties.add(name=name, value=value)
        return self.call(request, timeout_s).volumeDescription

    def list_volumes(
        self, path: str | None = None, container: str | None = None, *, timeout_s: float | None = None
    ) -> list[rpc_pb2.TVolumeDescription]:
        request = rpc_pb2.TContainerRequest()
        request.listVolumes.SetInParent()
        if path is not None:
            request.listVolumes.path = path
        if container is not None:
            request.listVolumes.container = container
        return list(self.call(request, timeout_s).volumeList.volumes)

    def tune_volume(self, path: str, properties: Mapping[str, str], *, timeout_s: float | None = None) -> None:
        """Change limits of a volume."""
        request = rpc_pb2.TContainerRequest()
        request.tuneVolume.path = path
        for name, value in properties.items():
            request.tuneVolume.properties.add(name=name, value=value)
        self.call(request, timeout_s)

    def link_volume(
        self,
        path: str,
        container: str,
        *,
        target: str | None = None,
        read_only: bool = False,
        required: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Link a volume to a container; with ``target`` it is also mounted there."""
        request = rpc_pb2.TContainerRequest()
        link = request.linkVolume if target is None else request.LinkVolumeTarget
        link.path, link.container = path, container
        link.read_only, link.required = read_only, required
        if target is not None:
            link.target = target
        self.call(request, timeout_s)

    def unlink_volume(
        self,
        path: str,
        container: str | None = None,
        *,
        target: str | None = None,
        strict: bool | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Remove a link; a volume without links is destroyed.

        :param container: the caller's own when None; ``***`` removes all links.
        """
        request = rpc_pb2.TContainerRequest()
        unlink = request.unlinkVolume if target is None else request.UnlinkVolumeTarget
        unlink.path = path
        if container is not None:
            unlink.container = container
        if target is not None:
            unlink.target = target
        if strict is not None:
            unlink.strict = strict
        self.call(request, timeout_s)

    # -- layers ----------------------------------------------------------------------------------------------------

    def import_layer(
        self,
        name: str,
        tarball: str,
        *,
        merge: bool = False,
        place: str | None = None,
        private_value: str | None = None,
        compress: str | None = None,
        timeout_s: float | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """Unpack a tar archive (a path that portod can read) into a layer.

        :param merge: unpack over an existing layer of that name.
        :param compress: ``txt`` archive suffix such as ``tar.gz`` when the path doesn't tell.
        """
        request = rpc_pb2.TContainerRequest()
        layer = request.importLayer
        layer.layer, layer.tarball, layer.merge = name, tarball, merge
        if place is not None:
            layer.place = place
        if private_value is not None:
            layer.private_value = private_value
        if compress is not None:
            layer.compress = compress
        self.call(request, timeout_s, cancel)

    def export_layer(
        self,
        volume: str,
        tarball: str,
        *,
        layer: str | None = None,
        place: str | None = None,
        compress: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Pack a volume's upper layer, or a layer by name, into a tar archive."""
        request = rpc_pb2.TContainerRequest()
        export = request.exportLayer
        export.volume, export.tarball = volume, tarball
        if layer is not None:
            export.layer = layer
        if place is not None:
            export.place = place
        if compress is not None:
            export.compress = compress
        self.call(request, timeout_s)

    def remove_layer(
        self, name: str, *, place: str | None = None, asynchronous: bool = False, timeout_s: float | None = None
    ) -> None:
        request = rpc_pb2.TContainerRequest()
        request.removeLayer.layer = name
        setattr(request.removeLayer, "async", asynchronous)  # a keyword of Python
        if place is not None:
            request.removeLayer.place = place
        self.call(request, timeout_s)

    def list_layers(
        self, *, place: str | None = None, mask: str | None = None, timeout_s: float | None = None
    ) -> list[rpc_pb2.TLayerDescription]:
        request = rpc_pb2.TContainerRequest()
        request.listLayers.SetInParent()
        if place is not None:
            request.listLayers.place = place
        if mask is not None:
            request.listLayers.mask = mask
        return list(self.call(request, timeout_s).layers.layers)

    def get_layer_private(self, name: str, *, place: str | None = None, timeout_s: float | None = None) -> str:
        request = rpc_pb2.TContainerRequest()
        request.getlayerprivate.layer = name
        if place is not None:
            request.getlayerprivate.place = place
        return self.call(request, timeout_s).layer_private.private_value

    def set_layer_private(
        self, name: str, value: str, *, place: str | None = None, timeout_s: float | None = None
    ) -> None:
        request = rpc_pb2.TContainerRequest()
        request.setlayerprivate.layer, request.setlayerprivate.private_value = name, value
        if place is not None:
            request.setlayerprivate.place = place
        self.call(request, timeout_s)

    # -- storages --------------------------------------------------------------------------------------------------

    def list_storages(
        self, *, place: str | None = None, mask: str | None = None, timeout_s: float | None = None
    ) -> list[rpc_pb2.TStorageDescription]:
        request = rpc_pb2.TContainerRequest()
        request.listStorage.SetInParent()
        if place is not None:
            request.listStorage.place = place
        if mask is not None:
            request.listStorage.mask = mask
        return list(self.call(request, timeout_s).storageList.storages)

    def remove_storage(self, name: str, *, place: str | None = None, timeout_s: float | None = None) -> None:
        request = rpc_pb2.TContainerRequest()
        request.removeStorage.name = name
        if place is not None:
            request.removeStorage.place = place
        self.call(request, timeout_s)

    def import_storage(
        self,
        name: str,
        tarball: str,
        *,
        place: str | None = None,
        private_value: str | None = None,
        compress: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Unpack a tar archive into a new storage."""
        request = rpc_pb2.TContainerRequest()
        storage = request.importStorage
        storage.name, storage.tarball = name, tarball
        if place is not None:
            storage.place = place
        if private_value is not None:
            storage.private_value = private_value
        if compress is not None:
            storage.compress = compress
        self.call(request, timeout_s)

    def export_storage(
        self,
        name: str,
        tarball: str,
        *,
        place: str | None = None,
        compress: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Pack a storage into a tar archive."""
        request = rpc_pb2.TContainerRequest()
        storage = request.exportStorage
        storage.name, storage.tarball = name, tarball
        if place is not None:
            storage.place = place
        if compress is not None:
            storage.compress = compress
        self.call(request, timeout_s)

    def cleanup_place(self, place: str, *, timeout_s: float | None = None) -> None:
        """Have portod remove what no volume or layer owns below a place."""
        request = rpc_pb2.TContainerRequest()
        request.CleanupPlace.place = place
        self.call(request, timeout_s)
