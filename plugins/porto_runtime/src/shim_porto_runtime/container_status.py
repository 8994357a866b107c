"""ListContainers, ContainerStatus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_porto_runtime import container, signals, states
from shim_porto_runtime.records import ContainerRecord, ContainerState, remembered
from shim_porto_runtime.sandbox_status import labels_match

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

_STATES = {
    ContainerState.CREATED: pb.CONTAINER_CREATED,
    ContainerState.RUNNING: pb.CONTAINER_RUNNING,
    ContainerState.EXITED: pb.CONTAINER_EXITED,
}


def list_containers(rt: Runtime, request: pb.ListContainersRequest, context: CallContext) -> pb.ListContainersResponse:
    """ListContainers, the newest first."""
    return pb.ListContainersResponse(containers=items(rt, request.filter))


def items(rt: Runtime, wanted: pb.ContainerFilter) -> Iterator[pb.Container]:
    """The containers that match a filter, up to date."""
    states.refresh(rt)
    return (_item(record) for record in matching(rt, wanted))


def matching(rt: Runtime, wanted: pb.ContainerFilter) -> Iterator[ContainerRecord]:
    """The containers that match all parts of a filter (CRI, ContainerFilter)."""
    wanted_id, sandbox_id, selector = wanted.id, wanted.pod_sandbox_id, dict(wanted.label_selector)
    state = wanted.state.state if wanted.HasField("state") else None
    for record in reversed(rt.records.containers.all()):
        if record.state is ContainerState.CREATING:
            continue
        if wanted_id and not record.id.startswith(wanted_id):
            continue
        if sandbox_id and not record.sandbox_id.startswith(sandbox_id):
            continue
        if state is not None and state != _STATES[record.state]:
            continue
        if not selector or labels_match(selector, record.config.labels):
            yield record


def container_status(
    rt: Runtime, request: pb.ContainerStatusRequest, context: CallContext
) -> pb.ContainerStatusResponse:
    """ContainerStatus."""
    record = states.refresh_container(rt, container.get(rt, request.container_id))
    response = pb.ContainerStatusResponse(status=status_of(record))
    if request.verbose:
        response.info["info"] = json.dumps(_info(rt, record))
    return response


def status_of(record: ContainerRecord) -> pb.ContainerStatus:
    """The status of a container, from its record alone."""
    config = record.config
    status = pb.ContainerStatus(
        id=record.id,
        metadata=config.metadata,
        state=_STATES[record.state],
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        exit_code=record.exit_code,
        image=config.image,
        image_ref=record.image_ref,
        image_id=record.image_id,
        reason=record.reason,
        message=record.message,
        labels=config.labels,
        annotations=config.annotations,
        mounts=config.mounts,
        log_path=record.log_path,
        # Some signals have two names.
        stop_signal=config.stop_signal or signals.cri(record.stop_signal),
    )
    if record.process:
        status.user.linux.uid = record.process["uid"]
        status.user.linux.gid = record.process["gid"]
        status.user.linux.supplemental_groups.extend(record.process["groups"])
    for mount in status.mounts:
        if mount.HasField("image"):
            mount.image.image_ref = record.mount_images.get(mount.image.image, "")
    status.resources.linux.CopyFrom(record.limits)
    return status


@remembered  # kubelet asks each second, and little has changed
def _item(record: ContainerRecord) -> pb.Container:
    config = record.config
    return pb.Container(
        id=record.id,
        pod_sandbox_id=record.sandbox_id,
        metadata=config.metadata,
        image=config.image,
        image_ref=record.image_id,
        image_id=record.image_id,
        state=_STATES[record.state],
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
    )


def _info(rt: Runtime, record: ContainerRecord) -> dict[str, Any]:
    return {
        "sandboxID": record.sandbox_id,
        "portoName": rt.names.container(record.sandbox_id, record.id),
        "process": record.process,
    }
