"""Network namespaces, without a process of their own."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
from shim_cni_net.netns import Namespaces, NetnsError

from tests.cni_net.support import run

pytestmark = pytest.mark.root


@pytest.fixture
def namespaces(tmp_path: Path) -> Namespaces:
    return Namespaces("/run/netns", str(tmp_path))


def test_made_with_loopback_and_taken_away(namespaces: Namespaces) -> None:
    path = namespaces.path("a" * 64)
    own = os.stat("/proc/self/ns/net").st_ino
    threads = threading.active_count()
    assert not namespaces.exists(path)
    namespaces.create(path)
    assert namespaces.exists(path)
    assert namespaces.pinned() == [path]
    assert os.stat(path).st_ino != own
    assert os.stat("/proc/thread-self/ns/net").st_ino == own, "this thread stays where it was"
    assert threading.active_count() == threads
    assert Path(path).name in run("ip", "netns")
    link = run("ip", "-o", "addr", "show", "lo", netns=path)
    assert "127.0.0.1/8" in link
    assert "::1/128" in link
    namespaces.remove(path)
    namespaces.remove(path)
    assert not os.path.lexists(path)


def test_names_tell_sandboxes_and_shims_apart(namespaces: Namespaces, tmp_path: Path) -> None:
    other = Namespaces("/run/netns", str(tmp_path / "other"))
    # Ids that begin alike once shared a namespace.
    ids = [f"{1:064x}", f"{2:064x}", "x"]
    paths = {shim.path(sandbox_id) for shim in (namespaces, other) for sandbox_id in ids}
    assert len(paths) == 6
    for path in paths:
        namespaces.create(path)
    assert len({os.stat(path).st_ino for path in paths}) == 6
    assert len(namespaces.pinned()) == len(other.pinned()) == 3


def test_what_is_in_the_way_goes(namespaces: Namespaces) -> None:
    path = namespaces.path("x")
    Path(path).write_text("a plain file")
    assert not namespaces.exists(path)
    namespaces.create(path)
    first = os.stat(path).st_ino
    subprocess.run(["mount", "--bind", "/proc/self/ns/net", path], check=True)
    namespaces.create(path)
    assert os.stat(path).st_ino not in (first, os.stat("/proc/self/ns/net").st_ino)
    namespaces.remove(path)
    assert not os.path.lexists(path)
    assert path not in Path("/proc/self/mountinfo").read_text()


def test_a_symbolic_link_is_not_followed(namespaces: Namespaces, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("untouched")
    path = namespaces.path("x")
    os.symlink(target, path)
    assert not namespaces.exists(path)
    namespaces.remove(path)
    os.symlink("/proc/self/ns/net", path)
    assert not namespaces.exists(path), "a link to a namespace pins nothing"
    namespaces.create(path)
    assert target.read_text() == "untouched"


def test_a_directory_that_is_missing_is_made(tmp_path: Path) -> None:
    namespaces = Namespaces(str(tmp_path / "deep" / "netns"), "x")
    assert namespaces.pinned() == []
    namespaces.create(namespaces.path("x"))
    assert namespaces.exists(namespaces.path("x"))
    namespaces.remove(namespaces.path("x"))


def test_what_fails_leaves_nothing(namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NetnsError, match=r"can't be created: Not a directory"):
        Namespaces(str(tmp_path / "file" / "netns"), "x").create(str(tmp_path / "file" / "netns" / "x"))

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    path = namespaces.path("x")
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.ioctl", refused)
        with pytest.raises(NetnsError, match=r"loopback interface can't be brought up: Operation not permitted"):
            namespaces.create(path)
    assert not os.path.lexists(path)


def test_use_is_seen(namespaces: Namespaces) -> None:
    path = namespaces.path("x")
    assert not namespaces.in_use(path)
    namespaces.create(path)
    assert not namespaces.in_use(path)
    with subprocess.Popen(
        ["nsenter", f"--net={path}", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        process.stdout.read(1)  # cat runs, so nsenter has done its part
        assert namespaces.in_use(path)
    assert not namespaces.in_use(path)


def test_many_at_once(namespaces: Namespaces) -> None:
    paths = [namespaces.path(f"{number:064x}") for number in range(20)]
    threads = [threading.Thread(target=namespaces.create, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({os.stat(path).st_ino for path in paths}) == 20
