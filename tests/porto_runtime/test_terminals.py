"""Terminals of a container's own devpts."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from shim_porto_runtime import terminals


def test_it_is_one_of_that_devpts() -> None:
    master, slave = terminals.open_in("/")
    try:
        assert os.ttyname(slave).startswith("/dev/pts/")
        os.write(slave, b"x")
        assert os.read(master, 1) == b"x"
    finally:
        os.close(master)
        os.close(slave)


def nothing(_path: Path) -> None:
    """No such file."""


def link_to_the_nodes(path: Path) -> None:
    path.symlink_to("/dev/pts/ptmx")


def link_upwards(path: Path) -> None:
    path.symlink_to("../" * 20 + "dev/pts/ptmx")


@pytest.mark.parametrize("make", [nothing, Path.touch, Path.mkdir, os.mkfifo, link_to_the_nodes, link_upwards])
def test_what_is_none_is_not_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A FIFO would be waited for until the end of days; a link must not lead to the node's."""
    place = tmp_path / "dev" / "pts" / "ptmx"
    place.parent.mkdir(parents=True)
    make(place)
    with pytest.raises(OSError) as caught:
        terminals.open_in(str(tmp_path))
    assert caught.value.errno in (errno.ENODEV, errno.ENOENT, errno.ELOOP)


def test_a_directory_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / "dev").symlink_to("/dev")
    with pytest.raises(OSError):
        terminals.open_in(str(tmp_path))


@pytest.mark.root
def test_another_device_is_not_opened(tmp_path: Path) -> None:
    place = tmp_path / "dev" / "pts" / "ptmx"
    place.parent.mkdir(parents=True)
    try:
        os.mknod(place, 0o20666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no devices can be made here")
    with pytest.raises(OSError, match=os.strerror(errno.ENODEV)):
        terminals.open_in(str(tmp_path))
