"""The embedded Porto removes what is its own, and nothing that is mounted in there or that links lead to."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_embedded_porto.removal import remove_tree, try_remove_tree

from porto_api import Client, rpc_pb2
from tests.embedded_porto.daemon import Daemon

pytestmark = pytest.mark.root


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def points_below(directory: Path) -> list[str]:
    points = (line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if Path(point).is_relative_to(directory)]


@pytest.fixture
def machines(daemon: Daemon) -> Iterator[Path]:
    """A directory of the machine's, on the filesystem that the daemon works on, with a mount in it."""
    directory = Path(os.environ["SHIM_STAGE_DIR"]) / "machines"
    (directory / "empty").mkdir(parents=True)
    mount("--bind", directory, directory)
    mount("--make-shared", directory)
    (directory / "inner").mkdir()
    mount("-t", "tmpfs", "none", directory / "inner")
    for name in ("file", "inner/file"):
        (directory / name).write_text("kept")
    yield directory
    subprocess.run(["umount", "-R", "-l", str(directory)], check=True)
    try_remove_tree(directory)


def check_kept(machines: Path) -> None:
    assert (machines / "empty").is_dir()
    assert (machines / "file").read_text() == (machines / "inner" / "file").read_text() == "kept"


def test_trees(daemon: Daemon, machines: Path) -> None:
    tree = daemon.directory / "tree"
    for name in ("point", "plain/deeper"):
        (tree / name).mkdir(parents=True)
    (tree / "link").symlink_to(machines)
    mount("--bind", machines, tree / "point")
    assert tree.stat().st_dev == machines.stat().st_dev
    with pytest.raises(OSError, match="point") as caught:
        remove_tree(tree)
    assert caught.value.errno == errno.EBUSY
    assert os.listdir(tree) == ["point"]
    check_kept(machines)
    fd = os.open(tree, os.O_RDONLY)
    with pytest.raises(OSError, match="point"):
        remove_tree("point", fd)
    subprocess.run(["umount", str(tree / "point")], check=True)
    remove_tree("point", fd)
    os.close(fd)
    assert os.listdir(tree) == []
    remove_tree(tree)
    remove_tree(tree)
    (daemon.directory / "link").symlink_to(machines)
    remove_tree(daemon.directory / "link")
    check_kept(machines)


def test_a_tree_of_any_depth(daemon: Daemon) -> None:
    tree = daemon.directory / "tree"
    tree.mkdir()
    fd = os.open(tree, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    remove_tree(tree)
    assert not tree.exists()


def test_a_volume_with_mounts_of_others(daemon: Daemon, porto: Client, archive: str, machines: Path) -> None:
    """Those in the volume go with it, as mounts; in its storage they are where the removal ends."""
    porto.import_layer("base", archive)
    path = porto.new_volume(rpc_pb2.TVolumeSpec(backend="overlay", layers=["base"])).path
    (storage,) = daemon.place.glob("porto_volumes/*/overlay/upper")
    for place in (Path(path) / "there", storage / "here"):
        place.mkdir()
        mount("--rbind", machines, place)
    porto.unlink_volume(path)
    check_kept(machines)
    assert not porto.list_volumes()
    mount("--make-rprivate", storage / "here")
    subprocess.run(["umount", "-R", str(storage / "here")], check=True)
    daemon.restart()
    check_kept(machines)
    assert not list(daemon.place.glob("porto_volumes/*"))


def test_a_work_directory_that_leads_elsewhere(daemon: Daemon, porto: Client, archive: str, machines: Path) -> None:
    """Of a storage that somebody else provides."""
    porto.import_layer("base", archive)
    storage = daemon.directory / "storage"
    (storage / "upper").mkdir(parents=True)
    (storage / "work").symlink_to(machines)
    spec = rpc_pb2.TVolumeSpec(backend="overlay", layers=["base"], storage=str(storage))
    path = porto.new_volume(spec).path
    check_kept(machines)
    porto.unlink_volume(path)
    check_kept(machines)


def test_what_a_forgotten_volume_has_left(daemon: Daemon, porto: Client, archive: str, machines: Path) -> None:
    porto.import_layer("base", archive)
    forgotten = daemon.place / "porto_volumes" / "77" / "volume"
    forgotten.mkdir(parents=True)
    mount("--rbind", machines, forgotten)
    daemon.restart()
    check_kept(machines)
    assert points_below(forgotten) == []
