"""What pods ask for, and what they can't smuggle in."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shim_cni_net.capabilities import capability_args, check_id, cni_args, parse_bits_per_second

from shim_core.errors import InvalidArgument
from shim_core.types import DnsConfig, PortMapping
from tests.cni_net.support import sandbox

ANNOTATIONS = "io.kubernetes.cri.pod-annotations"


def arguments(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in capability_args(sandbox(**fields)).items() if key != ANNOTATIONS}


def test_cni_args_are_the_five_keys() -> None:
    pod = sandbox(name="web-0", namespace="kube-system", uid="8e9e-1")
    assert cni_args(pod) == (
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=web-0;"
        f"K8S_POD_INFRA_CONTAINER_ID={pod.sandbox_id};K8S_POD_UID=8e9e-1"
    )


@pytest.mark.parametrize("field", ["name", "namespace", "uid"])
@pytest.mark.parametrize("value", ["a;IP=10.0.0.1", "a=b", "a\nb", "a\0", "a b", "a,b", "ü", "x" * 254, "a;"])
def test_cni_args_cannot_be_added_to(field: str, value: str) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises(InvalidArgument, match=f"metadata.{field}: "):
        cni_args(sandbox(**fields))


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_cni_args_have_five_keys_or_are_refused(name: str, namespace: str, uid: str) -> None:
    pod = sandbox(name=name, namespace=namespace, uid=uid)
    try:
        pairs = [item.split("=") for item in cni_args(pod).split(";")]
    except InvalidArgument:
        return
    assert dict(pairs) == {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": namespace,
        "K8S_POD_NAME": name,
        "K8S_POD_INFRA_CONTAINER_ID": pod.sandbox_id,
        "K8S_POD_UID": uid,
    }


@pytest.mark.parametrize("sandbox_id", ["", ".x", "-x", "../x", "a/b", "a;b", "a\n", "x" * 129, "*"])
def test_sandbox_ids_are_container_ids(sandbox_id: str) -> None:
    with pytest.raises(InvalidArgument, match=r"sandbox id"):
        check_id(sandbox_id)


def test_annotations_are_passed_on_whole() -> None:
    annotations = {"a": "1", "kubernetes.io/ingress-bandwidth": "1M", "b;c": "=\n"}
    assert capability_args(sandbox(annotations=annotations))[ANNOTATIONS] == annotations
    assert arguments() == {}


def test_port_mappings() -> None:
    mappings = (
        PortMapping("tcp", 80, 8080),
        PortMapping("udp", 53, 5353, host_ip="10.0.0.1"),
        PortMapping("sctp", 1, 65535),
        PortMapping("tcp", 9090, 0),
    )
    assert arguments(port_mappings=mappings)["portMappings"] == [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "10.0.0.1"},
        {"hostPort": 65535, "containerPort": 1, "protocol": "sctp"},
    ]
    assert "portMappings" not in arguments(port_mappings=mappings[3:])


@pytest.mark.parametrize(
    ("mapping", "field"),
    [
        (PortMapping("tcp", 80, -1), "host_port"),
        (PortMapping("tcp", 80, 65536), "host_port"),
        (PortMapping("tcp", 0, 80), "container_port"),
        (PortMapping("tcp", 65536, 80), "container_port"),
        (PortMapping("TCP", 80, 80), "protocol"),
        (PortMapping("", 80, 80), "protocol"),
    ],
)
def test_port_mappings_that_cannot_be(mapping: PortMapping, field: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"port_mappings\[1\]\.{field}: "):
        arguments(port_mappings=(PortMapping("tcp", 1, 1), mapping))


def test_bandwidth() -> None:
    annotations = {"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "1Gi"}
    burst = 2**32 - 1
    assert arguments(annotations=annotations)["bandwidth"] == {
        "ingressRate": 10_000_000, "ingressBurst": burst, "egressRate": 2**30, "egressBurst": burst,
    }  # fmt: skip
    del annotations["kubernetes.io/ingress-bandwidth"]
    assert arguments(annotations=annotations)["bandwidth"] == {"egressRate": 2**30, "egressBurst": burst}
    # Porto's own limits are the runtime's to set.
    assert arguments(annotations={"portoshim.net/net-tx": "1000", "portoshim.net/net-rx": "1000"}) == {}


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1000", 1000), ("1k", 1000), ("1.5M", 1_500_000), (".5M", 500_000), ("5.M", 5_000_000), ("1e6", 10**6),
        ("1E3", 1000), ("+2k", 2000), ("1000.1", 1001), ("1500000m", 1500), ("2Ki", 2048), ("1P", 10**15),
    ],
)  # fmt: skip
def test_quantities(text: str, rate: int) -> None:
    assert parse_bits_per_second(text, "a") == rate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1x",
        "1 M",
        "-1M",
        "0",
        "999",
        "1.1P",
        "1e999999999",
        "1e99",
        "1E",
        "1e-9",
        "NaN",
        "9" * 999,
        "1\n",
        "\u0661k",
    ],
)
def test_quantities_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"annotation kubernetes.io/ingress-bandwidth: "):
        arguments(annotations={"kubernetes.io/ingress-bandwidth": text})


def test_mac_and_aliases() -> None:
    asked = arguments(annotations={"portoshim.net/mac": "02:AB:cd:00:00:01", "portoshim.net/aliases": "web, db.svc ,"})
    assert asked == {"mac": "02:ab:cd:00:00:01", "aliases": ["web", "db.svc"]}


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        ("portoshim.net/mac", "01:00:5e:00:00:01"),
        ("portoshim.net/mac", "02:00:00:00:00"),
        ("portoshim.net/mac", "02:00:00:00:00:01\n"),
        ("portoshim.net/mac", "02-00-00-00-00-01"),
        ("portoshim.net/aliases", "a b"),
        ("portoshim.net/aliases", "-a"),
        ("portoshim.net/aliases", ",".join("x" * 65)),
    ],
)
def test_annotations_that_cannot_be(annotation: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=f"annotation {annotation}: "):
        arguments(annotations={annotation: value})


def test_dns_cgroup_and_ranges() -> None:
    pod = sandbox(dns=DnsConfig(servers=("10.0.0.10",), options=("ndots:5",)), cgroup_parent="/kubepods/x")
    asked = capability_args(pod, ("10.1.0.0/24", "fd00::/64"))
    assert asked["dns"] == {"servers": ["10.0.0.10"], "searches": [], "options": ["ndots:5"]}
    assert asked["cgroupPath"] == "/kubepods/x"
    assert asked["ipRanges"] == [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]
    assert "ipRanges" not in capability_args(dataclasses.replace(pod, dns=DnsConfig()))
