"""What is mounted in a container stays there, and removing it takes nothing of the node's along."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.conftest import pull
from tests.e2e.pods import Pods, failure, until
from tools import images
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root

PRIVATE, SLAVE, SHARED = pb.PROPAGATION_PRIVATE, pb.PROPAGATION_HOST_TO_CONTAINER, pb.PROPAGATION_BIDIRECTIONAL


def mount(container_path: str, host_path: Path | str, propagation: pb.MountPropagation = PRIVATE) -> pb.Mount:
    return pb.Mount(container_path=container_path, host_path=str(host_path), propagation=propagation)


def privileged() -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(privileged=True))


def node_mounts(node: Node) -> list[str]:
    """Root, mount point and flags of every mount of the node's but those of pods."""
    lines = (line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    ours = (str(node.directory), "/run/netns", "/place")
    return sorted(" ".join(fields[3:6]) for fields in lines if not fields[4].startswith(ours))


def points_below(directory: Path | str) -> list[str]:
    points = (line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if Path(point).is_relative_to(directory)]


def run(*command: object) -> None:
    subprocess.run([*map(str, command)], check=True)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A shared mount of the node with another one in it."""
    path = tmp_path / "shared"
    path.mkdir()
    run("mount", "-t", "tmpfs", "shared", path)
    run("mount", "--make-shared", path)
    for name in ("below", "inner"):
        (path / name).mkdir()
    run("mount", "-t", "tmpfs", "inner", path / "inner")
    (path / "inner" / "below").mkdir()
    (path / "marker").write_text("kept")
    (path / "inner" / "marker").write_text("kept")
    yield path
    run("umount", "-R", "-l", path)


@pytest.fixture
def sandbox(pods: Pods) -> str:
    config = pods.config()
    config.linux.security_context.privileged = True
    return pods.run(config)


# -- mounts that the node sees into ------------------------------------------------------------------------------------


def test_what_is_mounted_below_a_bidirectional_mount(
    node: Node, pods: Pods, sandbox: str, shared: Path, tmp_path: Path
) -> None:
    """It is the container's, though the mount above is the node's as well."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("other")
    before = node_mounts(node)
    container = pods.container(
        sandbox,
        mounts=[
            mount("/data", shared, SHARED),
            mount("/data/below", tmp_path / "other"),
            mount("/data/inner/below", tmp_path / "other", SLAVE),
            mount("/data/missing", tmp_path / "other" / "file"),
        ],
        linux=privileged(),
    )
    assert node_mounts(node) == before
    assert pods.shell(container, "cat /data/below/file /data/inner/below/file /data/missing") == "other" * 3
    # Both directions, both mounts.
    for name in ("made", "inner/made"):
        pods.shell(container, f"mkdir /data/{name} && mount -t tmpfs x /data/{name}")
        until(lambda name=name: (shared / name).is_mount())  # type: ignore[misc]
    for name in ("later", "inner/later"):
        (shared / name).mkdir()
        run("mount", "-t", "tmpfs", "x", shared / name)
        pods.shell(container, f"grep -q ' /data/{name} ' /proc/self/mountinfo")
        run("umount", shared / name)
        pods.shell(container, f"! grep -q ' /data/{name} ' /proc/self/mountinfo")
    for name in ("made", "inner/made"):
        run("umount", shared / name)
    pods.remove(container)
    assert node_mounts(node) == before
    assert (shared / "inner" / "marker").read_text() == "kept"


def test_the_pods_own_files_over_a_bidirectional_etc(node: Node, pods: Pods, sandbox: str, shared: Path) -> None:
    for name in ("hosts", "hostname", "resolv.conf"):
        (shared / name).write_text("the node's\n")
    before = node_mounts(node)
    container = pods.container(sandbox, mounts=[mount("/etc", shared, SHARED)])
    assert node_mounts(node) == before
    for name in ("hosts", "hostname", "resolv.conf"):
        assert (shared / name).read_text() == "the node's\n"
    assert "the node's" not in pods.shell(container, "cat /etc/hosts /etc/hostname /etc/resolv.conf")
    pods.remove(container)
    assert node_mounts(node) == before


@pytest.mark.parametrize("field", ["masked_paths", "readonly_paths"])
def test_paths_that_the_node_would_have_protected_too(
    node: Node, pods: Pods, sandbox: str, shared: Path, field: str
) -> None:
    def linux(**fields: Any) -> pb.LinuxContainerConfig:
        return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(**fields))

    mounts = [mount("/data", shared, SHARED), mount("/data/below", shared, SLAVE)]
    for path in ("/data", "/data/marker", "/data/inner/marker", "//data/./inner"):
        code, text = failure(pods.create, sandbox, "true", mounts=mounts, linux=linux(**{field: [path]}))
        assert code == "INVALID_ARGUMENT"
        assert f"security_context.{field}" in text
        assert "mounts[0]" in text
    before = node_mounts(node)
    paths = ["/data/not/there", "/data/below/marker", "/etc/passwd"]
    container = pods.container(sandbox, mounts=mounts, linux=linux(**{field: paths}))
    if field == "masked_paths":
        assert pods.shell(container, "cat /data/below/marker /etc/passwd") == ""
    else:
        assert pods.exec(container, "sh", "-c", "echo x > /data/below/marker").exit_code != 0
    assert node_mounts(node) == before
    pods.create(sandbox, "true", mounts=mounts, linux=linux(privileged=True, **{field: ["/data"]}))


# -- /sys --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place_in_sys() -> Iterator[Path]:
    """Where the node may mount something: nothing is mounted there yet."""
    names = ("fs/bpf", "fs/pstore", "kernel/config", "kernel/security", "kernel/debug", "fs/fuse/connections")
    place = next(path for path in (Path("/sys", name) for name in names) if path.is_dir() and not path.is_mount())
    yield place
    while place.is_mount():
        run("umount", place)


@pytest.mark.parametrize("kind", ["plain", "privileged", "private", "slave"])
def test_sys(node: Node, pods: Pods, sandbox: str, place_in_sys: Path, kind: str) -> None:
    """What the node mounts there later on isn't the container's, what the container unmounts stays the node's."""
    mounts = {"private": [mount("/sys", "/sys")], "slave": [mount("/sys", "/sys", SLAVE)]}.get(kind, [])
    linux = privileged() if kind != "plain" else pb.LinuxContainerConfig()
    before = node_mounts(node)
    container = pods.container(sandbox, mounts=mounts, linux=linux)
    assert node_mounts(node) == before
    run("mount", "-t", "tmpfs", "x", place_in_sys)
    seen = pods.shell(container, "cat /proc/self/mountinfo")
    assert (f" {place_in_sys} " in seen) == (kind == "slave")
    with_one_more = node_mounts(node)
    if kind != "plain":
        pods.shell(container, "umount -l /sys")
        assert node_mounts(node) == with_one_more
    pods.remove(container)
    assert node_mounts(node) == with_one_more
    run("umount", place_in_sys)
    assert node_mounts(node) == before


# -- removal -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(node: Node, registry: LocalRegistry) -> pb.ImageSpec:
    """One that names a volume."""
    images.push(images.busybox({"Volumes": {"/vol": {}}}), registry, "public/with-volume", ["1"])
    return pb.ImageSpec(image=pull(node, f"{registry.address}/public/with-volume:1"))


def test_removing_stops_at_what_others_have_mounted(
    pods: Pods, node: Node, image: pb.ImageSpec, tmp_path: Path
) -> None:
    """On the node, anywhere in what is ours; of the same filesystem, which an option of rm doesn't tell from ours."""
    nodes = tmp_path / "nodes"
    (nodes / "deeper" / "empty").mkdir(parents=True)
    (nodes / "deeper" / "file").write_text("kept")

    def kept() -> bool:
        return (nodes / "deeper" / "empty").is_dir() and (nodes / "deeper" / "file").read_text() == "kept"

    sandbox = pods.run()
    container = pods.container(
        sandbox, image=image, mounts=[pb.Mount(container_path="/image", image=image, readonly=True)]
    )
    state, volumes = node.directory / "state", node.directory / "volumes"
    places = [
        volumes / container / "there",
        volumes / f"{container}-volumes" / "volume0" / "there",
        volumes / f"{container}-volumes" / "there",
        state / "containers" / container / "there",
        state / "sandboxes" / sandbox / "there",
        state / "sandboxes" / sandbox / "shm" / "there",
    ]
    for place in places:
        place.mkdir()
        run("mount", "--bind", nodes, place)
    pods.remove(container)
    assert kept()
    pods.stop_sandbox(sandbox)
    pods.remove_sandbox(sandbox)
    assert kept()
    node.kill()
    node.start()
    assert kept()
    log = node.log_path.read_text()
    for place in (places[1], places[2], places[4]):
        assert f"{place}: something is mounted there" in log
        assert points_below(place) == [str(place)]
    # When nothing stands in the way any more, what was left goes at the next start.
    for place in places:
        if points_below(place):
            run("umount", place)
    node.kill()
    node.start()
    assert kept()
    left = [path for path in (volumes, state / "containers", state / "sandboxes") for path in path.iterdir()]
    assert [path for path in left if container in path.name or sandbox in path.name] == []


def test_trees_deeper_than_any_stack(pods: Pods, node: Node, image: pb.ImageSpec) -> None:
    """As any container can make them, in its volume and in its root."""
    sandbox = pods.run()
    container = pods.container(sandbox, image=image)
    volumes = node.directory / "volumes"
    for top in (volumes / f"{container}-volumes" / "volume0", volumes / container / "root"):
        nest(top, 1500)
    assert pods.exec(container, "test", "-d", "/vol/d/d/d").exit_code == 0
    pods.remove(container)
    assert [name for name in os.listdir(volumes) if container in name] == []


def nest(directory: Path, levels: int) -> None:
    """Directories in each other."""
    fd = os.open(directory, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
