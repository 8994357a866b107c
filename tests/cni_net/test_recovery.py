"""What earlier runs and earlier boots have left comes back by itself, and what others own stays."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from shim_cni_net import networking

from shim_core import hookimpl
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import Unavailable
from tests.cni_net import driver
from tests.cni_net.support import RESULT, FakePlugin, Node, sandbox, until

pytestmark = pytest.mark.root


class Runtime:
    """The runtime as it is asked which sandboxes there are."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.away = 0

    @hookimpl
    def cri_list_pod_sandbox(self, request: pb.ListPodSandboxRequest) -> pb.ListPodSandboxResponse:
        if self.away:
            self.away -= 1
            raise Unavailable("the runtime is starting")
        return pb.ListPodSandboxResponse(items=[pb.PodSandbox(id=sandbox_id) for sandbox_id in self.known])


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


@pytest.fixture
def node(tmp_path: Path, runtime: Runtime) -> Node:
    node = Node(tmp_path, runtime=runtime)
    node.network("fake", version="1.1.0")
    return node


@pytest.fixture
def fake(node: Node) -> FakePlugin:
    return node.fake(result={**RESULT, "cniVersion": "1.1.0"})


@pytest.fixture
def reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start the node another time: its boot id changes, and namespaces are gone."""

    def now(name: str) -> None:
        path = tmp_path / "boot_id"
        path.write_text(f"{name}\n")
        monkeypatch.setattr(networking, "_BOOT_ID", path)
        for entry in Path("/run/netns").iterdir():
            subprocess.run(["umount", "-l", entry], check=False, capture_output=True)
            entry.unlink()

    return now


def pinned() -> list[str]:
    return [name for name in os.listdir("/run/netns") if name.startswith("portoshim-")]


def test_after_a_reboot_addresses_come_back_without_a_namespace(
    node: Node, fake: FakePlugin, runtime: Runtime, reboot: Any
) -> None:
    runtime.known = {sandbox(1).sandbox_id, sandbox(2).sandbox_id}
    with node:
        for number in (1, 2):
            node.attach(sandbox(number))
    reboot("second")
    with node:
        assert node.status(sandbox(1)) is None
        assert node.recovered()
        deleted = {call.container_id: call for call in fake.calls("DEL")}
        assert deleted.keys() == runtime.known
        assert all(call.netns == "" and call.stdin["prevResult"]["ips"] for call in deleted.values())
        assert node.networking.records.all() == ()
        assert node.detach(sandbox(1)), "kubelet may still come to stop it"


def test_after_a_reboot_it_is_tried_until_the_plugins_are_there(
    node: Node, fake: FakePlugin, runtime: Runtime, reboot: Any
) -> None:
    runtime.known = {sandbox().sandbox_id}
    with node:
        node.attach(sandbox())
    reboot("second")
    away = fake.path.with_name("away")
    fake.path.rename(away)
    with node:
        assert not node.recovered(timeout_s=0.5)
        with pytest.raises(Unavailable, match=r"fake"):
            node.detach(sandbox())
        with pytest.raises(Unavailable, match=r"fake"):
            node.attach(sandbox())
        away.rename(fake.path)
        assert node.recovered()
        assert node.networking.records.all() == ()


def test_a_sandbox_of_another_boot_is_deleted_before_it_is_attached_anew(
    node: Node, fake: FakePlugin, reboot: Any
) -> None:
    fake.on("DEL", "exit 1")
    with node:
        first = node.attach(sandbox())
    reboot("second")
    with node:
        with pytest.raises(Unavailable):
            node.detach(sandbox())
        fake.on("DEL", None)
        assert node.attach(sandbox()).addresses == first.addresses
        assert [call.command for call in fake.calls("ADD", "DEL")][-2:] == ["DEL", "ADD"]


def test_what_the_runtime_has_lost_is_released_unless_it_runs(node: Node, fake: FakePlugin, runtime: Runtime) -> None:
    with node:
        attached = {number: node.attach(sandbox(number)) for number in (1, 2, 3)}
    runtime.known = {sandbox(1).sandbox_id}
    runtime.away = 1
    with subprocess.Popen(["nsenter", f"--net={attached[2].netns_path}", "sleep", "1000"]) as process:
        try:
            assert until(
                lambda: os.stat(f"/proc/{process.pid}/ns/net").st_ino == os.stat(attached[2].netns_path).st_ino
            )
            with node:
                assert node.recovered()
                assert [call.container_id for call in fake.calls("DEL")] == [sandbox(3).sandbox_id]
                assert node.status(sandbox(1)) == attached[1]
                assert node.status(sandbox(2)) == attached[2]
                assert node.status(sandbox(3)) is None
        finally:
            process.kill()


def test_without_a_runtime_nothing_is_taken_for_lost(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.network("fake")
    fake = node.fake()
    with node:
        node.attach(sandbox())
    with node:
        assert node.recovered()
        assert fake.calls("DEL") == []


def test_namespaces_without_a_record_go_and_others_stay(node: Node, fake: FakePlugin, tmp_path: Path) -> None:
    with node:
        mine = node.attach(sandbox(1)).netns_path
        empty, busy = (node.networking.namespaces.path(sandbox(number).sandbox_id) for number in (2, 3))
        for path in (empty, busy):
            node.networking.namespaces.create(path)
    Path(node.networking.namespaces.path("plain-file")).touch()
    subprocess.run(["ip", "netns", "add", "somebody"], check=True)
    with Node(tmp_path / "other") as other:
        other.networking.namespaces.create(other.networking.namespaces.path("neighbour"))
    with subprocess.Popen(["nsenter", f"--net={busy}", "sleep", "1000"]) as process:
        try:
            assert until(lambda: os.stat(f"/proc/{process.pid}/ns/net").st_ino == os.stat(busy).st_ino)
            with node:
                names = set(os.listdir("/run/netns"))
        finally:
            process.kill()
    assert {Path(mine).name, Path(busy).name, "somebody"} < names
    assert Path(empty).name not in names
    assert not [name for name in names if name.endswith("plain-file")]
    assert [name for name in names if name.endswith("neighbour")], "another shim's namespace"


def test_garbage_is_collected_at_start_with_the_attachments_there_are(
    node: Node, fake: FakePlugin, runtime: Runtime
) -> None:
    with node:
        assert node.recovered()
        node.attach(sandbox(1))
        node.attach(sandbox(2))
        assert fake.calls("GC") == [], "nothing on a new node is ours to collect"
    runtime.known = {sandbox(1).sandbox_id, sandbox(2).sandbox_id}
    with node:
        assert node.recovered()
    [call] = fake.calls("GC")
    valid = [{"containerID": sandbox(number).sandbox_id, "ifname": "eth0"} for number in (1, 2)]
    assert call.stdin["cni.dev/valid-attachments"] == valid
    assert call.stdin["cni.dev/attachments"] == valid
    assert call.path == str(node.bin)
    assert (call.container_id, call.netns, call.ifname, call.args) == ("", "", "", "")


def test_a_collection_that_a_killed_daemon_has_left_is_ended_before_pods_come(tmp_path: Path) -> None:
    """It would take the addresses of those that it knows nothing of."""
    node = driver.node(tmp_path)
    node.network("fake", version="1.1.0")
    fake = node.fake()
    with node:
        pass
    pids = fake.path.with_name("pids")
    fake.on("GC", f"sleep 1000 & echo $$ $! > {pids}.tmp; mv {pids}.tmp {pids}; wait")
    daemons = driver.Driver(tmp_path)
    with daemons.daemon() as daemon:
        assert until(pids.exists)
        daemon.kill()
    daemons.close()
    processes = [Path("/proc", pid) for pid in pids.read_text().split()]
    assert all(process.exists() for process in processes)
    fake.on("GC", None)
    with node:
        assert until(lambda: not any(process.exists() for process in processes))


@pytest.mark.parametrize(("version", "keys"), [("1.1.0", {"disableGC": True}), ("1.0.0", {})])
def test_no_garbage_is_collected_where_it_is_not_wanted_or_known(
    node: Node, fake: FakePlugin, version: str, keys: dict[str, Any]
) -> None:
    node.network("fake", version=version, **keys)
    for _ in range(2):
        with node:
            assert node.recovered()
    assert fake.calls("GC") == []


def test_garbage_collection_waits_for_a_configuration_and_goes_on_after_a_failure(node: Node, fake: FakePlugin) -> None:
    with node:
        pass
    config = node.network("failing", "fake", version="1.1.0")
    failing = node.fake("failing")
    failing.on("GC", "exit 1")
    config.rename(config.with_suffix(".away"))
    with node:
        assert not node.recovered(timeout_s=0.3)
        config.with_suffix(".away").rename(config)
        assert node.recovered()
    assert len(failing.calls("GC")) == len(fake.calls("GC")) == 1


def test_stopping_does_not_wait_for_what_can_not_be_done(node: Node, fake: FakePlugin, reboot: Any) -> None:
    fake.on("DEL", "exit 1")
    with node:
        node.attach(sandbox())
    reboot("second")
    node.start()
    assert not node.recovered(timeout_s=0.3)
    node.stop()
    assert node.recovered(timeout_s=1)
    assert node.networking.records.all()
