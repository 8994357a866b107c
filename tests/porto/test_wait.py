"""Waiting: once for one of many, or for every change there is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from porto_api.connection import Connection
from porto_api.events import Event

from porto_api import Client, errors, rpc_pb2
from tests.porto.support import eventually, refused, start


@contextmanager
def soon(action: Callable[[], object], delay_s: float = 0.1) -> Iterator[None]:
    """Do something while the test waits."""
    timer = threading.Timer(delay_s, action)
    timer.start()
    yield
    timer.join()


class TestOnce:
    @pytest.mark.parametrize("command", ["true", ""], ids=["dead", "meta"])
    def test_what_has_ended_is_told_at_once(self, porto: Client, command: str) -> None:
        start(porto, "a", command)
        assert porto.wait(["a"], 60).name == "a"

    def test_what_is_stopped_too(self, porto: Client) -> None:
        porto.create("a")
        found = porto.wait(["a"], 60)
        assert (found.name, found.state) == ("a", "stopped")
        assert abs(found.when - time.time()) < 100

    def test_what_runs_takes_its_time(self, porto: Client) -> None:
        start(porto, "a")
        assert porto.wait(["a"], 0).timed_out
        before = time.monotonic()
        assert porto.wait(["a"], 0.2).timed_out
        assert time.monotonic() - before > 0.19
        with soon(lambda: porto.kill("a", 9)):
            found = porto.wait(["a"], 60)
        assert (found.name, found.state) == ("a", "dead")

    def test_the_first_of_many(self, porto: Client) -> None:
        start(porto, "a")
        start(porto, "b")
        with soon(lambda: porto.kill("b", 9)):
            assert porto.wait(["a", "b"], 60).name == "b"

    def test_masks_find_what_comes_later(self, porto: Client) -> None:
        with soon(lambda: porto.create("later")):
            assert porto.wait(["lat*"], 60).name == "later"

    def test_a_container_that_goes(self, porto: Client) -> None:
        start(porto, "a")
        with soon(lambda: porto.destroy("a")):
            assert porto.wait(["a"], 60).state in ("stopped", "destroyed")

    def test_a_container_that_is_not_there(self, porto: Client) -> None:
        with refused(errors.ContainerDoesNotExist, "container nope not found"):
            porto.wait(["nope"], 1)

    def test_what_comes_after_one_that_has_ended_isnt_looked_at(self, porto: Client) -> None:
        porto.create("a")
        assert porto.wait(["a", "nope"], 1).name == "a"
        with refused(errors.ContainerDoesNotExist, "container nope not found"):
            porto.wait(["nope", "a"], 1)

    def test_nothing_to_wait_for(self, porto: Client) -> None:
        with refused(errors.InvalidValue, "Containers to wait are not set"):
            porto.wait([], 1)

    def test_a_meta_container_ends_with_the_last_below_it(self, porto: Client) -> None:
        start(porto, "m", "")
        start(porto, "m/a")
        assert porto.wait(["m"], 0).timed_out
        with soon(lambda: porto.kill("m/a", 9)):
            found = porto.wait(["m"], 60)
        assert (found.name, found.state) == ("m", "meta")


class Record:
    """What a subscription tells."""

    def __init__(self, porto: Client, names: list[str], **options: object) -> None:
        self.events: list[Event] = []
        self._subscription = porto.subscribe(names, **options)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self._collect)
        self._thread.start()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *exc: object) -> None:
        self._subscription.close()
        self._thread.join()

    def _collect(self) -> None:
        with self._subscription as subscription:
            for event in subscription:
                self.events.append(event)

    def states(self, name: str) -> list[str]:
        return [event.state for event in self.events if event.name == name and not event.label]

    def wait_for(self, name: str, state: str) -> None:
        eventually(
            lambda: any(event.name == name and event.state == state for event in self.events),
            what=f"{name} {state}",
        )


class TestEvery:
    def test_the_present_comes_first(self, porto: Client) -> None:
        porto.create("old")
        with Record(porto, ["***"]) as record:
            record.wait_for("old", "stopped")

    def test_each_change_in_order(self, porto: Client) -> None:
        porto.create("before")
        with Record(porto, ["***"]) as record:
            record.wait_for("before", "stopped")  # from now on it is told everything
            start(porto, "a")
            porto.pause("a")
            porto.resume("a")
            porto.kill("a", 9)
            porto.wait(["a"], 60)
            porto.stop("a")
            porto.destroy("a")
            record.wait_for("a", "destroyed")
        assert record.states("a") == [
            *("stopped", "starting", "running", "paused", "running"),
            *("stopping", "stopped", "destroyed"),
        ]
        (ended,) = [event for event in record.events if event.state == "dead"]
        assert (ended.label, ended.value) == ("exit_code", "-9")

    def test_only_some(self, porto: Client) -> None:
        with Record(porto, ["a*"]) as record:
            start(porto, "b", "")
            start(porto, "ab", "")
            record.wait_for("ab", "meta")
        assert {event.name for event in record.events} == {"ab"}

    def test_one_state_and_no_more(self, porto: Client) -> None:
        with Record(porto, ["***"], target_state="dead") as record:
            start(porto, "a", "true")
            porto.wait(["a"], 60)
            record.wait_for("a", "dead")
            porto.stop("a")
            porto.start("a")
            porto.wait(["a"], 60)
        assert [event.state for event in record.events] == ["dead"]

    def test_labels(self, porto: Client) -> None:
        porto.create("before")
        porto.set_label("before", "TEST.x", "0")
        with Record(porto, ["a", "before"], labels=["TEST.*"]) as record:
            eventually(lambda: record.events)  # from now on it is told everything
            porto.create("a")
            record.wait_for("a", "stopped")
            porto.set_label("a", "TEST.x", "1")
            porto.set_label("a", "OTHER.x", "1")
            porto.inc_label("a", "TEST.n")
            porto.set_label("a", "TEST.x", "")
            eventually(lambda: len(record.events) >= 5)
        labels = [(event.label, event.value) for event in record.events if event.label and event.name == "a"]
        assert labels == [("TEST.x", "1"), ("TEST.n", "1"), ("TEST.x", "")]

    def test_a_start_that_fails(self, porto: Client) -> None:
        porto.create("a")
        porto.set_property("a", "command", "nonexistent")
        with Record(porto, ["***"]) as record:
            record.wait_for("a", "stopped")
            with refused(errors.InvalidCommand):
                porto.start("a")
            eventually(lambda: any(event.label == "start_error" for event in record.events))

    def test_a_meta_container_when_nothing_runs_in_it_any_more(self, porto: Client) -> None:
        start(porto, "m", "")
        with Record(porto, ["m"]) as record:
            record.wait_for("m", "meta")
            start(porto, "m/a", "true")
            eventually(lambda: len(record.events) >= 2)
        assert record.states("m") == ["meta", "meta"]

    def test_requests_on_the_same_connection(self, porto: Client) -> None:
        porto.create("a")
        with porto.session() as connection:
            wait, stop, version = (rpc_pb2.TContainerRequest() for _ in range(3))
            wait.AsyncWait.name.append("a")
            stop.StopAsyncWait.name.append("a")
            version.version.SetInParent()
            assert _ask(connection, wait) == ["stopped", "Success"]
            assert _ask(connection, version) == ["Success"]
            porto.start("a")
            assert _ask(connection, version) == ["starting", "meta", "Success"]
            assert _ask(connection, stop) == ["Success"]
            assert _ask(connection, stop) == ["InvalidValue"]
            porto.stop("a")
            assert _ask(connection, version) == ["Success"]

    def test_a_time_limit(self, porto: Client) -> None:
        start(porto, "a")
        with porto.session() as connection:
            request = rpc_pb2.TContainerRequest()
            request.AsyncWait.name.append("a")
            request.AsyncWait.timeout_ms = 50
            assert _ask(connection, request) == ["running", "Success"]
            assert connection.receive(time.monotonic() + 10).AsyncWait.state == "timeout"


def _ask(connection: Connection, request: rpc_pb2.TContainerRequest) -> list[str]:
    """Send a request: the states reported meanwhile, and at the end what the answer is."""
    connection.send(request, time.monotonic() + 10)
    found: list[str] = []
    while True:
        response = connection.receive(time.monotonic() + 10)
        if not response.HasField("AsyncWait"):
            return [*found, rpc_pb2.EError.Name(response.error)]
        found.append(response.AsyncWait.state)
