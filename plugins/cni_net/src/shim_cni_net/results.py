"""Results of ADD: checked, converted between specification versions (CNI section 5), and read for the pod's addresses.

Three shapes exist: ``ip4``/``ip6`` up to 0.2.0; ``interfaces`` and ``ips`` whose entries say their family from 0.3.0;
the same without the family from 1.0.0.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Mapping
from typing import Any, Literal

from shim_cni_net import versions
from shim_core.types import NetworkInterface

Result = dict[str, Any]
IpPreference = Literal["ipv4", "ipv6", "cni"]


class ResultError(Exception):
    """What a plugin printed is no result: the text names the field."""


def parse(data: bytes, version: str) -> Result:
    """A plugin's output as a result of the given version.

    :param version: the version the plugin was asked to speak; also that of a result which doesn't say (as libcni).
    :raises ResultError: it is no result, or of a version that isn't known.
    """
    if not data.strip():
        raise ResultError("nothing was printed where a result was expected")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise ResultError(f"the output is not JSON: {data[:80]!r}") from None
    if not isinstance(tree, dict):
        raise ResultError("the output is not a JSON object")
    stated = tree.get("cniVersion") or version
    if stated not in versions.KNOWN:
        raise ResultError(f"cniVersion: {str(stated)[:32]!r} is not known")
    check({**tree, "cniVersion": stated})
    return convert({**tree, "cniVersion": stated}, version)


def check(result: Mapping[str, Any]) -> None:
    """Check what a result says of addresses, interfaces and routes.

    :raises ResultError: names the field.
    """
    if not versions.at_least(result["cniVersion"], versions.CHAINING):
        for key, family in (("ip4", 4), ("ip6", 6)):
            config = _object(result, key, key)
            if config is not None:
                _check_address(config.get("ip"), f"{key}.ip", family)
                _check_routes(config, f"{key}.routes")
        return
    interfaces = _objects(result, "interfaces", "interfaces")
    for index, interface in enumerate(interfaces):
        for key in ("name", "mac", "sandbox"):
            if not isinstance(interface.get(key, ""), str | None):
                raise ResultError(f"interfaces[{index}].{key}: must be a string")
    for index, config in enumerate(_objects(result, "ips", "ips")):
        _check_address(config.get("address"), f"ips[{index}].address")
        if config.get("gateway"):
            _check_ip(config["gateway"], f"ips[{index}].gateway")
        number = config.get("interface")
        if number is not None and (type(number) is not int or not 0 <= number < len(interfaces)):
            raise ResultError(f"ips[{index}].interface: there is no interface {str(number)[:16]}")
    _check_routes(result, "routes")


def convert(result: Mapping[str, Any], version: str) -> Result:
    """The same result in another version. What the other version can't express is left out, as libcni does.

    :param result: a checked result.
    :raises ResultError: 0.2.0 and older need at least one address.
    """
    source, target = _shape(result["cniVersion"]), _shape(version)
    if source == target:
        return {**result, "cniVersion": version}
    current = _from_flat(result) if source == 0 else dict(result)
    if target == 0:
        return _to_flat(current, version)
    ips = []
    for config in current.get("ips") or ():
        entry = {key: value for key, value in config.items() if key != "version"}
        if target == 1:
            entry["version"] = str(ipaddress.ip_interface(config["address"]).version)
        ips.append(entry)
    # 0.4.0 and older know three things about an interface; later ones understand these three.
    interfaces = [
        {key: value for key, value in interface.items() if key in ("name", "mac", "sandbox")}
        for interface in current.get("interfaces") or ()
    ]
    converted: Result = {"cniVersion": version, "interfaces": interfaces, "ips": ips}
    converted["routes"] = list(current.get("routes") or ())
    if current.get("dns"):
        converted["dns"] = current["dns"]
    return converted


def addresses(result: Mapping[str, Any], ifname: str, preference: IpPreference) -> tuple[str, ...]:
    """The pod's addresses without prefix length, the primary one first; of one interface of a 1.x result.

    Addresses count that belong to the interface ``ifname``, or to no interface in particular. A plugin that calls it
    by another name is believed if nothing else is there, as long as the interface is inside a sandbox.
    """
    interfaces = result.get("interfaces") or []
    named: list[str] = []
    inside: list[str] = []
    for config in result.get("ips") or ():
        address = str(ipaddress.ip_interface(config["address"]).ip)
        number = config.get("interface")
        if number is None or interfaces[number].get("name") == ifname:
            named.append(address)
        elif interfaces[number].get("sandbox"):
            inside.append(address)
    found = list(dict.fromkeys(named or inside))
    if preference != "cni":
        first = 4 if preference == "ipv4" else 6
        primary = next((address for address in found if ipaddress.ip_address(address).version == first), None)
        if primary is not None:
            found.remove(primary)
            found.insert(0, primary)
    return tuple(found)


def interfaces(result: Mapping[str, Any], ifname: str) -> tuple[NetworkInterface, ...]:
    """The interfaces inside the sandbox, of a 1.x result; one called ``ifname`` if the result names none."""
    named = result.get("interfaces") or []
    ips = result.get("ips") or []
    if not any(interface.get("sandbox") for interface in named):
        return (NetworkInterface(name=ifname, addresses=tuple(config["address"] for config in ips)),)
    return tuple(
        NetworkInterface(
            name=interface.get("name") or ifname,
            mac=interface.get("mac") or "",
            addresses=tuple(
                config["address"]
                for config in ips
                if config.get("interface") == index
                or (config.get("interface") is None and interface.get("name") == ifname)
            ),
        )
        for index, interface in enumerate(named)
        if interface.get("sandbox")
    )


def _shape(version: str) -> int:
    if not versions.at_least(version, versions.CHAINING):
        return 0
    return 2 if versions.at_least(version, "1.0.0") else 1


def _from_flat(result: Mapping[str, Any]) -> Result:
    ips: list[dict[str, Any]] = []
    routes: list[dict[str, Any]] = []
    for key in ("ip4", "ip6"):
        config = result.get(key)
        if config:
            ips.append({"address": config["ip"]} | {k: config[k] for k in ("gateway",) if config.get(k)})
            routes += config.get("routes") or []
    current: Result = {"ips": ips, "routes": routes}
    if result.get("dns"):
        current["dns"] = result["dns"]
    return current


def _to_flat(current: Mapping[str, Any], version: str) -> Result:
    flat: Result = {"cniVersion": version}
    for config in current.get("ips") or ():
        key = f"ip{ipaddress.ip_interface(config['address']).version}"
        if key not in flat:
            flat[key] = {"ip": config["address"]} | {k: config[k] for k in ("gateway",) if config.get(k)}
    if len(flat) == 1:
        raise ResultError(f"a result without addresses can't be told in version {version}")
    for route in current.get("routes") or ():
        target = flat.get(f"ip{ipaddress.ip_interface(route['dst']).version}")
        if target is not None:
            target.setdefault("routes", []).append({key: route[key] for key in ("dst", "gw") if route.get(key)})
    if current.get("dns"):
        flat["dns"] = current["dns"]
    return flat


def _object(tree: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any] | None:
    value = tree.get(key)
    if value is not None and not isinstance(value, dict):
        raise ResultError(f"{where}: must be an object")
    return value


def _objects(tree: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    value = tree.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ResultError(f"{where}: must be a list of objects")
    return value


def _check_routes(tree: Mapping[str, Any], where: str) -> None:
    for index, route in enumerate(_objects(tree, "routes", where)):
        _check_address(route.get("dst"), f"{where}[{index}].dst")
        if route.get("gw"):
            _check_ip(route["gw"], f"{where}[{index}].gw")


def _check_address(value: object, where: str, family: int | None = None) -> None:
    """CIDR notation as Go reads it: the prefix length is a number, and there is no zone."""
    address, _, length = value.partition("/") if isinstance(value, str) else ("", "", "")
    found = _family(address)
    fits = length.isascii() and length.isdecimal() and len(length) < 4 and int(length) <= (32 if found == 4 else 128)
    if found is None or not fits or family not in (None, found):
        raise ResultError(f"{where}: {str(value)[:64]!r} is not an address with its prefix length")


def _check_ip(value: object, where: str) -> None:
    if not isinstance(value, str) or _family(value) is None:
        raise ResultError(f"{where}: {str(value)[:64]!r} is not an address")


def _family(text: str) -> int | None:
    """4 or 6; None if it is no address. Results are checked after every plugin, and ipaddress takes its time."""
    for number, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        try:
            socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
        return number
    return None
