"""Daemons to be maltreated, and what they work on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from porto_api import Client
from tests.embedded_porto.daemon import Daemon
from tests.porto.support import eventually
from tools import images


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A running daemon. Nothing of it may be left at the end."""
    made = Daemon(Path(os.environ["SHIM_STAGE_DIR"]) / "maltreated")
    with made:
        yield made
        made.destroy_all()
        assert made.cgroups() == []
        assert made.mounts() == []
        assert not made.state.exists()
        eventually(lambda: not made.keeper_pid())


@pytest.fixture
def porto(daemon: Daemon) -> Iterator[Client]:
    """A client that outlives restarts."""
    with Client(daemon.socket, timeout_s=30) as client:
        yield client


@pytest.fixture(scope="package")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A layer with a shell, as an archive."""
    path = tmp_path_factory.mktemp("layers") / "base.tar"
    path.write_bytes(images.pack(images.busybox_files()))
    return str(path)
