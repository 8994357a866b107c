"""kill -9 of the whole shim, pods on a Porto, at every step of CNI's ADD and DEL: Stop and Remove give everything back.

Beyond ``tests/cni_net/test_kill.py``, the runtime's records and Porto take part.
With ``SHIM_TEST_LONG=1`` every step there is and a hundred random moments; otherwise a few of each.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from shim_core.cri.v1 import api_pb2 as pb
from tests.cni_net.support import footprint, settles, until
from tests.cni_net.test_real_plugins import FIREWALL, PORTMAP, TUNING
from tools.node import CNI_BIN, Node

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path(CNI_BIN, "bridge").exists(), reason="needs containernetworking-plugins"),
]

LONG = bool(os.environ.get("SHIM_TEST_LONG"))
MOMENTS = 100 if LONG else 4

# Passes the result on, and before that ends the daemon, whose child it is, where the file says so.
STRIKE = """\
#!/bin/sh
input=$(cat)
position=$(printf %s "$input" | sed 's/.*"position": \\([0-9]*\\).*/\\1/')
result=$(printf %s "$input" | sed -n 's/.*"prevResult": \\(.*\\)}$/\\1/p')
if [ "$(cat "$0.at" 2>/dev/null)" = "$CNI_COMMAND $position" ]; then rm "$0.at"; kill -9 $PPID; fi
if [ "$CNI_COMMAND" = ADD ]; then printf '%s\\n' "${result:-{\\"cniVersion\\": \\"1.0.0\\"\\}}"; fi
"""


def real_plugins(node: Node) -> list[dict[str, Any]]:
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": "10.84.0.0/24"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": str(node.directory / "leases"),
    }
    bridge = {"type": "bridge", "bridge": "cni-kill", "isGateway": True, "ipMasq": True, "ipam": ipam}
    bandwidth = {"type": "bandwidth", "capabilities": {"bandwidth": True}}
    return [bridge, TUNING, bandwidth, FIREWALL, PORTMAP]


def striking(plugins: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plugins with one before, between and behind them that may end the daemon."""
    chain: list[dict[str, Any]] = [{"type": "strike", "position": 0}]
    for position, plugin in enumerate(plugins, 1):
        chain += [plugin, {"type": "strike", "position": position}]
    return chain


STEPS = [(command, position) for command in ("ADD", "DEL") for position in range(6)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    here = tmp_path / "node"
    (here / "bin").mkdir(parents=True)
    config: dict[str, dict[str, Any]] = {
        "CNI": {"BinDir": [str(here / "bin"), CNI_BIN]},
        "Images": {"PauseImage": "none"},
    }
    made = Node(here, debug=True, config=config)
    made.start()
    yield made
    if not made.running:
        made.start()
    made.remove_pods()
    made.close()


def configure(node: Node, plugins: list[dict[str, Any]]) -> None:
    tree = {"name": "kill", "cniVersion": "1.0.0", "plugins": plugins}
    (node.directory / "cni" / "05-kill.conflist").write_text(json.dumps(tree))


def config_of(number: int) -> pb.PodSandboxConfig:
    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name=f"pod{number}", namespace="test", uid=f"uid-{number}"),
        annotations={"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "10M"},
    )
    config.port_mappings.add(protocol=pb.TCP, container_port=80, host_port=31080)
    return config


def live(node: Node, config: pb.PodSandboxConfig) -> None:
    """A pod's whole life, as far as it comes."""
    try:
        sandbox = node.cri.RunPodSandbox(pb.RunPodSandboxRequest(config=config)).pod_sandbox_id
        node.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox))
        node.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox))
    except grpc.RpcError as err:
        assert err.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED), err


def clear(node: Node) -> None:
    """What kubelet does after the daemon's return: all pods it finds are stopped and removed, until that has worked."""
    errors: list[str] = []

    def cleared() -> bool:
        try:
            node.remove_pods()
        except grpc.RpcError as err:
            # Porto may still be starting.
            assert err.code() is grpc.StatusCode.UNAVAILABLE, err
            errors.append(str(err.details()))
            return False
        return True

    assert until(cleared, timeout_s=60.0), errors[-1]


def look(node: Node) -> dict[str, Any]:
    return footprint(*places(node))


def places(node: Node) -> tuple[str, ...]:
    return (str(node.directory / "leases"), str(node.directory / "state" / "cni"))


def before_of(node: Node) -> tuple[dict[str, Any], float]:
    """What the node looks like with no pod on it, after there has been one; and how long that one took."""
    live(node, config_of(0))
    started = time.monotonic()
    live(node, config_of(1))
    took_s = time.monotonic() - started
    assert not node.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items
    assert until(lambda: not [name for name in look(node)["interfaces"] if name.startswith("veth")])
    return look(node), took_s


def test_at_every_step(node: Node) -> None:
    strike = node.directory / "bin" / "strike"
    strike.write_text(STRIKE)
    strike.chmod(0o755)
    configure(node, striking(real_plugins(node)))
    before, _ = before_of(node)
    for command, position in STEPS if LONG else random.sample(STEPS, 3):
        at = strike.with_name("strike.at")
        at.write_text(f"{command} {position}")
        live(node, config_of(2))
        assert until(lambda: not node.running), f"{command} {position}: it was not killed"
        node.kill()
        assert not at.exists()
        node.start()
        clear(node)
        assert settles(before, *places(node)) == before, f"killed at {command}, before plugin {position}"


def test_at_any_moment(node: Node) -> None:
    configure(node, real_plugins(node))
    before, whole_s = before_of(node)
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    for number in range(MOMENTS):
        after_s = moments.uniform(0, whole_s)
        life = threading.Thread(target=live, args=(node, config_of(number + 2)))
        life.start()
        time.sleep(after_s)
        node.kill()
        life.join()
        node.start()
        clear(node)
        after = settles(before, *places(node))
        assert after == before, f"round {number}, seed {seed}: killed after {after_s * 1000:.1f} ms"
