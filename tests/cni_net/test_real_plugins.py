"""Pods on networks made by the plugins that distributions ship: each other, the host, and host ports are reached."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shim_core.types import DnsConfig, PortMapping
from tests.cni_net.support import REAL_PLUGINS, Node, footprint, in_netns, run, sandbox, settles, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not Path(REAL_PLUGINS, "bridge").exists(), reason="needs containernetworking-plugins"),
]

RANGES: dict[str, Any] = {
    "type": "host-local",
    "ranges": [[{"subnet": "10.81.0.0/24"}], [{"subnet": "fd81::/64"}]],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
}
IPV4_RANGES = {**RANGES, "ranges": RANGES["ranges"][:1], "routes": RANGES["routes"][:1]}
BRIDGE = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True, "hairpinMode": True, "ipam": RANGES}
# What plugins do for the other family takes as long again, and is the same to us.
IPV4_BRIDGE = {**BRIDGE, "ipam": IPV4_RANGES}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
FIREWALL = {"type": "firewall"}
BANDWIDTH = {"type": "bandwidth", "capabilities": {"bandwidth": True}}
TUNING = {"type": "tuning", "capabilities": {"mac": True}, "sysctl": {"net.ipv4.conf.all.log_martians": "1"}}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path, bin_dirs=[REAL_PLUGINS]) as node:
        yield node


@pytest.fixture
def no_doubles() -> Iterator[None]:
    """The kernel would look for doubles of the node's own IPv6 addresses for a second before it uses them."""
    probes = Path("/proc/sys/net/ipv6/conf/default/dad_transmits")
    usual = probes.read_text()
    probes.write_text("0")
    yield
    probes.write_text(usual)


@pytest.fixture
def outside(no_doubles: None) -> Iterator[str]:
    """A machine beside the node: 192.0.2.2 and 2001:db8::2; the node is .1 and ::1."""
    run("ip", "netns", "add", "outside")
    run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", "outside")
    path = "/run/netns/outside"
    for number, netns, name in ((1, "", "up0"), (2, path, "eth0")):
        run("ip", "addr", "add", f"192.0.2.{number}/24", "dev", name, netns=netns)
        run("ip", "addr", "add", f"2001:db8::{number}/64", "dev", name, "nodad", netns=netns)
        run("ip", "link", "set", name, "up", netns=netns)
    yield path
    run("ip", "link", "del", "up0")
    run("ip", "netns", "del", "outside")


@contextmanager
def web_server(netns: str, port: int, says: str) -> Iterator[None]:
    """A web server in a namespace, on both families."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(says.encode())

        def log_message(self, format: str, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("::", port), Handler, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = in_netns(
            lambda: socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True), netns
        )
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            # What connects while its own address is still being looked for elsewhere takes another one.
            assert until(lambda: "tentative" not in run("ip", "-6", "address"))
            yield
        finally:
            server.shutdown()
            thread.join()


def get(address: str, port: int, netns: str = "") -> str:
    """What a web server says, asked from the node or from a namespace.

    :raises OSError: it can't be reached.
    """

    def ask() -> str:
        connection = HTTPConnection(address, port, timeout=10)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    return in_netns(ask, netns)


def leases(network: str = "net") -> list[str]:
    directory = Path("/var/lib/cni/networks", network)
    return sorted(path.name for path in directory.glob("[0-9a-f]*"))


def test_pods_reach_each_other_the_host_and_host_ports_on_both_families(node: Node, outside: str) -> None:
    node.network(BRIDGE, TUNING, BANDWIDTH, FIREWALL, PORTMAP)
    mappings = (PortMapping("tcp", 8000, 31080), PortMapping("udp", 53, 31053))
    # Chains that plugins make once and keep.
    node.attach(sandbox(9, port_mappings=mappings))
    node.detach(sandbox(9))
    before = settles(footprint("/var/lib/cni", node.state), "/var/lib/cni", node.state)
    web = sandbox(1, port_mappings=mappings)
    client = sandbox(2)
    one, two = node.attach(web), node.attach(client)

    assert [address.rpartition(".")[0] for address in one.addresses[:1]] == ["10.81.0"]
    assert one.addresses[1].startswith("fd81::")
    assert one.interfaces[0].name == "eth0"
    assert one.interfaces[0].mac
    assert node.status(web) == one
    with web_server(one.netns_path, 8000, "web"), web_server("/proc/self/ns/net", 8001, "host"):
        for address in one.addresses:
            assert get(address, 8000) == "web", "the node reaches the pod"
            assert get(address, 8000, two.netns_path) == "web", "another pod reaches the pod"
            assert get(address, 8000, one.netns_path) == "web", "the pod reaches itself"
        assert get("127.0.0.1", 8000, one.netns_path) == "web", "loopback is up"
        assert get("::1", 8000, one.netns_path) == "web", "loopback is up"
        for gateway in ("10.81.0.1", "fd81::1"):
            assert get(gateway, 8001, two.netns_path) == "host", "a pod reaches the node"
        for address in ("192.0.2.1", "2001:db8::1"):
            assert get(address, 31080, outside) == "web", "the host port leads to the pod from outside"
            assert get(address, 31080) == "web", "the host port leads to the pod on the node"
            assert get(address, 31080, two.netns_path) == "web", "the host port leads to the pod from another pod"
            assert get(address, 31080, one.netns_path) == "web", "the host port leads the pod to itself"
    with web_server(outside, 8002, "outside"):
        for address in ("192.0.2.2", "2001:db8::2"):
            assert get(address, 8002, one.netns_path) == "outside", "a pod reaches the world"

    assert len(leases()) == 4
    assert node.detach(web)
    assert node.detach(client)
    assert settles(before, "/var/lib/cni", node.state) == before
    assert leases() == []


def test_bandwidth_and_mac_of_annotations_are_honoured(node: Node) -> None:
    node.network(BRIDGE, TUNING, BANDWIDTH)
    pod = sandbox(
        annotations={
            "kubernetes.io/ingress-bandwidth": "10M",
            "kubernetes.io/egress-bandwidth": "20M",
            "portoshim.net/mac": "02:00:00:aa:bb:cc",
        }
    )
    attachment = node.attach(pod)
    assert attachment.interfaces[0].mac == "02:00:00:aa:bb:cc"
    link = json.loads(run("ip", "-j", "link", "show", "eth0", netns=attachment.netns_path))[0]
    assert link["address"] == "02:00:00:aa:bb:cc"
    limits = {qdisc["options"]["rate"] for qdisc in json.loads(run("tc", "-j", "qdisc")) if qdisc["kind"] == "tbf"}
    assert limits == {10_000_000 // 8, 20_000_000 // 8}
    assert run("sysctl", "-n", "net.ipv4.conf.all.log_martians", netns=attachment.netns_path) == "1\n"
    assert node.detach(pod)
    assert not [qdisc for qdisc in json.loads(run("tc", "-j", "qdisc")) if qdisc["kind"] == "tbf"]


def test_the_pod_cidr_becomes_the_address_range(node: Node) -> None:
    ipam = {"type": "host-local", "routes": [{"dst": "0.0.0.0/0"}]}
    node.network({**BRIDGE, "ipam": ipam, "capabilities": {"ipRanges": True}})
    from shim_core.cri.v1 import api_pb2 as pb

    request = pb.UpdateRuntimeConfigRequest()
    request.runtime_config.network_config.pod_cidr = "10.82.5.0/28,fd82::/112"
    node.manager.hook.cri_update_runtime_config(request=request, context=None)
    attachment = node.attach(sandbox())
    assert attachment.addresses == ("10.82.5.2", "fd82::2")
    node.detach(sandbox())


@pytest.mark.parametrize("kind", ["ptp", "macvlan", "ipvlan"])
def test_other_kinds_of_interfaces(node: Node, outside: str, kind: str) -> None:
    if kind == "ipvlan":
        probe = subprocess.run(["ip", "link", "add", "iv9", "link", "up0", "type", "ipvlan"], check=False)
        if probe.returncode:
            pytest.skip("this kernel has no ipvlan")
        run("ip", "link", "del", "iv9")
    master = {} if kind == "ptp" else {"master": "up0"}
    node.network(
        {"type": kind, "ipMasq": kind == "ptp", "ipam": RANGES, **master}, *([PORTMAP] if kind == "ptp" else [])
    )
    mappings = (PortMapping("tcp", 8000, 31080),)
    if kind == "ptp":
        node.attach(sandbox(9, port_mappings=mappings))  # makes chains that stay
        node.detach(sandbox(9))
    before = settles(footprint("/var/lib/cni", node.state), "/var/lib/cni", node.state)
    pods = [sandbox(1, port_mappings=mappings), sandbox(2)]
    with ThreadPoolExecutor() as threads:  # the plugins wait for the kernel to look for doubles of the address
        one, two = threads.map(node.attach, pods)
    with web_server(one.netns_path, 8000, "web"):
        for address in one.addresses:
            assert until(partial(_reaches, address, two.netns_path)), f"{address} is out of reach"
            if kind == "ptp":
                assert get(address, 8000) == "web"
        for address in ("192.0.2.1", "2001:db8::1") if kind == "ptp" else ():
            assert get(address, 31080, outside) == "web", "the host port leads to the pod from outside"
            assert get(address, 31080) == "web", "the host port leads to the pod on the node"
    for pod in pods:
        assert node.detach(pod)
    assert settles(before, "/var/lib/cni", node.state) == before


def _reaches(address: str, netns: str) -> bool:
    try:
        return get(address, 8000, netns) == "web"
    except OSError:
        return False


@pytest.mark.usefixtures("no_doubles")
def test_static_addresses_are_reached(node: Node) -> None:
    addresses = [{"address": "10.83.0.7/24", "gateway": "10.83.0.1"}, {"address": "fd83::7/64", "gateway": "fd83::1"}]
    node.network({**BRIDGE, "ipam": {"type": "static", "addresses": addresses, "routes": RANGES["routes"]}})
    attachment = node.attach(sandbox())
    assert attachment.addresses == ("10.83.0.7", "fd83::7")
    with (
        web_server(attachment.netns_path, 8000, "web"),
        web_server("/proc/self/ns/net", 8001, "host"),
    ):
        for address, gateway in zip(attachment.addresses, ("10.83.0.1", "fd83::1"), strict=True):
            assert get(address, 8000) == "web", "the node reaches the pod"
            assert get(gateway, 8001, attachment.netns_path) == "host", "the pod reaches the node"
    assert node.detach(sandbox())


def test_static_addresses_and_two_networks(tmp_path: Path) -> None:
    with Node(tmp_path, bin_dirs=[REAL_PLUGINS], MaxConfNum=0, IpPreference="ipv6") as node:
        static = {"type": "static", "addresses": [{"address": "10.83.0.7/24"}, {"address": "fd83::7/64"}]}
        node.write(
            "10-first.conflist",
            {"name": "first", "cniVersion": "0.4.0", "plugins": [{"type": "bridge", "bridge": "b1", "ipam": static}]},
        )
        node.write(
            "20-second.conf",
            {
                "name": "second", "cniVersion": "0.3.1", "type": "bridge", "bridge": "b2",
                "ipam": {"type": "host-local", "subnet": "10.84.0.0/24"},
            },
        )  # fmt: skip
        before = footprint("/var/lib/cni", node.state)
        attachment = node.attach(sandbox())
        assert attachment.addresses == ("fd83::7", "10.83.0.7")
        assert [interface.name for interface in attachment.interfaces] == ["eth0", "eth1"]
        assert attachment.info["cniResult"]["cniVersion"] == "1.1.0"
        assert attachment.info["cniResults"]["eth1"]["ips"][0]["address"] == "10.84.0.2/24"
        assert node.detach(sandbox())
        after = footprint("/var/lib/cni", node.state)
        assert set(after.pop("interfaces")) - set(before.pop("interfaces")) == {"b1", "b2"}, "bridges stay"
        assert after == before


def test_an_attachment_that_survived_a_restart_is_checked_by_its_plugins(tmp_path: Path) -> None:
    node = Node(tmp_path, bin_dirs=[REAL_PLUGINS]).start()
    # Without ipMasq: the plugin finds the rules to remove by the interface that is missing here.
    node.network({**BRIDGE, "ipMasq": False}, TUNING, FIREWALL)
    pod = sandbox()
    first = node.attach(pod)
    node.stop()
    with node:
        assert node.attach(pod) == first
        node.stop()
    with node:
        run("ip", "link", "del", "eth0", netns=first.netns_path)
        with pytest.raises(Exception, match=r'plugin "bridge" of network "net" failed \(CHECK\)'):
            node.attach(pod)
        assert node.detach(pod)
        assert node.attach(pod).addresses
        assert node.detach(pod)


def test_dns_reaches_a_plugin_that_asks_for_it(node: Node) -> None:
    fake = node.fake()
    node.network({**BRIDGE}, {"type": "fake", "capabilities": {"dns": True}})
    fake.on("ADD", "sed -e 's/.*\"prevResult\": //' -e 's/}$//' $call.stdin; exit 0")
    node.attach(sandbox(dns=DnsConfig(servers=("10.0.0.10",), searches=("svc.local",))))
    [add] = fake.calls("ADD")
    assert add.stdin["runtimeConfig"] == {"dns": {"servers": ["10.0.0.10"], "searches": ["svc.local"], "options": []}}
    node.detach(sandbox())


def test_porto_l3_network_takes_addresses_and_gives_them_back(tmp_path: Path) -> None:
    with Node(tmp_path, bin_dirs=[REAL_PLUGINS], NetType="L3") as node:
        node.network({"type": "host-local", "ipam": RANGES})
        attachment = node.attach(sandbox())
        assert attachment.netns_path == ""
        assert attachment.addresses == ("10.81.0.2", "fd81::2")
        assert [interface.name for interface in attachment.interfaces] == ["eth0"]
        assert len(leases()) == 2
        assert node.detach(sandbox())
        assert leases() == []
