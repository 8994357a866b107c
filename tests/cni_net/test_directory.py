"""The configuration directory changes, and is believed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from shim_cni_net import directory as module
from shim_cni_net import netconf
from shim_cni_net.directory import ConfigDirectory
from shim_cni_net.netconf import NetworkConfigError

from tests.cni_net.support import until


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    return tmp_path / "net.d"


@pytest.fixture
def configs(conf: Path) -> ConfigDirectory:
    return ConfigDirectory(str(conf), 1)


def write(path: Path, name: str) -> None:
    """In place, as an editor or a careless installer does."""
    path.write_text(json.dumps({"name": name, "cniVersion": "1.0.0", "plugins": [{"type": "x"}]}))


def name(configs: ConfigDirectory) -> str:
    try:
        return configs.networks()[0].name
    except NetworkConfigError as err:
        return f"{err}".partition(":")[0]


def test_appearing_changing_vanishing_and_coming_back(conf: Path, configs: ConfigDirectory) -> None:
    missing = f"no network configuration found in {conf}"
    assert name(configs) == missing
    for _ in range(3):
        conf.mkdir()
        assert name(configs) == missing
        for number in range(20):
            # Same length, same inode, within one step of the file system's clock.
            write(conf / "10.conflist", f"n{number:02}")
            assert name(configs) == f"n{number:02}"
        write(conf / "05.conflist", "before")
        assert name(configs) == "before"
        (conf / "05.conflist").unlink()
        assert name(configs) == "n19"
        (conf / "10.conflist").rename(conf / "10.off")
        assert name(configs) == missing
        (conf / "10.conflist").write_text("{")
        assert name(configs) == f"{conf}/10.conflist"
        shutil.rmtree(conf)
        assert name(configs) == missing


def test_an_older_file_moved_in_place_is_seen(conf: Path, configs: ConfigDirectory, tmp_path: Path) -> None:
    conf.mkdir()
    write(tmp_path / "old", "old")
    write(conf / "10.conflist", "new")
    os.utime(tmp_path / "old", (1, 1))
    os.utime(conf / "10.conflist", (1, 1))
    assert name(configs) == "new"
    (tmp_path / "old").rename(conf / "10.conflist")
    os.utime(conf, (1, 1))
    assert name(configs) == "old"


def test_plugins_beside_the_list_count(conf: Path, configs: ConfigDirectory) -> None:
    conf.mkdir()
    (conf / "10.conflist").write_text('{"name": "net", "cniVersion": "1.0.0"}')
    assert name(configs) == f"{conf}/10.conflist"
    (conf / "net").mkdir()
    (conf / "net" / "1.conf").write_text('{"type": "one"}')
    assert name(configs) == "net"
    (conf / "net" / "2.conf").write_text('{"type": "two"}')
    assert [plugin.type for plugin in configs.networks()[0].plugins] == ["one", "two"]
    (conf / "net" / "1.conf").write_text('{"type": "six"}')
    assert [plugin.type for plugin in configs.networks()[0].plugins] == ["six", "two"]


def test_what_has_not_changed_is_not_read_again(
    conf: Path, configs: ConfigDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf.mkdir()
    write(conf / "10.conflist", "net")
    reads: list[str] = []
    load = netconf.load_file

    def load_file(path: str) -> netconf.NetworkConfig | None:
        reads.append(path)
        return load(path)

    monkeypatch.setattr(netconf, "load_file", load_file)
    networks = configs.networks()

    def settled() -> bool:
        reads.clear()
        configs.networks()
        return not reads

    assert until(settled, timeout_s=5), "a file that is old enough is trusted"
    assert configs.networks() is networks, "the same objects, though it was read twice"
    assert module._SETTLED_NS < 10**9


def test_many_threads_and_an_unsteady_file(conf: Path, configs: ConfigDirectory) -> None:
    conf.mkdir()
    write(conf / "10.conflist", "a")
    stop = threading.Event()
    seen: set[str] = set()

    def look() -> None:
        while not stop.is_set():
            seen.add(name(configs))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(200):
        write(conf / ".tmp", "ab"[number % 2])
        (conf / ".tmp").rename(conf / "10.conflist")
    stop.set()
    for thread in threads:
        thread.join()
    assert seen <= {"a", "b"}
    assert name(configs) == "b"
