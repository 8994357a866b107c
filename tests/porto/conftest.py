"""The Porto under test: the one ``PORTO_SOCKET`` names, or else an embedded one.

These tests speak only the wire protocol. Where the two differ, the real one is right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.embedded_porto.daemon import Daemon
from tools import images

BASE_LAYER = "conformance-base"


@dataclass(frozen=True, slots=True)
class UnderTest:
    """Which Porto it is."""

    socket: str
    embedded: bool


@pytest.fixture(scope="package")
def under_test() -> Iterator[UnderTest]:
    named = os.environ.get("PORTO_SOCKET")
    if named:
        yield UnderTest(named, embedded=False)
        return
    with Daemon(Path(os.environ["SHIM_STAGE_DIR"]) / "conformance") as daemon:
        yield UnderTest(daemon.socket, embedded=True)


@pytest.fixture
def embedded(under_test: UnderTest) -> bool:
    return under_test.embedded


@pytest.fixture(scope="package")
def session_client(under_test: UnderTest) -> Iterator[Client]:
    with Client(under_test.socket, timeout_s=60) as client:
        assert not client.list_containers(), "these tests take a Porto without containers"
        assert not client.list_volumes(), "these tests take a Porto without volumes"
        yield client


@pytest.fixture
def porto(session_client: Client) -> Iterator[Client]:
    """A client. What a test makes is gone afterwards."""
    yield session_client
    _clean(session_client)


@pytest.fixture(scope="package")
def tarballs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for archives that Porto can read."""
    return tmp_path_factory.mktemp("tarballs")


@pytest.fixture(scope="package")
def base_layer(session_client: Client, tarballs: Path) -> Iterator[str]:
    """A layer with a shell."""
    directories = [images.File("work"), images.File("mnt")]
    archive = tarballs / "base.tar.gz"
    archive.write_bytes(images.layer([*images.busybox_files(), *directories]).blob)
    session_client.import_layer(BASE_LAYER, str(archive))
    yield BASE_LAYER
    session_client.remove_layer(BASE_LAYER)


@pytest.fixture
def root(porto: Client, base_layer: str) -> str:
    """A root directory with a shell."""
    return porto.new_volume(rpc_pb2.TVolumeSpec(backend="overlay", layers=[base_layer])).path


def _clean(client: Client) -> None:
    for name in client.list_containers():
        if "/" not in name:
            client.destroy(name)
    for volume in client.list_volumes():
        try:
            client.unlink_volume(volume.path, "***")
        except errors.VolumeNotFound:
            pass  # it has gone with another
    for layer in client.list_layers():
        if layer.name != BASE_LAYER:
            client.remove_layer(layer.name)
    for storage in client.list_storages():
        client.remove_storage(storage.name)
    assert client.list_containers() == []
    assert client.list_volumes() == []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.root)
