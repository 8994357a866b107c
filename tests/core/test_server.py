"""The server on its socket, with real gRPC on both ends."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from shim_core import errors, hookimpl, testing
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.dispatch import POOL_SIZES, Dispatcher
from shim_core.errors import Code, ShimError, StartupError
from shim_core.server import Server


class Runtime:
    """Answers a few calls, in ways the tests choose."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.cancelled = threading.Event()
        self.running = threading.Semaphore(0)
        self.error: Exception | None = None

    @hookimpl
    def cri_version(self, request: pb.VersionRequest) -> pb.VersionResponse:
        if self.error:
            raise self.error
        return pb.VersionResponse(version=request.version, runtime_name="test")

    @hookimpl
    def cri_exec_sync(self, request: pb.ExecSyncRequest, context: CallContext) -> pb.ExecSyncResponse:
        self.running.release()
        context.on_cancel(self.cancelled.set)
        self.release.wait(30)
        return pb.ExecSyncResponse(exit_code=3)

    @hookimpl
    def cri_list_pod_sandbox(self, request: pb.ListPodSandboxRequest) -> pb.ListPodSandboxResponse:
        size = int(request.filter.id or 0)
        return pb.ListPodSandboxResponse(items=[pb.PodSandbox(id="x" * size)])

    @hookimpl
    def cri_get_container_events(self, context: CallContext) -> Iterator[pb.ContainerEventResponse]:
        yield pb.ContainerEventResponse(container_id="one")
        self.running.release()
        context.wait(30)
        self.cancelled.set()


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


@pytest.fixture
def server(runtime: Runtime, tmp_path: Path) -> Iterator[Server]:
    made = Server(Dispatcher(testing.manager(runtime=runtime)), str(tmp_path / "shim.sock"))
    made.start()
    yield made
    runtime.release.set()
    made.stop(0)


@pytest.fixture
def client(server: Server) -> Iterator[testing.CriClient]:
    with testing.CriClient(server.path) as made:
        yield made


def failure(call: Any, *args: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*args)
    return caught.value


@pytest.mark.parametrize("package", ["runtime.v1", "runtime.v1alpha2"])
def test_both_packages_reach_the_same_hook(server: Server, package: str) -> None:
    with testing.CriClient(server.path, package) as client:
        assert client.Version(pb.VersionRequest(version="v1")).runtime_name == "test"


def test_a_call_nobody_answers_is_unimplemented(client: testing.CriClient) -> None:
    err = failure(client.Status, pb.StatusRequest())
    assert err.code() is grpc.StatusCode.UNIMPLEMENTED
    assert err.details() == "Status: no plugin answers this call"


def test_a_stream_nobody_answers_is_unimplemented_on_receipt(client: testing.CriClient) -> None:
    err = failure(list, client.StreamImages(pb.StreamImagesRequest()))
    assert err.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "kind",
    [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ShimError)],
    ids=lambda c: c.__name__,
)
def test_every_error_keeps_code_and_text(client: testing.CriClient, runtime: Runtime, kind: type[ShimError]) -> None:
    runtime.error = kind("sandbox 'x': ünknown")
    err = failure(client.Version, pb.VersionRequest())
    assert err.code().value[0] == int(kind.code)
    assert err.details() == "sandbox 'x': ünknown"


def test_every_status_code_has_an_error() -> None:
    kinds = {c.code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ShimError)}
    assert kinds == set(Code) - {Code.OK}


def test_a_bug_is_internal_and_says_nothing(
    client: testing.CriClient, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.error = ValueError("password=S3CR3T")
    err = failure(client.Version, pb.VersionRequest())
    assert err.code() is grpc.StatusCode.INTERNAL
    assert "S3CR3T" not in err.details()
    assert "Traceback" not in err.details()
    request_id = err.details().rsplit("[", 1)[1].rstrip("]")
    assert request_id in caplog.text
    assert "S3CR3T" in caplog.text


def test_a_long_error_arrives_shortened(client: testing.CriClient, runtime: Runtime) -> None:
    runtime.error = errors.InvalidArgument("ü" * 100_000)
    err = failure(client.Version, pb.VersionRequest())
    assert err.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert 500 < len(err.details()) < 3000


def test_messages_of_more_than_32_mib_pass_both_ways(server: Server) -> None:
    size = 33 * 1024 * 1024
    channel = grpc.insecure_channel(f"unix:{server.path}", options=[("grpc.max_receive_message_length", -1)])
    with channel:
        call = channel.unary_unary(
            "/runtime.v1.RuntimeService/ListPodSandbox",
            request_serializer=pb.ListPodSandboxRequest.SerializeToString,
            response_deserializer=pb.ListPodSandboxResponse.FromString,
        )
        selector = {"padding": "x" * size}
        answer = call(pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(id=str(size), label_selector=selector)))
        assert len(answer.items[0].id) == size


def test_a_client_that_leaves_cancels_its_call(client: testing.CriClient, runtime: Runtime) -> None:
    future = client.ExecSync.future(pb.ExecSyncRequest())
    assert runtime.running.acquire(timeout=10)
    future.cancel()
    assert runtime.cancelled.wait(60)


def test_a_stream_ends_when_its_client_leaves(client: testing.CriClient, runtime: Runtime) -> None:
    stream = client.GetContainerEvents(pb.GetEventsRequest())
    assert next(iter(stream)).container_id == "one"
    assert runtime.running.acquire(timeout=10)
    stream.cancel()
    assert runtime.cancelled.wait(60)


def test_blocked_execs_do_not_hold_up_lists(client: testing.CriClient, runtime: Runtime) -> None:
    futures = [client.ExecSync.future(pb.ExecSyncRequest()) for _ in range(POOL_SIZES["exec"] + 50)]
    for _ in range(POOL_SIZES["exec"]):
        assert runtime.running.acquire(timeout=30)
    assert not runtime.running.acquire(blocking=False)  # the rest waits for a thread ...
    assert client.Version(pb.VersionRequest(), timeout=10).runtime_name == "test"  # ... and nobody else does
    runtime.release.set()
    assert {future.result(timeout=30).exit_code for future in futures} == {3}


class TestSocket:
    def make(self, path: Path) -> Server:
        return Server(Dispatcher(testing.manager()), str(path))

    @pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
    def test_mode_is_0660_whatever_the_umask(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            server = self.make(tmp_path / "s")
            server.start()
            mode = stat.S_IMODE(os.stat(tmp_path / "s").st_mode)
            server.stop(0)
        finally:
            os.umask(before)
        assert oct(mode) == "0o660"

    def test_a_stale_socket_is_replaced(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "s"))
        server = self.make(tmp_path / "s")
        server.start()
        with testing.CriClient(str(tmp_path / "s")) as client:
            client.wait_ready()
        server.stop(0)

    def test_a_killed_instance_is_no_hindrance(self, tmp_path: Path) -> None:
        script = (
            "import sys, os, signal; from shim_core import testing; from shim_core.server import Server;"
            "from shim_core.dispatch import Dispatcher; s = Server(Dispatcher(testing.manager()), sys.argv[1]);"
            "s.start(); os.kill(os.getpid(), signal.SIGKILL)"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "s")], check=False)
        assert (tmp_path / "s").is_socket()
        server = self.make(tmp_path / "s")
        server.start()
        server.stop(0)

    def test_a_second_instance_leaves_the_first_alone(self, server: Server, client: testing.CriClient) -> None:
        with pytest.raises(StartupError, match="another portoshim is serving there"):
            self.make(Path(server.path)).start()
        assert client.Version(pb.VersionRequest()).runtime_name == "test"

    def test_a_stranger_on_the_socket_is_left_alone(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(tmp_path / "s"))
            other.listen()
            with pytest.raises(StartupError, match="another process is serving there"):
                self.make(tmp_path / "s").start()
        assert (tmp_path / "s").is_socket()

    @pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda p: p.symlink_to("/etc/passwd")])
    def test_what_is_no_socket_is_not_removed(self, tmp_path: Path, make: Any) -> None:
        make(tmp_path / "s")
        with pytest.raises(StartupError, match="exists and is no socket"):
            self.make(tmp_path / "s").start()
        assert os.path.lexists(tmp_path / "s")

    def test_nothing_is_left_after_a_stop(self, tmp_path: Path) -> None:
        server = self.make(tmp_path / "s")
        server.start()
        server.stop(0)
        assert list(tmp_path.iterdir()) == []
