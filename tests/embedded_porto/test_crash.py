"""The daemon killed in the middle of an operation, at moments spread over all of it.

Afterwards the operation has either been carried out or not: nothing half made stays, nothing is lost, and it can be
repeated.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.embedded_porto.daemon import Daemon, eventually
from tests.porto.support import root_pid, run, shell, spec, start, state, states

pytestmark = pytest.mark.root

POINTS = 5
"""How many moments of each operation are tried."""


@dataclass(frozen=True)
class Operation:
    """Something that is done to a running pod with one container, whose root is an overlay volume."""

    do: Callable[[Client, str], object]
    done: Callable[[Client], bool]
    """True when it has been carried out."""


def _root(name: str) -> rpc_pb2.TVolumeSpec:
    made = rpc_pb2.TVolumeSpec(backend="overlay", layers=["base"])
    made.links.add(container=name, container_root=True)
    return made


def _make_pod(porto: Client) -> None:
    start(porto, "pod", "", hostname="pod", net="none")
    porto.create_from_spec(spec("pod/a", "sleep 1000", memory_limit=1 << 28), [_root("pod/a")], start=True)
    start(porto, "pod/a/x", "sleep 1000", isolate=False)


OPERATIONS = {
    "create": Operation(
        lambda porto, _: porto.create_from_spec(
            spec("pod/b", "sleep 1000", thread_limit=50), [_root("pod/b")], start=True
        ),
        lambda porto: states(porto).get("pod/b") == "running",
    ),
    "create a pod": Operation(
        lambda porto, _: start(porto, "other", "", hostname="other", net="none"),
        lambda porto: states(porto).get("other") == "meta",
    ),
    "exec": Operation(
        lambda porto, _: start(porto, "pod/a/y", "sleep 1000", isolate=False),
        lambda porto: states(porto).get("pod/a/y") == "running",
    ),
    "stop": Operation(
        lambda porto, _: porto.stop("pod/a", kill_after_s=0),
        lambda porto: states(porto).get("pod/a") == "stopped",
    ),
    "destroy": Operation(
        lambda porto, _: porto.destroy("pod"),
        lambda porto: "pod" not in porto.list_containers(),
    ),
    "destroy a container": Operation(
        lambda porto, _: porto.destroy("pod/a"),
        lambda porto: "pod/a" not in porto.list_containers(),
    ),
    "pause": Operation(
        lambda porto, _: porto.pause("pod"),
        lambda porto: states(porto).get("pod") == "paused",
    ),
    "layer": Operation(
        lambda porto, archive: porto.import_layer("more", archive),
        lambda porto: "more" in [layer.name for layer in porto.list_layers()],
    ),
    "link": Operation(
        lambda porto, _: porto.new_volume(_data()),
        lambda porto: len(porto.list_volumes()) > 1,
    ),
}


def _data() -> rpc_pb2.TVolumeSpec:
    made = rpc_pb2.TVolumeSpec(backend="plain")
    made.links.add(container="pod/a", target="/data")
    return made


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_in_the_middle(daemon: Daemon, archive: str, name: str) -> None:
    operation = OPERATIONS[name]
    with Client(daemon.socket, timeout_s=30) as porto:
        porto.import_layer("base", archive)
        daemon.end()
        daemon.start(crashing=True)
        _make_pod(porto)
        calls = _count(daemon, lambda: operation.do(porto, archive))
        _clear(porto)
        for point in range(POINTS):
            _make_pod(porto)
            # The first call, the last, and some between.
            daemon.arm(1 + (calls - 1) * point // (POINTS - 1))
            _die(daemon, lambda: operation.do(porto, archive), surely=point < POINTS - 1)
            daemon.start(crashing=True)
            _check(daemon, porto)
            if not operation.done(porto):
                _repeat(porto, operation, archive)
            assert operation.done(porto)
            _check(daemon, porto)
            if state_of(porto, "pod") == "paused":
                porto.resume("pod")
            if state_of(porto, "pod/a") == "running":
                assert run(porto, "pod/a/z", ["echo", "fine"], isolate=False).stdout == "fine\n"
            _clear(porto)
            assert os.listdir(daemon.place / "porto_volumes") == []
            assert sorted(os.listdir(daemon.place / "porto_layers")) == ["_private_base", "base"]
            assert daemon.mounts() == []


def _die(daemon: Daemon, action: Callable[[], object], *, surely: bool) -> None:
    """Do something that the daemon doesn't survive.

    :param surely: False at its very end: this time it may take less calls.
    """
    try:
        action()
    except errors.PortoError:
        pass
    assert daemon.process is not None
    if not surely:
        daemon.process.kill()
    daemon.process.wait(timeout=20)
    daemon.trigger.unlink()


def _clear(porto: Client) -> None:
    """Remove everything but the layer that roots are made of."""
    for container in porto.list_containers():
        if "/" not in container:
            porto.destroy(container)
    for volume in porto.list_volumes():
        porto.unlink_volume(volume.path, "***")
    for layer in porto.list_layers():
        if layer.name != "base":
            porto.remove_layer(layer.name)


def _count(daemon: Daemon, action: Callable[[], object]) -> int:
    daemon.arm(0)
    action()
    daemon.trigger.unlink()
    counted = Path(f"{daemon.trigger}.count")
    with Client(daemon.socket) as client:
        client.version()
    eventually(counted.exists)
    return int(counted.read_text())


def _check(daemon: Daemon, porto: Client) -> None:
    """What Porto says is so, and there is nothing else."""
    found = states(porto)
    volumes = {volume.path: set(volume.containers) for volume in porto.list_volumes()}
    for name, said in found.items():
        assert said in ("running", "meta", "stopped", "dead", "paused"), (name, said)
        if said in ("running", "meta", "paused"):
            assert Path(f"/proc/{root_pid(porto, name)}").exists()
    for path, holders in volumes.items():
        assert os.path.isdir(path)
        assert holders <= {*found, "/"}
    alive = {name for name, said in found.items() if said not in ("stopped",)}
    directories = {
        path.partition(f"/{daemon.cgroup}/")[2].replace("%", "/")
        for path in daemon.cgroups()
        if f"/{daemon.cgroup}/" in path
    }
    assert directories <= alive, "there are cgroups of containers that are none"
    kept = {Path(path).parent.name for path in volumes}
    assert set(os.listdir(daemon.place / "porto_volumes")) <= kept
    assert not [name for name in os.listdir(daemon.place / "porto_layers") if name.startswith(("_import", "_remove"))]
    assert set(os.listdir(daemon.state / "bundles")) == set()


def _repeat(porto: Client, operation: Operation, archive: str) -> None:
    """Do it again, as a client would: what is half there is removed first."""
    for name in ("pod/b", "other", "pod/a/y"):
        if name in porto.list_containers() and state(porto, name) not in ("running", "meta"):
            porto.destroy(name)
    if state_of(porto, "pod") == "dead" or state_of(porto, "pod/a") == "dead":
        porto.stop("pod")
        porto.start("pod/a")
    operation.do(porto, archive)


def state_of(porto: Client, name: str) -> str:
    return states(porto).get(name, "")


@pytest.mark.parametrize("seed", range(2))
def test_killed_while_much_is_going_on(daemon: Daemon, archive: str, seed: int) -> None:
    """Clients that make and remove containers all the time, and a daemon that is killed every now and then."""
    chance = random.Random(seed)
    with Client(daemon.socket, timeout_s=30) as porto:
        porto.import_layer("base", archive)
        over = threading.Event()
        clients = [threading.Thread(target=_live, args=(porto, f"pod{number}", over)) for number in range(4)]
        for client in clients:
            client.start()
        for _ in range(3):
            over.wait(chance.uniform(0.05, 0.4))
            daemon.restart()
        over.set()
        for client in clients:
            client.join()
        _check(daemon, porto)
        for name in porto.list_containers():
            if "/" not in name:
                porto.destroy(name)
        assert porto.list_volumes() == []
        porto.remove_layer("base")


def _live(porto: Client, pod: str, over: threading.Event) -> None:
    while not over.is_set():
        try:
            start(porto, pod, "", hostname=pod)
            porto.create_from_spec(spec(f"{pod}/a", "sleep 1000"), [_root(f"{pod}/a")], start=True)
            start(porto, f"{pod}/a/x", shell("exit 3"), isolate=False)
            assert porto.wait([f"{pod}/a/x"], 20).state == "dead"
            porto.destroy(pod)
        except errors.PortoError:
            _destroy_quietly(porto, pod)


def _destroy_quietly(porto: Client, pod: str) -> None:
    try:
        porto.destroy(pod)
    except errors.PortoError:
        pass  # not there, or the daemon isn't
