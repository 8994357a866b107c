"""NetworkReady, and why not."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_cni_net import readiness

from shim_core import testing
from shim_core.types import RuntimeCondition
from tests.cni_net.support import Node, until


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path) as node:
        yield node


def condition(node: Node) -> RuntimeCondition:
    answer: RuntimeCondition
    [answer] = node.manager.hook.runtime_conditions(context=testing.context())
    assert answer.type == "NetworkReady"
    assert (answer.reason, bool(answer.message)) == (("", False) if answer.status else ("NetworkPluginNotReady", True))
    return answer


def test_it_follows_configuration_and_plugins(node: Node) -> None:
    assert condition(node).message == (
        f"cni plugin not initialized: no network configuration found in {node.conf}: "
        "install one there, or a CNI provider"
    )
    path = node.network("fake")
    assert condition(node).message == (f'cni plugin not initialized: {path}: the plugin "fake" is not in {node.bin}')
    fake = node.fake()
    assert condition(node).status
    fake.path.chmod(0o644)
    assert "is not executable in" in condition(node).message
    fake.path.chmod(0o755)
    assert condition(node).status
    shutil.rmtree(node.conf)
    assert "no network configuration" in condition(node).message
    node.conf.mkdir()
    (node.conf / "10-net.conflist").write_text("{")
    assert "not valid JSON" in condition(node).message
    node.network("fake")
    assert condition(node).status
    assert fake.calls() == [], "nothing is run for it"


def test_changes_are_logged_once(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("shim").propagate = True
    with caplog.at_level("INFO", "shim.cni_net"):
        caplog.clear()
        node.fake()
        for _ in range(3):
            condition(node)
        node.network("fake")
        for _ in range(3):
            condition(node)
    assert [(record.levelname, record.message.split(":")[0]) for record in caplog.records] == [
        ("WARNING", "the network is not ready"),
        ("INFO", "the network is ready"),
    ]


def test_status_of_the_plugins_counts(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_STATUS_INTERVAL_S", 0.2)
    fake = node.fake()
    node.network("fake", version="1.1.0")
    assert condition(node).status
    fake.on("STATUS", """echo '{"code": 50, "msg": "the daemon is away"}'; exit 1""")
    assert until(lambda: not condition(node).status)
    assert condition(node).message == (
        'plugin "fake" of network "net" failed (STATUS): the daemon is away; code 50 (exit status 1)'
    )
    fake.on("STATUS", None)
    assert until(lambda: condition(node).status)


def test_status_is_not_asked_all_the_time(node: Node) -> None:
    fake = node.fake()
    node.network("fake", version="1.1.0")
    for _ in range(10):
        assert condition(node).status
    assert len(fake.calls("STATUS")) == 1
    node.network("fake", "fake", version="1.1.0")
    assert condition(node).status, "another configuration is asked for at once"
    assert len(fake.calls("STATUS")) == 3


def test_status_that_hangs_holds_nobody_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_STATUS_WAIT_S", 0.1)
    fake = node.fake()
    fake.on("STATUS", "sleep 1000")
    node.network("fake", version="1.1.0")
    started = time.monotonic()
    for _ in range(3):
        assert condition(node).message == "the plugins have not answered STATUS yet"
    assert time.monotonic() - started < 2
    threads = [thread for thread in threading.enumerate() if thread.name == "cni-status"]
    assert len(threads) == 1
    node.stop()
    threads[0].join(60)
    assert not threads[0].is_alive(), "stopping ends it"


def test_a_plugin_named_by_a_path_is_not_ready_and_not_run(node: Node) -> None:
    fake = node.fake()
    (node.bin / "sub").mkdir()
    for type_ in ("../bin/fake", "sub/../fake", "..", "sub"):
        node.write("10-net.conflist", {"name": "net", "cniVersion": "1.1.0", "plugins": [{"type": type_}]})
        assert not condition(node).status
    assert fake.calls() == []


def test_info_shows_the_networks_and_no_secret(node: Node) -> None:
    node.network({"type": "fake", "capabilities": {"mac": True}, "ipam": {"type": "x"}, "token": "s3cr3t"})
    [info] = node.manager.hook.runtime_info(context=testing.context())
    config = json.loads(info["cniconfig"])
    assert config["Networks"][0]["IFName"] == "eth0"
    assert config["Networks"][0]["Config"]["Plugins"] == [{"type": "fake", "capabilities": ["mac"], "ipam": "x"}]
    assert config["PluginDirs"] == [str(node.bin)]
    assert json.loads(info["lastCNILoadStatus"]) == "OK"
    assert json.loads(info["cnistatistics"])["attached"] == 0
    assert "s3cr3t" not in str(info)
    (node.conf / "10-net.conflist").unlink()
    [info] = node.manager.hook.runtime_info(context=testing.context())
    assert "no network configuration" in json.loads(info["lastCNILoadStatus"])
    assert json.loads(info["cniconfig"])["Networks"] == []
