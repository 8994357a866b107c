"""Requests about Porto itself."""

from __future__ import annotations

import logging

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits
from shim_embedded_porto.errors import permission
from shim_embedded_porto.rpc.call import Call, Kind, method


@method("version", kind=Kind.READ)
def version(call: Call, _request: pb.TVersionRequest) -> None:
    call.response.version.tag = limits.VERSION
    call.response.version.revision = limits.REVISION


@method("GetSystem", kind=Kind.READ)
def get_system(call: Call, _request: pb.TGetSystemRequest) -> None:
    call.porto.statistics.describe(call.porto, call.response.GetSystem)


@method("SetSystem")
def set_system(call: Call, request: pb.TSetSystemRequest) -> None:
    """Switch logging, and freeze Porto for all but root."""
    if not call.client.superuser:
        raise permission("Only for super-user")
    log = logging.getLogger("shim")
    if request.HasField("verbose"):
        log.setLevel(logging.INFO if request.verbose else logging.WARNING)
    if request.HasField("debug"):
        log.setLevel(logging.DEBUG if request.debug else logging.INFO)
    if request.HasField("frozen"):
        call.porto.frozen = request.frozen
    call.response.SetSystem.SetInParent()


@method("ClearStatistics")
def clear_statistics(call: Call, request: pb.TClearStatisticsRequest) -> None:
    call.porto.statistics.clear(request.stat)
