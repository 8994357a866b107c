"""Many at once, and the end of a process at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from shim_porto_runtime.images.flights import Flights, Slots, run_together
from shim_porto_runtime.images.model import Layer

from shim_core import errors, testing
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.types import RegistryAuth
from tests.images.fakeporto import FakePorto
from tests.images.support import MakeNode, Node, entry, open_node
from tools import images
from tools.images import File
from tools.registry import LocalRegistry


def many_layers(seed: int, count: int = 6, size: int = 400_000) -> images.Image:
    source = random.Random(seed)
    return images.build([images.layer([File(f"f{n}", source.randbytes(size))]) for n in range(count)])


# -- pulls together ----------------------------------------------------------------------------------------------------


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    """What each of many threads returned or raised."""
    results: list[object] = [None] * count
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = work(number)
        except errors.ShimError as err:
            results[number] = err

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_twenty_pulls_are_one_download(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = many_layers(1)
    images.push(image, registry, repository)
    name = f"{registry.address}/{repository}"
    results = in_threads(20, lambda _: node.pull(name).id)
    assert results == [image.id] * 20
    assert registry.requests("GET", f"{repository}/manifests/") == 1
    assert registry.requests("GET", f"{repository}/blobs/") == 1 + len(image.layers)
    assert node.temporary_files() == []


def test_pulls_of_different_images_share_what_is_under_way(
    node: Node, registry: LocalRegistry, repository: str
) -> None:
    base = many_layers(2)
    made = [images.build([*base.layers, images.layer([File("own", str(n).encode())])]) for n in range(5)]
    for number, image in enumerate(made):
        images.push(image, registry, f"{repository}-{number}")
    results = in_threads(5, lambda n: node.pull(f"{registry.address}/{repository}-{n}").id)
    assert results == [image.id for image in made]
    for layer in base.layers:
        assert registry.requests("GET", f"/blobs/{layer.digest}") == 1


def test_credentials_are_not_shared(
    make_node: MakeNode, registries: Callable[..., LocalRegistry], repository: str
) -> None:
    registry = registries(auth="basic")
    assert registry.credentials is not None
    user, password = registry.credentials
    image = many_layers(3)
    images.push(image, registry, repository)
    node = make_node({"Registries": [entry(registry)]})
    name = f"{registry.address}/{repository}"

    def pull(number: int) -> str:
        return node.pull(name, RegistryAuth(username=user, password=password if number % 2 else "wrong")).id

    results = in_threads(8, pull)
    assert results[1::2] == [image.id] * 4
    assert all(isinstance(result, errors.UnknownError) for result in results[::2])


def test_the_leader_leaves_and_the_others_stay(node: Node, registry: LocalRegistry, repository: str) -> None:
    image = many_layers(4)
    images.push(image, registry, repository)
    name = f"{registry.address}/{repository}"
    contexts = [testing.context("PullImage") for _ in range(6)]
    under_way = threading.Event()

    def before_import(_name: str) -> None:
        under_way.set()
        time.sleep(0.05)

    if node.fake is not None:
        node.fake.before_import = before_import

    def pull(number: int) -> str:
        return node.pull(name, context=contexts[number]).id

    def leave() -> None:
        under_way.wait(5 if node.fake is not None else 0.1)
        for context in contexts[:3]:
            context.cancel()

    leaver = threading.Thread(target=leave)
    leaver.start()
    results = in_threads(6, pull)
    leaver.join()
    assert results[3:] == [image.id] * 3
    assert all(isinstance(result, errors.Cancelled) or result == image.id for result in results[:3])
    assert registry.requests("GET", f"{repository}/manifests/") == 1


def test_an_image_that_came_meanwhile_keeps_its_layers(
    node: Node, registry: LocalRegistry, repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection that has found a layer unused, and a pull that has just begun to use it."""
    first, second = many_layers(6, count=2, size=1000), many_layers(6, count=1, size=1000)
    images.push(first, registry, f"{repository}-1")
    images.push(second, registry, f"{repository}-2")
    one = node.pull(f"{registry.address}/{repository}-1")
    store = node.service._store
    found = store.unreferenced_layers

    def pull_then_answer() -> list[Layer]:
        answer = found()
        monkeypatch.undo()
        node.pull(f"{registry.address}/{repository}-2")
        return answer

    monkeypatch.setattr(store, "unreferenced_layers", pull_then_answer)
    request = pb.RemoveImageRequest(image=pb.ImageSpec(image=one.id))
    node.service.remove_image(request, testing.context())
    two = node.service.resolve(f"{registry.address}/{repository}-2")
    assert two is not None
    assert node.layer_names() == set(two.layers)


def test_pulls_and_removals_in_any_order(node: Node, registry: LocalRegistry, repository: str) -> None:
    """Whatever happens meanwhile, what is listed is complete."""
    base = many_layers(5, count=2, size=1000)
    made = [images.build([*base.layers, images.layer([File("own", str(n).encode())])]) for n in range(3)]
    for number, image in enumerate(made):
        images.push(image, registry, f"{repository}-{number}")

    def churn(number: int) -> None:
        source = random.Random(number)
        for _ in range(12):
            name = f"{registry.address}/{repository}-{source.randrange(3)}"
            if source.random() < 0.5:
                try:
                    node.pull(name)
                except errors.Aborted:
                    continue  # removed while it was pulled
            else:
                request = pb.RemoveImageRequest(image=pb.ImageSpec(image=name))
                node.service.remove_image(request, testing.context())

    results = in_threads(6, churn)
    assert results == [None] * 6
    layers = node.layer_names()
    for kept in node.service._store.index().images.values():
        assert set(kept.layers) <= layers
        for index in range(len(kept.layers)):
            assert list(node.layer_dir(kept, index).iterdir())
    for number in range(3):
        request = pb.RemoveImageRequest(image=pb.ImageSpec(image=f"{registry.address}/{repository}-{number}"))
        node.service.remove_image(request, testing.context())
    assert node.layer_names() == set()
    assert node.temporary_files() == []


# -- the machinery -----------------------------------------------------------------------------------------------------


def test_a_flight_ends_when_all_have_left() -> None:
    flights: Flights[int] = Flights("test")
    ended = threading.Event()
    started = threading.Event()

    def work(own: CallContext) -> int:
        started.set()
        own.wait(30)
        ended.set()
        own.check()
        return 1

    contexts = [testing.context(), testing.context()]

    def call(context: CallContext) -> None:
        with pytest.raises(errors.Cancelled):
            flights.run("k", context, work)

    threads = [threading.Thread(target=call, args=(context,)) for context in contexts]
    for thread in threads:
        thread.start()
    started.wait(60)
    while len(flights._flights["k"].waiters) < 2:
        time.sleep(0.001)
    contexts[0].cancel()
    threads[0].join(60)
    assert not ended.is_set()
    contexts[1].cancel()
    threads[1].join(60)
    assert ended.wait(60)
    assert flights.run("k", testing.context(), lambda _: 7) == 7
    flights.close()
    with pytest.raises(errors.Unavailable, match="stopping"):
        flights.run("k", testing.context(), lambda _: 7)


def test_a_flight_hands_its_error_to_everyone() -> None:
    flights: Flights[int] = Flights("test")
    gate = threading.Event()

    def work(_: CallContext) -> int:
        gate.wait(60)
        raise errors.UnknownError("broken")

    results: list[BaseException] = []

    def call() -> None:
        try:
            flights.run("k", testing.context(), work)
        except errors.UnknownError as err:
            results.append(err)

    threads = [threading.Thread(target=call) for _ in range(5)]
    for thread in threads:
        thread.start()
    while "k" not in flights._flights or len(flights._flights["k"].waiters) < 5:
        time.sleep(0.001)
    gate.set()
    for thread in threads:
        thread.join()
    assert [str(err) for err in results] == ["broken"] * 5
    assert len({id(err) for err in results}) == 5


def test_waiting_for_a_slot_can_be_cancelled() -> None:
    slots = Slots(1)
    context = testing.context()
    with slots.hold(testing.context()):
        threading.Timer(0.05, context.cancel).start()
        with pytest.raises(errors.Cancelled), slots.hold(context):
            pass
    with slots.hold(testing.context()):
        pass


def test_the_first_error_is_the_one_that_counts() -> None:
    def wait(own: CallContext) -> None:
        own.wait(30)
        own.check()

    def fail(_: CallContext) -> None:
        raise errors.UnknownError("the cause")

    started = time.monotonic()
    with pytest.raises(errors.UnknownError, match="the cause"):
        run_together(4, [wait, wait, fail, wait, wait, wait], testing.context())
    assert time.monotonic() - started < 5


# -- kill -9 -----------------------------------------------------------------------------------------------------------

ROUNDS = 50


@pytest.mark.root
@pytest.mark.timeout(300)
def test_kill_9_at_any_moment(
    tmp_path: Path, registry: LocalRegistry, repository: str, pytestconfig: pytest.Config
) -> None:
    """After each kill the next process starts, uses nothing half done, and leaves nothing behind."""
    source = random.Random(os.environ.get("SHIM_TEST_SEED", "9"))
    fake = None
    socket = os.environ.get("PORTO_SOCKET")
    if socket is None:
        fake = FakePorto(tmp_path / "porto")
        fake.start()
        socket = fake.path
    contents = {}
    layers = []
    for number in range(5):
        contents[number] = source.randbytes(300_000)
        layers.append(images.layer([File(f"f{number}", contents[number])]))
    image = images.build(layers)
    images.push(image, registry, repository)
    name = f"{registry.address}/{repository}"
    configuration = {"Registries": [entry(registry)]}
    state = tmp_path / "state"
    command = [sys.executable, "-c", NURSERY, json.dumps([configuration, socket, str(state), name])]
    path = os.pathsep.join(filter(None, [str(pytestconfig.rootpath), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    killed = 0
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for _ in range(ROUNDS):
            nursery.stdin.write("go\n")
            nursery.stdin.flush()
            pid = int(nursery.stdout.readline())
            time.sleep(source.uniform(0, 0.25))
            os.kill(pid, signal.SIGKILL)
            nursery.stdin.write("reap\n")
            nursery.stdin.flush()
            killed += nursery.stdout.readline() == "killed\n"
            node = open_node(configuration, socket, state, fake)
            try:
                pulled = node.pull(name)
                assert pulled.id == image.id
                for number, content in contents.items():
                    assert (node.layer_dir(pulled, number) / f"f{number}").read_bytes() == content
                assert node.layer_names() == set(pulled.layers)
                assert node.temporary_files() == []
                node.service.remove_image(pb.RemoveImageRequest(image=pb.ImageSpec(image=name)), testing.context())
                assert node.layer_names() == set()
            finally:
                node.service.close()
                node.client.close()
            assert not list((state / "images" / "tmp").iterdir())
        nursery.stdin.close()
    if fake is not None:
        fake.stop()
    assert killed > ROUNDS / 4, (
        f"only {killed} of {ROUNDS} were killed before they had finished: the delays are too long"
    )


# A process that has loaded everything and forks one that pulls for each line it reads: a round costs no start.
NURSERY = """
import json, os, sys
from pathlib import Path
from tests.images.support import open_node
configuration, socket, state, name = json.loads(sys.argv[1])
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        node = open_node(configuration, socket, Path(state))
        node.pull(name)
        node.service.close()
        os._exit(0)
    print(pid, flush=True)
    sys.stdin.readline()
    print("killed" if os.waitpid(pid, 0)[1] == 9 else "finished", flush=True)
"""
