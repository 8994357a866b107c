"""From a request to its answer."""

from __future__ import annotations

import logging
import time

from porto_api import rpc_pb2 as pb
from shim_embedded_porto.connection import Connection
from shim_embedded_porto.errors import Fault, permission, system
from shim_embedded_porto.porto import Porto
from shim_embedded_porto.rpc import containers, labels, layers, processes, properties, system_state, volumes, waiting
from shim_embedded_porto.rpc.call import METHODS, Call, Kind, Method

logger = logging.getLogger("shim.embedded_porto.rpc")

HANDLERS = (containers, labels, layers, processes, properties, system_state, volumes, waiting)
"""The modules that fill the table."""


def _method(request: pb.TContainerRequest) -> tuple[str, Method]:
    """:raises Fault: InvalidMethod: no request, more than one, or one of a newer protocol."""
    fields = request.ListFields()
    if len(fields) > 1:
        raise Fault(pb.InvalidMethod, f"Request has {len(fields)} known methods")
    name = fields[0][0].name if fields else ""
    found = METHODS.get(name)
    if found is None:
        raise Fault(pb.InvalidMethod, "invalid RPC method")
    return name, found


def kind(request: pb.TContainerRequest) -> Kind:
    """Which threads a request belongs to."""
    try:
        return _method(request)[1].kind
    except Fault:
        return Kind.READ


def handle(porto: Porto, connection: Connection, request: pb.TContainerRequest) -> pb.TContainerResponse | None:
    """Work on a request; None when a report is going to be the answer."""
    began, timestamp = time.monotonic(), int(time.time())
    call = Call(porto, connection, pb.TContainerResponse())
    name, fault, spec = "", None, False
    porto.statistics.begin(id(call), began)
    try:
        name, found = _method(request)
        spec = found.spec
        _check(call, found)
        found.handler(call, getattr(request, name))
    except Fault as err:
        fault = err
    except OSError as err:
        logger.exception("%s: a system call failed that wasn't expected to", name)
        fault = system(err, err.filename or name)
    except Exception as err:
        logger.exception("%s failed", name)
        fault = Fault(pb.Unknown, f"{type(err).__name__}: {err}")
    duration_s = time.monotonic() - began
    porto.statistics.end(id(call), duration_s, fault.code if fault is not None else 0, spec=spec)
    if fault is None and not call.answered:
        return None
    response = call.response
    if fault is not None:
        logger.log(
            logging.INFO if fault.code in (pb.Unknown, pb.Busy) else logging.DEBUG,
            "%s of %s (%d): %s",
            name,
            connection.client.comm,
            connection.client.pid,
            fault,
        )
        if not response.IsInitialized():
            response.Clear()
    response.error = fault.code if fault is not None else pb.Success  # type: ignore[assignment]
    response.errorMsg = fault.message if fault is not None else ""
    response.timestamp = timestamp
    return response


def _check(call: Call, found: Method) -> None:
    if found.kind == Kind.READ:
        return
    if not call.client.writes:
        raise permission("Write access denied")
    if call.porto.frozen and not call.client.superuser:
        raise Fault(pb.PortoFrozen, "Porto frozen, only root user might change anything")
