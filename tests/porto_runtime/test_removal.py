"""Removing as root never reaches the node's own files: not by mounts, not by symbolic links, however it is nested."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_porto_runtime import linux, namespaces, rootfs
from shim_porto_runtime.removal import remove_tree
from shim_porto_runtime.runtime import Directories
from shim_porto_runtime.usage import measure

from shim_core.cri.v1 import api_pb2 as pb
from tools.scratch import unmount_below

pytestmark = pytest.mark.root

OWNER = "0123456789abcdef" * 4
PLUGINS = Path(__file__).parents[2] / "plugins"


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Path]:
    """A directory of the node's, on the same filesystem, with a mount in it and shared as / is on any node."""
    directory = tmp_path / "nodes"
    (directory / "deeper" / "empty").mkdir(parents=True)
    (directory / "deeper" / "file").write_text("kept")
    mount("--bind", directory, directory)
    mount("--make-shared", directory)
    (directory / "inner").mkdir()
    mount("-t", "tmpfs", "none", directory / "inner")
    (directory / "inner" / "file").write_text("kept")
    yield directory
    subprocess.run(["umount", "-R", "-l", str(directory)], check=True)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """What is to be removed."""
    directory = tmp_path / "tree"
    (directory / "a" / "b").mkdir(parents=True)
    (directory / "a" / "b" / "file").write_text("x")
    yield directory
    assert unmount_below(directory) == []
    if directory.is_mount():
        subprocess.run(["umount", "-l", str(directory)], check=True)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def points_below(directory: Path) -> list[str]:
    points = (line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if Path(point).is_relative_to(directory)]


def check_kept(nodes: Path) -> None:
    assert (nodes / "deeper" / "empty").is_dir()
    assert (nodes / "deeper" / "file").read_text() == "kept"
    assert (nodes / "inner" / "file").read_text() == "kept"


# -- trees -------------------------------------------------------------------------------------------------------------


def test_all_kinds_of_files(tree: Path, nodes: Path) -> None:
    os.mkfifo(tree / "fifo")
    os.mknod(tree / "device", 0o600 | 0o020000, os.makedev(1, 3))
    (tree / "bytes\udcff\n").write_text("")
    (tree / "to a directory").symlink_to(nodes)
    (tree / "a" / "to a file").symlink_to(nodes / "deeper" / "file")
    (tree / "nowhere").symlink_to("/not/there")
    (tree.parent / "original").write_text("kept")
    os.link(tree.parent / "original", tree / "hard link")
    (tree / "closed").mkdir(mode=0)
    before = os.listdir("/proc/self/fd")
    assert remove_tree(tree) == ()
    assert not tree.exists()
    check_kept(nodes)
    assert (tree.parent / "original").read_text() == "kept"
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_what_is_not_there(tmp_path: Path) -> None:
    assert remove_tree(tmp_path / "none") == ()
    assert remove_tree(tmp_path / "none" / "below") == ()
    (tmp_path / "file").write_text("")
    assert remove_tree(tmp_path / "file" / "below") != ()


def test_a_link_or_a_file_in_its_place(tmp_path: Path, nodes: Path) -> None:
    (tmp_path / "link").symlink_to(nodes)
    assert remove_tree(tmp_path / "link") == ()
    assert not (tmp_path / "link").is_symlink()
    (tmp_path / "file").write_text("")
    assert remove_tree(str(tmp_path / "file")) == ()
    check_kept(nodes)


@pytest.mark.parametrize("options", [("--bind",), ("--rbind",), ("--bind", "-o", "ro")])
def test_a_bind_mount_of_the_same_filesystem(tree: Path, nodes: Path, options: tuple[str, ...]) -> None:
    assert tree.stat().st_dev == nodes.stat().st_dev
    (tree / "a" / "point").mkdir()
    mount(*options, nodes, tree / "a" / "point")
    (tree / "z").mkdir()
    assert remove_tree(tree) == (f"{tree}/a/point: something is mounted there",)
    check_kept(nodes)
    assert [str(path.relative_to(tree)) for path in (tree, *tree.iterdir())] == [".", "a"]
    subprocess.run(["umount", "-R", str(tree / "a" / "point")], check=True)
    assert remove_tree(tree) == ()
    assert not tree.exists()


def test_a_file_as_a_mount_point(tree: Path, nodes: Path) -> None:
    mount("--bind", nodes / "deeper" / "file", tree / "a" / "b" / "file")
    assert remove_tree(tree) == (f"{tree}/a/b/file: something is mounted there",)
    check_kept(nodes)


def test_the_tree_itself_is_a_mount(tree: Path, nodes: Path) -> None:
    mount("--rbind", nodes, tree)
    assert remove_tree(tree) == (f"{tree}: something is mounted there",)
    check_kept(nodes)


def test_mounts_over_mounts(tree: Path, nodes: Path) -> None:
    """What an upper one hides is neither seen nor removed."""
    mount("-t", "tmpfs", "none", tree / "a")
    (tree / "a" / "x").mkdir()
    mount("--bind", nodes, tree / "a" / "x")
    mount("--bind", nodes / "deeper", tree / "a")
    assert remove_tree(tree) == (f"{tree}/a: something is mounted there",)
    check_kept(nodes)


def test_cgroups_behind_a_bind_mount_of_sys(tree: Path) -> None:
    """What an empty cgroup is to those who look for directories to remove."""
    roots = [Path("/sys/fs/cgroup", name, os.environ["SHIM_STAGE_CGROUP"]) for name in ("freezer", "unified", "")]
    cgroup = next(path for path in roots if (path.parent / "cgroup.procs").exists()) / "helpers"
    cgroup.mkdir(parents=True)
    (tree / "sys").mkdir()
    mount("--rbind", "/sys", tree / "sys")
    assert remove_tree(tree) == (f"{tree}/sys: something is mounted there",)
    assert cgroup.is_dir()


def test_deeper_than_stack_and_descriptors(tree: Path) -> None:
    os.close(nest(tree, 1500))
    (tree / "wide").mkdir()
    for number in range(300):
        (tree / "wide" / str(number)).mkdir()
    assert remove_tree(tree) == ()
    assert not tree.exists()


def nest(directory: Path, levels: int) -> int:
    """Directories in each other, with files beside them; the innermost, opened."""
    fd = os.open(directory, os.O_RDONLY)
    for _ in range(levels):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    return fd


def test_a_mount_deep_down(tree: Path, nodes: Path) -> None:
    innermost = nest(tree, 200)
    mount("--bind", nodes, f"/proc/{os.getpid()}/fd/{innermost}")
    os.close(innermost)
    (left,) = remove_tree(tree)
    assert left.endswith("something is mounted there")
    check_kept(nodes)


def test_what_is_told_is_bounded(tree: Path, nodes: Path) -> None:
    for number in range(20):
        (tree / f"{number}").mkdir()
        mount("--bind", nodes / "deeper", tree / f"{number}")
    assert len(remove_tree(tree)) == 8
    check_kept(nodes)


@pytest.mark.parametrize("what", ["link", "mount", "nothing"])
def test_what_takes_a_directorys_place_meanwhile(
    tree: Path, nodes: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a directory and its opening."""
    opened = rootfs.open_directory_below

    def open_after_exchange(above: int, name: str) -> int:
        if name == "a":
            if what == "mount":
                mount("--bind", nodes, tree / "a")
            else:
                (tree / "a").rename(tree.parent / "aside")
            if what == "link":
                (tree / "a").symlink_to(nodes)
        return opened(above, name)

    monkeypatch.setattr(rootfs, "open_directory_below", open_after_exchange)
    left = remove_tree(tree)
    assert (left == ()) == (what == "nothing")
    check_kept(nodes)
    assert (tree.parent / "aside" / "b").is_dir() == (what != "mount")
    monkeypatch.undo()
    if what == "link":
        assert remove_tree(tree) == ()
        check_kept(nodes)


def test_a_mount_over_what_is_being_emptied(tree: Path, nodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = rootfs.open_directory_below

    def mount_after_opening(above: int, name: str) -> int:
        fd = opened(above, name)
        if name == "a":
            mount("--bind", nodes, tree / "a")
        return fd

    monkeypatch.setattr(rootfs, "open_directory_below", mount_after_opening)
    assert remove_tree(tree) == (f"{tree}/a: something is mounted there",)
    check_kept(nodes)


# -- what uses it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def directories(tmp_path: Path) -> Iterator[Directories]:
    made = Directories(tmp_path / "state", tmp_path / "volumes")
    made.prepare()
    yield made
    assert unmount_below(made.state) == unmount_below(made.volumes) == []


def test_the_files_of_a_container(directories: Directories, nodes: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is mounted into them stays; what can be removed when it is gone is removed then."""
    init = directories.state / "init"
    init.write_text("")
    helper = directories.make_helper(OWNER, init, {"ipc": "/proc/self/ns/ipc", "uts": "/proc/self/ns/uts"})
    owned = directories.owned_volumes(OWNER)
    places = [owned / "volume0" / "there", owned / "image0", directories.root(OWNER), helper / "there"]
    for place in places:
        place.mkdir(parents=True)
        mount("--rbind", nodes, place)
    # From the volumes to the helper directory, by which the rest is found again.
    for number, place in enumerate(places):
        with caplog.at_level(logging.WARNING):
            directories.remove_files(OWNER)
        assert str(place) in caplog.text
        assert directories.owners() == {OWNER}
        check_kept(nodes)
        linux.unmount(str(place))
        check_kept(nodes)
        caplog.clear()
        assert place.exists() or number == 0
    directories.remove_files(OWNER)
    assert directories.owners() == set()
    assert os.listdir(directories.volumes) == os.listdir(directories.containers) == []
    assert points_below(directories.state) == points_below(directories.volumes) == []


def test_the_files_of_a_pod(directories: Directories, nodes: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What others mount below the pod's own mounts is cut off with them, and stays where it came from."""
    directory = directories.sandbox(OWNER)
    namespaces.begin(directory, pb.PodSandboxConfig())()
    for place in (directory / "shm" / "there", directory / "there"):
        place.mkdir()
        mount("--rbind", nodes, place)
    with caplog.at_level(logging.WARNING):
        namespaces.remove(directory)
    assert f"{directory}/there: something is mounted there" in caplog.text
    check_kept(nodes)
    assert not (directory / "shm").exists()
    linux.unmount(str(directory / "there"))
    namespaces.remove(directory)
    check_kept(nodes)
    assert not directory.exists()
    assert points_below(directories.state) == []


def test_unmounting_follows_no_link(tmp_path: Path, nodes: Path) -> None:
    (tmp_path / "link").symlink_to(nodes)
    linux.unmount(str(tmp_path / "link"))
    check_kept(nodes)
    shared = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {nodes} " in line]
    assert "shared:" in shared[0]


def test_nothing_else_is_measured(tree: Path, nodes: Path) -> None:
    alone = measure(tree)
    assert alone.inodes == 3
    (tree / "point").mkdir()
    (tree / "link").symlink_to(nodes)
    mount("--bind", nodes, tree / "point")
    assert measure(tree).inodes == alone.inodes + 2


def test_no_other_way_to_remove_a_tree() -> None:
    """Of the plugins, that is; what the network plugin pins is single files."""
    found = []
    for path in PLUGINS.rglob("src/**/*.py"):
        for item in ast.walk(ast.parse(path.read_text())):
            name = item.attr if isinstance(item, ast.Attribute) else item.id if isinstance(item, ast.Name) else ""
            text = item.value if isinstance(item, ast.Constant) and isinstance(item.value, str) else ""
            if name in ("rmtree", "removedirs") or text.startswith("rm ") or text == "rm":
                found.append(f"{path}: {name or text}")
    assert found == []
