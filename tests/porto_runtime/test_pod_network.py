"""The network of a pod as Porto is told of it."""

from __future__ import annotations

import pytest
from shim_porto_runtime import pod_network, spec

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument
from shim_core.types import NetworkAttachment, NetworkInterface

PINNED = NetworkAttachment("/run/netns/net-1", ("10.1.0.5", "fd00::5"), (NetworkInterface("eth0"),))
PORTOS = NetworkAttachment("", ("10.1.0.5", "fd00::5"), (NetworkInterface("eth1"), NetworkInterface("eth2")))


def of(attachment: NetworkAttachment, **annotations: str) -> rpc_pb2.TContainerSpec:
    made = rpc_pb2.TContainerSpec()
    pod_network.into_spec(attachment, {f"portoshim.net/{key}": text for key, text in annotations.items()}, made)
    return made


def test_whose_network_it_is() -> None:
    assert pod_network.option(None) == ("inherited",)
    assert pod_network.option(PINNED) == ("netns", "net-1")
    assert pod_network.option(PORTOS) == ("L3", "eth1")
    assert pod_network.option(NetworkAttachment("", ("10.1.0.5",))) == ("L3", "eth0")


def test_only_portos_own_network_needs_addresses() -> None:
    assert of(PINNED) == rpc_pb2.TContainerSpec()
    assert [(item.dev, item.ip) for item in of(PORTOS).ip.cfg] == [("eth1", "10.1.0.5"), ("eth1", "fd00::5")]


def test_limits() -> None:
    made = of(PINNED, **{"net-tx": "1000", "net-rx": "9223372036854775807", "net-else": "x"})
    assert [(item.key, item.val) for item in made.net_limit.map] == [("default", 1000)]
    assert [(item.key, item.val) for item in made.net_rx_limit.map] == [("default", 2**63 - 1)]
    assert not made.HasField("ip")


@pytest.mark.parametrize("text", ["", "0", "-1", "+1", " 1", "1.5", "1e6", "10M", "0x10", "²", "9223372036854775808"])
@pytest.mark.parametrize("annotation", [pod_network.NET_TX, pod_network.NET_RX])
def test_what_is_no_limit_is_refused_by_name(annotation: str, text: str) -> None:
    config = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="a", namespace="b", uid="c"))
    config.annotations[annotation] = text
    with pytest.raises(InvalidArgument, match=f"annotation {annotation}: "):
        spec.check_sandbox(config)


def test_a_limit_of_any_length_is_read_at_once() -> None:
    with pytest.raises(InvalidArgument):
        pod_network.limits({pod_network.NET_TX: "9" * 100_000})
