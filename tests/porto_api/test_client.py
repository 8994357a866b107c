"""The client: errors by class, nothing that changes something sent twice, deadlines, cancellation, parallel calls."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from porto_api import CancelToken, Client, errors, rpc_pb2
from tests.porto_api.conftest import ScriptedPorto, hang_up, ok


@pytest.fixture
def client(porto: ScriptedPorto) -> Iterator[Client]:
    with Client(porto.path, timeout_s=10) as made:
        yield made


def failed(code: rpc_pb2.EError, text: str = "why") -> rpc_pb2.TContainerResponse:
    return rpc_pb2.TContainerResponse(error=code, errorMsg=text)


@pytest.mark.parametrize("name", [n for n in rpc_pb2.EError.keys() if n != "Success"])  # noqa: SIM118 - an enum wrapper
def test_each_error_has_its_class(porto: ScriptedPorto, client: Client, name: str) -> None:
    code = cast("rpc_pb2.EError", rpc_pb2.EError.Value(name))
    porto.answer = lambda request, peer: failed(code)
    with pytest.raises(getattr(errors, name)) as caught:
        client.start("a")
    assert (caught.value.code, caught.value.message, str(caught.value)) == (code, "why", f"{name}: why")


def test_an_answer_without_an_error_code_is_a_lost_error(porto: ScriptedPorto, client: Client) -> None:
    porto.answer = lambda request, peer: rpc_pb2.TContainerResponse()
    with pytest.raises(errors.LostError):
        client.start("a")


def test_an_unknown_error_keeps_its_number() -> None:
    err = errors.error_for(999999, "new")
    assert (type(err), err.code, str(err)) == (errors.PortoError, 999999, "EError 999999: new")


def test_no_socket_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(errors.SocketUnavailable, match="can't connect"):
        Client(str(tmp_path / "none")).version()


def test_connections_are_used_again(porto: ScriptedPorto, client: Client) -> None:
    for _ in range(5):
        client.create("a")
    assert porto.connections == 1


def test_parallel_calls_have_connections_of_their_own(porto: ScriptedPorto, client: Client) -> None:
    together = threading.Barrier(4, timeout=10)

    def answer(request: rpc_pb2.TContainerRequest, peer: socket.socket) -> rpc_pb2.TContainerResponse:
        together.wait()
        return ok()

    porto.answer = answer
    threads = [threading.Thread(target=client.start, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert porto.connections == 4
    assert {r.start.name for r in porto.requests} == {"0", "1", "2", "3"}


def test_a_restarted_porto_is_noticed_before_anything_is_sent(porto: ScriptedPorto, client: Client) -> None:
    client.create("a")
    porto.stop()
    porto.start()
    client.create("b")
    assert [r.create.name for r in porto.requests] == ["a", "b"]


def test_a_change_is_not_sent_twice(porto: ScriptedPorto, client: Client) -> None:
    porto.answer = lambda request, peer: hang_up(peer)
    with pytest.raises(errors.SocketError):
        client.create("a")
    assert len(porto.requests) == 1


def test_a_question_is_asked_again_once(porto: ScriptedPorto, client: Client) -> None:
    porto.answer = lambda request, peer: hang_up(peer)
    with pytest.raises(errors.SocketError):
        client.get_property("a", "state")
    assert len(porto.requests) == 2


def test_every_read_only_request_is_a_request() -> None:
    from porto_api.connection import READ_ONLY

    assert set(rpc_pb2.TContainerRequest.DESCRIPTOR.fields_by_name) >= READ_ONLY


def test_the_deadline_holds_and_the_late_answer_is_not_mistaken_for_the_next(
    porto: ScriptedPorto, client: Client
) -> None:
    release = threading.Event()

    def answer(request: rpc_pb2.TContainerRequest, peer: socket.socket) -> rpc_pb2.TContainerResponse:
        if request.HasField("getProperty"):
            response = ok()
            response.getProperty.value = request.getProperty.name
            if request.getProperty.name == "slow":
                release.wait(60)
            return response
        return ok()

    porto.answer = answer
    started = time.monotonic()
    with pytest.raises(errors.SocketTimeout):
        client.get_property("slow", "state", timeout_s=0.1)
    assert time.monotonic() - started < 5
    release.set()
    assert client.get_property("quick", "state") == "quick"


def test_the_deadline_does_not_depend_on_the_clock(
    porto: ScriptedPorto, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    client.create("a")


def test_cancelling_wakes_a_call_and_costs_its_connection(porto: ScriptedPorto, client: Client) -> None:
    asked = threading.Event()
    porto.answer = lambda request, peer: asked.set()
    token = CancelToken()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            client.wait(["a"], cancel=token)
        except errors.Cancelled as err:
            caught.append(err)

    thread = threading.Thread(target=wait)
    thread.start()
    assert asked.wait(60)
    token.cancel()
    thread.join(60)
    assert len(caught) == 1
    porto.answer = lambda request, peer: ok()
    client.create("b")
    assert porto.connections == 2


def test_a_cancelled_token_stops_a_call_before_it_is_sent(porto: ScriptedPorto, client: Client) -> None:
    token = CancelToken()
    token.cancel()
    with pytest.raises(errors.Cancelled):
        client.start("a", cancel=token)
    assert porto.requests == []


def test_get_returns_values_and_errors_by_container(porto: ScriptedPorto, client: Client) -> None:
    response = ok()
    entry = response.get.list.add(name="a")
    entry.keyval.add(variable="state", value="running")
    entry.keyval.add(variable="exit_code", error=rpc_pb2.InvalidState, errorMsg="not dead")
    porto.answer = lambda request, peer: response
    got = client.get(["a"], ["state", "exit_code"])
    assert got["a"]["state"] == "running"
    assert isinstance(got["a"]["exit_code"], errors.InvalidState)


def test_a_session_keeps_one_connection(porto: ScriptedPorto, client: Client) -> None:
    with client.session() as connection:
        client.create("a", weak=True, connection=connection)
        client.create("b", weak=True, connection=connection)
        client.create("c")
    assert porto.connections == 2
    assert [r.HasField("createWeak") for r in porto.requests] == [True, True, False]


def test_events_come_as_they_happen_until_closed(porto: ScriptedPorto, client: Client) -> None:
    def answer(request: rpc_pb2.TContainerRequest, peer: socket.socket) -> None:
        for state in ("running", "dead"):
            response = ok()
            response.AsyncWait.name, response.AsyncWait.state, response.AsyncWait.when = "a", state, 5
            peer.sendall(bytes([len(response.SerializeToString())]) + response.SerializeToString())

    porto.answer = answer
    seen = []
    with client.subscribe() as subscription:
        for event in subscription:
            seen.append((event.name, event.state, event.when))
            if event.state == "dead":
                subscription.close()
    assert seen == [("a", "running", 5), ("a", "dead", 5)]


def test_events_end_with_an_error_when_porto_goes(porto: ScriptedPorto, client: Client) -> None:
    porto.answer = lambda request, peer: hang_up(peer)
    with client.subscribe() as subscription, pytest.raises(errors.SocketError):
        list(subscription)


def test_a_thousand_calls_leave_no_descriptor(porto: ScriptedPorto, client: Client) -> None:
    client.create("a")
    before = len(os.listdir("/proc/self/fd"))
    for n in range(1000):
        client.create(str(n))
    client.close()
    assert len(os.listdir("/proc/self/fd")) <= before
