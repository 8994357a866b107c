"""Versions are chosen so that everybody understands them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shim_cni_net import netconf
from shim_cni_net.execute import Plugins
from shim_cni_net.negotiate import Negotiator
from shim_cni_net.netconf import NetworkConfig, NetworkConfigError

from shim_core import testing
from tests.cni_net.support import REAL_PLUGINS, FakePlugin

OFFER = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]


@pytest.fixture
def plugins(tmp_path: Path) -> list[FakePlugin]:
    return [FakePlugin(tmp_path, name) for name in ("a", "b")]


@pytest.fixture
def negotiator(tmp_path: Path) -> Negotiator:
    return Negotiator(Plugins((str(tmp_path),), {"PATH": "/usr/bin:/bin"}))


def network(*versions: str, types: tuple[str, ...] = ("a", "b")) -> NetworkConfig:
    objects = [{"type": name} for name in types]
    tree = {"name": "net", "cniVersions": list(versions), "plugins": objects, "loadOnlyInlinedPlugins": True}
    return netconf.parse_list(tree, "f")


def speaks(plugin: FakePlugin, *versions: str) -> None:
    plugin.on("VERSION", f"echo '{json.dumps({'cniVersion': '1.1.0', 'supportedVersions': versions})}'; exit 0")


def choose(negotiator: Negotiator, offer: NetworkConfig) -> NetworkConfig:
    return negotiator.choose(offer, testing.context())


def test_the_highest_that_all_speak(plugins: list[FakePlugin], negotiator: Negotiator) -> None:
    speaks(plugins[0], *OFFER)
    speaks(plugins[1], "0.2.0", "0.3.1", "0.4.0")
    chosen = choose(negotiator, network(*OFFER))
    assert chosen.versions == ("0.4.0", "0.3.1")
    [call] = plugins[0].calls()
    assert (call.command, call.stdin) == ("VERSION", {"cniVersion": "1.1.0"})


def test_a_plugin_is_asked_once_and_again_when_it_is_replaced(
    plugins: list[FakePlugin], negotiator: Negotiator, tmp_path: Path
) -> None:
    for plugin in plugins:
        speaks(plugin, "1.0.0", "1.1.0")
    for _ in range(3):
        assert choose(negotiator, network("1.0.0", "1.1.0")).version == "1.1.0"
    assert [len(plugin.calls("VERSION")) for plugin in plugins] == [1, 1]
    speaks(FakePlugin(tmp_path, "a"), "1.0.0")
    assert choose(negotiator, network("1.0.0", "1.1.0")).version == "1.0.0"
    assert [len(plugin.calls("VERSION")) for plugin in plugins] == [2, 1]


def test_nobody_is_asked_where_there_is_no_choice(plugins: list[FakePlugin], negotiator: Negotiator) -> None:
    assert choose(negotiator, network("1.1.0")).version == "1.1.0"
    assert plugins[0].calls() == []


def test_nothing_in_common_is_an_error(plugins: list[FakePlugin], negotiator: Negotiator) -> None:
    speaks(plugins[0], "1.0.0")
    speaks(plugins[1], "0.4.0")
    with pytest.raises(NetworkConfigError, match=r"f: cniVersions: the plugin b speaks none .*it speaks 0\.4\.0"):
        choose(negotiator, network("0.4.0", "1.0.0"))


@pytest.mark.parametrize("shell", ["exit 1", "exit 0", "echo '{}'", "echo '[]'", "echo '{\"supportedVersions\": 1}'"])
def test_a_plugin_that_does_not_say_is_no_obstacle(
    plugins: list[FakePlugin], negotiator: Negotiator, shell: str
) -> None:
    plugins[0].on("VERSION", f"{shell}; exit 0")
    speaks(plugins[1], "0.4.0")
    assert choose(negotiator, network("0.4.0", "1.0.0")).version == "0.4.0"
    plugins[0].path.unlink()
    assert choose(negotiator, network("0.4.0", "1.0.0")).version == "0.4.0"


@pytest.mark.skipif(not Path(REAL_PLUGINS, "bridge").exists(), reason="needs containernetworking-plugins")
def test_plugins_of_distributions() -> None:
    negotiator = Negotiator(Plugins((REAL_PLUGINS,), {}))
    types = ("bridge", "portmap", "firewall", "tuning", "bandwidth")
    chosen = choose(negotiator, network(*OFFER, types=types))
    assert chosen.version in ("1.0.0", "1.1.0")
    assert choose(negotiator, network("0.3.0", "0.3.1", types=types[:2])).version == "0.3.1"
