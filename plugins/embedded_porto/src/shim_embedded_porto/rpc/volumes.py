"""Requests about volumes."""

from __future__ import annotations

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits, paths
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.rpc.call import Call, Kind, method
from shim_embedded_porto.volumes import backends, specification
from shim_embedded_porto.volumes import volume as states
from shim_embedded_porto.volumes.links import ALL
from shim_embedded_porto.volumes.volume import Link, Volume


@method("listVolumeProperties", kind=Kind.READ)
def list_volume_properties(call: Call, _request: pb.TVolumePropertyListRequest) -> None:
    for name, (description, _) in specification.PROPERTIES.items():
        call.response.volumePropertyList.properties.add(name=name, desc=description)


def _create(call: Call, spec: pb.TVolumeSpec) -> Volume:
    call.porto.statistics.add("volumes_created")
    try:
        return call.porto.volumes.create(spec, call.client)
    except Fault:
        call.porto.statistics.add("volumes_failed")
        raise


@method("createVolume", kind=Kind.VOLUMES)
def create_volume(call: Call, request: pb.TVolumeCreateRequest) -> None:
    values = {prop.name: prop.value for prop in request.properties}
    if request.path:
        values["path"] = request.path
    volume = _create(call, specification.parse(values))
    with call.porto.volumes.registry.changed:
        path = volume.path_for(call.client.container)
        volume.describe(None, path, call.response.volumeDescription, call.client)


@method("NewVolume", kind=Kind.VOLUMES)
def new_volume(call: Call, request: pb.TNewVolumeRequest) -> None:
    volume = _create(call, request.volume)
    with call.porto.volumes.registry.changed:
        volume.dump(call.response.NewVolume.volume, call.client)


@method("tuneVolume", kind=Kind.VOLUMES)
def tune_volume(call: Call, request: pb.TVolumeTuneRequest) -> None:
    volume = call.porto.volumes.registry.controlled(request.path, call.client)
    call.porto.volumes.tune(volume, {prop.name: prop.value for prop in request.properties})


@method("checkVolume", kind=Kind.IO)
def check_volume(call: Call, request: pb.TVolumeCheckRequest) -> None:
    volume = call.porto.volumes.registry.controlled(request.path, call.client)
    call.response.checkVolume.SetInParent()
    backends.check(volume)


@method("linkVolume", "LinkVolumeTarget", kind=Kind.VOLUMES)
def link_volume(call: Call, request: pb.TVolumeLinkRequest) -> None:
    volumes = call.porto.volumes
    with call.locked(request.container or limits.SELF, child=True) as ct:
        read_only = not request.HasField("target") or request.read_only
        volume = volumes.registry.controlled(request.path, call.client, read_only=read_only)
        volumes.links.link(
            volume, ct, call.client, request.target, read_only=request.read_only, required=request.required
        )


@method("unlinkVolume", "UnlinkVolumeTarget", kind=Kind.VOLUMES)
def unlink_volume(call: Call, request: pb.TVolumeUnlinkRequest) -> None:
    volumes = call.porto.volumes
    if request.container == ALL:
        volume = volumes.registry.controlled(request.path, call.client, read_only=True)
        if volume.state != states.READY:
            raise Fault(pb.VolumeNotReady, f"Volume {request.path} is not ready")
        volumes.destroy(volume)
        return
    name = request.container if request.HasField("container") else limits.SELF
    ct = call.client.find_for_write(name, child=True)
    volume = volumes.registry.controlled(request.path, call.client, read_only=True)
    target = request.target if request.HasField("target") else ALL
    volumes.unlink(volume, ct, target, strict=request.strict)


# -- looking -----------------------------------------------------------------------------------------------------------


def _measured(volume: Volume) -> Volume:
    if volume.state in states.USABLE:
        volume.space = backends.measure(volume)
    return volume


def _describe(call: Call, link: Link, path: str, request: pb.TVolumeListRequest) -> None:
    entry = call.response.volumeList.volumes.add()
    if request.HasField("changed_since") and link.volume.change_time < request.changed_since:
        entry.path = request.path or path
        entry.change_time = link.volume.change_time
        entry.no_changes = True
    else:
        _measured(link.volume).describe(link, path, entry, call.client)


@method("listVolumes", kind=Kind.READ)
def list_volumes(call: Call, request: pb.TVolumeListRequest) -> None:
    registry = call.porto.volumes.registry
    call.response.volumeList.SetInParent()
    with registry.changed:
        if request.path and "*" not in request.path:
            link = registry.link_at(call.client.resolve_path(request.path))
            if link is None:
                raise Fault(pb.VolumeNotFound, f"Volume {request.path} not found")
            _describe(call, link, request.path, request)
            return
        ct = call.client.find(request.container) if request.HasField("container") else call.client.container
        for path, link in registry.inner(ct.root_path, request.path or "***").items():
            _describe(call, link, path, request)


@method("GetVolume", kind=Kind.READ)
def get_volume(call: Call, request: pb.TGetVolumeRequest) -> None:
    registry, client = call.porto.volumes.registry, call.client
    response = call.response.GetVolume
    response.SetInParent()
    if request.HasField("container"):
        ct, name = client.find(request.container), request.container
    else:
        ct, name = client.container, client.relative_name(client.container.name)
    with registry.changed:
        if request.path:
            found = [(path, registry.link_at(paths.join(ct.root_path, path))) for path in request.path]
            if len(found) == 1 and found[0][1] is None:
                raise Fault(pb.VolumeNotFound, f"Volume {found[0][0]} not found")
        else:
            found = list(registry.inner(ct.root_path).items())
        for path, link in found:
            if link is None:
                continue
            spec = response.volume.add()
            if request.HasField("changed_since") and link.volume.change_time < request.changed_since:
                spec.change_time, spec.no_changes = link.volume.change_time, True
            else:
                _measured(link.volume).dump(spec, client)
            spec.path, spec.container = path, name
