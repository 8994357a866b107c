"""Results: what is none, and what becomes of one in another version."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shim_cni_net import results, versions
from shim_cni_net.results import ResultError, convert, parse

FLAT: dict[str, Any] = {
    "cniVersion": "0.2.0",
    "ip4": {"ip": "10.0.0.5/24", "gateway": "10.0.0.1", "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1"}]},
    "ip6": {"ip": "fd00::5/64", "routes": [{"dst": "::/0"}]},
    "dns": {"nameservers": ["10.0.0.10"]},
}
OLD: dict[str, Any] = {
    "cniVersion": "0.4.0",
    "interfaces": [{"name": "cni0"}, {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x"}],
    "ips": [
        {"version": "4", "address": "10.0.0.5/24", "gateway": "10.0.0.1", "interface": 1},
        {"version": "6", "address": "fd00::5/64", "interface": 1},
    ],
    "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1"}, {"dst": "::/0"}],
    "dns": {"nameservers": ["10.0.0.10"]},
}
NEW: dict[str, Any] = {
    **OLD,
    "cniVersion": "1.1.0",
    "ips": [{key: value for key, value in ip.items() if key != "version"} for ip in OLD["ips"]],
}


def of(version: str) -> dict[str, Any]:
    shape = FLAT if version < "0.3.0" else OLD if version < "1.0.0" else NEW
    return {**shape, "cniVersion": version}


@pytest.mark.parametrize("source", versions.KNOWN)
@pytest.mark.parametrize("target", versions.KNOWN)
def test_every_version_becomes_every_other(source: str, target: str) -> None:
    converted = convert(of(source), target)
    results.check(converted)
    expected = of(target)
    if source < "0.3.0" <= target:
        # The old shape knows no interfaces.
        expected["interfaces"] = []
        expected["ips"] = [{k: v for k, v in ip.items() if k != "interface"} for ip in expected["ips"]]
    assert converted == expected


def test_newer_keys_of_interfaces_are_left_out_of_old_results() -> None:
    new = {**NEW, "interfaces": [{}, {"name": "eth0", "mtu": 1500, "socketPath": "/x", "pciID": "0", "sandbox": "y"}]}
    assert convert(new, "0.3.1")["interfaces"][1] == {"name": "eth0", "sandbox": "y"}
    assert convert(new, "1.0.0")["interfaces"] == new["interfaces"]


def test_within_a_version_nothing_is_lost() -> None:
    assert convert({**NEW, "x": {"y": 1}}, "1.1.0")["x"] == {"y": 1}


def test_the_old_shape_needs_an_address() -> None:
    with pytest.raises(ResultError, match=r"without addresses"):
        convert({"cniVersion": "1.0.0", "ips": []}, "0.2.0")


def test_a_result_that_does_not_say_is_of_the_version_asked_for() -> None:
    tree = {key: value for key, value in NEW.items() if key != "cniVersion"}
    assert parse(json.dumps(tree).encode(), "1.0.0") == {**NEW, "cniVersion": "1.0.0"}
    assert parse(json.dumps({**tree, "cniVersion": ""}).encode(), "1.0.0")["cniVersion"] == "1.0.0"
    assert parse(json.dumps(OLD).encode(), "1.0.0")["ips"] == NEW["ips"], "it is converted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cniVersion": "9.9.9"}, "cniVersion: '9.9.9' is not known"),
        ({"cniVersion": 1}, "cniVersion: '1' is not known"),
        ({"ips": {}}, "ips: must be a list"),
        ({"ips": [1]}, "ips: must be a list"),
        ({"ips": [{}]}, r"ips\[0\].address"),
        ({"ips": [{"address": "10.0.0.1"}]}, r"ips\[0\].address: '10.0.0.1' is not an address with its prefix"),
        ({"ips": [{"address": "10.0.0.1/33"}]}, r"ips\[0\].address"),
        ({"ips": [{"address": "010.0.0.1/8"}]}, r"ips\[0\].address"),
        ({"ips": [{"address": "fd00::1/129"}]}, r"ips\[0\].address"),
        ({"ips": [{"address": "10.0.0.1/" + "9" * 5000}]}, r"ips\[0\].address"),
        ({"ips": [{"address": "10.0.0.1\0/8"}]}, r"ips\[0\].address"),
        ({"ips": [{"address": "10.0.0.1/255.0.0.0"}]}, r"ips\[0\].address"),
        ({"ips": [{"address": "fe80::1%eth0/64"}]}, r"ips\[0\].address"),
        ({"ips": [{"address": "10.0.0.1/24", "gateway": "x"}]}, r"ips\[0\].gateway"),
        ({"ips": [{"address": "10.0.0.1/24", "interface": 2}]}, r"ips\[0\].interface: there is no interface 2"),
        ({"ips": [{"address": "10.0.0.1/24", "interface": -1}]}, r"ips\[0\].interface"),
        ({"ips": [{"address": "10.0.0.1/24", "interface": True}]}, r"ips\[0\].interface"),
        ({"interfaces": "eth0"}, "interfaces: must be a list"),
        ({"interfaces": [{"name": 1}]}, r"interfaces\[0\].name: must be a string"),
        ({"routes": [{"dst": "default"}]}, r"routes\[0\].dst"),
        ({"routes": [{"dst": "0.0.0.0/0", "gw": "x"}]}, r"routes\[0\].gw"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ResultError, match=f"^{message}"):
        parse(json.dumps({**NEW, **change}).encode(), "1.1.0")


def test_what_is_wrong_in_the_old_shape_is_named() -> None:
    for change, message in (
        ({"ip4": []}, "ip4: must be an object"),
        ({"ip4": {"ip": "fd00::1/64"}}, r"ip4\.ip"),
        ({"ip6": {"ip": "fd00::1/64", "routes": 1}}, r"ip6\.routes"),
    ):
        with pytest.raises(ResultError, match=message):
            parse(json.dumps({**FLAT, **change}).encode(), "0.2.0")


@pytest.mark.parametrize("output", [b"", b"\n", b"hello", b"[]", b"null", b"{", b'{"a":' * 100_000, b"\xff\xfe"])
def test_what_is_no_result(output: bytes) -> None:
    with pytest.raises(ResultError):
        parse(output, "1.0.0")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_nothing_a_plugin_prints_is_more_than_an_error(tree: object) -> None:
    for key in ("ips", "interfaces", "routes", "ip4"):
        try:
            parsed = parse(json.dumps({**NEW, key: tree}).encode(), "1.1.0")
            results.addresses(parsed, "eth0", "ipv4")
            results.interfaces(parsed, "eth0")
        except ResultError:
            pass


@given(st.from_regex(r"[0-9a-f.:]{1,24}/[0-9]{1,3}", fullmatch=True) | st.ip_addresses().map(lambda ip: f"{ip}/24"))
def test_an_address_that_passes_can_be_read(text: str) -> None:
    try:
        parsed = parse(json.dumps({**NEW, "ips": [{"address": text}]}).encode(), "1.1.0")
    except ResultError:
        with pytest.raises(ValueError):
            ipaddress.ip_interface(text)
    else:
        assert results.addresses(parsed, "eth0", "cni") == (str(ipaddress.ip_interface(text).ip),)


@pytest.mark.parametrize(
    ("preference", "addresses"),
    [
        ("cni", ("fd00::5", "10.0.0.5", "10.0.0.6", "fd00::6")),
        ("ipv4", ("10.0.0.5", "fd00::5", "10.0.0.6", "fd00::6")),
        ("ipv6", ("fd00::5", "10.0.0.5", "10.0.0.6", "fd00::6")),
    ],
)
def test_the_primary_address_is_the_first_of_the_family_preferred(preference: Any, addresses: tuple[str, ...]) -> None:
    ips = [{"address": text} for text in ("fd00::5/64", "10.0.0.5/24", "10.0.0.6/24", "fd00::6/64", "10.0.0.5/24")]
    assert results.addresses({"ips": ips}, "eth0", preference) == addresses


def test_addresses_of_other_interfaces_are_not_the_pods() -> None:
    tree: dict[str, Any] = {
        "interfaces": [
            {"name": "cni0"},
            {"name": "net1", "sandbox": "x"},
            {"name": "eth0", "sandbox": "x"},
        ],
        "ips": [
            {"address": "10.0.0.1/24", "interface": 0},
            {"address": "10.0.1.2/24", "interface": 1},
            {"address": "10.0.2.3/24", "interface": 2},
        ],
    }
    assert results.addresses(tree, "eth0", "ipv4") == ("10.0.2.3",)
    del tree["ips"][2]
    assert results.addresses(tree, "eth0", "ipv4") == ("10.0.1.2",), "better than none"
    del tree["ips"][1]
    assert results.addresses(tree, "eth0", "ipv4") == ()


def test_interfaces() -> None:
    [eth0] = results.interfaces(NEW, "eth0")
    assert (eth0.name, eth0.mac, eth0.addresses) == ("eth0", "02:00:00:00:00:01", ("10.0.0.5/24", "fd00::5/64"))
    [unnamed] = results.interfaces({"ips": [{"address": "10.0.0.5/24"}]}, "eth0")
    assert (unnamed.name, unnamed.addresses) == ("eth0", ("10.0.0.5/24",))
