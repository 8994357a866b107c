"""Properties of a container's network."""

from __future__ import annotations

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import text
from shim_embedded_porto.cgroups.usage import interface_counters
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_value
from shim_embedded_porto.plans import netns_path
from shim_embedded_porto.properties.base import Computed, Context, Property, UintMap, Value, size
from shim_embedded_porto.settings import networks

_RX = {"bytes": 0, "packets": 1, "drops": 3, "overlimits": 4}
_TX = {"bytes": 8, "packets": 9, "drops": 11, "overlimits": 12}
"""Columns of /proc/net/dev."""


class Net(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return networks.format_lines(ct.net)

    def _assign(self, ct: Container, lines: networks.Lines, ctx: Context) -> None:
        net = networks.parse(lines)
        if net.netns:
            netns_path(net.netns, ctx.client.pid)
        if net.needs_class:
            ctx.porto.enable_controllers(ct, ("net_cls",))
        self._apply(ct, lines, net)

    def _apply(self, ct: Container, lines: networks.Lines, net: networks.Network) -> None:
        ct.net = lines
        ct.net_isolate = net.isolate or bool(net.netns)
        ct.net_inherit = net.inherit
        ct.assigned.add(self.name)
        ct.sanitize_capabilities()

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self._assign(ct, networks.split(value), ctx)

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        lines = networks.split(value)
        self._apply(ct, lines, networks.parse(lines))

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self._assign(ct, tuple((entry.opt, *entry.arg) for entry in spec.net.cfg), ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        for line in ct.net:
            out.spec.net.cfg.add(opt=line[0]).arg.extend(line[1:])
        out.spec.net.inherited = ct.net_inherit

    def start(self, ct: Container, ctx: Context) -> None:
        if ct.os_mode and self.name not in ct.assigned:
            ct.net, ct.net_isolate, ct.net_inherit = (("none",),), True, False


class Pairs(Value):
    """``ip`` and ``default_gw``: an interface and an address each."""

    def __init__(self, name: str, description: str, what: str) -> None:
        super().__init__(
            name,
            description,
            parse=lambda value: networks.parse_pairs(networks.split(value), what),
            show=networks.format_lines,
        )
        self._what = what

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        lines = tuple((entry.dev, entry.ip) for entry in getattr(spec, self.field).cfg)
        self.assign(ct, networks.parse_pairs(lines, self._what))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        message = getattr(out.spec, self.field)
        message.SetInParent()
        for dev, address in getattr(ct, self.attribute):
            message.cfg.add(dev=dev, ip=address)


class IpLimit(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return text.merge_nested(ct.ip_limit, ";", " ")

    def _assign(self, ct: Container, lines: networks.Lines) -> None:
        ct.ip_policy = networks.parse_limit(lines)
        ct.ip_limit = lines
        ct.assigned.add(self.name)
        ct.sanitize_capabilities()

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self._assign(ct, tuple(tuple(line) for line in text.split_nested(value, ";", " ")))

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self._assign(ct, tuple((ip,) for ip in spec.ip_limit.ip) or ((spec.ip_limit.policy,),))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.ip_limit.policy = ct.ip_policy
        if ct.ip_policy == "some":
            out.spec.ip_limit.ip.extend(line[0] for line in ct.ip_limit)


class NetLimit(UintMap):
    """Stored and shown: no traffic classes are made."""

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        try:
            super().set_indexed(ct, index, value, ctx)
        except Fault:
            raise invalid_value(f"Invalid value {value}") from None

    def start(self, ct: Container, ctx: Context) -> None:
        if self.name == "net_rx_limit" and not ct.net_isolate and ct.net_rx_limit:
            raise invalid_value("Net rx limit requires isolated network")


def _parse_tos(value: str) -> int:
    if len(value) != 3 or not value.startswith("CS") or value[2] not in "01234567":
        raise invalid_value(f"Invalud ToS: {value}")
    return int(value[2])


# -- counters ----------------------------------------------------------------------------------------------------------


def _owns_network(ct: Container) -> bool:
    """True when the container is in another network namespace than Porto."""
    return any(not other.net_inherit for other in ct.lineage())


def _holder_pid(ct: Container) -> int:
    holder = ct.namespace_holder()
    return holder.task.pid if holder is not None else 0


def _devices(ct: Container, column: int) -> dict[str, int]:
    if ct.is_root or _owns_network(ct):
        pid = _holder_pid(ct)
        if not pid and not ct.is_root:
            return {}
        try:
            counters = interface_counters(pid or 1, lambda name: name != "lo")
        except OSError:
            return {}
        values = {name: columns[column] for name, columns in counters.items()}
        return {**values, "group default": sum(values.values())} if values else {}
    return {}


def _counter(name: str, description: str, column: int, *, sockets: bool) -> Computed:
    """Bytes, packets and so on, by interface. In Porto's own network there are none of the container's alone."""

    def compute(ct: Container, _ctx: Context) -> dict[str, int]:
        if not ct.is_root and not _owns_network(ct):
            return {"Latency": 0, "Uplink": 0} if sockets else {}
        return _devices(ct, column)

    def part(ct: Container, index: str, ctx: Context) -> str:
        values = compute(ct, ctx)
        if index not in values:
            raise invalid_value(f"network device {index} not found")
        return str(values[index])

    return Computed(name, description, compute, show=text.format_map, indexed=part, runtime_only=True)


def _protocol_counter(name: str, file: str, label: str) -> Computed:
    def compute(ct: Container, _ctx: Context) -> dict[str, int]:
        pid = _holder_pid(ct)
        if not pid or not _owns_network(ct):
            return {}
        try:
            with open(f"/proc/{pid}/net/{file}") as source:
                return _parse_protocol(source.read())
        except OSError:
            return {}

    def part(ct: Container, index: str, ctx: Context) -> str:
        values = compute(ct, ctx)
        if index not in values:
            raise invalid_value(f"{label} stat {index} not found")
        return str(values[index])

    description = f"Net namespace statistics from /proc/net/{file}: <key>: <value>;..."
    return Computed(name, description, compute, show=text.format_map, indexed=part, runtime_only=True, skip_empty=True)


def _parse_protocol(content: str) -> dict[str, int]:
    """Lines of names and lines of numbers in turn; or, for IPv6, a name and a number a line.

    As with portod the protocol isn't part of the name, so that of two with one name the last counts.
    """
    values: dict[str, int] = {}
    lines = [line.split() for line in content.splitlines()]
    if lines and not lines[0][0].endswith(":"):
        return {words[0]: int(words[1]) for words in lines if len(words) == 2}
    for header, numbers in zip(lines[::2], lines[1::2], strict=False):
        # -1 stands for "no limit", and Porto's counters have no sign.
        values.update(
            (name, int(number)) for name, number in zip(header[1:], numbers[1:], strict=False) if number[0] != "-"
        )
    return values


def _class_id(_ct: Container, _ctx: Context) -> str:
    return "1:0"


def _soft_stat(ct: Container, _ctx: Context) -> dict[str, int]:
    if not _owns_network(ct):
        return {}
    names = "BytesForcedToFB BytesUntouched ConnectionMarks ConnectionUnmarks PacketsAboveGuarantee PacketsForcedToFB"
    return dict.fromkeys((*text.words(names), "PacketsUntouched"), 0)


def _bound(attribute: str) -> Computed:
    def compute(ct: Container, _ctx: Context) -> dict[str, int]:
        for other in ct.lineage():
            if other.net_isolate and not other.net_inherit:
                found: dict[str, int] = getattr(other, attribute)
                return found
        return {}

    kind = "rx limits" if "rx" in attribute else "limits"
    description = f"Net {kind} for container netns"
    return Computed(f"{attribute}_bound", description, compute, show=text.format_map, skip_empty=True)


def _hidden_statistic(name: str, description: str) -> Computed:
    return Computed(name, description, lambda _ct, _ctx: None, runtime_only=True, hidden=True, field="")


_NET_HELP = (
    "Container network settings: none | inherited (default) | steal <name> | container <name> | "
    "macvlan <master> <name> [bridge|private|vepa|passthru] [mtu] [hw] | ipvlan <master> <name> [l2|l3] [mtu] | "
    "veth <name> <bridge> [mtu] [hw] | L3 [extra_routes] <name> [master] | NAT [name] | "
    "ipip6 <name> <remote> <local> | tap <name> | MTU <name> <mtu> | MAC <name> <mac> | autoconf <name> (SLAAC) | "
    "ip <cmd> <args>... | netns <name>"
)

PROPERTIES: list[Property] = [
    Net("net", _NET_HELP, stored=True),
    Pairs("ip", "IP configuration: <interface> <ip>/<prefix>; ...", "ip"),
    Pairs("default_gw", "Default gateway: <interface> <ip>; ...", "gateway"),
    IpLimit("ip_limit", "IP allowed for sub-containers: none|any|<ip>[/<mask>]; ...", stored=True),
    NetLimit("net_limit", "Maximum network bandwidth: <interface>|default: <Bps>;...", dynamic=True),
    NetLimit("net_guarantee", "Guaranteed network bandwidth: <interface>|default: <Bps>;...", dynamic=True),
    NetLimit("net_rx_limit", "Maximum ingress bandwidth: <interface>|default: <Bps>;...", dynamic=True),
    _bound("net_limit"),
    _bound("net_rx_limit"),
    size("net_limit_soft", "Network soft limit: int (bytes/s)", dynamic=True),
    Computed(
        "net_limit_soft_stat",
        "Net limit soft statistics: <key>: <value>;...",
        _soft_stat,
        show=text.format_map,
        runtime_only=True,
        skip_empty=True,
    ),
    Value(
        "net_tos",
        "Default IP TOS, format: CS0|...|CS7, default CS0",
        parse=_parse_tos,
        show=lambda value: f"CS{value}",
        dynamic=True,
        controllers=("net_cls",),
        field="",
    ),
    Computed("net_class_id", "Network class: major:minor (hex)", _class_id, runtime_only=True, field=""),
    _counter("net_bytes", "Class TX bytes: <interface>: <bytes>;...", _TX["bytes"], sockets=True),
    _counter("net_packets", "Class TX packets: <interface>: <packets>;...", _TX["packets"], sockets=True),
    _counter("net_drops", "Class TX drops: <interface>: <packets>;...", _TX["drops"], sockets=False),
    _counter("net_overlimits", "Class TX overlimits: <interface>: <packets>;...", _TX["overlimits"], sockets=False),
    _counter("net_rx_bytes", "Device RX bytes: <interface>: <bytes>;...", _RX["bytes"], sockets=True),
    _counter("net_rx_packets", "Device RX packets: <interface>: <packets>;...", _RX["packets"], sockets=True),
    _counter("net_rx_drops", "Device RX drops: <interface>: <packets>;...", _RX["drops"], sockets=False),
    _counter("net_rx_overlimits", "Device RX overlimits: <interface>: <packets>;...", _RX["overlimits"], sockets=False),
    _counter("net_tx_bytes", "Device TX bytes: <interface>: <bytes>;...", _TX["bytes"], sockets=True),
    _counter("net_tx_packets", "Device TX packets: <interface>: <packets>;...", _TX["packets"], sockets=True),
    _counter("net_tx_drops", "Device TX drops: <interface>: <packets>;...", _TX["drops"], sockets=False),
    _protocol_counter("net_netstat", "netstat", "network"),
    _protocol_counter("net_snmp", "snmp", "snmp"),
    _protocol_counter("net_snmp6", "snmp6", "snmp6"),
    _hidden_statistic("net_tx_max_speed", "Maximum tx speed since net namespace creation"),
    _hidden_statistic("net_rx_max_speed", "Maximum rx speed since net namespace creation"),
    _hidden_statistic("net_tx_speed_hgram", "Network tx speed hgram since net namespace creation"),
    _hidden_statistic("net_rx_speed_hgram", "Network rx speed hgram since net namespace creation"),
]
