"""The daemon itself: version, state and counters, settings, and what isn't there."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from porto_api import Client, errors, framing, rpc_pb2
from tests.porto.support import refused, start


def test_version(porto: Client) -> None:
    tag, revision = porto.version()
    assert tag.split(".")[0].isdigit()
    assert revision


def test_counters(porto: Client) -> None:
    before = porto.system()
    start(porto, "a")
    start(porto, "b", "")
    after = porto.system()
    assert after.container_count == before.container_count + 2
    assert after.container_running == before.container_running + 1
    assert after.container_created == before.container_created + 2
    assert after.container_started == before.container_started + 2
    assert after.porto_uptime >= 0
    assert after.client_count >= 1


def test_frozen(porto: Client) -> None:
    request = rpc_pb2.TContainerRequest()
    request.SetSystem.frozen = True
    porto.call(request)
    try:
        porto.create("a")  # root may
    finally:
        request.SetSystem.frozen = False
        porto.call(request)


def test_counters_can_be_cleared(porto: Client) -> None:
    start(porto, "a", "")
    request = rpc_pb2.TContainerRequest()
    request.ClearStatistics.stat = "containers_started"
    porto.call(request)
    assert porto.system().container_started == 0
    request.ClearStatistics.stat = "nope"
    with pytest.raises(errors.PortoError):
        porto.call(request)


@pytest.mark.parametrize("call", ["dockerImageStatus", "listDockerImages", "pullDockerImage", "removeDockerImage"])
def test_there_are_no_images(porto: Client, call: str) -> None:
    request = rpc_pb2.TContainerRequest()
    message = getattr(request, call)
    message.SetInParent()
    if call != "listDockerImages":
        message.name = "busybox"
    with refused(errors.NotSupported, "Docker images are not supported"):
        porto.call(request)


def test_a_request_without_a_method(porto: Client) -> None:
    with refused(errors.InvalidMethod):
        porto.call(rpc_pb2.TContainerRequest())


def test_requests_in_a_row(porto: Client) -> None:
    """Answers come in the order of the requests, whatever each takes."""
    names = [f"c{number}" for number in range(20)]
    with porto.session() as connection:
        for name in names:
            request = rpc_pb2.TContainerRequest()
            request.create.name = name
            connection.send(request, time.monotonic() + 10)
        listing = rpc_pb2.TContainerRequest()
        listing.list.SetInParent()
        connection.send(listing, time.monotonic() + 10)
        answers = [connection.receive(time.monotonic() + 10) for _ in range(len(names) + 1)]
    assert {answer.error for answer in answers} == {rpc_pb2.Success}
    assert sorted(answers[-1].list.name) == sorted(names)


def test_a_slow_request_holds_up_nobody(porto: Client) -> None:
    start(porto, "a", ["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"])
    stopping = threading.Thread(target=lambda: porto.stop("a", kill_after_s=1))
    stopping.start()
    before = time.monotonic()
    start(porto, "b")
    assert porto.get_property("b", "state") == "running"
    assert time.monotonic() - before < 0.9
    stopping.join()


def test_many_at_once(porto: Client) -> None:
    def cycle(number: int) -> str:
        name = f"c{number}"
        start(porto, name, ["echo", name])
        porto.wait([name], 60)
        found = porto.get_property(name, "stdout")
        porto.destroy(name)
        return found

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(cycle, range(32))) == [f"c{number}\n" for number in range(32)]
    assert porto.list_containers() == []


def test_the_same_name_at_once(porto: Client) -> None:
    def create(_: int) -> bool:
        try:
            porto.create("a")
        except errors.ContainerAlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(8))) == 1


@pytest.mark.parametrize("data", [b"\xff" * 20, b"\x05hello", b"\x80" * 10 + b"\x01", b""])
def test_what_is_no_request(porto: Client, data: bytes) -> None:
    """Whatever becomes of the connection: nothing else happens."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(porto.path)
        connection.sendall(data)
        assert porto.list_containers() == []


def test_half_a_request(porto: Client) -> None:
    request = rpc_pb2.TContainerRequest()
    request.create.name = "a"
    frame = framing.encode(request)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(porto.path)
        connection.sendall(frame[:-1])
    assert porto.list_containers() == []
