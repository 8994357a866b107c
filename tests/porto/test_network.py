"""Networks: a container's own, its parent's, another's, or one that was made for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.porto.support import eventually, namespace, refused, root_pid, run, shell, spec, start


@pytest.fixture
def netns() -> Iterator[str]:
    """A named network namespace with an interface in it."""
    name = "conformance"
    _ip(f"netns add {name}")
    _ip(f"-n {name} link set lo up")
    _ip(f"-n {name} link add eth0 type veth peer name peer0")
    _ip(f"-n {name} addr add 10.1.2.3/24 dev eth0")
    _ip(f"-n {name} link set eth0 up")
    _ip(f"-n {name} link set peer0 up")
    yield name
    _ip(f"netns delete {name}")


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def test_a_named_namespace(porto: Client, netns: str) -> None:
    start(porto, "p", "", net=f"netns {netns}", hostname="pod")
    start(porto, "p/a")
    wanted = os.stat(f"/run/netns/{netns}").st_ino
    assert namespace(root_pid(porto, "p"), "net") == wanted
    assert namespace(root_pid(porto, "p/a"), "net") == wanted
    assert "inet 10.1.2.3/24" in run(porto, "p/b", ["ip", "address"]).stdout
    assert porto.get_property("p", "net") == f"netns {netns}"
    porto.destroy("p")
    assert os.path.exists(f"/run/netns/{netns}")


def test_a_name_that_is_none(porto: Client) -> None:
    with pytest.raises(errors.InvalidValue):
        start(porto, "a", net="netns nosuchnetns")
    assert porto.list_containers() == []


def test_none_has_a_loopback(porto: Client) -> None:
    found = run(porto, "a", shell("ip -o link | cut -d: -f2; ip -o address"), net="none")
    assert found.lines[0].strip() == "lo"
    assert "127.0.0.1/8" in found.stdout
    with refused(errors.InvalidValue, "net=none must be the only option"):
        porto.create("b")
        porto.set_property("b", "net", "none;none")


def test_another_containers(porto: Client) -> None:
    start(porto, "a", net="none")
    start(porto, "b", net="container a")
    assert namespace(root_pid(porto, "b"), "net") == namespace(root_pid(porto, "a"), "net")
    porto.create("stopped")
    with refused(errors.InvalidValue, "Cannot open network of container stopped"):
        start(porto, "c", net="container stopped")
    with refused(errors.ContainerDoesNotExist, "container nope not found"):
        start(porto, "c", net="container nope")


def test_the_parents_or_the_machines(porto: Client) -> None:
    start(porto, "p", net="none")
    start(porto, "p/a", net="inherited")
    assert namespace(root_pid(porto, "p/a"), "net") == namespace(root_pid(porto, "p"), "net")
    start(porto, "b")
    assert namespace(root_pid(porto, "b"), "net") == namespace("self", "net")


@pytest.mark.parametrize("option", ["L3 veth0", "macvlan nosuchlink m0", "veth v0 nosuchbridge", "steal nosuchlink"])
def test_interfaces_are_made_by_the_real_one(porto: Client, option: str, embedded: bool) -> None:
    porto.create_from_spec(spec("a", "true", net=option))
    if embedded:
        kind = option.split()[0]
        text = f"net: {kind}: the embedded Porto makes no interfaces; use none, inherited or netns"
        with refused(errors.NotSupported, text):
            porto.start("a")
    elif option.startswith("L3"):
        porto.start("a")
    else:
        with pytest.raises(errors.PortoError):
            porto.start("a")


class TestCounters:
    def test_interfaces_of_a_network_of_its_own(self, porto: Client, netns: str) -> None:
        start(porto, "p", "", net=f"netns {netns}", hostname="pod")
        start(porto, "p/a")
        eventually(lambda: "eth0" in porto.get_property("p", "net_rx_bytes", sync=True))
        for name in ("p", "p/a"):
            found = dict(pair.split(": ") for pair in porto.get_property(name, "net_tx_packets", sync=True).split("; "))
            assert set(found) == {"eth0", "peer0", "group default"}
            assert int(found["eth0"]) <= int(porto.get_property(name, "net_tx_packets[eth0]", sync=True))
        with refused(errors.InvalidValue, "network device nope not found"):
            porto.get_property("p", "net_tx_bytes[nope]")

    def test_on_the_machines_network_there_are_none_of_its_own(self, porto: Client) -> None:
        start(porto, "a")
        assert porto.get_property("a", "net_drops") == ""
        found = porto.get_property("a", "net_bytes")
        assert {pair.split(": ")[0] for pair in found.split("; ")} == {"Latency", "Uplink"}

    def test_limits_are_kept_in_mind(self, porto: Client, netns: str) -> None:
        start(porto, "p", "", net=f"netns {netns}", hostname="pod", net_limit=_limit("default", 1 << 20))
        assert porto.get_property("p", "net_limit_bound") == "default: 1048576"
        porto.set_property("p", "net_rx_limit", "eth0: 2M")
        assert porto.get_property("p", "net_rx_limit_bound") == "eth0: 2097152"

    def test_incoming_traffic_takes_a_network_of_its_own(self, porto: Client) -> None:
        with refused(
            errors.InvalidValue, "Cannot prepare start for container a: Net rx limit requires isolated network"
        ):
            start(porto, "a", net_rx_limit=_limit("default", 1))


def _limit(name: str, value: int) -> rpc_pb2.TUintMap:
    made = rpc_pb2.TUintMap()
    made.map.add(key=name, val=value)
    return made
