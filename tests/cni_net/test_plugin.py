"""The plugin as the core sees it: its section, its hooks, its start."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from shim_cni_net.config import CniSection
from shim_cni_net.plugin import CniNet

from shim_core import config as configuration
from shim_core import plugins, testing
from shim_core.errors import ConfigError, StartupError
from tests.cni_net.support import Node


def parse(**keys: Any) -> CniSection:
    return configuration.parse({"CNI": keys}, [CniSection]).get(CniSection)


def test_it_is_found_by_its_entry_point() -> None:
    [entry] = importlib.metadata.entry_points(group=plugins.NAMESPACE, name="cni_net")
    assert entry.load() is CniNet


def test_hooks() -> None:
    manager = testing.manager(cni_net=CniNet())
    [plugin] = manager.get_plugins()
    assert {caller.name for caller in manager.get_hookcallers(plugin) or ()} == {
        "network_attach", "network_detach", "network_status", "runtime_conditions", "runtime_info",
        "shim_config_section", "shim_configure", "shim_startup", "shim_shutdown", "cri_update_runtime_config",
    }  # fmt: skip


def test_defaults() -> None:
    section = parse()
    assert (section.conf_dir, section.bin_dir, section.netns_dir, section.net_type) == (
        "/etc/cni/net.d", ("/opt/cni/bin",), "/var/run/netns", "netns",
    )  # fmt: skip
    assert (section.max_conf_num, section.ip_preference, section.conf_template) == (1, "ipv4", "")
    assert 0 < section.add_timeout + section.del_timeout < 240, "kubelet gives a sandbox four minutes"


@pytest.mark.parametrize(
    ("value", "directories"),
    [
        ("/opt/cni/bin", ("/opt/cni/bin",)),
        ("/opt/cni/bin:/usr/lib/cni", ("/opt/cni/bin", "/usr/lib/cni")),
        (["/opt/cni/bin"], ("/opt/cni/bin",)),
        (["/a", "/b:/c"], ("/a", "/b", "/c")),
    ],
)
def test_bin_dir_is_a_string_or_a_list(value: object, directories: tuple[str, ...]) -> None:
    assert parse(BinDir=value).bin_dir == directories


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"BinDir": []}, "CNI.BinDir: must name at least one directory"),
        ({"BinDir": ""}, "CNI.BinDir: must name at least one directory"),
        ({"BinDir": "opt/cni"}, "must be an absolute path"),
        ({"BinDir": 3}, "CNI.BinDir"),
        ({"ConfDir": "net.d"}, "CNI.ConfDir: must be an absolute path"),
        ({"ConfTemplate": "x"}, "CNI.ConfTemplate"),
        ({"NetType": ""}, "CNI.NetType"),
        ({"MaxConfNum": -1}, "CNI.MaxConfNum"),
        ({"IpPreference": "ipv5"}, "CNI.IpPreference"),
        ({"AddTimeout": "0"}, "CNI.AddTimeout: must be longer than 0s"),
        ({"DelTimeout": 30}, "CNI.DelTimeout: not a duration"),
        ({"BinDirs": "/x"}, "did you mean BinDir"),
    ],
)
def test_mistakes(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**keys)


def test_a_portoshim_configuration_is_understood() -> None:
    section = parse(ConfDir="/etc/cni/net.d", BinDir="/opt/cni/bin", NetnsDir="/var/run/netns", NetType="netns")
    assert section == parse()
    assert "ConfDir: /etc/cni/net.d" in configuration.parse({}, [CniSection]).dump()


def test_a_state_directory_that_can_not_be_used_stops_the_start(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.state.write_text("a file")
    with pytest.raises(StartupError, match=f"{node.state}.*set Portoshim.StateDir"):
        node.start()


def test_stopping_without_starting_is_fine() -> None:
    CniNet().shim_shutdown()


def test_start_and_stop_many_times(tmp_path: Path) -> None:
    node = Node(tmp_path)
    for _ in range(5):
        with node:
            pass
