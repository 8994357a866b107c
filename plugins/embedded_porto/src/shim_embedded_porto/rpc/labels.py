"""Requests about labels."""

from __future__ import annotations

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits, names, text
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_state, invalid_value
from shim_embedded_porto.lifecycle.state import save_quietly
from shim_embedded_porto.properties.identity import get_label
from shim_embedded_porto.rpc.call import Call, Kind, method

_MOST, _LEAST = (1 << 63) - 1, -(1 << 63)


@method("FindLabel", kind=Kind.READ)
def find_label(call: Call, request: pb.TFindLabelRequest) -> None:
    call.response.FindLabel.SetInParent()
    namespace = call.client.namespace
    for ct in call.porto.tree.all():
        if not ct.name.startswith(namespace):
            continue
        name = ct.name[len(namespace) :]
        if request.HasField("state") and ct.state != request.state:
            continue
        if request.HasField("mask") and not text.matches(name, request.mask):
            continue
        for label, value in _matching(ct, request.label):
            if not request.HasField("value") or value == request.value:
                call.response.FindLabel.list.add(name=name, state=ct.state, label=label, value=value)


def _matching(ct: Container, label: str) -> list[tuple[str, str]]:
    if text.is_mask(label):
        return [(name, value) for name, value in sorted(ct.labels.items()) if text.matches(name, label)]
    try:
        return [(label, get_label(ct, label))]
    except Fault:
        return []


@method("SetLabel")
def set_label(call: Call, request: pb.TSetLabelRequest) -> None:
    """Set a label, on condition that it is, and the container is in, what the client thinks."""
    response = call.response.SetLabel
    names.check_label(request.label, request.value)
    with call.locked(request.name) as ct:
        with call.porto.tree.lock:
            current = ct.labels.get(request.label)
            if current is not None:
                response.prev_value = current
            response.state = ct.state
            _check_conditions(ct, current, request)
            if request.value and len(ct.labels) >= limits.LABEL_COUNT_MAX:
                raise Fault(pb.ResourceNotAvailable, "Too many labels")
            _assign(ct, request.label, request.value)
        call.porto.waiters.tell(ct, request.label, request.value)
        save_quietly(call.porto, ct)


def _check_conditions(ct: Container, current: str | None, request: pb.TSetLabelRequest) -> None:
    if request.HasField("prev_value"):
        if current is None:
            if request.prev_value:
                raise Fault(pb.LabelNotFound, f"Container {request.name} has no label {request.label}")
        elif current != request.prev_value:
            was = f"Container {request.name} label {request.label} is {current} not {request.prev_value}"
            raise Fault(pb.Busy, was)
    if request.HasField("state") and ct.state != request.state:
        raise invalid_state(f"Container {request.name} is {ct.state} not {request.state}")


def _assign(ct: Container, label: str, value: str) -> None:
    if value:
        ct.labels[label] = value
    else:
        ct.labels.pop(label, None)
    ct.assigned.add("labels")


@method("IncLabel")
def increment_label(call: Call, request: pb.TIncLabelRequest) -> None:
    """Add to a label that is a number; a label that isn't there counts as 0."""
    names.check_label(request.label, "")
    with call.locked(request.name) as ct:
        with call.porto.tree.lock:
            result = _increment(call, ct, request)
        call.porto.waiters.tell(ct, request.label, str(result))
        save_quietly(call.porto, ct)


def _increment(call: Call, ct: Container, request: pb.TIncLabelRequest) -> int:
    current = ct.labels.get(request.label)
    if current is None:
        if len(ct.labels) >= limits.LABEL_COUNT_MAX:
            raise Fault(pb.ResourceNotAvailable, "Too many labels")
        current = "0"
    value = text.parse_int(current)
    call.response.IncLabel.result = value
    result = value + request.add
    if not _LEAST <= result <= _MOST:
        raise invalid_value(f"Label {request.label} overflow {value} + {request.add}")
    call.response.IncLabel.result = result
    _assign(ct, request.label, str(result))
    return result
