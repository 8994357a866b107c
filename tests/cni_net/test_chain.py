"""Chains of plugins: order, what each is told, and what becomes of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from shim_cni_net import chain, netconf
from shim_cni_net.chain import Progress, Target
from shim_cni_net.execute import PluginError, Plugins
from shim_cni_net.netconf import NetworkConfig

from shim_core import testing
from tests.cni_net.support import RESULT, FakePlugin, commands

TARGET = Target("c" * 64, "/run/netns/x", "eth0", "K=v", {"mac": "02:00:00:00:00:01", "portMappings": [], "x": 1})
DONE = Progress(started=3, succeeded=3, result=RESULT)
CONTEXT = testing.context()


@pytest.fixture
def three(tmp_path: Path) -> list[FakePlugin]:
    return [FakePlugin(tmp_path, name) for name in ("a", "b", "c")]


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    return Plugins((str(tmp_path),), {"PATH": "/usr/bin:/bin"})


def network(version: str = "1.0.0", **keys: Any) -> NetworkConfig:
    objects = [
        {
            "type": "a",
            "capabilities": {"mac": True, "other": True},
            "x": {"y": [1]},
            "cni.dev/own": 1,
            "prevResult": {},
        },
        {"type": "b", "capabilities": {"mac": False}, "name": "mine", "cniVersion": "0.1.0"},
        {"type": "c", "args": {"cni": {}}},
    ]
    tree = {"name": "net", "cniVersion": version, "plugins": objects, "loadOnlyInlinedPlugins": True, **keys}
    return netconf.parse_list(tree, "f")


def add(plugins: Plugins, steps: list[Progress], version: str = "1.0.0") -> Any:
    return chain.add(network(version), TARGET, plugins, 10, CONTEXT, steps.append)


def test_add(three: list[FakePlugin], plugins: Plugins, tmp_path: Path) -> None:
    for number, plugin in enumerate(three):
        plugin.returns({**RESULT, "step": number})
    steps: list[Progress] = []
    result = add(plugins, steps)
    assert result == {**RESULT, "step": 2}
    assert list(commands(three)) == [("a", "ADD"), ("b", "ADD"), ("c", "ADD")]
    [a], [b], [c] = (plugin.calls() for plugin in three)
    assert a.stdin == {
        "name": "net",
        "cniVersion": "1.0.0",
        "type": "a",
        "x": {"y": [1]},
        "runtimeConfig": {"mac": "02:00:00:00:00:01"},
    }
    assert b.stdin == {"name": "net", "cniVersion": "1.0.0", "type": "b", "prevResult": {**RESULT, "step": 0}}
    assert c.stdin["prevResult"] == {**RESULT, "step": 1}
    assert c.stdin["args"] == {"cni": {}}
    for call in (a, b, c):
        assert (call.container_id, call.netns, call.ifname, call.args, call.path) == (
            "c" * 64, "/run/netns/x", "eth0", "K=v", str(tmp_path),
        )  # fmt: skip
    assert [(step.started, step.succeeded) for step in steps] == [(1, 0), (2, 1), (3, 2)]
    assert steps[1].result == {**RESULT, "step": 0}
    assert steps[-1].result == {**RESULT, "step": 1}


def test_results_are_passed_on_in_the_networks_version(three: list[FakePlugin], plugins: Plugins) -> None:
    three[0].returns({"cniVersion": "0.2.0", "ip4": {"ip": "10.0.0.2/24"}})
    three[1].returns({"ips": [{"address": "10.0.0.3/24"}]})
    three[2].returns({"cniVersion": "1.1.0", "ips": [{"address": "10.0.0.4/24"}]})
    result = add(plugins, [], "0.4.0")
    expected = {"cniVersion": "0.4.0", "interfaces": [], "routes": []}
    assert three[1].calls()[0].stdin["prevResult"] == {**expected, "ips": [{"version": "4", "address": "10.0.0.2/24"}]}
    assert three[2].calls()[0].stdin["prevResult"]["cniVersion"] == "0.4.0"
    assert result == {**expected, "ips": [{"version": "4", "address": "10.0.0.4/24"}]}


def test_add_stops_at_the_first_error(three: list[FakePlugin], plugins: Plugins) -> None:
    three[1].on("ADD", "exit 1")
    steps: list[Progress] = []
    with pytest.raises(PluginError, match=r'plugin "b" of network "net"'):
        add(plugins, steps)
    assert list(commands(three)) == [("a", "ADD"), ("b", "ADD")]
    assert steps[-1] == Progress(started=2, succeeded=1, result=RESULT)
    three[1].path.unlink()
    with pytest.raises(PluginError, match=r"is not in"):
        add(plugins, steps)
    assert steps[-1] == Progress(started=1, succeeded=1, result=RESULT), "it has never run"


def test_the_time_is_for_all_together(three: list[FakePlugin], plugins: Plugins) -> None:
    for plugin in three:
        plugin.on("ADD", "sleep 0.4")
    with pytest.raises(PluginError, match=r'plugin "c".*too long'):
        chain.add(network(), TARGET, plugins, 1.0, CONTEXT, lambda _: None)


def test_delete_is_in_reverse_with_the_final_result(three: list[FakePlugin], plugins: Plugins) -> None:
    chain.delete(network(), TARGET, plugins, 10, CONTEXT, DONE)
    assert list(commands(three)) == [("c", "DEL"), ("b", "DEL"), ("a", "DEL")]
    for plugin in three:
        assert plugin.calls()[0].stdin["prevResult"] == RESULT


@pytest.mark.parametrize(("version", "passed"), [("0.3.1", False), ("0.4.0", True), ("1.1.0", True)])
def test_delete_passes_the_result_from_0_4_0_on(
    three: list[FakePlugin], plugins: Plugins, version: str, passed: bool
) -> None:
    chain.delete(network(version), TARGET, plugins, 10, CONTEXT, DONE)
    assert ("prevResult" in three[0].calls()[0].stdin) is passed


def test_delete_without_a_result(three: list[FakePlugin], plugins: Plugins) -> None:
    chain.delete(network(), TARGET, plugins, 10, CONTEXT, Progress(started=3))
    assert list(commands(three)) == [("c", "DEL"), ("b", "DEL"), ("a", "DEL")]
    assert all("prevResult" not in plugin.calls()[0].stdin for plugin in three)


def test_delete_leaves_out_what_never_ran(three: list[FakePlugin], plugins: Plugins) -> None:
    chain.delete(network(), TARGET, plugins, 10, CONTEXT, Progress(started=2, succeeded=1, result=RESULT))
    assert list(commands(three)) == [("b", "DEL"), ("a", "DEL")]
    chain.delete(network(), TARGET, plugins, 10, CONTEXT, Progress())
    assert len(list(commands(three))) == 2


def test_delete_halts_where_add_had_succeeded(three: list[FakePlugin], plugins: Plugins) -> None:
    three[1].on("DEL", "exit 1")
    with pytest.raises(PluginError, match=r'"b"'):
        chain.delete(network(), TARGET, plugins, 10, CONTEXT, DONE)
    assert list(commands(three)) == [("c", "DEL"), ("b", "DEL")]


def test_delete_goes_on_where_add_had_failed(three: list[FakePlugin], plugins: Plugins) -> None:
    three[1].on("DEL", "exit 1")
    with pytest.raises(PluginError, match=r'"b"'):
        chain.delete(network(), TARGET, plugins, 10, CONTEXT, Progress(started=2, succeeded=1))
    assert list(commands(three)) == [("b", "DEL"), ("a", "DEL")]


def test_a_delete_that_hangs_leaves_the_others_their_time(three: list[FakePlugin], plugins: Plugins) -> None:
    three[2].on("DEL", "sleep 1000")
    with pytest.raises(PluginError, match=r'"c".*too long'):
        chain.delete(network(), TARGET, plugins, 1.5, CONTEXT, Progress(started=3, succeeded=2))
    assert list(commands(three)) == [("c", "DEL"), ("b", "DEL"), ("a", "DEL")]


@pytest.mark.parametrize(
    ("version", "keys", "asked"),
    [("0.3.1", {}, False), ("0.4.0", {}, True), ("1.1.0", {}, True), ("1.0.0", {"disableCheck": True}, False)],
)
def test_check(three: list[FakePlugin], plugins: Plugins, version: str, keys: dict[str, Any], asked: bool) -> None:
    chain.check(network(version, **keys), TARGET, plugins, 10, CONTEXT, RESULT)
    assert list(commands(three)) == ([("a", "CHECK"), ("b", "CHECK"), ("c", "CHECK")] if asked else [])
    if asked:
        assert three[0].calls()[0].stdin["prevResult"] == RESULT
        assert three[0].calls()[0].stdin["runtimeConfig"] == {"mac": "02:00:00:00:00:01"}
        three[1].on("CHECK", "exit 1")
        with pytest.raises(PluginError, match=r'"b" of network "net" failed \(CHECK\)'):
            chain.check(network(version), TARGET, plugins, 10, CONTEXT, RESULT)


@pytest.mark.parametrize(("version", "asked"), [("1.0.0", False), ("1.1.0", True)])
def test_status(three: list[FakePlugin], plugins: Plugins, version: str, asked: bool) -> None:
    chain.status(network(version), plugins, 10, CONTEXT)
    assert list(commands(three)) == ([("a", "STATUS"), ("b", "STATUS"), ("c", "STATUS")] if asked else [])
    if asked:
        call = three[0].calls()[0]
        assert call.stdin == {"name": "net", "cniVersion": "1.1.0", "type": "a", "x": {"y": [1]}}
        assert (call.container_id, call.netns, call.ifname, call.args) == ("", "", "", "")
        three[1].on("STATUS", """echo '{"code": 50, "msg": "no addresses left"}'; exit 1""")
        with pytest.raises(PluginError, match=r'"b" of network "net" failed \(STATUS\): no addresses left; code 50'):
            chain.status(network(version), plugins, 10, CONTEXT)


def test_garbage_collection_goes_on_after_an_error(three: list[FakePlugin], plugins: Plugins) -> None:
    three[0].on("GC", "exit 1")
    valid = [("c" * 64, "eth0")]
    [failure] = chain.collect_garbage(network("1.1.0"), valid, plugins, 10, CONTEXT, "gc")
    assert failure.call.plugin == "a"
    assert list(commands(three)) == [("a", "GC"), ("b", "GC"), ("c", "GC")]
    assert three[2].calls()[0].stdin["cni.dev/valid-attachments"] == [{"containerID": "c" * 64, "ifname": "eth0"}]
    assert chain.collect_garbage(network("1.0.0"), valid, plugins, 10, CONTEXT, "gc") == []
    assert chain.collect_garbage(network("1.1.0", disableGC=True), valid, plugins, 10, CONTEXT, "gc") == []
    assert len(list(commands(three))) == 3
