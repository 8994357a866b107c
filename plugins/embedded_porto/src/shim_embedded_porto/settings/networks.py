"""The ``net`` property: parsed and checked as Porto does, and reduced to what can be set up here."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import text
from shim_embedded_porto.errors import Fault, invalid_value, permission

Lines = tuple[tuple[str, ...], ...]
INHERITED: Lines = (("inherited",),)
_MAC = re.compile(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}")
_MACVLAN_MODES = ("bridge", "private", "vepa", "passthru")
_IPVLAN_MODES = ("l2", "l3", "l3s")


@dataclass(frozen=True, slots=True)
class Network:
    """What a configuration asks for."""

    inherit: bool = False
    isolate: bool = False
    """A new network namespace."""
    none: bool = False
    netns: str = ""
    """An existing network namespace, by name."""
    container: str = ""
    """That of another container."""
    devices: tuple[str, ...] = ()
    """Kinds of interfaces to make: none of them can be made here."""

    @property
    def needs_class(self) -> bool:
        """True when Porto wants a traffic class for it."""
        return not self.inherit and not self.none


def split(value: str) -> Lines:
    return tuple(tuple(line) for line in text.split_nested(value, " ", ";"))


def parse(lines: Sequence[Sequence[str]]) -> Network:
    """Check a configuration, line by line.

    :raises Fault: InvalidValue, Permission.
    """
    if not lines:
        raise invalid_value("Configuration is not specified")
    inherit = isolate = none = False
    netns = container = ""
    devices: list[tuple[str, str]] = [("ip6tnl0", "ip6tnl0")]
    for line in lines:
        kind, args = line[0], line[1:]
        wrong = invalid_value("Invalid " + text.merge(line, " "))
        made: tuple[str, str] | None = None
        if kind == "inherited" or (kind == "host" and not args):
            inherit = True
        elif kind == "none":
            isolate = none = True
            if len(lines) != 1:
                raise invalid_value("net=none must be the only option")
        elif kind in ("container", "netns", "steal", "host"):
            if len(args) != 1:
                raise wrong
            if kind == "container":
                container = args[0]
            elif kind == "netns":
                if ".." in args[0]:
                    raise permission("'..' not allowed in net namespace path")
                netns = args[0]
            else:
                made = ("steal", args[0])
        elif kind == "macvlan" or kind == "ipvlan":
            if len(args) < 2:
                raise wrong
            _check_vlan(kind, args)
            made = (kind, args[1])
        elif kind == "veth":
            if len(args) < 2:
                raise wrong
            if len(args) > 2:
                text.parse_int(args[2], kind="int")
            if len(args) > 3 and not _MAC.fullmatch(args[3]):
                raise invalid_value(f"Invalid veth mac {args[3]}")
            made = (kind, args[0])
        elif kind == "L3" or kind == "NAT":
            names = args[1:] if args[:1] == ("extra_routes",) else args
            made = ("L3", names[0] if names else "eth0")
        elif kind == "ipip6":
            if len(args) != 3:
                raise wrong
            for address in args[1:]:
                parse_address(address)
            made = (kind, args[0])
        elif kind == "tap":
            if len(args) != 1:
                raise wrong
            made = (kind, args[0])
        elif kind in ("MTU", "MAC"):
            if len(args) != 2 or (kind == "MAC" and not _MAC.fullmatch(args[1])):
                raise wrong
            if kind == "MTU":
                text.parse_int(args[1], kind="int")
            if args[0] not in {name for _, name in devices}:
                raise invalid_value(f"Link not found: {args[0]}")
        elif kind == "ECN":
            if len(args) > 1:
                raise wrong
        elif kind == "autoconf":
            if len(args) != 1:
                raise wrong
            if args[0] not in {name for _, name in devices}:
                raise invalid_value(f"Link not found: {args[0]}")
        elif kind == "ip":
            raise permission("iproute is disabled")
        else:
            raise invalid_value(f"Unknown net option: {kind}")
        if made is not None:
            devices.append(made)
            if made[0] == "tap":
                inherit = True
            else:
                isolate = True
    if sum((inherit, isolate, bool(netns), bool(container))) != 1:
        raise invalid_value("Uncertain network type")
    return Network(inherit, isolate, none, netns, container, tuple(kind for kind, _ in devices[1:]))


def _check_vlan(kind: str, args: Sequence[str]) -> None:
    modes = _MACVLAN_MODES if kind == "macvlan" else _IPVLAN_MODES
    if len(args) > 2 and args[2] not in modes:
        raise invalid_value(f"Invalid {kind} {'type' if kind == 'macvlan' else 'mode'} {args[2]}")
    if len(args) > 3:
        text.parse_int(args[3], kind="int")
    if kind == "macvlan" and len(args) > 4 and not _MAC.fullmatch(args[4]):
        raise invalid_value(f"Invalid macvlan mac {args[4]}")


def parse_address(value: str) -> None:
    """:raises Fault: no IP address, with or without a prefix."""
    address, _, prefix = value.partition("/")
    try:
        ipaddress.ip_address(address)
        int(prefix or 0)  # libnl takes any prefix here
    except ValueError:
        wrong = f"Cannot parse address {value}: Invalid address for specified address family"
        raise Fault(pb.Unknown, wrong) from None


def parse_pairs(lines: Lines, what: str) -> Lines:
    """``<interface> <address>; ...``: the ``ip`` and ``default_gw`` properties."""
    for line in lines:
        if len(line) != 2:
            raise invalid_value(f"Invalid {what} format")
        parse_address(line[1])
    return lines


def parse_limit(lines: Lines) -> str:
    """The policy of an ``ip_limit``: ``any``, ``none`` or ``some``."""
    policy = "any"
    for line in lines:
        if len(line) != 1:
            raise invalid_value("wrong format")
        if line[0] in ("any", "none"):
            if len(lines) != 1:
                raise invalid_value("more than one ip policy")
            policy = line[0]
        else:
            policy = "some"
            parse_address(line[0])
    return policy


def format_lines(lines: Lines) -> str:
    return text.merge_nested(lines, " ", ";")
