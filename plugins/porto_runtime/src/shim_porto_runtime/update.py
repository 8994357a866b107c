"""UpdateContainerResources, UpdatePodSandboxResources."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porto_api import PortoError, rpc_pb2
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import FailedPrecondition, Internal, NotFound, Unimplemented
from shim_porto_runtime import container, resources, spec, states
from shim_porto_runtime.names import check_id, no_such
from shim_porto_runtime.porto_errors import porto_errors, translate
from shim_porto_runtime.records import ContainerState, SandboxState

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

_FIELDS = (
    "memory_limit", "cpu_limit", "cpu_period", "cpu_weight", "cpu_set", "hugetlb_limit", "oom_score_adj",
    "thread_limit",
)  # fmt: skip


def container_resources(
    rt: Runtime, request: pb.UpdateContainerResourcesRequest, context: CallContext
) -> pb.UpdateContainerResourcesResponse:
    """UpdateContainerResources. CRI: all of it or nothing."""
    if request.HasField("windows"):
        raise Unimplemented("windows: Porto runs Linux containers only")
    resources.check(request.linux, "linux")
    record = states.refresh_container(rt, container.get(rt, request.container_id))
    if record.state not in (ContainerState.CREATED, ContainerState.RUNNING):
        raise FailedPrecondition(f"container {record.id[:13]} has exited: its resources can't be changed")
    with rt.locks.hold(record.sandbox_id, context):
        record = container.get(rt, record.id)
        _apply(rt, rt.names.container(record.sandbox_id, record.id), request.linux)
        in_force = resources.merged(record.limits, request.linux)
        rt.records.containers.update(record.id, resources=in_force.SerializeToString().hex())
    return pb.UpdateContainerResourcesResponse()


def sandbox_resources(
    rt: Runtime, request: pb.UpdatePodSandboxResourcesRequest, context: CallContext
) -> pb.UpdatePodSandboxResourcesResponse:
    """UpdatePodSandboxResources: the limits of the pod as a whole."""
    for name in ("overhead", "resources"):
        resources.check(getattr(request, name), name)
    record = rt.records.sandboxes.find(check_id(request.pod_sandbox_id, "pod_sandbox_id"))
    if record is None or record.state is SandboxState.CREATING:
        raise no_such("sandbox", request.pod_sandbox_id)
    if record.state is not SandboxState.READY:
        raise FailedPrecondition(f"sandbox {record.id[:13]} is not ready: its resources can't be changed")
    config = pb.PodSandboxConfig()
    config.linux.overhead.CopyFrom(request.overhead)
    config.linux.resources.CopyFrom(request.resources)
    with rt.locks.hold(record.id, context):
        _apply(rt, rt.names.sandbox(record.id), spec.pod_resources(config))
    return pb.UpdatePodSandboxResourcesResponse()


def _apply(rt: Runtime, name: str, wanted: pb.LinuxContainerResources) -> None:
    """Set limits; when Porto refuses one, those set before it are taken back."""
    update = rpc_pb2.TContainerSpec(name=name)
    resources.into_spec(wanted, update)
    changed = [field for field in _FIELDS if update.HasField(field)]
    if not changed:
        return
    with porto_errors("reading the resources in force"):
        found = rt.porto.list_containers_by([name], properties=changed)
    if not found:
        raise NotFound(f"{name}: Porto has no such container")
    try:
        rt.porto.update_from_spec(update)
    except PortoError as err:
        before = rpc_pb2.TContainerSpec(name=name)
        for field in changed:
            value = getattr(found[0].spec, field)
            if field == "cpu_set":
                before.cpu_set.CopyFrom(value)
            else:
                setattr(before, field, value)
        try:
            rt.porto.update_from_spec(before)
        except PortoError as failure:
            raise Internal(f"{name}: {err}; what was set before that could not be taken back: {failure}") from err
        raise translate(err, "changing the resources") from err
