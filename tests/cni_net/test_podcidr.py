"""The pod CIDR: told, remembered, rendered."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from shim_cni_net.podcidr import CONFIG_NAME, PodCidr

from shim_core import testing
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import FailedPrecondition, InvalidArgument, Unavailable
from tests.cni_net.support import Node
from tests.cni_net.test_gotemplate import CLUSTER


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "net.template"
    path.write_text(CLUSTER)
    return path


@pytest.fixture
def node(tmp_path: Path, template: Path) -> Node:
    return Node(tmp_path, ConfTemplate=str(template))


def told(node: Node, cidr: str) -> None:
    request = pb.UpdateRuntimeConfigRequest()
    request.runtime_config.network_config.pod_cidr = cidr
    answer = node.manager.hook.cri_update_runtime_config(request=request, context=testing.context())
    assert answer == pb.UpdateRuntimeConfigResponse()


def rendered(node: Node) -> list[str]:
    tree = json.loads((node.conf / CONFIG_NAME).read_text())
    return [pool[0]["subnet"] for pool in tree["plugins"][0]["ipam"]["ranges"]]


def test_a_template_becomes_the_network(node: Node) -> None:
    with node:
        [condition] = node.manager.hook.runtime_conditions(context=testing.context())
        assert "no network configuration" in condition.message
        told(node, "10.1.0.0/24, fd00::/64")
        assert rendered(node) == ["10.1.0.0/24", "fd00::/64"]
        assert json.loads((node.conf / CONFIG_NAME).read_text())["plugins"][0]["ipam"]["routes"] == [
            {"dst": "0.0.0.0/0"},
            {"dst": "::/0"},
        ]
        assert stat.S_IMODE((node.conf / CONFIG_NAME).stat().st_mode) == 0o644
        assert [path.name for path in node.conf.iterdir()] == [CONFIG_NAME]
        [network] = node.networking.networks(testing.context())
        assert network.name == "k8s-pod-network"
        told(node, "10.2.0.0/24")
        assert rendered(node) == ["10.2.0.0/24"]
        before = (node.conf / CONFIG_NAME).stat()
        told(node, "10.2.0.0/24")
        assert (node.conf / CONFIG_NAME).stat() == before, "what is right is left alone"


def test_it_is_remembered(node: Node, template: Path) -> None:
    with node:
        told(node, "10.1.2.3/24")
    (node.conf / CONFIG_NAME).unlink()
    with node:
        assert rendered(node) == ["10.1.2.0/24"], "rendered again at the start"
    template.write_text(CLUSTER.replace("ptp", "bridge"))
    with node:
        assert '"bridge"' in (node.conf / CONFIG_NAME).read_text()


def test_a_network_of_somebody_elses_is_left_alone(node: Node) -> None:
    node.network("fake")
    with node:
        told(node, "10.1.0.0/24")
    assert [path.name for path in node.conf.iterdir()] == ["10-net.conflist"]


def test_without_a_template_it_is_harmless(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        told(node, "10.1.0.0/24")
        assert node.plugin._pod_cidr.cidrs() == ("10.1.0.0/24",)
        told(node, "")
        assert node.plugin._pod_cidr.cidrs() == ("10.1.0.0/24",), "nothing is no news"
    assert list(node.conf.iterdir()) == []


@pytest.mark.parametrize("cidr", ["x", "10.0.0.0/33", "10.0.0.0/24,", "10.0.0.0/24;fd00::/64", ",".join(["::/1"] * 17)])
def test_what_is_no_cidr(node: Node, cidr: str) -> None:
    with node, pytest.raises(InvalidArgument, match=r"network_config\.pod_cidr: "):
        told(node, cidr)
    assert list(node.conf.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read: No such file"),
        ("{{.Wrong}}", "there is no .Wrong"),
        ("{", "what it renders to: not valid JSON"),
        ('{"name": "x", "plugins": [{"type": "../x"}]}', r"plugins\[0\]: type"),
        (" " * (256 * 1024 + 1), "larger than"),
    ],
)
def test_a_template_that_is_wrong_writes_nothing(node: Node, template: Path, text: str | None, message: str) -> None:
    template.unlink() if text is None else template.write_text(text)
    with node, pytest.raises(FailedPrecondition, match=f"CNI.ConfTemplate: {template}.*{message}"):
        told(node, "10.1.0.0/24")
    assert list(node.conf.iterdir()) == []
    with node:
        pass  # nor does it stop the next start


def test_what_can_not_be_written_is_tried_again(node: Node) -> None:
    with node:
        node.conf.rmdir()
        node.conf.write_text("a file in the way")
        with pytest.raises(Unavailable, match=str(node.conf)):
            told(node, "10.1.0.0/24")
        node.conf.unlink()
        told(node, "10.1.0.0/24")
        assert rendered(node) == ["10.1.0.0/24"], "the directory is made"


@pytest.mark.parametrize("text", ["", "{", '{"podCidrs": 3}', '{"podCidrs": ["x"]}', "[]"])
def test_a_damaged_file_is_no_obstacle(node: Node, text: str) -> None:
    (node.state / "cni").mkdir(parents=True)
    (node.state / "cni" / "pod-cidr.json").write_text(text)
    cidrs = PodCidr(str(node.state / "cni"), str(node.conf), "")
    cidrs.open()
    assert cidrs.cidrs() == ()
    cidrs.update("10.1.0.0/24")
    assert cidrs.cidrs() == ("10.1.0.0/24",)
