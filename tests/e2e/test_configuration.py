"""Every key of portoshim.yaml does what it says: a node on which nothing is as by default."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from porto_api import Client, rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.conftest import pull
from tests.e2e.pods import Pods, failure, until
from tests.e2e.test_lifecycle import porto_socket
from tools import images
from tools.node import CNI_BIN, Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root
PARENT = "portoshim-parent"


def runtime_ready(node: Node) -> str:
    """Why pods can't run; empty when they can."""
    (condition,) = (c for c in node.cri.Status(pb.StatusRequest()).status.conditions if c.type == "RuntimeReady")
    assert condition.status == (not condition.message)
    return str(condition.message)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def make(registry: LocalRegistry, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts a node with a value of its own for each key, and others on top; one at a time."""
    images.push(images.pause(), registry, "pause", ["own"])
    for name in ("images", "node", "net.d"):
        (tmp_path / name).mkdir()
    (tmp_path / "net.d" / "10-own.conflist").write_text(
        json.dumps(
            {
                "cniVersion": "1.0.0",
                "name": "own",
                "plugins": [
                    {
                        "type": "bridge",
                        "bridge": "own0",
                        "ipam": {
                            "type": "host-local",
                            "ranges": [[{"subnet": "10.77.0.0/24"}]],
                            "dataDir": str(tmp_path / "leases"),
                        },
                    }
                ],
            }
        )
    )
    nodes: list[Node] = []

    def start(**changes: dict[str, Any]) -> Node:
        config: dict[str, dict[str, Any]] = {
            "Portoshim": {key: str(tmp_path / key) for key in ("Socket", "LogsDir", "VolumesDir", "StateDir")},
            "Porto": {"RuntimeName": "port-au-prince", "ImagesDir": str(tmp_path / "images")},
            "CNI": {
                "ConfDir": str(tmp_path / "net.d"),
                "BinDir": [str(tmp_path / "no-such-bin"), CNI_BIN],
                "NetnsDir": str(tmp_path / "netns"),
                "NetType": "netns",
            },
            "StreamingServer": {"Address": "127.0.0.3", "Port": free_port()},
            "Images": {"PauseImage": f"{registry.address}/pause:own"},
        }
        for section, keys in changes.items():
            config[section].update(keys)
        for node in nodes:
            node.close()
        nodes.append(Node(tmp_path / "node", registry=registry, config=config))
        nodes[-1].start()
        return nodes[-1]

    yield start
    nodes[-1].remove_pods()
    nodes[-1].close()


def test_each_key_is_honoured(make: Callable[..., Node], registry: LocalRegistry, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    node = make(Images={"Place": str(place)})
    assert node.cri.Version(pb.VersionRequest()).runtime_name == "port-au-prince"
    assert (tmp_path / "Socket").is_socket()
    assert (tmp_path / "LogsDir" / "portoshim.log").read_text()
    assert (tmp_path / "StateDir" / "records.db").exists()

    pods = Pods(node, pull(node, f"{registry.address}/public/busybox:1"))
    sandbox = pods.run()
    container = pods.container(sandbox)
    assert pods.shell(container, "ip -4 -o address show eth0").split()[3].startswith("10.77.0.")
    assert [path.name.endswith(sandbox) for path in (tmp_path / "netns").iterdir()] == [True]
    assert (tmp_path / "VolumesDir" / container).is_mount()
    assert list((place / "porto_layers").iterdir())
    image = node.cri.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=f"{registry.address}/pause:own"))).image
    assert image.pinned
    with Client(porto_socket(node)) as porto:
        assert porto.get_property(f"{sandbox}/pause", "state") == "running"
    request = pb.ExecRequest(container_id=container, cmd=["true"], stdout=True)
    url = urlsplit(node.cri.Exec(request).url)
    assert (url.hostname, url.port) == ("127.0.0.3", node.config()["StreamingServer"]["Port"])
    with socket.create_connection(("127.0.0.3", url.port or 0), 10):
        pass


def test_pods_run_in_the_parent_container(make: Callable[..., Node], registry: LocalRegistry) -> None:
    node = make()
    with Client(porto_socket(node)) as porto:
        porto.create_from_spec(rpc_pb2.TContainerSpec(name=PARENT, isolate=False), start=True)
    try:
        node = make(Porto={"ParentContainer": PARENT})
        assert "lacks the capabilities SYS_ADMIN; set its property" in runtime_ready(node)
        with Client(porto_socket(node)) as porto:
            porto.stop(PARENT)
            assert "it is stopped; start it" in runtime_ready(node)
            everything = porto.get_property("/", "capabilities")
            porto.set_property(PARENT, "capabilities", everything)
            porto.start(PARENT)
        assert runtime_ready(node) == ""
        pods = Pods(node, pull(node, f"{registry.address}/public/busybox:1"))
        sandbox = pods.run()
        container = pods.container(sandbox)
        assert pods.shell(container, "echo yes") == "yes\n"
        with Client(porto_socket(node)) as porto:
            assert porto.get_property(f"{PARENT}/{sandbox}/{container}", "state") == "running"
    finally:
        node.remove_pods()
        with Client(porto_socket(node)) as porto:
            porto.destroy(PARENT)


def test_the_images_directory_tells_the_file_system_when_no_place_is_named(
    make: Callable[..., Node], tmp_path: Path
) -> None:
    filesystems = make().cri.ImageFsInfo(pb.ImageFsInfoRequest()).image_filesystems
    assert [fs.fs_id.mountpoint for fs in filesystems] == [str(tmp_path / "images")]


def test_a_porto_that_does_not_answer_is_given_its_time(tmp_path: Path) -> None:
    node = Node(tmp_path, config={"Porto": {"SocketTimeout": "300ms"}, "Images": {"PauseImage": "none"}})
    node.porto_socket = str(tmp_path / "silent.sock")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(node.porto_socket)
        silent.listen(100)
        with node:
            until(lambda: failure(node.cri.Version, pb.VersionRequest())[0], lambda code: code == "DEADLINE_EXCEEDED")
            started = time.monotonic()
            code, _ = failure(node.cri.ListPodSandbox, pb.ListPodSandboxRequest())
            assert code in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
            assert time.monotonic() - started < 60  # not the five minutes of the default
