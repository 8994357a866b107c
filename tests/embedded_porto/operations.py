"""Things done to a running pod, in the middle of which something dies, and what has to be so afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from porto_api import Client, rpc_pb2
from tests.embedded_porto.daemon import Daemon
from tests.porto.support import root_pid, run, spec, start, state, states


@dataclass(frozen=True)
class Operation:
    """Something that is done to a running pod with one container, whose root is an overlay volume."""

    do: Callable[[Client, str], object]
    done: Callable[[Client], bool]
    """True when it has been carried out."""


def root_of(name: str) -> rpc_pb2.TVolumeSpec:
    made = rpc_pb2.TVolumeSpec(backend="overlay", layers=["base"])
    made.links.add(container=name, container_root=True)
    return made


def make_pod(porto: Client) -> None:
    start(porto, "pod", "", hostname="pod", net="none")
    porto.create_from_spec(spec("pod/a", "sleep 1000", memory_limit=1 << 28), [root_of("pod/a")], start=True)
    start(porto, "pod/a/x", "sleep 1000", isolate=False)


OPERATIONS = {
    "create": Operation(
        lambda porto, _: porto.create_from_spec(
            spec("pod/b", "sleep 1000", thread_limit=50), [root_of("pod/b")], start=True
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


def clear(porto: Client) -> None:
    """Remove everything but the layer that roots are made of."""
    for container in porto.list_containers():
        if "/" not in container:
            porto.destroy(container)
    for volume in porto.list_volumes():
        porto.unlink_volume(volume.path, "***")
    for layer in porto.list_layers():
        if layer.name != "base":
            porto.remove_layer(layer.name)


def check(daemon: Daemon, porto: Client) -> None:
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


def repeat(porto: Client, operation: Operation, archive: str) -> None:
    """Do it again, as a client would: what is half there is removed first."""
    for name in ("pod/b", "other", "pod/a/y"):
        if name in porto.list_containers() and state(porto, name) not in ("running", "meta"):
            porto.destroy(name)
    if state_of(porto, "pod") == "dead" or state_of(porto, "pod/a") == "dead":
        porto.stop("pod")
        porto.start("pod/a")
    operation.do(porto, archive)


def finish(daemon: Daemon, porto: Client, operation: Operation, archive: str) -> None:
    """Whatever has died: the operation is done or can be repeated, all is in order, and all of it goes."""
    check(daemon, porto)
    if not operation.done(porto):
        repeat(porto, operation, archive)
    assert operation.done(porto)
    check(daemon, porto)
    if state_of(porto, "pod") == "paused":
        porto.resume("pod")
    if state_of(porto, "pod/a") == "running":
        assert run(porto, "pod/a/z", ["echo", "fine"], isolate=False).stdout == "fine\n"
    clear(porto)
    assert os.listdir(daemon.place / "porto_volumes") == []
    assert sorted(os.listdir(daemon.place / "porto_layers")) == ["_private_base", "base"]
    assert daemon.mounts() == []


def state_of(porto: Client, name: str) -> str:
    return states(porto).get(name, "")
