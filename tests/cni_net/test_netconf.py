"""Configuration files, as libcni reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from shim_cni_net import netconf
from shim_cni_net.netconf import NetworkConfigError, load_directory, load_file, parse_json, parse_list, parse_plugin

LIST = {"name": "net", "cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}


def write(directory: Path, name: str, tree: Any) -> Path:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def names(directory: Path, max_networks: int = 0) -> list[str]:
    return [network.name for network in load_directory(str(directory), max_networks)]


def test_files_are_taken_by_name_and_extension(tmp_path: Path) -> None:
    write(tmp_path, "20-b.conf", {"name": "b", "type": "ptp"})
    write(tmp_path, "10-a.conflist", {**LIST, "name": "a"})
    write(tmp_path, "30-c.json", {"name": "c", "type": "macvlan", "cniVersion": "0.3.1"})
    for ignored in ("05-x.conflist.bak", "06.txt", "07.conflist~", "README"):
        write(tmp_path, ignored, "not json")
    (tmp_path / "08.conflist").mkdir()
    assert names(tmp_path) == ["a", "b", "c"]
    assert names(tmp_path, 1) == ["a"]
    assert names(tmp_path, 2) == ["a", "b"]


def test_a_file_behind_those_wanted_may_be_wrong_but_not_one_of_them(tmp_path: Path) -> None:
    write(tmp_path, "10.conflist", LIST)
    write(tmp_path, "20.conflist", "{")
    assert names(tmp_path, 1) == ["net"]
    with pytest.raises(NetworkConfigError, match=r"20\.conflist: not valid JSON"):
        names(tmp_path, 2)
    write(tmp_path, "00.conf", "{")
    with pytest.raises(NetworkConfigError, match=r"00\.conf: not valid JSON"):
        names(tmp_path, 1)


@pytest.mark.parametrize("there", [True, False])
def test_no_configuration(tmp_path: Path, there: bool) -> None:
    directory = tmp_path / "net.d"
    if there:
        directory.mkdir()
    with pytest.raises(NetworkConfigError, match=f"no network configuration found in {directory}"):
        names(directory)


def test_a_single_plugin_is_a_list_of_one(tmp_path: Path) -> None:
    tree = {"name": "one", "cniVersion": "0.4.0", "type": "ptp", "disableCheck": True, "mtu": 1500}
    network = load_file(str(write(tmp_path, "1.conf", tree)))
    assert network is not None
    assert network.plugins[0].tree == tree
    assert (network.version, network.disable_check) == ("0.4.0", False)


def test_a_list_in_the_wrong_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(NetworkConfigError, match=r"must be in a file named \*\.conflist"):
        load_file(str(write(tmp_path, "1.conf", LIST)))


def test_plugins_beside_the_list_are_appended(tmp_path: Path) -> None:
    write(tmp_path, "10.conflist", LIST)
    write(tmp_path, "net/20-b.conf", {"type": "second"})
    write(tmp_path, "net/10-a.conf", {"type": "first"})
    write(tmp_path, "net/30.conflist", {"type": "ignored"})
    [network] = load_directory(str(tmp_path), 1)
    assert [plugin.type for plugin in network.plugins] == ["bridge", "first", "second"]

    write(tmp_path, "10.conflist", {**LIST, "loadOnlyInlinedPlugins": True})
    [network] = load_directory(str(tmp_path), 1)
    assert [plugin.type for plugin in network.plugins] == ["bridge"]

    write(tmp_path, "10.conflist", {"name": "net", "cniVersion": "1.1.0"})
    [network] = load_directory(str(tmp_path), 1)
    assert [plugin.type for plugin in network.plugins] == ["first", "second"]

    write(tmp_path, "net/10-a.conf", {"type": "../first"})
    with pytest.raises(NetworkConfigError, match=r"net/10-a\.conf: type"):
        load_directory(str(tmp_path), 1)


@pytest.mark.parametrize(
    ("keys", "versions"),
    [
        ({}, ("0.1.0",)),
        ({"cniVersion": ""}, ("0.1.0",)),
        ({"cniVersion": "0.3.1"}, ("0.3.1",)),
        ({"cniVersion": "1.1.0", "cniVersions": ["0.3.1", "0.4.0", "1.0.0"]}, ("1.1.0", "1.0.0", "0.4.0", "0.3.1")),
        ({"cniVersions": ["0.4.0", "1.0.0"]}, ("1.0.0", "0.4.0")),
        ({"cniVersion": "2.0.0", "cniVersions": ["1.0.0", "3.1.4"]}, ("1.0.0",)),
        ({"cniVersion": "0.4.0", "cniVersions": []}, ("0.4.0",)),
    ],
)
def test_versions(keys: dict[str, Any], versions: tuple[str, ...]) -> None:
    network = parse_list({"name": "n", "plugins": [{"type": "x"}], "loadOnlyInlinedPlugins": True, **keys}, "f")
    assert network.versions == versions
    assert parse_list(network.as_tree(), "f") == network


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "f: name: must be"),
        ({"name": 3}, "f: name: must be"),
        ({"name": "../net"}, "f: name: must be"),
        ({"name": "-net"}, "f: name: must be"),
        ({"name": "net\n"}, "f: name: must be"),
        ({"name": "n" * 300}, "f: name: must be"),
        ({"cniVersion": 1}, "f: cniVersion: must be a string"),
        ({"cniVersion": "2.0.0"}, "f: cniVersion: 2.0.0 is not known; the highest known is 1.1.0"),
        ({"cniVersion": "1.0"}, "f: cniVersion: 1.0 is not known"),
        ({"cniVersions": "1.0.0"}, "f: cniVersions: must be a list"),
        ({"cniVersions": [1]}, "f: cniVersions: must be a list"),
        ({"plugins": []}, "f: plugins: must be a list with at least one"),
        ({"plugins": {}}, "f: plugins: must be a list with at least one"),
        ({"plugins": None}, "f: plugins: must be there when loadOnlyInlinedPlugins"),
        ({"plugins": [1]}, r"f: plugins\[0\]: must be an object"),
        ({"plugins": [{"type": "x"}, {}]}, r"f: plugins\[1\]: type: must name a plugin"),
        ({"disableCheck": 1}, "f: disableCheck: must be true or false"),
        ({"disableGC": "maybe"}, "f: disableGC: must be true or false"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(NetworkConfigError, match=f"^{message}"):
        parse_list({**LIST, "loadOnlyInlinedPlugins": True, **change}, "f")


def test_flags_may_be_words() -> None:
    network = parse_list({**LIST, "loadOnlyInlinedPlugins": "TRUE", "disableCheck": "true", "disableGC": "False"}, "f")
    assert (network.disable_check, network.disable_gc) == (True, False)


@pytest.mark.parametrize("name", ["../x", "..", ".", "/x", "a/b", "a\\b", "a:b", "a\0", "a\n", "", None, 3])
def test_a_type_is_never_a_path(name: object) -> None:
    with pytest.raises(NetworkConfigError, match=r"^f: type: "):
        parse_plugin({"type": name}, "f")
    if name:
        with pytest.raises(NetworkConfigError, match=r"^f: ipam\.type: "):
            parse_plugin({"type": "x", "ipam": {"type": name}}, "f")


@pytest.mark.parametrize("capabilities", [[], "x", {"mac": 1}, {"mac": "true"}])
def test_capabilities_are_flags(capabilities: object) -> None:
    if capabilities:
        with pytest.raises(NetworkConfigError, match=r"^f: capabilities: "):
            parse_plugin({"type": "x", "capabilities": capabilities}, "f")
    assert parse_plugin({"type": "x", "capabilities": {"a": True, "b": False}}, "f").capabilities == {"a"}
    assert parse_plugin({"type": "x", "capabilities": None}, "f").capabilities == frozenset()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", "null", "{", '{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', "\xff", '{"a":' * 100_000],
)
def test_what_is_no_json_object(text: str) -> None:
    with pytest.raises(NetworkConfigError, match=r"^f: "):
        parse_json(text.encode("latin-1"), "f")


def test_numbers_are_passed_on_as_libcni_does() -> None:
    assert json.dumps(parse_json(b'{"a": 1500.0, "b": 1.5e3, "c": 0.5, "d": 12345678901234567890}', "f")) == (
        '{"a": 1500, "b": 1500, "c": 0.5, "d": 12345678901234567890}'
    )


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1.conf")
    with pytest.raises(NetworkConfigError, match=r"must be a regular file"):
        names(tmp_path)
    (tmp_path / "0.conf").symlink_to("/nowhere")
    with pytest.raises(NetworkConfigError, match=r"0\.conf: the symbolic link leads nowhere"):
        names(tmp_path)


def test_a_link_to_a_file_is_fine(tmp_path: Path) -> None:
    write(tmp_path, "data", LIST)
    (tmp_path / "1.conflist").symlink_to("data")
    assert names(tmp_path) == ["net"]


def test_a_huge_file_is_no_configuration(tmp_path: Path) -> None:
    write(tmp_path, "1.conf", " " * (netconf.MAX_FILE_BYTES + 1))
    with pytest.raises(NetworkConfigError, match=r"larger than"):
        names(tmp_path)
