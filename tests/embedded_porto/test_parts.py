"""Records, waiters and timers."""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
from pathlib import Path

import pytest
from shim_embedded_porto import kernel, states
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.store import Store
from shim_embedded_porto.timers import Timers
from shim_embedded_porto.tree import Tree
from shim_embedded_porto.waiters import Report, Waiter, Waiters


class TestStore:
    def test_records_come_back(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "state")
        store.open()
        store.save_container(5, {"name": "a"})
        store.save_volume("7", {"path": "/x"})
        store.save_container(5, {"name": "b"})
        again = Store(tmp_path / "state")
        again.open()
        assert list(again.containers()) == [{"name": "b"}]
        assert list(again.volumes()) == [{"path": "/x"}]
        again.remove_container(5)
        again.remove_container(5)
        assert list(again.containers()) == []
        assert not again.rebooted

    def test_half_a_record_is_none(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "state")
        store.open()
        store.save_container(5, {"name": "a"})
        (tmp_path / "state/containers/6").write_text('{"name": ')
        (tmp_path / "state/containers/7.new").write_text(json.dumps({"name": "c"}))
        assert list(store.containers()) == [{"name": "a"}]
        assert not (tmp_path / "state/containers/7.new").exists()

    def test_no_room_for_a_record(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "state")
        store.open()
        store.save_container(5, {"name": "a"})
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                store.save_container(5, {"name": "b" * 1000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert list(store.containers()) == [{"name": "a"}]

    def test_a_file_system_that_cant_exchange_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def exchange(first: str, second: str) -> None:
            raise OSError(errno.EINVAL, "Invalid argument", f"{first}, {second}")

        monkeypatch.setattr(kernel, "exchange", exchange)
        store = Store(tmp_path / "state")
        store.open()
        for name in "ab":
            store.save_container(5, {"name": name})
        assert list(store.containers()) == [{"name": "b"}]
        assert os.listdir(tmp_path / "state/containers") == ["5"]

    def test_another_boot(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "state")
        store.open()
        store.save_container(5, {"name": "a"})
        (tmp_path / "state/boot_id").write_text("another")
        again = Store(tmp_path / "state")
        again.open()
        assert again.rebooted
        assert list(again.containers()) == []

    def test_it_is_private(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "state")
        store.open()
        store.save_container(5, {})
        assert (tmp_path / "state").stat().st_mode & 0o077 == 0
        assert (tmp_path / "state/containers/5").stat().st_mode & 0o077 == 0


class Listening:
    """A client that waits."""

    def __init__(self) -> None:
        self.heard: list[Report] = []

    def visible_name(self, name: str) -> str | None:
        return None if name.startswith("hidden") else name

    def report(self, report: Report, *, asynchronous: bool) -> None:
        self.heard.append(report)


@pytest.fixture
def tree() -> Tree:
    return Tree("/work", set(), set())


def container(tree: Tree, name: str, state: str) -> Container:
    with tree.lock:
        ct = tree.add(name, superuser=True)
    ct.state = state
    return ct


class TestWaiters:
    def test_once(self, tree: Tree) -> None:
        waiters, client = Waiters(), Listening()
        a = container(tree, "a", states.RUNNING)
        waiters.activate(Waiter(asynchronous=False, names=["a"]), client)
        waiters.tell(a)
        assert client.heard == []
        a.state = states.DEAD
        waiters.tell(a)
        waiters.tell(a)
        assert [report.state for report in client.heard] == ["dead"]

    def test_every_time(self, tree: Tree) -> None:
        waiters, client = Waiters(), Listening()
        a = container(tree, "a", states.RUNNING)
        waiters.activate(Waiter(asynchronous=True, masks=["*"]), client)
        for state in (states.STARTING, states.RUNNING, states.DEAD):
            a.state = state
            waiters.tell(a)
        assert [report.state for report in client.heard] == ["starting", "running", "dead"]
        waiters.forget(client)
        waiters.tell(a)
        assert len(client.heard) == 3

    def test_the_later_replaces_the_earlier(self, tree: Tree) -> None:
        waiters, client = Waiters(), Listening()
        a, b = container(tree, "a", states.RUNNING), container(tree, "b", states.RUNNING)
        waiters.activate(Waiter(asynchronous=True, names=["a"]), client)
        waiters.activate(Waiter(asynchronous=True, names=["b"]), client)
        waiters.tell(a)
        waiters.tell(b)
        assert [report.name for report in client.heard] == ["b"]

    def test_labels_of_porto_are_for_everybody(self, tree: Tree) -> None:
        waiters, client = Waiters(), Listening()
        a = container(tree, "a", states.DEAD)
        waiters.activate(Waiter(asynchronous=True, names=["a"], labels=["TEST.*"]), client)
        for label in ("OTHER.x", "TEST.x", "exit_code"):
            waiters.tell(a, label, "1")
        assert [report.label for report in client.heard] == ["TEST.x", "exit_code"]

    def test_what_a_client_cant_see(self, tree: Tree) -> None:
        waiters, client = Waiters(), Listening()
        waiters.activate(Waiter(asynchronous=True, masks=["***"]), client)
        waiters.tell(container(tree, "hidden", states.DEAD))
        assert client.heard == []

    def test_the_time_is_up_once(self, tree: Tree) -> None:
        waiters, client = Waiters(), Listening()
        waiter = Waiter(asynchronous=False, names=["a"])
        waiters.activate(waiter, client)
        waiters.expire(waiter)
        waiters.expire(waiter)
        assert [report.state for report in client.heard] == ["timeout"]

    def test_taking_back(self, tree: Tree) -> None:
        waiters, client = Waiters(), Listening()
        waiters.activate(Waiter(asynchronous=True, names=["a"]), client)
        with pytest.raises(Fault, match="Waiter not found"):
            waiters.cancel(Waiter(asynchronous=True, names=["b"]), client)
        waiters.cancel(Waiter(asynchronous=True, names=["a"]), client)
        waiters.tell(container(tree, "a", states.DEAD))
        assert client.heard == []


class TestTimers:
    def test_in_the_order_they_are_due(self) -> None:
        timers, done, order = Timers(workers=1), threading.Event(), list[str]()
        timers.later(0.06, done.set)
        timers.later(0.04, lambda: order.append("second"))
        timers.later(0.02, lambda: order.append("first"))
        timers.soon(lambda: order.append("now"))
        assert done.wait(60)
        timers.stop()
        assert order == ["now", "first", "second"]

    def test_one_that_fails_stops_none(self) -> None:
        timers, done = Timers(workers=1), threading.Event()
        timers.soon(lambda: 1 / 0)
        timers.soon(done.set)
        assert done.wait(60)
        timers.stop()
        timers.soon(lambda: 1 / 0)  # too late, and no error
