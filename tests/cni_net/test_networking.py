"""Attach and detach: idempotent, recorded, undone with what was recorded."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shim_cni_net import records
from shim_cni_net.netns import NetnsError

from shim_core import testing
from shim_core.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from tests.cni_net.support import RESULT, FakePlugin, Node, commands, sandbox, until

pytestmark = pytest.mark.root

POD = sandbox()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path, AddTimeout="10s", DelTimeout="10s") as node:
        node.network("fake")
        yield node


@pytest.fixture
def fake(node: Node) -> FakePlugin:
    return node.fake()


def at_once(action: Callable[[], Any], times: int) -> list[Any]:
    """The action's outcomes in so many threads."""
    outcomes: list[Any] = []

    def act() -> None:
        try:
            outcomes.append(action())
        except Exception as err:
            outcomes.append(err)

    threads = [threading.Thread(target=act) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_a_whole_life(node: Node, fake: FakePlugin) -> None:
    assert node.status(POD) is None
    assert node.detach(POD), "an unknown sandbox is no error"
    attachment = node.attach(POD)
    assert attachment.netns_path == f"/run/netns/{Path(attachment.netns_path).name}"
    assert POD.sandbox_id in attachment.netns_path
    assert attachment.addresses == ("10.1.0.5",)
    assert [interface.name for interface in attachment.interfaces] == ["eth0"]
    assert attachment.info == {"cniResult": {**RESULT, "cniVersion": "1.1.0"}}
    json.dumps(attachment.info)
    assert node.status(POD) == attachment
    [add] = fake.calls()
    assert (add.command, add.container_id, add.netns, add.ifname) == (
        "ADD", POD.sandbox_id, attachment.netns_path, "eth0",
    )  # fmt: skip
    assert add.args.startswith("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod-1;")
    assert node.detach(POD)
    delete = fake.calls()[-1]
    assert (delete.command, delete.netns, delete.args, delete.stdin["prevResult"]) == (
        "DEL", add.netns, add.args, RESULT,
    )  # fmt: skip
    assert node.status(POD) is None
    assert os.listdir("/run/netns") == []
    assert node.networking.records.all() == ()
    for _ in range(5):
        assert node.detach(POD)
    assert len(fake.calls("DEL")) == 1


def test_ten_attaches_are_one_and_ten_detaches_are_one(node: Node, fake: FakePlugin) -> None:
    outcomes = at_once(lambda: node.attach(POD), 10)
    assert len({outcome.addresses for outcome in outcomes}) == 1
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert len(fake.calls("ADD")) == 1
    assert at_once(lambda: node.detach(POD), 10) == [True] * 10
    assert len(fake.calls("DEL")) == 1


def test_different_sandboxes_do_not_wait_for_each_other(node: Node, fake: FakePlugin) -> None:
    fake.on("ADD", "sleep 0.5")
    numbers = iter(range(8))
    started = time.monotonic()
    outcomes = at_once(lambda: node.attach(sandbox(next(numbers))), 8)
    assert time.monotonic() - started < 3
    assert len({outcome.netns_path for outcome in outcomes}) == 8


def test_a_detach_waits_for_the_attach_and_gives_up_in_time(node: Node, fake: FakePlugin) -> None:
    fake.on("ADD", "touch $0.running; while [ ! -e $0.go ]; do sleep 0.01; done")
    thread = threading.Thread(target=lambda: node.attach(POD))
    thread.start()
    assert until(fake.path.with_name("fake.running").exists)
    with pytest.raises(Unavailable, match=r"another network operation for sandbox 0000000000000 is still running"):
        node.detach(POD, testing.context().for_cleanup(timeout_s=0.1))
    assert node.status(POD) is None
    fake.path.with_name("fake.go").touch()
    assert node.detach(POD)
    thread.join()
    assert [call.command for call in fake.calls()] == ["ADD", "DEL"]


def test_a_pod_is_torn_down_with_the_configuration_it_was_added_with(node: Node, fake: FakePlugin) -> None:
    node.network({"type": "fake", "subnet": "old", "capabilities": {"mac": True}}, "fake", version="0.4.0")
    pod = sandbox(annotations={"portoshim.net/mac": "02:00:00:00:00:01"})
    first = node.attach(pod)
    other = node.fake("other")
    node.network({"type": "other", "subnet": "new"})
    assert node.status(pod) == first
    assert node.attach(sandbox(2)).addresses
    assert len(other.calls("ADD")) == 1
    (node.conf / "10-net.conflist").unlink()
    node.stop()
    node.start()
    # The configuration is gone, the daemon is another one, and the hook knows less of the pod.
    assert node.detach(sandbox(1, name="", namespace="", uid=""))
    second, first_call = fake.calls("DEL")
    assert second.stdin["cniVersion"] == first_call.stdin["cniVersion"] == "0.4.0"
    assert first_call.stdin["subnet"] == "old"
    assert first_call.stdin["runtimeConfig"] == {"mac": "02:00:00:00:00:01"}
    assert first_call.stdin["prevResult"]["cniVersion"] == "0.4.0"
    assert first_call.args == fake.calls("ADD")[0].args
    assert other.calls("DEL") == []


def test_without_a_network_the_reason_is_told(node: Node) -> None:
    (node.conf / "10-net.conflist").unlink()
    with pytest.raises(Unavailable, match=r"the pod network is not ready: no network configuration found in"):
        node.attach(POD)
    assert os.listdir("/run/netns") == []
    assert node.networking.records.all() == ()


@pytest.mark.parametrize("sandbox_id", ["", "../../etc", "/", "a/b", ".", "*", "***", "x" * 1000, "\0"])
def test_ids_that_are_none(node: Node, fake: FakePlugin, sandbox_id: str) -> None:
    pod = sandbox(1, sandbox_id=sandbox_id)
    with pytest.raises(InvalidArgument, match=r"sandbox id"):
        node.attach(pod)
    assert node.detach(pod)
    assert node.status(pod) is None
    assert fake.calls() == []


def test_names_that_could_add_arguments_change_nothing(node: Node, fake: FakePlugin) -> None:
    with pytest.raises(InvalidArgument, match=r"metadata\.name"):
        node.attach(sandbox(name="x;IP=10.0.0.1"))
    assert fake.calls() == []
    assert os.listdir("/run/netns") == []


def test_a_call_that_is_out_of_time_starts_nothing(node: Node, fake: FakePlugin) -> None:
    with pytest.raises(DeadlineExceeded):
        node.attach(POD, testing.context().for_cleanup(timeout_s=0))
    assert fake.calls() == []
    assert node.networking.records.all() == ()


def test_two_networks_are_taken_down_both_though_one_fails(tmp_path: Path) -> None:
    with Node(tmp_path, MaxConfNum=2) as node:
        one, two = node.fake("one"), node.fake("two")
        for name in ("one", "two"):
            node.write(f"{name}.conflist", {"name": name, "cniVersion": "1.0.0", "plugins": [{"type": name}]})
        two.on("ADD", "exit 1")
        with pytest.raises(Unavailable, match=r'"two" of network "two"'):
            node.attach(POD)
        assert node.detach(POD)
        assert list(commands([one, two])) == [("one", "ADD"), ("two", "ADD"), ("two", "DEL"), ("one", "DEL")]
        two.on("ADD", None)
        node.attach(POD)
        assert [call.ifname for call in (one.calls()[-1], two.calls()[-1])] == ["eth0", "eth1"]
        two.on("DEL", "exit 1")
        with pytest.raises(Unavailable, match=r'"two" of network "two"'):
            node.detach(POD)
        assert one.calls()[-1].command == "DEL", "networks are independent of each other"
        two.on("DEL", None)
        assert node.detach(POD)


class Full:
    """A disk that is full from some moment on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def fill(self) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        self._patch.setattr(records, "_append", refuse)
        self._patch.setattr(records, "_replace", refuse)

    def clear(self) -> None:
        self._patch.undo()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Full:
    return Full(monkeypatch)


def test_on_a_full_disk_nothing_is_started(node: Node, fake: FakePlugin, disk: Full) -> None:
    disk.fill()
    with pytest.raises(ResourceExhausted, match=r"Portoshim\.StateDir: No space left"):
        node.attach(POD)
    assert fake.calls() == []
    assert os.listdir("/run/netns") == []
    assert node.detach(POD)
    disk.clear()
    assert node.attach(POD).addresses


def test_a_full_disk_keeps_no_address(node: Node, fake: FakePlugin, disk: Full) -> None:
    node.attach(POD)
    disk.fill()
    assert node.detach(POD)
    assert len(fake.calls("DEL")) == 1
    disk.clear()
    node.stop()
    node.start()
    assert node.networking.records.all() == ()


def test_a_disk_that_fills_up_between_two_plugins(
    node: Node, fake: FakePlugin, disk: Full, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.network("fake", "fake")
    calls = []
    append = records._append

    def once(*arguments: Any) -> bool:
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return append(*arguments)

    monkeypatch.setattr(records, "_append", once)
    with pytest.raises(ResourceExhausted):
        node.attach(POD)
    assert [call.command for call in fake.calls()] == ["ADD"]
    assert node.detach(POD)
    assert node.networking.records.all() == ()
    assert os.listdir("/run/netns") == []


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 100])
def test_a_lost_record_is_torn_down_with_todays_configuration(node: Node, fake: FakePlugin, damage: bytes) -> None:
    attachment = node.attach(POD)
    node.stop()
    [path] = (node.state / "cni" / "attachments").iterdir()
    path.write_bytes(damage)
    (node.conf / "10-net.conflist").rename(node.directory / "away")
    node.start()
    assert node.status(POD) is None
    assert Path(attachment.netns_path).exists(), "it may still be running"
    with pytest.raises(Unavailable, match=r"the record of sandbox 0+ is lost, and there is no configuration"):
        node.detach(POD)
    (node.directory / "away").rename(node.conf / "10-net.conflist")
    fake.on("DEL", "exit 1")
    with pytest.raises(Unavailable, match=r"fake"):
        node.detach(POD)
    fake.on("DEL", None)
    assert node.detach(POD)
    add, _, delete = fake.calls()
    assert (delete.netns, delete.args, delete.ifname) == (add.netns, add.args, add.ifname)
    assert os.listdir("/run/netns") == []
    assert list((node.state / "cni" / "attachments").iterdir()) == []


def test_a_namespace_that_can_not_be_made(node: Node, fake: FakePlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.ioctl", refuse)
        with pytest.raises(Unavailable, match=r"network namespace /run/netns/portoshim-.*Operation not permitted"):
            node.attach(POD)
    assert fake.calls() == []
    assert node.detach(POD)
    assert fake.calls() == [], "no plugin has run"
    assert os.listdir("/run/netns") == []
    assert node.attach(POD).addresses


def test_a_namespace_that_can_not_be_removed_is_tried_again(
    node: Node, fake: FakePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.attach(POD)

    def refuse(path: str) -> None:
        raise NetnsError(f"{path}: can't be unmounted: Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(node.networking.namespaces, "remove", refuse)
        with pytest.raises(Unavailable, match=r"busy"):
            node.detach(POD)
    assert node.detach(POD)
    assert os.listdir("/run/netns") == []


def test_an_attachment_whose_namespace_has_vanished_is_made_anew(node: Node, fake: FakePlugin) -> None:
    attachment = node.attach(POD)
    node.networking.namespaces.remove(attachment.netns_path)
    assert node.attach(POD) == attachment
    assert [call.command for call in fake.calls()] == ["ADD", "DEL", "ADD"]
    assert fake.calls()[1].netns == ""
    assert Path(attachment.netns_path).exists()


def test_what_is_attached_is_checked_after_a_restart_and_only_then(node: Node, fake: FakePlugin) -> None:
    attachment = node.attach(POD)
    assert node.attach(POD) == attachment
    assert fake.calls("CHECK") == []
    node.stop()
    node.start()
    for _ in range(2):
        assert node.attach(POD) == attachment
    [check] = fake.calls("CHECK")
    assert (check.netns, check.stdin["prevResult"]) == (attachment.netns_path, RESULT)
    node.stop()
    node.start()
    fake.on("CHECK", "echo damaged >&2; exit 1")
    with pytest.raises(Unavailable, match=r"\(CHECK\).*damaged"):
        node.attach(POD)
    assert node.status(POD) == attachment, "it is not touched"
    assert node.detach(POD)
    assert node.attach(POD).addresses


def test_l3_is_checked_and_deleted_like_the_others(tmp_path: Path) -> None:
    with Node(tmp_path, NetType="L3") as node:
        node.network("fake")
        fake = node.fake()
        first = node.attach(POD)
        assert (first.netns_path, first.addresses) == ("", ("10.1.0.5",))
        assert os.listdir("/run/netns") == []
        node.stop()
        node.start()
        assert node.attach(POD) == first
        assert node.detach(POD)
        add, check, delete = fake.calls()
        assert add.netns == check.netns == node.networking.namespaces.path(POD.sandbox_id)
        assert delete.netns == ""


def test_status_costs_nothing(node: Node, fake: FakePlugin) -> None:
    node.attach(POD)
    started = time.monotonic()
    for _ in range(1000):
        node.status(POD)
    assert time.monotonic() - started < 1
    assert len(fake.calls()) == 1


def test_what_it_costs_is_counted(node: Node, fake: FakePlugin) -> None:
    fake.on("ADD", "sleep 0.1")
    node.attach(POD)
    node.detach(POD)
    [info] = node.manager.hook.runtime_info(context=testing.context())
    costs = json.loads(info["cnistatistics"])
    assert (costs["attached"], costs["detached"]) == (1, 1)
    assert 0.1 < costs["pluginSeconds"] < costs["attachSeconds"] + costs["detachSeconds"]


def test_little_is_added_to_the_plugins_own_time(node: Node, fake: FakePlugin) -> None:
    node.network("fake", "fake", "fake")
    took_s = []
    for number in range(10):
        # The processor's time: the clock's says how busy the machine is.
        started = time.process_time()
        node.attach(sandbox(number))
        node.detach(sandbox(number))
        took_s.append(time.process_time() - started)
    # Namespace, records, configuration, six processes started and their JSON: six milliseconds.
    assert min(took_s) < 0.015


def test_hundreds_of_pods(node: Node, fake: FakePlugin) -> None:
    count = 100
    numbers = iter(range(count))
    lock = threading.Lock()

    def live() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            node.attach(sandbox(number))
            if number % 2:
                node.detach(sandbox(number))

    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    assert at_once(live, 8) == [None] * 8
    assert len(os.listdir("/run/netns")) == len(node.networking.records.all()) == count // 2
    node.stop()
    node.start()
    assert len(node.networking.records.all()) == count // 2
    assert node.recovered()
    for number in range(count):
        assert node.detach(sandbox(number))
    assert os.listdir("/run/netns") == []
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
