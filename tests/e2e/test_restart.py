"""The daemon comes and goes, by request and by force; pods stay."""

from __future__ import annotations

import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from porto_api import Client
from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.conftest import pull
from tests.e2e.pods import Pods, until
from tests.e2e.test_lifecycle import porto_pid, porto_socket, traces
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root


@pytest.fixture
def own(registry: LocalRegistry, tmp_path: Path) -> Iterator[Node]:
    """A node of the test's own, to be stopped and killed."""
    made = Node(tmp_path / "node", registry=registry, debug=True)
    (tmp_path / "node").mkdir()
    made.start()
    yield made
    if not made.running:
        made.start()
    made.remove_pods()
    made.close()


@pytest.fixture
def own_pods(own: Node, registry: LocalRegistry) -> Pods:
    return Pods(own, pull(own, f"{registry.address}/public/busybox:1"))


@pytest.mark.parametrize("end", [Node.stop, Node.kill])
def test_pods_run_on_and_what_ended_meanwhile_is_known(own: Node, own_pods: Pods, end: Callable[[Node], None]) -> None:
    annotations = {f"example.org/key-{n}": f"välue\n{n}" for n in range(200)} | {"large": "é" * (100 * 1024)}
    labels = {f"label-{n}": "a b;c=d" for n in range(50)}
    sandbox = own_pods.run(annotations=annotations, labels=labels)
    before = own_pods.sandbox_status(sandbox)
    assert (dict(before.annotations), dict(before.labels)) == (annotations, labels)
    stays = own_pods.container(sandbox, "sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done")
    ends = own_pods.container(sandbox, "sh", "-c", "while [ ! -e /dev/shm/go ]; do sleep 0.01; done; echo last; exit 3")
    created = own_pods.create(sandbox, "true", annotations=annotations, labels=labels)
    running = own_pods.status(stays)
    with Client(porto_socket(own)) as porto:
        pid = int(porto.get_property(f"{sandbox}/{ends}", "root_pid"))
    end(own)
    process = os.pidfd_open(pid)
    Path(f"/proc/{pid}/root/dev/shm/go").touch()
    assert select.select([process], [], [], 20)[0]
    os.close(process)
    own.start()
    assert own_pods.sandbox_status(sandbox) == before
    assert own_pods.status(stays) == running
    kept = own_pods.status(created)
    assert (kept.state, dict(kept.annotations), dict(kept.labels)) == (pb.CONTAINER_CREATED, annotations, labels)
    ended = own_pods.exited(ends)
    assert (ended.exit_code, ended.reason) == (3, "Error")
    assert own_pods.log(ends) == "last\n"
    own_pods.start(created)
    assert own_pods.exited(created).exit_code == 0
    own_pods.stop(stays)
    numbers = own_pods.log(stays).split()
    assert numbers == [str(n) for n in range(len(numbers))]


def test_sigterm_under_load_touches_no_container(own: Node, own_pods: Pods) -> None:
    sandbox = own_pods.run()
    container = own_pods.container(sandbox)
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            try:
                own_pods.cri.ListContainers(pb.ListContainersRequest(), timeout=60)
                own_pods.exec(container, "true")
            except grpc.RpcError as err:
                assert err.code() in (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.CANCELLED,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                )

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    own.stop()
    assert time.monotonic() - started < 15
    stop.set()
    for thread in threads:
        thread.join()
    own.start()
    assert own_pods.status(container).state == pb.CONTAINER_RUNNING


def test_killed_at_any_moment_everything_can_be_removed(own: Node, own_pods: Pods) -> None:
    """kubelet's view: after a kill, whatever was under way is repeated, and stopped and removed in the end."""
    clean = traces(own)
    rng = random.Random(int(os.environ.get("SHIM_TEST_SEED", "7")))
    for _ in range(12):
        config = own_pods.config()
        steps = threading.Thread(target=attempt, args=(own_pods, config))
        steps.start()
        time.sleep(rng.uniform(0.0, 0.35))
        own.kill()
        steps.join()
        own.start()
        # The same attempt again: a finished one is found, a half-made one is gone.
        sandbox = until(partial(again, own_pods, config))
        assert sandbox is not None
        container = own_pods.container(sandbox, "sleep", "1000", name="after")
        assert own_pods.status(container).state == pb.CONTAINER_RUNNING
        own_pods.remove_all()
        own.remove_pods()
    until(lambda: traces(own), lambda found: found == clean)
    with Client(porto_socket(own)) as porto:
        assert [name for name in porto.list_containers() if len(name.split("/")[0]) == 64] == []


def attempt(pods: Pods, config: pb.PodSandboxConfig) -> None:
    try:
        sandbox = pods.run(config)
        container = pods.container(sandbox, "sleep", "1000", name="c")
        pods.exec(container, "true")
        pods.stop(container)
        pods.remove_sandbox(sandbox)
    except grpc.RpcError:
        pass


def again(pods: Pods, config: pb.PodSandboxConfig) -> str | None:
    try:
        return pods.run(config)
    except grpc.RpcError as err:
        if err.code() is grpc.StatusCode.ALREADY_EXISTS:
            pods.remove_all()
            pods.node.remove_pods()
        return None


def test_containers_that_no_record_knows_are_destroyed(own: Node, own_pods: Pods) -> None:
    sandbox = own_pods.run()
    own_pods.container(sandbox)
    own.kill()
    (own.directory / "state" / "records.db").unlink()
    for suffix in ("-wal", "-shm"):
        (own.directory / "state" / f"records.db{suffix}").unlink(missing_ok=True)
    own.start()
    with Client(porto_socket(own)) as porto:
        until(lambda: sandbox not in porto.list_containers())
    until(lambda: [*(own.directory / "state" / "containers").iterdir(), *(own.directory / "volumes").iterdir()] == [])
    assert list((own.directory / "state" / "sandboxes").iterdir()) == []
    assert list(own.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items) == []


@pytest.mark.skipif("PORTO_SOCKET" in os.environ, reason="not our portod to end")
def test_without_porto_it_says_so_and_recovers(own: Node, own_pods: Pods) -> None:
    sandbox = own_pods.run()
    os.kill(porto_pid(own), signal.SIGKILL)

    # The supervisor brings it back; until then nothing is an empty list.
    def listed() -> list[str] | None:
        try:
            return [i.id for i in own.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items]
        except grpc.RpcError as err:
            assert err.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            return None

    found = until(listed, lambda items: items is not None)
    assert found == [sandbox]
    assert own_pods.sandbox_status(sandbox).state == pb.SANDBOX_READY
