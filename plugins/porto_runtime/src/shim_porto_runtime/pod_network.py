"""The network of a pod as Porto is told of it: whose it is, its addresses where Porto makes it, and Porto's limits.

Limits come from the annotations ``portoshim.net/net-tx`` and ``portoshim.net/net-rx``, in bytes a second. A pod on the
node's network has none: they would be the node's.
"""

from __future__ import annotations

from collections.abc import Mapping

from porto_api import rpc_pb2
from shim_core.errors import InvalidArgument
from shim_core.types import NetworkAttachment
from shim_porto_runtime import namespaces

NET_TX = "portoshim.net/net-tx"
NET_RX = "portoshim.net/net-rx"
_PROPERTIES = {NET_TX: "net_limit", NET_RX: "net_rx_limit"}
_ALL_INTERFACES = "default"
_MAX_BYTES_PER_S = 2**63 - 1
_MAX_DIGITS = 20


def option(attachment: NetworkAttachment | None) -> tuple[str, ...]:
    """The ``net`` property of a sandbox, as an option and its arguments.

    :param attachment: what a network plugin made; None: the pod is on the node's network.
    """
    if attachment is None:
        return ("inherited",)
    if attachment.netns_path:
        return ("netns", namespaces.netns_name(attachment.netns_path))
    return ("L3", _interface(attachment))


def into_spec(attachment: NetworkAttachment, annotations: Mapping[str, str], spec: rpc_pb2.TContainerSpec) -> None:
    """Set what belongs to a pod's own network, beside ``net``.

    :raises InvalidArgument: an annotation is no limit.
    """
    if not attachment.netns_path:
        for address in attachment.addresses:
            spec.ip.cfg.add(dev=_interface(attachment), ip=address)
    for name, limit in limits(annotations).items():
        getattr(spec, name).map.add(key=_ALL_INTERFACES, val=limit)


def limits(annotations: Mapping[str, str]) -> dict[str, int]:
    """Porto's properties that annotations of a pod ask for, in bytes a second.

    :raises InvalidArgument: one is no number of bytes.
    """
    found = {}
    for annotation, name in _PROPERTIES.items():
        text = annotations.get(annotation)
        if text is None:
            continue
        fits = text.isascii() and text.isdecimal() and len(text) < _MAX_DIGITS
        if not fits or not 0 < int(text) <= _MAX_BYTES_PER_S:
            raise InvalidArgument(f"annotation {annotation}: {text[:64]!r} is not a number of bytes a second")
        found[name] = int(text)
    return found


def _interface(attachment: NetworkAttachment) -> str:
    return attachment.interfaces[0].name if attachment.interfaces else "eth0"
