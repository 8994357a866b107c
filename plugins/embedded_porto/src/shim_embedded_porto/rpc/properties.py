"""Requests about single properties."""

from __future__ import annotations

from porto_api import rpc_pb2 as pb
from shim_embedded_porto.lifecycle.state import save
from shim_embedded_porto.properties import registry
from shim_embedded_porto.rpc.call import Call, Kind, method

_OLD_NAMES = {
    "cpu.smart": ("cpu_policy", {"0": "normal", None: "rt"}),
    "memory.limit_in_bytes": ("memory_limit", {}),
    "memory.low_limit_in_bytes": ("memory_guarantee", {}),
    "memory.recharge_on_pgfault": ("recharge_on_pgfault", {"0": "false", None: "true"}),
}
"""Deprecated names, and what became of their values; None: any other value."""


@method("getProperty", kind=Kind.READ)
def get_property(call: Call, request: pb.TContainerGetPropertyRequest) -> None:
    call.response.getProperty.value = _get(call, request.name, request.property, real=request.real)


@method("getData", kind=Kind.READ)
def get_data(call: Call, request: pb.TContainerGetDataRequest) -> None:
    call.response.getData.value = _get(call, request.name, request.data, real=request.real)


def _get(call: Call, name: str, prop: str, *, real: bool) -> str:
    ct, context = call.client.find(name), call.context
    if real:
        registry.check_real(ct, prop, context)
    return registry.get(ct, prop, context)


@method("setProperty")
def set_property(call: Call, request: pb.TContainerSetPropertyRequest) -> None:
    name, value = request.property, request.value
    if name in _OLD_NAMES:
        name, values = _OLD_NAMES[name]
        value = values.get(value, values.get(None, value))
    with call.locked(request.name) as ct:
        try:
            registry.set_value(ct, name, value, call.context)
        finally:
            save(call.porto, ct)


@method("propertyList", kind=Kind.READ)
def list_properties(call: Call, _request: pb.TContainerPropertyListRequest) -> None:
    for prop in registry.PROPERTIES.values():
        if prop.is_supported(call.context) and not prop.hidden:
            call.response.propertyList.list.add(
                name=prop.name, desc=prop.description, read_only=prop.read_only, dynamic=prop.dynamic
            )


@method("dataList", kind=Kind.READ)
def list_data(call: Call, _request: pb.TContainerDataListRequest) -> None:
    for prop in registry.PROPERTIES.values():
        if prop.read_only and prop.is_supported(call.context) and not prop.hidden:
            call.response.dataList.list.add(name=prop.name, desc=prop.description)
