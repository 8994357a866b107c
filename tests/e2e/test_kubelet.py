"""A real kubelet on the node, without an API server: ``KUBELET=/usr/bin/kubelet make test`` (1.31 or later).

It is the client that all this is for. What it makes of static pods is asked of the kubelet itself.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.conftest import pull
from tests.e2e.pods import until
from tests.streaming.forward_client import Forwarder
from tests.streaming.spdy_client import SpdyCommand
from tests.streaming.websocket_client import WebSocketCommand
from tools.node import Node
from tools.registry import LocalRegistry

KUBELET = os.environ.get("KUBELET", "")
if not KUBELET:
    pytest.skip("there is no kubelet: KUBELET=PATH names one", allow_module_level=True)
pytestmark = pytest.mark.timeout(600)

HOST = "node1"
PORT = 10250
_TLS = ssl.create_default_context()
_TLS.check_hostname, _TLS.verify_mode = False, ssl.CERT_NONE  # its certificate is one it has made itself


class Kubelet:
    """A kubelet that makes the pods it finds in a directory.

    :param features: feature gates that are on.
    """

    def __init__(self, node: Node, directory: Path, features: Sequence[str]) -> None:
        self.node = node
        self.directory = directory
        self.pods = directory / "manifests"
        self.pods.mkdir(parents=True)
        endpoint = f"unix://{node.socket}"
        nothing = dict.fromkeys(
            ("memory.available", "nodefs.available", "imagefs.available", "nodefs.inodesFree", "imagefs.inodesFree"),
            "0%",
        )
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "staticPodPath": str(self.pods), "fileCheckFrequency": "1s", "podLogsDir": str(directory / "logs"),
            "containerRuntimeEndpoint": endpoint, "imageServiceEndpoint": endpoint,
            "cgroupDriver": "cgroupfs", "cgroupsPerQOS": False, "enforceNodeAllocatable": [], "failCgroupV1": False,
            "failSwapOn": False, "evictionHard": nothing, "makeIPTablesUtilChains": False, "resolvConf": "",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"}, "address": "127.0.0.1", "port": PORT,
            "volumePluginDir": str(directory / "plugins"), "featureGates": dict.fromkeys(features, True),
            "containerLogMaxSize": "100Ki", "containerLogMaxFiles": 3, "containerLogMonitorInterval": "3s",
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            *(KUBELET, f"--config={self.directory}/config.json", f"--root-dir={self.directory}/root"),
            *(f"--cert-dir={self.directory}/pki", f"--hostname-override={HOST}", "--node-ip=127.0.0.1", "--v=2"),
        ]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self.serves)

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait()

    def serves(self) -> bool:
        try:
            return self.get("/healthz") == "ok"
        except OSError:
            assert self._process is not None
            assert self._process.poll() is None, (self.directory / "log").read_text()[-3000:]
            return False

    def get(self, path: str, method: str = "GET", **query: str) -> str:
        url = f"https://127.0.0.1:{PORT}{path}?{urlencode(query)}"
        request = urllib.request.Request(url, method=method)
        with urllib.request.urlopen(request, context=_TLS, timeout=60) as answer:
            body: bytes = answer.read()
            return body.decode()

    def url(self, what: str, pod: str, container: str = "", **query: str) -> str:
        """Of a stream to a pod."""
        path = "/".join(filter(None, (what, "default", f"{pod}-{HOST}", container)))
        return f"https://127.0.0.1:{PORT}/{path}?{urlencode(query)}"

    def make(self, name: str, **spec: Any) -> None:
        metadata = {"name": name, "namespace": "default", "labels": {"app": name}}
        tree = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        partial = self.directory / f"{name}.json"
        partial.write_text(json.dumps(tree))
        partial.rename(self.pods / f"{name}.json")

    def status(self, pod: str) -> dict[str, Any]:
        """A pod's status; empty while the kubelet has none."""
        for item in json.loads(self.get("/pods"))["items"] or []:
            if item["metadata"]["name"] == f"{pod}-{HOST}":
                found: dict[str, Any] = item["status"]
                return found
        return {}

    def container(self, pod: str) -> dict[str, Any]:
        """The status of a pod's first container."""
        found = self.status(pod).get("containerStatuses") or [{"state": {}, "restartCount": 0}]
        status: dict[str, Any] = found[0]
        return status

    def ready(self, pod: str) -> bool:
        conditions = {each["type"]: each["status"] for each in self.status(pod).get("conditions") or []}
        return conditions.get("Ready") == "True"

    def ended(self, pod: str) -> dict[str, Any]:
        """How a pod's first container has ended, once it has."""
        state: dict[str, Any] = until(lambda: self.container(pod)["state"].get("terminated"))
        return state

    def looks(self) -> int:
        """How often it has looked at all pods."""
        name = "kubelet_pleg_relist_duration_seconds_count"
        return next(int(line.split()[1]) for line in self.get("/metrics").splitlines() if line.startswith(name))

    def run(self, pod: str, container: str, command: str) -> str:
        return self.get(f"/run/default/{pod}-{HOST}/{container}", "POST", cmd=command)


@pytest.fixture(scope="module", params=[(), ("EventedPLEG", "PodAndContainerStatsFromCRI")], ids=["usual", "events"])
def kubelet(
    request: pytest.FixtureRequest, registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kubelet]:
    """A kubelet with a few pods of each kind."""
    directory = tmp_path_factory.mktemp("kubelet")
    node = Node(directory / "node", registry=registry, subnet="10.91.0.0/16", bridge="cni-kubelet")
    with node:
        made = Kubelet(node, directory, request.param)
        _make_pods(made, pull(node, f"{registry.address}/public/busybox:1"), f"{registry.address}/public/nothing:1")
        made.start()
        try:
            yield made
        finally:
            made.stop()
            node.remove_pods()


def _make_pods(kubelet: Kubelet, image: str, missing: str) -> None:
    (kubelet.directory / "shared").mkdir()
    (kubelet.directory / "shared" / "file").write_text("from the node\n")
    web = {
        "name": "httpd", "image": image, "command": ["httpd", "-f", "-p", "8080", "-h", "/data"],
        "volumeMounts": [
            {"name": "data", "mountPath": "/data", "readOnly": True},
            {"name": "memory", "mountPath": "/memory"},
            {"name": "node", "mountPath": "/file", "subPath": "file"},
            {"name": "info", "mountPath": "/info"},
        ],
        "env": [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "resources": {"limits": {"memory": "64Mi", "cpu": "500m"}},
        "securityContext": {
            "runAsUser": 1000, "runAsGroup": 1000, "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
        },
        "readinessProbe": {"httpGet": {"path": "/index.html", "port": 8080}, "periodSeconds": 1},
        "livenessProbe": {"exec": {"command": ["test", "-e", "/data/index.html"]}, "periodSeconds": 1},
        "lifecycle": {"postStart": {"exec": {"command": ["true"]}}, "preStop": {"exec": {"command": ["true"]}}},
    }  # fmt: skip
    sidecar = _shell("side", image, "trap 'exit 0' TERM; while :; do echo side; sleep 1 & wait; done")
    kubelet.make(
        "web",
        initContainers=[
            _shell("init", image, "echo made > /data/index.html")
            | {"volumeMounts": [{"name": "data", "mountPath": "/data"}]},
            sidecar | {"restartPolicy": "Always", "startupProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1}},
        ],
        containers=[web],
        volumes=[
            {"name": "data", "emptyDir": {}},
            {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            {"name": "node", "hostPath": {"path": str(kubelet.directory / "shared")}},
            {
                "name": "info",
                "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]},
            },
        ],
        securityContext={"fsGroup": 2000, "supplementalGroups": [3000]},
        hostname="webby",
        dnsPolicy="None",
        dnsConfig={"nameservers": ["10.0.0.10"], "searches": ["x.test"], "options": [{"name": "ndots", "value": "5"}]},
        hostAliases=[{"ip": "192.0.2.4", "hostnames": ["alias.test"]}],
        terminationGracePeriodSeconds=5,
    )
    soon = {"terminationGracePeriodSeconds": 1}
    kubelet.make("crash", containers=[_shell("c", image, "echo I crash; exit 3")], **soon)
    once = _shell("c", image, "printf bye > /dev/termination-log; exit 7")
    kubelet.make("once", restartPolicy="Never", containers=[once])
    greedy = _shell("c", image, "sleep 1; tail /dev/zero") | {"resources": {"limits": {"memory": "16Mi"}}}
    kubelet.make("greedy", restartPolicy="Never", containers=[greedy])
    kubelet.make("missing", containers=[{"name": "c", "image": missing}])
    privileged = _shell("c", image, "sleep 1000") | {"securityContext": {"privileged": True}}
    kubelet.make("host", hostNetwork=True, hostPID=True, containers=[privileged], **soon)
    loud = _shell("loud", image, "trap 'exit 0' TERM; while :; do date; usleep 2000; done")
    kubelet.make("shared", shareProcessNamespace=True, containers=[_shell("a", image, "sleep 1234"), loud], **soon)
    mortal = _shell("c", image, "touch /tmp/ok; sleep 3; rm /tmp/ok; sleep 1000")
    mortal["livenessProbe"] = {"exec": {"command": ["cat", "/tmp/ok"]}, "periodSeconds": 1, "failureThreshold": 1}
    kubelet.make("mortal", containers=[mortal], **soon)


def _shell(name: str, image: str, script: str) -> dict[str, Any]:
    return {"name": name, "image": image, "command": ["sh", "-c", script]}


def test_a_pod_is_as_it_was_wanted(kubelet: Kubelet) -> None:
    until(lambda: kubelet.ready("web"))
    status = kubelet.status("web")
    assert [each["name"] for each in status["initContainerStatuses"]] == ["init", "side"]
    assert status["podIP"].startswith("10.91.")
    with urllib.request.urlopen(f"http://{status['podIP']}:8080/index.html", timeout=20) as answer:
        assert answer.read() == b"made\n"

    def shown(command: str) -> str:
        return kubelet.run("web", "httpd", command)

    assert {"1000", "2000", "3000"} <= set(shown("id -G").split())
    assert {"nameserver 10.0.0.10", "search x.test", "options ndots:5"} <= set(
        shown("cat /etc/resolv.conf").splitlines()
    )
    assert "192.0.2.4\talias.test" in shown("cat /etc/hosts")
    assert shown("hostname") == "webby\n"
    assert shown("cat /file") == "from the node\n"
    assert 'app="web"' in shown("cat /info/labels")
    assert f"IP={status['podIP']}\n" in shown("env")
    assert " 1024 " in shown("df -k /memory")
    process = shown("cat /proc/self/status")
    assert all(line in process for line in ("CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"))
    assert kubelet.get(f"/containerLogs/default/web-{HOST}/side").startswith("side\n")


def test_containers_that_end(kubelet: Kubelet) -> None:
    once = kubelet.ended("once")
    assert (once["exitCode"], once["reason"], once["message"]) == (7, "Error", "bye")
    greedy = kubelet.ended("greedy")
    assert (greedy["exitCode"], greedy["reason"]) == (137, "OOMKilled")
    until(lambda: kubelet.container("crash")["restartCount"] >= 1)
    until(lambda: kubelet.container("mortal")["restartCount"] >= 1)
    waiting = until(lambda: kubelet.container("missing")["state"].get("waiting"))
    assert waiting["reason"] in ("ErrImagePull", "ImagePullBackOff")


def test_namespaces(kubelet: Kubelet) -> None:
    until(lambda: kubelet.ready("host") and kubelet.ready("shared"))
    assert "cni-kubelet" in kubelet.run("host", "c", "ls /sys/class/net")
    assert "sleep 1234" not in kubelet.run("web", "httpd", "ps")
    processes = kubelet.run("shared", "loud", "ps")
    assert "sleep 1234" in processes
    assert "pause" in processes


@pytest.mark.parametrize("client", [SpdyCommand, WebSocketCommand])
def test_exec_through_it(kubelet: Kubelet, client: type[SpdyCommand] | type[WebSocketCommand]) -> None:
    until(lambda: kubelet.ready("web"))
    url = kubelet.url("exec", "web", "httpd", command="cat", input="1", output="1", error="1")
    data = os.urandom(1_000_000)
    with _connected(client, url) as command:
        command.write(data)
        command.close_stdin()
        assert command.exit_code() == 0
        assert command.out == data


def _connected(client: Any, url: str) -> Any:
    return closing(
        client(url, stdin=True, tls=_TLS) if client is SpdyCommand else client(url, "v5.channel.k8s.io", tls=_TLS)
    )


def test_port_forward_through_it(kubelet: Kubelet) -> None:
    until(lambda: kubelet.ready("web"))
    forwarder = Forwarder(kubelet.url("portForward", "web"), tls=_TLS)
    connection = forwarder.connect(8080)
    connection.send(b"GET /index.html HTTP/1.0\r\n\r\n")
    assert connection.wait_end().endswith(b"\r\n\r\nmade\n")
    forwarder.close()


def test_stats_and_logs(kubelet: Kubelet) -> None:
    until(lambda: kubelet.ready("web") and kubelet.ready("shared"))

    def measured() -> bool:
        pods = {pod["podRef"]["name"]: pod for pod in json.loads(kubelet.get("/stats/summary"))["pods"]}
        containers = pods.get(f"web-{HOST}", {}).get("containers", [])
        return len(containers) == 2 and all(each.get("memory", {}).get("workingSetBytes") for each in containers)

    until(measured)
    logs = kubelet.directory / "logs"
    until(lambda: len(list(logs.glob("default_shared-*/loud/*"))) >= 2, timeout_s=120)


def test_the_shim_and_the_kubelet_killed(kubelet: Kubelet) -> None:
    """Nothing is restarted for it."""
    until(lambda: kubelet.ready("web") and kubelet.ready("shared"))
    before = _lives(kubelet)
    kubelet.node.kill()
    kubelet.node.start()
    kubelet.stop()
    kubelet.start()
    until(lambda: kubelet.ready("web") and kubelet.ready("shared"))
    until(lambda: kubelet.looks() >= 1)
    assert _lives(kubelet) == before


def _lives(kubelet: Kubelet) -> dict[str, list[tuple[str, int]]]:
    return {
        pod: [(each["containerID"], each["restartCount"]) for each in kubelet.status(pod)["containerStatuses"]]
        for pod in ("web", "shared", "host")
    }


def test_pods_go(kubelet: Kubelet) -> None:
    """kubelet removes stopped sandboxes once a minute."""
    node = kubelet.node
    for path in kubelet.pods.iterdir():
        path.unlink()
    until(lambda: not node.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items, timeout_s=200)
    assert not list((node.directory / "leases").glob("*/[0-9]*"))
