"""Requests about layers and storages, and about images, which this Porto has none of."""

from __future__ import annotations

import errno
import os

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import text
from shim_embedded_porto.errors import Fault, not_supported
from shim_embedded_porto.rpc.call import Call, Kind, method
from shim_embedded_porto.volumes.storage import LAYER, STORAGE, Item


def _item(call: Call, kind: str, place: str, name: str, *, strict: bool = False) -> Item:
    return call.porto.storages.item(kind, place, name, call.client, strict=strict)


@method("importLayer", kind=Kind.IO)
def import_layer(call: Call, request: pb.TLayerImportRequest) -> None:
    memory_cgroup = ""
    if request.HasField("container"):
        ct = call.client.find(request.container)
        call.client.check_control(ct)
        if "memory" in ct.controllers and ct.has_resources and call.porto.cgroups.has("memory"):
            memory_cgroup = call.porto.cgroups.process_file(ct, "memory")
    call.porto.storages.import_archive(
        _item(call, LAYER, request.place, request.layer),
        call.client.resolve_path(request.tarball),
        call.client,
        compress=request.compress,
        merge=request.merge,
        private=request.private_value,
        memory_cgroup=memory_cgroup,
        verbose_error=request.verbose_error,
    )


@method("exportLayer", kind=Kind.IO)
def export_layer(call: Call, request: pb.TLayerExportRequest) -> None:
    if request.HasField("layer"):
        item = _item(call, LAYER, request.place, request.layer, strict=True)
        item.load()
        directory = item.path
    else:
        volume = call.porto.volumes.registry.controlled(request.volume, call.client, read_only=True)
        item = Item("volume", volume.place, volume.id, volume.owner)
        directory = volume.upper
    tarball = call.client.resolve_path(request.tarball)
    call.porto.storages.export_archive(item, directory, tarball, call.client, compress=request.compress)


@method("removeLayer", kind=Kind.IO)
def remove_layer(call: Call, request: pb.TLayerRemoveRequest) -> None:
    item = _item(call, LAYER, request.place, request.layer)
    later = getattr(request, "async")
    call.porto.storages.remove(item, call.client, later=later)


@method("listLayers", kind=Kind.READ)
def list_layers(call: Call, request: pb.TLayerListRequest) -> None:
    storages = call.porto.storages
    place = storages.resolve_place(request.place, call.client.container)
    call.response.layers.SetInParent()
    for item in _chosen(storages.list(LAYER, place), request):
        call.response.layers.layer.append(item.name)
        call.response.layers.layers.add(
            name=item.name,
            owner_user=item.owner.user,
            owner_group=item.owner.group,
            private_value=item.private,
            last_usage=item.last_usage,
        )


def _chosen(items: list[Item], request: pb.TLayerListRequest | pb.TStorageListRequest) -> list[Item]:
    """The items a client asks for, loaded."""
    found = []
    for item in items:
        if request.HasField("mask") and not text.matches(item.name, request.mask):
            continue
        try:
            item.load()
        except Fault:
            continue  # removed meanwhile
        found.append(item)
    return found


@method("getlayerprivate", kind=Kind.READ)
def get_layer_private(call: Call, request: pb.TLayerGetPrivateRequest) -> None:
    item = _item(call, LAYER, request.place, request.layer)
    item.load()
    call.response.layer_private.private_value = item.private


@method("setlayerprivate")
def set_layer_private(call: Call, request: pb.TLayerSetPrivateRequest) -> None:
    item = _item(call, LAYER, request.place, request.layer)
    call.porto.storages.set_private(item, request.private_value, call.client)


# -- storages ----------------------------------------------------------------------------------------------------------


@method("listStorage", kind=Kind.READ)
def list_storages(call: Call, request: pb.TStorageListRequest) -> None:
    storages = call.porto.storages
    place = storages.resolve_place(request.place, call.client.container)
    call.response.storageList.SetInParent()
    for item in _chosen(storages.list(STORAGE, place), request):
        call.response.storageList.storages.add(
            name=item.name,
            owner_user=item.owner.user,
            owner_group=item.owner.group,
            private_value=item.private,
            last_usage=item.last_usage,
        )


@method("removeStorage", kind=Kind.IO)
def remove_storage(call: Call, request: pb.TStorageRemoveRequest) -> None:
    call.porto.storages.remove(_item(call, STORAGE, request.place, request.name), call.client)


@method("importStorage", kind=Kind.IO)
def import_storage(call: Call, request: pb.TStorageImportRequest) -> None:
    call.porto.storages.import_archive(
        _item(call, STORAGE, request.place, request.name),
        call.client.resolve_path(request.tarball),
        call.client,
        compress=request.compress,
        private=request.private_value,
    )


@method("exportStorage", kind=Kind.IO)
def export_storage(call: Call, request: pb.TStorageExportRequest) -> None:
    item = _item(call, STORAGE, request.place, request.name, strict=True)
    item.load()
    tarball = call.client.resolve_path(request.tarball)
    call.porto.storages.export_archive(item, item.path, tarball, call.client, compress=request.compress)


@method("CreateMetaStorage", "ResizeMetaStorage", "RemoveMetaStorage", kind=Kind.IO)
def meta_storage(_call: Call, _request: pb.TMetaStorage) -> None:
    """Storages with a common limit take project quotas."""
    raise Fault(pb.NotSupported, "Cannot enable project quota", errno.ESRCH)


@method("CleanupPlace", kind=Kind.IO)
def clean_up_place(call: Call, request: pb.TCleanupPlaceRequest) -> None:
    """Remove what interrupted imports and removals have left."""
    storages = call.porto.storages
    place = storages.resolve_place(request.place, call.client.container)
    if not os.path.isdir(place):
        raise Fault(pb.LayerNotFound, f"place {place} not found")
    storages.clean_place(place)


# -- images ------------------------------------------------------------------------------------------------------------


@method("dockerImageStatus", "listDockerImages", "pullDockerImage", "removeDockerImage", kind=Kind.IO)
def docker_image(_call: Call, _request: object) -> None:
    """As portod with ``docker_images_support`` off."""
    raise not_supported("Docker images are not supported")
