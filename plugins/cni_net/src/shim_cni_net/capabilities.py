"""What a pod asks of its network, as CNI says it: CNI_ARGS, and the arguments of capabilities (CNI conventions).

Pod annotations read here, beside Kubernetes' own ``kubernetes.io/ingress-bandwidth`` and ``egress-bandwidth``:
``portoshim.net/mac`` and ``portoshim.net/aliases`` (separated by commas). None has an effect unless a plugin of the
configuration declares the capability.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from typing import Any

from shim_core.errors import InvalidArgument
from shim_core.types import NetworkSandbox

INGRESS = "kubernetes.io/ingress-bandwidth"
EGRESS = "kubernetes.io/egress-bandwidth"
MAC = "portoshim.net/mac"
ALIASES = "portoshim.net/aliases"

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")
_ARGUMENT = re.compile(r"[A-Za-z0-9_.:\-]{0,253}")
_MAC_ADDRESS = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_ALIAS = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.\-]{0,251}[A-Za-z0-9])?")
_MAX_ALIASES = 64
_PROTOCOLS = ("tcp", "udp", "sctp")

_QUANTITY = re.compile(
    r"([+-]?(?:\d{1,32}\.?\d{0,32}|\.\d{1,32}))(?:[eE]([+-]?\d{1,3})|([numkMGTPE]|[KMGTPE]i)?)", re.ASCII
)
_SUFFIXES = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1),
    "k": Decimal("1e3"), "M": Decimal("1e6"), "G": Decimal("1e9"),
    "T": Decimal("1e12"), "P": Decimal("1e15"), "E": Decimal("1e18"),
    "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30),
    "Ti": Decimal(2**40), "Pi": Decimal(2**50), "Ei": Decimal(2**60),
}  # fmt: skip
_MIN_RATE = 1000
_MAX_RATE = 10**15
_BURST_BITS = 2**32 - 1
"""As containerd: Kubernetes' annotations say nothing of bursts, and the bandwidth plugin wants one."""


def check_id(sandbox_id: str) -> str:
    """A sandbox id as CNI wants a container id; it becomes part of file names.

    :raises InvalidArgument: it is none.
    """
    if not _ID.fullmatch(sandbox_id):
        raise InvalidArgument(f"sandbox id {sandbox_id[:64]!r}: must be letters, digits, '.', '_' or '-', at most 128")
    return sandbox_id


def cni_args(sandbox: NetworkSandbox) -> str:
    """CNI_ARGS: the five keys that Kubernetes' runtimes pass, and never one more, whatever the pod is called.

    :raises InvalidArgument: a name holds a sign that could end its value.
    """
    pairs = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": sandbox.namespace,
        "K8S_POD_NAME": sandbox.name,
        "K8S_POD_INFRA_CONTAINER_ID": sandbox.sandbox_id,
        "K8S_POD_UID": sandbox.uid,
    }
    for key, field in (("K8S_POD_NAMESPACE", "namespace"), ("K8S_POD_NAME", "name"), ("K8S_POD_UID", "uid")):
        if not _ARGUMENT.fullmatch(pairs[key]):
            raise InvalidArgument(
                f"metadata.{field}: {pairs[key][:64]!r} can't be told to CNI plugins: "
                "only letters, digits, '.', '_', ':' and '-' can, at most 253"
            )
    return ";".join(f"{key}={value}" for key, value in pairs.items())


def capability_args(sandbox: NetworkSandbox, pod_cidrs: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments by capability. A plugin gets those it declares.

    :param pod_cidrs: what kubelet has told of the node's pod CIDR.
    :raises InvalidArgument: an annotation or a port can't be honoured; the message names it.
    """
    arguments: dict[str, Any] = {}
    if ports := _port_mappings(sandbox):
        arguments["portMappings"] = ports
    if bandwidth := _bandwidth(sandbox.annotations):
        arguments["bandwidth"] = bandwidth
    if pod_cidrs:
        # One address of each range: the outer list is what a pod gets, the inner one where it may come from.
        arguments["ipRanges"] = [[{"subnet": cidr}] for cidr in pod_cidrs]
    dns = {
        "servers": list(sandbox.dns.servers),
        "searches": list(sandbox.dns.searches),
        "options": list(sandbox.dns.options),
    }
    if any(dns.values()):
        arguments["dns"] = dns
    if mac := sandbox.annotations.get(MAC):
        if not _MAC_ADDRESS.fullmatch(mac) or int(mac[:2], 16) & 1:
            raise InvalidArgument(f"annotation {MAC}: {mac[:64]!r} is not the MAC address of an interface")
        arguments["mac"] = mac.lower()
    if aliases := _aliases(sandbox.annotations.get(ALIASES, "")):
        arguments["aliases"] = aliases
    if sandbox.cgroup_parent:
        arguments["cgroupPath"] = sandbox.cgroup_parent
    arguments["io.kubernetes.cri.pod-annotations"] = dict(sandbox.annotations)
    return arguments


def parse_bits_per_second(text: str, annotation: str) -> int:
    """A Kubernetes quantity such as ``10M`` or ``1.5Gi``, rounded up.

    :raises InvalidArgument: it is none, or no rate between 1k and 1P.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise InvalidArgument(f"annotation {annotation}: {text[:64]!r} is not a quantity such as 10M or 1.5Gi")
    number, exponent, suffix = match.groups()
    scale = Decimal(10) ** int(exponent) if exponent else _SUFFIXES[suffix or ""]
    rate = int((Decimal(number) * scale).to_integral_value(ROUND_CEILING))
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise InvalidArgument(f"annotation {annotation}: {text[:64]!r} is not between 1k and 1P bits per second")
    return rate


def _bandwidth(annotations: Mapping[str, str]) -> dict[str, int]:
    limits: dict[str, int] = {}
    for key, annotation in (("ingress", INGRESS), ("egress", EGRESS)):
        if annotation in annotations:
            limits[f"{key}Rate"] = parse_bits_per_second(annotations[annotation], annotation)
            limits[f"{key}Burst"] = _BURST_BITS
    return limits


def _port_mappings(sandbox: NetworkSandbox) -> list[dict[str, Any]]:
    mappings = []
    for index, mapping in enumerate(sandbox.port_mappings):
        if mapping.host_port == 0:  # CRI: no host port
            continue
        where = f"port_mappings[{index}]"
        for field, port in (("host_port", mapping.host_port), ("container_port", mapping.container_port)):
            if not 0 < port < 65536:
                raise InvalidArgument(f"{where}.{field}: {port} is not a port")
        if mapping.protocol not in _PROTOCOLS:
            raise InvalidArgument(f"{where}.protocol: {mapping.protocol[:16]!r} is not one of {', '.join(_PROTOCOLS)}")
        entry: dict[str, Any] = {
            "hostPort": mapping.host_port,
            "containerPort": mapping.container_port,
            "protocol": mapping.protocol,
        }
        if mapping.host_ip:
            entry["hostIP"] = mapping.host_ip
        mappings.append(entry)
    return mappings


def _aliases(text: str) -> list[str]:
    aliases = [alias for item in text.split(",") if (alias := item.strip())]
    if len(aliases) > _MAX_ALIASES:
        raise InvalidArgument(f"annotation {ALIASES}: more than {_MAX_ALIASES} names")
    for alias in aliases:
        if not _ALIAS.fullmatch(alias):
            raise InvalidArgument(f"annotation {ALIASES}: {alias[:64]!r} is not a name")
    return aliases
