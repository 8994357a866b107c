"""Pods on a network, through the whole shim: what kubelet, the pods and those outside see of it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from porto_api import Client
from shim_core.cri.v1 import api_pb2 as pb
from tests.cni_net.support import FakePlugin, footprint, run, settles
from tests.cni_net.test_real_plugins import FIREWALL, PORTMAP, TUNING, get, no_doubles, outside, web_server
from tests.e2e.conftest import pull, require_crictl
from tests.e2e.pods import Pods, failure, until
from tests.e2e.test_lifecycle import porto_socket
from tools.node import CNI_BIN, Node
from tools.registry import LocalRegistry

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not Path(CNI_BIN, "bridge").exists(), reason="needs containernetworking-plugins"),
]
__all__ = ["no_doubles", "outside"]

HOST_PORT = 31080
BANDWIDTH = {"type": "bandwidth", "capabilities": {"bandwidth": True}}
WEB = ("httpd", "-f", "-p", "80", "-h", "/www")


def ipam(node: Node) -> dict[str, Any]:
    return {
        "type": "host-local",
        "ranges": [[{"subnet": "10.85.0.0/24"}], [{"subnet": "fd85::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        "dataDir": str(node.directory / "leases"),
    }


def bridge(node: Node) -> dict[str, Any]:
    return {
        "type": "bridge", "bridge": "cni-e2e", "isGateway": True, "ipMasq": True, "hairpinMode": True,
        "ipam": ipam(node),
    }  # fmt: skip


def configure(node: Node, *plugins: dict[str, Any]) -> None:
    """The pods' network from now on."""
    tree = {"name": "e2e", "cniVersion": "1.0.0", "plugins": plugins}
    path = node.directory / "cni" / "05-e2e.conflist"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(tree))
    temporary.rename(path)


@contextmanager
def started(directory: Path, registry: LocalRegistry, **keys: Any) -> Iterator[Node]:
    """A node of these tests' own, with more keys in the section CNI."""
    bin_dirs = [str(directory / "bin"), CNI_BIN]
    (directory / "bin").mkdir()
    with Node(directory, registry=registry, debug=True, config={"CNI": {"BinDir": bin_dirs, **keys}}) as node:
        yield node
        node.remove_pods()


@pytest.fixture(scope="module")
def module_node(registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with started(tmp_path_factory.mktemp("node"), registry) as node:
        yield node


@pytest.fixture
def own(module_node: Node) -> Iterator[Node]:
    configure(module_node, bridge(module_node), TUNING, BANDWIDTH, FIREWALL, PORTMAP)
    yield module_node
    module_node.remove_pods()
    for path in (module_node.directory / "cni").iterdir():
        path.unlink()


@pytest.fixture
def own_pods(own: Node, registry: LocalRegistry) -> Pods:
    return Pods(own, pull(own, f"{registry.address}/public/busybox:1"))


def web(pods: Pods, **fields: Any) -> tuple[str, str]:
    """A pod with a web server that says "web": sandbox and container."""
    sandbox = pods.run(**fields)
    script = f"mkdir /www; echo web > /www/index.html; exec {' '.join(WEB)}"
    container = pods.container(sandbox, "sh", "-c", script)
    until(lambda: pods.exec(container, "wget", "-q", "-O", "-", "http://127.0.0.1/").exit_code == 0)
    return sandbox, container


def addresses(pods: Pods, sandbox: str) -> list[str]:
    network = pods.sandbox_status(sandbox).network
    return [network.ip, *(item.ip for item in network.additional_ips)]


def url(address: str, port: int) -> str:
    return f"http://[{address}]:{port}/" if ":" in address else f"http://{address}:{port}/"


def fetch(pods: Pods, container: str, address: str, port: int) -> str:
    return pods.shell(container, f"wget -q -O - {url(address, port)}").strip()


def leases(node: Node) -> list[str]:
    return sorted(path.name for path in (node.directory / "leases").glob("*/[0-9a-f]*"))


def look(node: Node) -> dict[str, Any]:
    return footprint(node.directory / "leases", node.directory / "state" / "cni")


def test_pods_the_host_and_those_outside_reach_the_web_server_in_a_pod(own: Node, own_pods: Pods, outside: str) -> None:
    mappings = [pb.PortMapping(protocol=pb.TCP, container_port=80, host_port=HOST_PORT)]
    own_pods.run(port_mappings=mappings)
    own_pods.remove_all()  # plugins keep a few things for ever
    before = settles(look(own), own.directory / "leases", own.directory / "state" / "cni")
    server, inside = web(own_pods, port_mappings=mappings)
    client = own_pods.container(own_pods.run())
    ipv4, ipv6 = addresses(own_pods, server)
    assert ipv4.startswith("10.85.0.")
    assert ipv6.startswith("fd85::")
    for address in (ipv4, ipv6):
        assert get(address, 80).strip() == "web", "the node reaches the pod"
        assert fetch(own_pods, client, address, 80) == "web", "another pod reaches the pod"
    for address in ("192.0.2.1", "2001:db8::1"):
        assert get(address, HOST_PORT, outside).strip() == "web", "the host port leads to the pod from outside"
        assert get(address, HOST_PORT).strip() == "web", "the host port leads to the pod on the node"
        assert fetch(own_pods, client, address, HOST_PORT) == "web", "the host port leads to it from another pod"
        assert fetch(own_pods, inside, address, HOST_PORT) == "web", "the host port leads the pod to itself"
    with web_server("/proc/self/ns/net", 8001, "host"), web_server(outside, 8002, "outside"):
        for gateway in ("10.85.0.1", "fd85::1"):
            assert fetch(own_pods, client, gateway, 8001) == "host", "a pod reaches the node"
        for address in ("192.0.2.2", "2001:db8::2"):
            assert fetch(own_pods, client, address, 8002) == "outside", "a pod reaches the world"
    assert len(leases(own)) == 4
    own_pods.remove_all()
    assert settles(before, own.directory / "leases", own.directory / "state" / "cni") == before


def test_inspectp_shows_the_cni_result(own: Node, own_pods: Pods) -> None:
    require_crictl()
    sandbox = own_pods.run()
    answer = json.loads(own.crictl("inspectp", sandbox).stdout)
    result = answer["info"]["cniResult"]
    assert result["cniVersion"] == "1.1.0"
    assert [config["address"].split("/")[0] for config in result["ips"]] == addresses(own_pods, sandbox)
    [inside] = [item for item in result["interfaces"] if item.get("sandbox")]
    assert inside["name"] == "eth0"
    assert inside["sandbox"] == answer["info"]["network"]["netns_path"]
    assert run("ip", "-br", "link", "show", "eth0", netns=inside["sandbox"]).split()[2] == inside["mac"]
    assert answer["status"]["network"]["ip"] == addresses(own_pods, sandbox)[0]
    assert answer["status"]["network"]["additionalIps"] == [{"ip": addresses(own_pods, sandbox)[1]}]


def test_a_pod_on_the_hosts_network_has_neither_address_nor_lease(own: Node, own_pods: Pods) -> None:
    before = look(own)
    # The limits of such a pod would be the node's.
    config = own_pods.config(annotations={"portoshim.net/net-tx": "1000000", "portoshim.net/net-rx": "1000000"})
    config.linux.security_context.namespace_options.network = pb.NODE
    sandbox = own_pods.run(config)
    assert addresses(own_pods, sandbox) == [""]
    assert look(own) == before
    container = own_pods.container(sandbox)
    assert own_pods.shell(container, "readlink /proc/self/ns/net").strip() == os.readlink("/proc/self/ns/net")
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=sandbox, verbose=True)
    info = json.loads(own.cri.PodSandboxStatus(request).info["info"])
    assert "cniResult" not in info
    assert info["network"] is None
    own_pods.remove_all()
    assert look(own) == before


def test_the_error_names_the_plugin_and_everything_comes_back(own: Node, own_pods: Pods) -> None:
    broken = FakePlugin(own.directory / "bin", "broken")
    configure(own, bridge(own), TUNING, FIREWALL, {"type": "broken"}, PORTMAP)
    pass_on = "sed -e 's/.*\"prevResult\": //' -e 's/}$//' $call.stdin; exit 0"
    mappings = [pb.PortMapping(protocol=pb.TCP, container_port=80, host_port=HOST_PORT)]
    broken.on("ADD", pass_on)
    own_pods.run(port_mappings=mappings)
    own_pods.remove_all()
    before = settles(look(own), own.directory / "leases", own.directory / "state" / "cni")

    broken.on("ADD", "echo no route to nowhere >&2; exit 1")
    config = own_pods.config(port_mappings=mappings)
    code, text = failure(own_pods.run, config)
    assert code == "UNAVAILABLE"
    assert 'plugin "broken" of network "e2e" failed (ADD)' in text
    assert "no route to nowhere" in text
    assert settles(before, own.directory / "leases", own.directory / "state" / "cni") == before
    assert not own.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items

    broken.on("ADD", pass_on)
    sandbox = own_pods.run(config)
    held = leases(own)
    broken.on("DEL", "echo not now >&2; exit 1")
    for _ in range(3):
        code, text = failure(own_pods.stop_sandbox, sandbox)
        assert code == "UNAVAILABLE"
        assert 'plugin "broken" of network "e2e" failed (DEL)' in text
        assert "not now" in text
        assert failure(own_pods.remove_sandbox, sandbox)[0] == "UNAVAILABLE"
        assert leases(own) == held
        [item] = own.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items
        assert (item.id, item.state) == (sandbox, pb.SANDBOX_NOTREADY)
    broken.on("DEL", None)
    own_pods.remove_all()
    assert settles(before, own.directory / "leases", own.directory / "state" / "cni") == before


def test_an_address_whose_add_and_del_fail_is_kept_until_kubelet_has_it_back(own: Node, own_pods: Pods) -> None:
    """RunPodSandbox can't undo it: the sandbox stays listed, for Stop and Remove."""
    broken = FakePlugin(own.directory / "bin", "broken")
    configure(own, bridge(own), {"type": "broken"})
    before = look(own)
    for command in ("ADD", "DEL"):
        broken.on(command, "exit 1")
    assert failure(own_pods.run)[0] == "UNAVAILABLE"
    [item] = own.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items
    assert item.state == pb.SANDBOX_NOTREADY
    assert failure(own_pods.stop_sandbox, item.id)[0] == "UNAVAILABLE"
    own.kill()
    own.start()
    assert failure(own_pods.remove_sandbox, item.id)[0] == "UNAVAILABLE"
    broken.on("DEL", None)
    own_pods.stop_sandbox(item.id)
    own_pods.remove_sandbox(item.id)
    assert leases(own) == []
    assert look(own)["namespaces"] == before["namespaces"]


def test_limits_of_annotations_are_portos(own: Node, own_pods: Pods) -> None:
    sandbox = own_pods.run(annotations={"portoshim.net/net-tx": "1000000", "portoshim.net/net-rx": "2000000"})
    with Client(porto_socket(own)) as porto:
        assert porto.get_property(sandbox, "net_limit") == "default: 1000000"
        assert porto.get_property(sandbox, "net_rx_limit") == "default: 2000000"
    for text in ("", "10M", "-1", "0", "1e6", "9" * 30):
        code, message = failure(own_pods.run, annotations={"portoshim.net/net-rx": text})
        assert (code, "annotation portoshim.net/net-rx" in message) == ("INVALID_ARGUMENT", True)


class TestPortosOwnNetwork:
    """``NetType`` other than netns. Porto routes addresses that belong to one of the node's networks."""

    @pytest.fixture
    def l3(self, registry: LocalRegistry, tmp_path: Path) -> Iterator[Node]:
        run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1")
        for address in ("10.85.0.254/24", "fd85::ffff/64"):
            run("ip", "addr", "add", address, "dev", "up0", *(["nodad"] if ":" in address else []))
        for name in ("up0", "up1"):
            run("ip", "link", "set", name, "up")
        (tmp_path / "node").mkdir()
        with started(tmp_path / "node", registry, NetType="L3") as node:
            configure(node, {"type": "host-local", "ipam": ipam(node)})
            yield node
        run("ip", "link", "del", "up0")

    @pytest.fixture
    def l3_pods(self, l3: Node, registry: LocalRegistry) -> Pods:
        return Pods(l3, pull(l3, f"{registry.address}/public/busybox:1"))

    @pytest.mark.skipif("PORTO_SOCKET" not in os.environ, reason="the embedded Porto makes no interfaces")
    def test_pods_and_the_node_reach_each_other(self, l3: Node, l3_pods: Pods) -> None:
        before = look(l3)
        config = l3_pods.config(annotations={"portoshim.net/net-rx": "100000000"})
        config.linux.sysctls["net.ipv4.ip_unprivileged_port_start"] = "79"
        server, inside = web(l3_pods, config=config)
        client = l3_pods.container(l3_pods.run())
        ipv4, ipv6 = addresses(l3_pods, server)
        assert (ipv4, ipv6) == ("10.85.0.2", "fd85::2")
        shown = l3_pods.shell(inside, "ip -o address show eth0")
        assert ipv4 in shown
        assert ipv6 in shown
        for address in (ipv4, ipv6):
            assert get(address, 80).strip() == "web", "the node reaches the pod"
            assert fetch(l3_pods, client, address, 80) == "web", "another pod reaches the pod"
        with web_server("/proc/self/ns/net", 8001, "host"):
            for address in ("10.85.0.254", "fd85::ffff"):
                assert fetch(l3_pods, client, address, 8001) == "host", "a pod reaches the node"
        assert l3_pods.shell(inside, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start") == "79\n"
        assert Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text() != "79\n", "the node's stays"
        with Client(porto_socket(l3)) as porto:
            assert porto.get_property(server, "net") == "L3 eth0"
            assert porto.get_property(server, "net_rx_limit") == "default: 100000000"
        require_crictl()
        with l3.crictl_process("port-forward", server, "28766:80") as process:
            assert process.stdout is not None
            assert "Forwarding from" in process.stdout.readline()
            assert until(partial(get, "127.0.0.1", 28766)).strip() == "web"
            process.terminate()
        l3.kill()
        l3.start()
        assert addresses(l3_pods, server) == [ipv4, ipv6]
        l3_pods.remove_all()
        assert leases(l3) == []
        assert settles(before, l3.directory / "leases", l3.directory / "state" / "cni") == before

    @pytest.mark.skipif("PORTO_SOCKET" in os.environ, reason="portod makes interfaces")
    def test_a_porto_that_can_not_make_it_keeps_no_address(self, l3: Node, l3_pods: Pods) -> None:
        before = look(l3)
        code, text = failure(l3_pods.run)
        assert (code, "the embedded Porto makes no interfaces" in text) == ("UNIMPLEMENTED", True)
        assert settles(before, l3.directory / "leases", l3.directory / "state" / "cni") == before
        assert not l3.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items


def test_networks_follow_the_directory_and_pods_keep_theirs(own: Node, own_pods: Pods) -> None:
    """A CNI provider is replaced while pods run: new ones get the new network, old ones go with the old one."""
    first = own_pods.run()
    other = {**bridge(own), "bridge": "cni-new"}
    other["ipam"] = {**ipam(own), "ranges": [[{"subnet": "10.86.0.0/24"}]], "routes": []}
    tree = {"name": "other", "cniVersion": "0.4.0", "plugins": [other]}
    (own.directory / "cni" / "01-other.conflist").write_text(json.dumps(tree))
    (own.directory / "cni" / "05-e2e.conflist").unlink()
    second = own_pods.run()
    assert [addresses(own_pods, sandbox)[0].rpartition(".")[0] for sandbox in (first, second)] == [
        "10.85.0", "10.86.0",
    ]  # fmt: skip
    assert len(leases(own)) == 3
    own_pods.stop_sandbox(first)
    assert leases(own) == ["10.86.0.2"]
    for path in (own.directory / "cni").iterdir():
        path.unlink()
    conditions = own.cri.Status(pb.StatusRequest()).status.conditions
    [network] = [condition for condition in conditions if condition.type == "NetworkReady"]
    assert (network.status, network.reason) == (False, "NetworkPluginNotReady")
    assert "no network configuration found" in network.message
    own_pods.remove_all()
    assert leases(own) == []
    subprocess.run(["ip", "link", "del", "cni-new"], check=True)
