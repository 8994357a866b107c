"""Requests about containers: creating, starting, stopping, listing them."""

from __future__ import annotations

from collections.abc import Mapping

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits, paths, states, text
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_path, invalid_value
from shim_embedded_porto.lifecycle import pause, start, stop
from shim_embedded_porto.lifecycle.state import save
from shim_embedded_porto.properties import registry
from shim_embedded_porto.properties.files import make_symlink
from shim_embedded_porto.rpc.call import Call, Kind, method


@method("create")
def create(call: Call, request: pb.TContainerCreateRequest) -> None:
    start.create(call.porto, call.client.resolve_name(request.name), call.client)


@method("createWeak")
def create_weak(call: Call, request: pb.TContainerCreateRequest) -> None:
    ct = start.create(call.porto, call.client.resolve_name(request.name), call.client, weak=True)
    ct.assigned.add("weak")
    call.client.weak.append(ct)
    save(call.porto, ct)


@method("destroy")
def destroy(call: Call, request: pb.TContainerDestroyRequest) -> None:
    call.porto.destroy(call.client.find_for_write(request.name))


@method("start")
def start_container(call: Call, request: pb.TContainerStartRequest) -> None:
    start.start(call.porto, call.client.find_for_write(request.name), call.client)


@method("stop")
def stop_container(call: Call, request: pb.TContainerStopRequest) -> None:
    timeout_ms = request.timeout_ms if request.HasField("timeout_ms") else limits.STOP_TIMEOUT_MS
    with call.locked(request.name) as ct:
        stop.stop(call.porto, ct, timeout_ms)


@method("pause")
def pause_container(call: Call, request: pb.TContainerPauseRequest) -> None:
    with call.locked(request.name) as ct:
        pause.pause(call.porto, ct)


@method("resume")
def resume_container(call: Call, request: pb.TContainerResumeRequest) -> None:
    with call.locked(request.name) as ct:
        pause.resume(call.porto, ct)


@method("Respawn")
def respawn_container(call: Call, request: pb.TContainerRespawnRequest) -> None:
    with call.locked(request.name) as ct:
        start.respawn(call.porto, ct, call.client)


@method("kill")
def kill_container(call: Call, request: pb.TContainerKillRequest) -> None:
    ct = call.client.find(request.name)
    call.client.check_control(ct)
    stop.kill(ct, request.sig)


# -- by specification --------------------------------------------------------------------------------------------------


@method("CreateFromSpec", spec=True)
def create_from_spec(call: Call, request: pb.TCreateFromSpecRequest) -> None:
    """All or nothing: until everything is done, the container is a weak one."""
    porto, client, spec = call.porto, call.client, request.container
    ct = start.create(porto, client.resolve_name(spec.name), client, weak=True)
    try:
        with porto.tree.locked(ct):
            registry.load(ct, spec, call.context)
        for asked in request.volumes:
            volume = pb.TVolumeSpec()
            volume.CopyFrom(asked)
            if not any(link.container == spec.name for link in volume.links):
                volume.links.add(container=spec.name)
            porto.statistics.add("volumes_created")
            try:
                porto.volumes.create(volume, client)
            except Fault:
                porto.statistics.add("volumes_failed")
                raise
        with porto.tree.locked(ct):
            if spec.weak:
                ct.assigned.add("weak")
                client.weak.append(ct)
            else:
                ct.weak = False
            if not request.start:
                save(porto, ct)
        if request.start:
            start.start(porto, ct, client)  # remembers it too
    except BaseException:
        if ct.state != states.DESTROYED:
            porto.destroy(ct)
        raise


@method("UpdateFromSpec", spec=True)
def update_from_spec(call: Call, request: pb.TUpdateFromSpecRequest) -> None:
    """What can be set is set, or everything taken back; the start is tried in any case, as portod does."""
    fault: Fault | None = None
    with call.locked(request.container.name) as ct:
        try:
            registry.load(ct, request.container, call.context, undo=True)
        except Fault as err:
            fault = err
        save(call.porto, ct)
    if request.start and not ct.running_or_meta:
        start.start(call.porto, ct, call.client)
    if fault is not None:
        raise fault


# -- looking -----------------------------------------------------------------------------------------------------------


@method("list", kind=Kind.READ)
def list_containers(call: Call, request: pb.TContainerListRequest) -> None:
    mask = request.mask if request.HasField("mask") else "***"
    found = call.response.list.name
    call.response.list.SetInParent()
    for name, ct in visible(call):
        if text.matches(name, mask) and not _unchanged(ct, request):
            found.append(name)


@method("ListContainersBy", kind=Kind.READ, spec=True)
def list_containers_by(call: Call, request: pb.TListContainersRequest) -> None:
    response, options, context = call.response.ListContainersBy, request.field_options, call.context
    response.SetInParent()
    windows = {}
    for stream in ("stdout", "stderr"):
        if options.HasField(f"{stream}_options"):
            window = getattr(options, f"{stream}_options")
            windows[stream] = f"{window.stdstream_offset}:{window.stdstream_limit}"
    wanted = list(options.properties)
    found: set[str] = set()
    for name, ct in visible(call, root=True):
        for chosen in request.filters:
            if not text.matches(name, chosen.name):
                continue
            if chosen.HasField("labels") and not _has_labels(ct, {e.key: e.val for e in chosen.labels.map}):
                continue
            found.add(chosen.name)
            entry = response.containers.add()
            entry.spec.name = name
            registry.dump(ct, wanted, windows, entry, context)
            break
    for chosen in request.filters:
        if chosen.name not in found:
            entry = response.containers.add()
            entry.spec.name = chosen.name
            entry.error.error = pb.ContainerDoesNotExist
            entry.error.msg = f"container {chosen.name} not found"


def _has_labels(ct: Container, wanted: Mapping[str, str]) -> bool:
    return all(ct.labels.get(name) == value for name, value in wanted.items())


def visible(call: Call, *, root: bool = False) -> list[tuple[str, Container]]:
    """The containers a client sees, by the names it knows them by; in the order of their full names."""
    found = []
    for ct in call.porto.tree.all():
        name = call.client.visible_name(ct.name)
        if name is not None and (root or not ct.is_root):
            found.append((name, ct))
    return found


def _unchanged(ct: Container, request: pb.TContainerListRequest | pb.TContainerGetRequest) -> bool:
    return request.HasField("changed_since") and int(ct.times.changed) < request.changed_since


@method("get", kind=Kind.READ)
def get(call: Call, request: pb.TContainerGetRequest) -> None:
    """Many properties of many containers."""
    masks = [name for name in request.name if text.is_mask(name)]
    wanted: list[tuple[str, Container | None]] = [(name, None) for name in request.name if not text.is_mask(name)]
    if masks:
        wanted += [each for each in visible(call) if any(text.matches(each[0], mask) for mask in masks)]
    context = call.context
    call.response.get.SetInParent()
    for name, ct in wanted:
        entry = call.response.get.list.add(name=name)
        missing: Fault | None = None
        try:
            ct = ct or call.client.find(name)
        except Fault as fault:
            missing = fault
        if ct is not None:
            entry.change_time = int(ct.times.changed)
            if _unchanged(ct, request):
                entry.no_changes = True
                continue
        for variable in request.variable:
            keyval = entry.keyval.add(variable=variable)
            try:
                if missing is not None:
                    raise missing
                assert ct is not None
                if request.real:
                    registry.check_real(ct, variable, context)
                keyval.value = registry.get(ct, variable, context)
            except Fault as fault:
                keyval.error = fault.code  # type: ignore[assignment]
                keyval.errorMsg = fault.message


@method("convertPath", kind=Kind.READ)
def convert_path(call: Call, request: pb.TConvertPathRequest) -> None:
    source = call.client.find(request.source or limits.SELF)
    destination = call.client.find(request.destination or limits.SELF)
    path = request.path
    if source is not destination:
        path = paths.inner(destination.root_path, paths.normal(paths.join(source.root_path, request.path)))
        if not path:
            raise invalid_value("Path is unreachable")
    call.response.convertPath.path = path


@method("SetSymlink")
def set_symlink(call: Call, request: pb.TSetSymlinkRequest) -> None:
    if not request.symlink:
        raise invalid_path("empty symlink path")
    with call.locked(request.container) as ct:
        make_symlink(ct, request.symlink, request.target)
        save(call.porto, ct)
