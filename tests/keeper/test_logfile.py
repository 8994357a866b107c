"""Where a log may be opened, and what is left of a write that fails."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_porto_runtime.keeper.logfile import LogFile, open_log
from shim_porto_runtime.keeper.protocol import Refusal


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    previous = os.umask(0o022)
    yield
    os.umask(previous)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_log_and_its_directories_are_made(tmp_path: Path) -> None:
    log = open_log(str(tmp_path / "pods/web"), "app/0.log")
    log.append(b"line\n", 0)
    log.close()
    assert (tmp_path / "pods/web/app/0.log").read_bytes() == b"line\n"
    assert mode(tmp_path / "pods/web/app/0.log") == 0o640
    assert mode(tmp_path / "pods/web/app") == mode(tmp_path / "pods/web") == mode(tmp_path / "pods") == 0o755


def test_a_log_that_is_there_goes_on(tmp_path: Path) -> None:
    (tmp_path / "0.log").write_bytes(b"before\n")
    log = open_log(str(tmp_path), "0.log")
    assert log.size() == 7
    log.append(b"after\n", 7)
    log.close()
    assert (tmp_path / "0.log").read_bytes() == b"before\nafter\n"


@pytest.mark.parametrize(
    ("directory", "path"),
    [
        ("{}", "../x.log"),
        ("{}", "a/../../x.log"),
        ("{}", "/etc/x.log"),
        ("{}", "a/.."),
        ("{}", "a/"),
        ("{}", "."),
        ("{}", "a\0b"),
        ("{}/../x", "0.log"),
        ("relative", "0.log"),
        ("", "0.log"),
        ("{}", "n" * 300),
    ],
)
def test_a_path_that_leaves_the_directory_is_refused(tmp_path: Path, directory: str, path: str) -> None:
    with pytest.raises(Refusal) as caught:
        open_log(directory.format(tmp_path / "d"), path)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert not (tmp_path / "x.log").exists()


@pytest.mark.parametrize("where", ["file", "inner", "directory"])
def test_a_symlink_is_refused_and_its_target_untouched(tmp_path: Path, where: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "0.log").write_bytes(b"secret\n")
    logs = tmp_path / "logs"
    if where == "directory":
        logs.symlink_to(target)
        path = "0.log"
    elif where == "inner":
        logs.mkdir()
        (logs / "app").symlink_to(target)
        path = "app/0.log"
    else:
        logs.mkdir()
        (logs / "0.log").symlink_to(target / "0.log")
        path = "0.log"
    with pytest.raises(Refusal) as caught:
        open_log(str(logs), path)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert (target / "0.log").read_bytes() == b"secret\n"
    assert [path.name for path in target.iterdir()] == ["0.log"]


def test_a_dangling_symlink_makes_no_file(tmp_path: Path) -> None:
    (tmp_path / "0.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refusal):
        open_log(str(tmp_path), "0.log")
    assert not (tmp_path / "elsewhere").exists()


def test_the_node_may_have_its_logs_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "log").symlink_to(tmp_path / "data")
    open_log(str(tmp_path / "log/pods"), "0.log").close()
    assert (tmp_path / "data/pods/0.log").exists()


@pytest.mark.timeout(10)
def test_a_fifo_or_directory_in_its_place_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for name in ("fifo", "directory"):
        with pytest.raises(Refusal) as caught:
            open_log(str(tmp_path), name)
        assert caught.value.code == "INVALID_ARGUMENT"


def test_a_refused_log_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "link").symlink_to("/etc")
    for path in ("link", "link/x", "../x", "directory/.."):
        with pytest.raises(Refusal):
            open_log(str(tmp_path), path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def log(tmp_path: Path) -> Iterator[LogFile]:
    log = open_log(str(tmp_path), "0.log")
    yield log
    log.close()


class _FullAt:
    """A disk that is full when a file has this many bytes."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


def test_of_what_does_not_fit_no_half_record_is_left(log: LogFile, tmp_path: Path) -> None:
    with _FullAt(12):
        whole, error = log.append(b"first\nsecond\nthird\n", 0)
    assert whole == 6
    assert error is not None
    assert (tmp_path / "0.log").read_bytes() == b"first\n"
    assert log.append(b"fourth\n", 6) == (7, None)
    assert (tmp_path / "0.log").read_bytes() == b"first\nfourth\n"


def test_only_what_is_missing_is_written(log: LogFile, tmp_path: Path) -> None:
    os.write(log.fd, b"first\nsec")
    assert log.append(b"first\nsecond\n", 0, already=9) == (13, None)
    assert (tmp_path / "0.log").read_bytes() == b"first\nsecond\n"


def test_a_log_that_somebody_else_left_torn_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "torn.log").write_bytes(b"2023-11-14T22:13:20.123456789Z stdout F hal")
    torn = open_log(str(tmp_path), "torn.log")
    assert torn.is_torn(torn.size())
    assert not torn.is_torn(0)
    torn.append(b"\nwhole\n", torn.size())
    assert not torn.is_torn(torn.size())
    torn.close()
