"""ListPodSandbox, PodSandboxStatus."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_porto_runtime import states
from shim_porto_runtime.names import check_id, no_such
from shim_porto_runtime.records import SandboxRecord, SandboxState, remembered

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

_STATES = {SandboxState.READY: pb.SANDBOX_READY, SandboxState.NOTREADY: pb.SANDBOX_NOTREADY}


def list_sandboxes(rt: Runtime, request: pb.ListPodSandboxRequest, context: CallContext) -> pb.ListPodSandboxResponse:
    """ListPodSandbox, the newest first."""
    return pb.ListPodSandboxResponse(items=items(rt, request.filter))


def items(rt: Runtime, wanted: pb.PodSandboxFilter) -> Iterator[pb.PodSandbox]:
    """The sandboxes that match a filter, up to date."""
    states.refresh_sandboxes(rt)
    return (_item(record) for record in matching(rt, wanted))


def matching(rt: Runtime, wanted: pb.PodSandboxFilter) -> Iterator[SandboxRecord]:
    """The sandboxes that match all parts of a filter (CRI, PodSandboxFilter)."""
    wanted_id, selector = wanted.id, dict(wanted.label_selector)
    state = wanted.state.state if wanted.HasField("state") else None
    for record in reversed(rt.records.sandboxes.all()):
        if record.state is SandboxState.CREATING:
            continue
        if wanted_id and not record.id.startswith(wanted_id):
            continue
        if state is not None and state != _STATES[record.state]:
            continue
        if not selector or labels_match(selector, record.config.labels):
            yield record


def labels_match(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())


def sandbox_status(
    rt: Runtime, request: pb.PodSandboxStatusRequest, context: CallContext
) -> pb.PodSandboxStatusResponse:
    """PodSandboxStatus."""
    record = rt.records.sandboxes.find(check_id(request.pod_sandbox_id, "pod_sandbox_id"))
    if record is None or record.state is SandboxState.CREATING:
        raise no_such("sandbox", request.pod_sandbox_id)
    record = states.refresh_sandbox(rt, record)
    response = pb.PodSandboxStatusResponse(status=status_of(record))
    if request.verbose:
        response.info["info"] = json.dumps(_info(rt, record))
    return response


def status_of(record: SandboxRecord) -> pb.PodSandboxStatus:
    """The status of a sandbox, from its record alone."""
    config = record.config
    status = pb.PodSandboxStatus(
        id=record.id,
        metadata=config.metadata,
        state=_STATES[record.state],
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=record.runtime_handler,
    )
    status.linux.namespaces.options.CopyFrom(config.linux.security_context.namespace_options)
    addresses = (record.network or {}).get("addresses", [])
    # CRI: no address on the host's network, nor for a sandbox that isn't ready.
    if addresses and record.state is SandboxState.READY:
        status.network.ip = addresses[0]
        status.network.additional_ips.extend(pb.PodIP(ip=address) for address in addresses[1:])
    else:
        status.network.SetInParent()
    return status


@remembered  # kubelet asks each second, and little has changed
def _item(record: SandboxRecord) -> pb.PodSandbox:
    config = record.config
    return pb.PodSandbox(
        id=record.id,
        metadata=config.metadata,
        state=_STATES[record.state],
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=record.runtime_handler,
    )


def _info(rt: Runtime, record: SandboxRecord) -> dict[str, Any]:
    network = dict(record.network or {})
    # Beside the others, as containerd has it: ``crictl inspectp`` users look for ``info.cniResult``.
    shown = network.pop("info", {})
    return {
        **shown,
        "sandboxID": record.id,
        "portoName": rt.names.sandbox(record.id),
        "reason": record.reason,
        "network": network or None,
    }
