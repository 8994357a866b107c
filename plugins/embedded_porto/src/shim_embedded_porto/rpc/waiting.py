"""Requests that wait for containers."""

from __future__ import annotations

from collections.abc import Iterator

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import text
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_value
from shim_embedded_porto.rpc.call import Call, Kind, method
from shim_embedded_porto.waiters import Waiter, report_of, timeout_report


@method("wait", kind=Kind.READ)
def wait(call: Call, request: pb.TContainerWaitRequest) -> None:
    """Wait until one of the containers is stopped, dead, or has nothing left to do."""
    if not request.name:
        raise invalid_value("Containers to wait are not set")
    waiter, given = _waiter(call, request, asynchronous=False)
    for full in waiter.names:
        ct = call.porto.tree.get(full)
        if ct is None:
            call.response.wait.name = given[full]
            call.porto.tree.find(full)
        elif waiter.wants(ct):
            break  # it is told at once: nobody looks at the others
    call.connection.await_report()
    call.answered = False
    _begin(call, request, waiter, given)


@method("AsyncWait", kind=Kind.READ)
def async_wait(call: Call, request: pb.TContainerWaitRequest) -> None:
    """Report every change of the containers from now on, the present state first."""
    waiter, given = _waiter(call, request, asynchronous=True)
    _begin(call, request, waiter, given)


@method("StopAsyncWait", kind=Kind.READ)
def stop_async_wait(call: Call, request: pb.TContainerWaitRequest) -> None:
    waiter, _ = _waiter(call, request, asynchronous=True)
    call.porto.waiters.cancel(waiter, call.connection)


def _waiter(call: Call, request: pb.TContainerWaitRequest, *, asynchronous: bool) -> tuple[Waiter, dict[str, str]]:
    """What is waited for, and the names the client uses by full name."""
    waiter = Waiter(asynchronous, request.target_state, labels=list(request.label))
    given: dict[str, str] = {}
    for name in request.name:
        if name == "***":
            waiter.masks.append(name)
            continue
        try:
            full = call.client.resolve_name(name)
        except Fault:
            call.response.wait.name = name
            raise
        if text.is_mask(name):
            waiter.masks.append(full)
        else:
            waiter.names.append(full)
            given.setdefault(full, name)
    return waiter, given


def _begin(call: Call, request: pb.TContainerWaitRequest, waiter: Waiter, given: dict[str, str]) -> None:
    waiters, connection = call.porto.waiters, call.connection
    at_once = request.HasField("timeout_ms") and request.timeout_ms == 0
    if not at_once:
        # Before looking what there is: nothing that happens meanwhile is missed.
        waiters.activate(waiter, connection)
    for name, ct in _present(call, waiter, given):
        for label, value in _labels(ct, waiter):
            connection.report(report_of(name, ct, label, value), asynchronous=waiter.asynchronous)
            if not waiter.asynchronous:
                waiters.drop(waiter)
                return
    if at_once:
        connection.report(timeout_report(), asynchronous=waiter.asynchronous)
    elif request.timeout_ms:
        call.porto.timers.later(request.timeout_ms / 1000, lambda: waiters.expire(waiter))


def _present(call: Call, waiter: Waiter, given: dict[str, str]) -> Iterator[tuple[str, Container]]:
    """The containers to be told of at once: those named first, then those that match a mask."""
    for full in waiter.names:
        ct = call.porto.tree.get(full)
        if ct is not None and waiter.wants(ct):
            yield given[full], ct
    if waiter.masks:
        for ct in call.porto.tree.all():
            name = call.client.visible_name(ct.name)
            if name is not None and ct.name not in waiter.names and waiter.wants(ct):
                yield name, ct


def _labels(ct: Container, waiter: Waiter) -> list[tuple[str, str]]:
    if not waiter.labels:
        return [("", "")]
    return [(name, value) for name, value in sorted(ct.labels.items()) if waiter.wants_label(name)]
