"""UpdateContainerResources, UpdatePodSandboxResources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from porto_api import PortoError, rpc_pb2
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import FailedPrecondition, Internal, NotFound, Unimplemented
from shim_porto_runtime import container, resources, states
from shim_porto_runtime.names import check_id, no_such
from shim_porto_runtime.porto_errors import porto_errors, translate
from shim_porto_runtime.records import ContainerState, SandboxState

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

_FIELDS = (
    "memory_limit", "cpu_limit", "cpu_period", "cpu_guarantee", "cpu_set", "hugetlb_limit", "oom_score_adj",
    "oom_is_fatal", "thread_limit",
)  # fmt: skip


def container_resources(
    rt: Runtime, request: pb.UpdateContainerResourcesRequest, context: CallContext
) -> pb.UpdateContainerResourcesResponse:
    """UpdateContainerResources. CRI: all of it or nothing."""
    if request.HasField("windows"):
        raise Unimplemented("windows: Porto runs Linux containers only")
    record = states.refresh_container(rt, container.get(rt, request.container_id))
    with rt.locks.hold(record.sandbox_id, context):
        record = container.get(rt, record.id)
        if record.state not in (ContainerState.CREATED, ContainerState.RUNNING):
            raise FailedPrecondition(f"container {record.id[:13]} has exited: its resources can't be changed")
        resources.check(request.linux, "linux", record.limits)
        in_force = resources.merged(record.limits, request.linux)
        changed = resources.changes(record.limits, in_force)
        if changed.oom_score_adj and record.state is ContainerState.RUNNING:
            raise FailedPrecondition("linux.oom_score_adj: Porto can't change it while the container runs")
        _apply(rt, rt.names.container(record.sandbox_id, record.id), changed)
        rt.records.containers.update(record.id, resources=in_force.SerializeToString().hex())
    return pb.UpdateContainerResourcesResponse()


def sandbox_resources(
    rt: Runtime, request: pb.UpdatePodSandboxResourcesRequest, context: CallContext
) -> pb.UpdatePodSandboxResourcesResponse:
    """UpdatePodSandboxResources: the limits of the pod as a whole."""
    record = rt.records.sandboxes.find(check_id(request.pod_sandbox_id, "pod_sandbox_id"))
    if record is None or record.state is SandboxState.CREATING:
        raise no_such("sandbox", request.pod_sandbox_id)
    with rt.locks.hold(record.id, context):
        record = rt.records.sandboxes.get(record.id)
        if record is None or record.state is not SandboxState.READY:
            raise FailedPrecondition(f"sandbox {request.pod_sandbox_id[:13]} is not ready: its resources can't change")
        resources.check(request.overhead, "overhead", record.overhead)
        resources.check(request.resources, "resources", record.limits)
        overhead = resources.merged(record.overhead, request.overhead)
        limits = resources.merged(record.limits, request.resources)
        before = resources.of_pod(record.limits, record.overhead)
        _apply(rt, rt.names.sandbox(record.id), resources.changes(before, resources.of_pod(limits, overhead)))
        rt.records.sandboxes.update(
            record.id,
            resources=limits.SerializeToString().hex(),
            overhead_in_force=overhead.SerializeToString().hex(),
        )
    return pb.UpdatePodSandboxResourcesResponse()


def _apply(rt: Runtime, name: str, wanted: pb.LinuxContainerResources) -> None:
    """Set limits; when Porto refuses one, those set before it are taken back."""
    update = rpc_pb2.TContainerSpec(name=name)
    resources.into_spec(wanted, update, hugetlb=rt.abilities.has("hugetlb_limit"))
    changed = [field for field in _FIELDS if update.HasField(field)]
    if not changed:
        return
    before = _read(rt, name, changed)
    try:
        rt.porto.update_from_spec(update)
    except PortoError as err:
        _take_back(rt, name, changed, before, err)
        raise translate(err, "changing the resources") from err


def _read(rt: Runtime, name: str, fields: Sequence[str]) -> rpc_pb2.TContainerSpec:
    with porto_errors("reading the resources in force"):
        found = rt.porto.list_containers_by([name], properties=fields)
    if not found:
        raise NotFound(f"{name}: Porto has no such container")
    return found[0].spec


def _take_back(
    rt: Runtime, name: str, fields: Sequence[str], before: rpc_pb2.TContainerSpec, cause: PortoError
) -> None:
    now = _read(rt, name, fields)
    back = rpc_pb2.TContainerSpec(name=name)
    for field in fields:
        value = getattr(before, field)
        if value == getattr(now, field):
            continue  # not reached, or refused
        if field == "cpu_set":
            back.cpu_set.CopyFrom(value)
        else:
            setattr(back, field, value)
    try:
        rt.porto.update_from_spec(back)
    except PortoError as failure:
        raise Internal(f"{name}: {cause}; what was set before that could not be taken back: {failure}") from cause
