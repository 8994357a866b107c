"""Many calls at once, as kubelets make them: nothing is held up, nothing is seen that isn't so, nothing is left.

``SHIM_TEST_LONG=1`` makes each take minutes instead of seconds.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.conftest import pull
from tests.e2e.pods import Pods, until
from tests.e2e.test_lifecycle import descriptors, porto_pid, traces
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root

LONG = "SHIM_TEST_LONG" in os.environ
EXPECTED = {"OK", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "INVALID_ARGUMENT"}
"""What may come of a call for a pod that another client has just changed."""


@pytest.fixture(scope="module")
def own(registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node of these tests' own, without a line of log for each poll."""
    with Node(tmp_path_factory.mktemp("node"), registry=registry) as made:
        pull(made, f"{registry.address}/public/busybox:1")
        yield made
        made.remove_pods()


@pytest.fixture
def own_pods(own: Node, registry: LocalRegistry) -> Iterator[Pods]:
    made = Pods(own, f"{registry.address}/public/busybox:1")
    yield made
    made.remove_all()


@contextmanager
def in_the_background(*loops: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Repeat something in threads of its own until the block ends; an error ends its loop, and is raised at the end."""
    over = threading.Event()
    failures: list[BaseException] = []

    def repeat(loop: Callable[[], object]) -> None:
        try:
            while not over.is_set():
                loop()
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=repeat, args=(loop,)) for loop in loops]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def test_what_is_listed_is_so_while_pods_come_and_go(own: Node, own_pods: Pods) -> None:
    """kubelet takes a pod that is listed as not ready down, and starts a container anew that is listed as exited."""
    clean = traces(own)
    rounds, clients = (60, 16) if LONG else (3, 8)
    lock, up, running = threading.Lock(), set[str](), set[str]()

    def live(number: int, times: int) -> None:
        for _ in range(times):
            sandbox = own_pods.run()
            with lock:
                up.add(sandbox)
            container = own_pods.container(sandbox)
            with lock:
                running.add(container)
            assert own_pods.exec(container, "echo", str(number)).stdout == f"{number}\n".encode()
            with lock:
                running.discard(container)
            own_pods.remove(container)
            with lock:
                up.discard(sandbox)
            own_pods.remove_sandbox(sandbox)

    def look_at_pods() -> None:
        with lock:
            before = set(up)
        answer = own.cri.ListPodSandbox(pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter()))
        with lock:
            still = before & up
        seen = {item.id: item.state for item in answer.items}
        assert {sandbox: seen.get(sandbox) for sandbox in still} == dict.fromkeys(still, pb.SANDBOX_READY)

    def look_at_containers() -> None:
        with lock:
            before = set(running)
        answer = own.cri.ListContainers(pb.ListContainersRequest())
        with lock:
            still = before & running
        seen = {item.id: item.state for item in answer.containers}
        assert {name: seen.get(name) for name in still} == dict.fromkeys(still, pb.CONTAINER_RUNNING)

    def look_closely() -> None:
        with lock:
            some = next(iter(running), None)
        if some is None:
            return
        try:
            state = own_pods.status(some).state
        except grpc.RpcError as err:
            assert err.code() is grpc.StatusCode.NOT_FOUND
            return
        with lock:
            assert state == pb.CONTAINER_RUNNING or some not in running

    with in_the_background(look_at_pods, look_at_containers, look_closely), ThreadPoolExecutor(clients) as pool:
        list(pool.map(live, range(clients), [1] * clients))
        files = descriptors(own.pid)  # with as many idle connections to Porto as it needs
        list(pool.map(live, range(clients), [rounds] * clients))
    until(lambda: traces(own), lambda found: found == clean)
    until(lambda: descriptors(own.pid) <= files + 5)


def test_two_clients_at_the_same_pods(own: Node, own_pods: Pods) -> None:
    """Whatever they do at the same time: each call ends as the CRI knows it, and what they have made can be removed."""
    clean = traces(own)
    configs = [own_pods.config() for _ in range(3)]
    counts: Counter[tuple[str, str]] = Counter()
    enough, end = (time.monotonic() + after_s for after_s in (600 if LONG else 5, 900))

    def hammer(seed: int) -> None:
        chance = random.Random(seed)
        while (now := time.monotonic()) < end and (now < enough or not all(counts[name, "OK"] for name, _ in ACTIONS)):
            name, call = chance.choice(ACTIONS)
            try:
                call(own_pods, chance.choice(configs), chance)
                code = "OK"
            except grpc.RpcError as err:
                code = err.code().name
                if code not in EXPECTED:
                    raise
            counts[name, code] += 1

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(hammer, seed) for seed in range(6)]:
            done.result()
    assert all(counts[name, "OK"] for name, _ in ACTIONS), counts
    own_pods.remove_all()
    own.remove_pods()
    until(lambda: traces(own), lambda found: found == clean)


def _run(pods: Pods, config: pb.PodSandboxConfig, _chance: random.Random) -> None:
    pods.run(config)


def _sandbox(pods: Pods, config: pb.PodSandboxConfig) -> str:
    """The pod's sandbox; an id that is none when there is none."""
    items = pods.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items
    found: list[str] = [item.id for item in items if item.metadata == config.metadata]
    return found[0] if found else "f" * 64


def _container(pods: Pods, config: pb.PodSandboxConfig, chance: random.Random) -> str:
    wanted = pb.ContainerFilter(pod_sandbox_id=_sandbox(pods, config))
    found = pods.cri.ListContainers(pb.ListContainersRequest(filter=wanted)).containers
    return chance.choice([*(str(item.id) for item in found)] or ["f" * 64])


def _create(pods: Pods, config: pb.PodSandboxConfig, chance: random.Random) -> None:
    sandbox = _sandbox(pods, config)
    pods.adopt(sandbox, config)
    pods.create(sandbox, "sleep", "1000", name=f"c{chance.randrange(3)}")


ACTIONS: list[tuple[str, Callable[[Pods, pb.PodSandboxConfig, random.Random], object]]] = [
    *[("run", _run)] * 3,
    *[("create", _create)] * 4,
    *[("start", lambda pods, config, chance: pods.start(_container(pods, config, chance)))] * 4,
    ("exec", lambda pods, config, chance: pods.exec(_container(pods, config, chance), "true")),
    ("status", lambda pods, config, chance: pods.status(_container(pods, config, chance))),
    ("stop", lambda pods, config, chance: pods.stop(_container(pods, config, chance))),
    ("remove", lambda pods, config, chance: pods.remove(_container(pods, config, chance))),
    ("stop pod", lambda pods, config, _: pods.stop_sandbox(_sandbox(pods, config))),
    ("remove pod", lambda pods, config, _: pods.remove_sandbox(_sandbox(pods, config))),
]


def test_slow_calls_hold_up_no_list(own: Node, own_pods: Pods) -> None:
    """Commands that don't end, containers that don't stop: lists and statuses are answered as if they weren't there."""
    execs, stops = (200, 100) if LONG else (40, 20)
    sandbox = own_pods.run()
    stubborn = [own_pods.container(sandbox, "sh", "-c", "trap '' TERM; sleep 1000 & wait; wait") for _ in range(2)]
    channel = own.cri

    def sleepers() -> int:
        return int(own_pods.shell(stubborn[0], "ps | grep -c '[s]leep 1000$'"))

    before = sleepers()
    slow = [
        channel.ExecSync.future(pb.ExecSyncRequest(container_id=stubborn[0], cmd=["sleep", "1000"]))
        for _ in range(execs)
    ] + [
        channel.StopContainer.future(pb.StopContainerRequest(container_id=stubborn[1], timeout=1000))
        for _ in range(stops)
    ]
    until(lambda: sleepers() == before + execs, timeout_s=60)
    took = []
    for _ in range(50):
        began = time.monotonic()
        channel.ListContainers(pb.ListContainersRequest())
        channel.ListPodSandbox(pb.ListPodSandboxRequest())
        channel.Status(pb.StatusRequest())
        assert own_pods.status(stubborn[1]).state == pb.CONTAINER_RUNNING
        took.append(time.monotonic() - began)
    assert not any(call.done() for call in slow)
    assert len(took) == 50
    # What could still be made to run goes on being made, too.
    assert own_pods.exec(own_pods.container(sandbox), "echo", "fine").stdout == b"fine\n"
    for call in slow:
        call.cancel()
    until(lambda: sleepers() == before, timeout_s=60)


@pytest.mark.skipif("PORTO_SOCKET" in os.environ and not LONG, reason="not our portod to end, but in the long form")
def test_porto_killed_while_pods_come_and_go(own: Node, own_pods: Pods) -> None:
    """Pods that run don't notice; calls fail with a code that has kubelet try again; nothing is made twice or left."""
    clean = traces(own)
    sandbox = own_pods.run()
    stays = [own_pods.container(sandbox) for _ in range(3)]
    before = [own_pods.status(container) for container in stays]
    codes: Counter[str] = Counter()

    def churn() -> None:
        config = own_pods.config()
        try:
            made = own_pods.run(config)
            container = own_pods.container(made, name="c")
            assert own_pods.exec(container, "echo", "x").stdout == b"x\n"
        except grpc.RpcError as err:
            codes[err.code().name] += 1
        _persist(own_pods, config)

    chance = random.Random(3)
    with in_the_background(*[churn] * 4):
        for _ in range(60 if LONG else 4):
            time.sleep(chance.uniform(0.3, 1.5))
            os.kill(porto_pid(own), signal.SIGKILL)
            until(lambda: _names(own_pods, sandbox) >= set(stays), timeout_s=15)
    assert set(codes) <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"}, codes
    assert [own_pods.status(container) for container in stays] == before
    assert own_pods.sandbox_status(sandbox).state == pb.SANDBOX_READY
    own_pods.remove_all()
    assert not own.cri.ListPodSandbox(pb.ListPodSandboxRequest()).items
    until(lambda: traces(own), lambda found: found == clean)


def _names(pods: Pods, sandbox: str) -> set[str]:
    """The running containers of a pod; none while Porto is away."""
    running = pb.ContainerFilter(pod_sandbox_id=sandbox, state=pb.ContainerStateValue(state=pb.CONTAINER_RUNNING))
    try:
        found = pods.cri.ListContainers(pb.ListContainersRequest(filter=running)).containers
    except grpc.RpcError as err:
        assert err.code() is grpc.StatusCode.UNAVAILABLE
        return set()
    return {item.id for item in found}


def _persist(pods: Pods, config: pb.PodSandboxConfig) -> None:
    """Remove a pod as kubelet does: again and again."""

    def removed() -> bool:
        try:
            sandbox = _sandbox(pods, config)
            pods.stop_sandbox(sandbox)
            pods.remove_sandbox(sandbox)
        except grpc.RpcError as err:
            assert err.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), err
            return False
        return True

    until(removed, timeout_s=60)
