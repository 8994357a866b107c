"""A node to pull images to: the image service, the registry plugin, and a Porto, all of them real but the last.

With ``PORTO_SOCKET`` set the Porto is real too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shim_porto_runtime.images import layers

from tests.images.fakeporto import FakePorto
from tests.images.hostile import HostileRegistry
from tests.images.support import MakeNode, Node, entry, open_node
from tests.images.victim import Victim
from tools.certificates import CertificateAuthority
from tools.registry import LocalRegistry
from tools.scratch import scratch


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that no record knows isn't one that another process records any moment."""
    monkeypatch.setattr(layers, "_OTHER_PROCESS_S", 0.05)


@pytest.fixture(scope="package")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in memory, where the stage has one that layers can be in: everything here is synced all the time."""
    with scratch(os.environ.get("SHIM_STAGE_DIR")) as directory:
        try:
            os.setxattr(directory, "user.test", b"x")  # before Linux 6.6 tmpfs has none
        except OSError:
            directory = tmp_path_factory.mktemp("images")
        yield directory


@pytest.fixture
def tmp_path(fast: Path) -> Iterator[Path]:
    with scratch(str(fast)) as directory:
        yield directory


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[MakeNode]:
    """Makes nodes: ``make_node({"Registries": [...]}, state="a")``. The same state directory is the same node again."""
    made: list[Node] = []
    fake: FakePorto | None = None
    if "PORTO_SOCKET" not in os.environ:
        fake = FakePorto(tmp_path / "porto")
        fake.start()

    def make(
        images: dict[str, Any] | None = None, *, state: str = "state", plugins: dict[str, Any] | None = None
    ) -> Node:
        socket = fake.path if fake is not None else None
        made.append(open_node(images or {}, socket, tmp_path / state, fake, **(plugins or {})))
        return made[-1]

    yield make
    for node in made:
        node.service.close()
        if fake is None:
            for name in node.layer_names():
                node.client.remove_layer(name)
        node.client.close()
    if fake is not None:
        fake.stop()


@pytest.fixture(scope="package")
def registries(fast: Path) -> Iterator[Callable[..., LocalRegistry]]:
    """Registries by their options, started when first asked for: ``registries(auth="token")``."""
    started: dict[str, LocalRegistry] = {}

    def get(**options: Any) -> LocalRegistry:
        key = repr(sorted(options.items()))
        if key not in started:
            registry = LocalRegistry(fast / f"registry-{len(started)}", **options)
            registry.start()
            started[key] = registry
        return started[key]

    yield get
    for registry in started.values():
        registry.stop()


@pytest.fixture
def registry(registries: Callable[..., LocalRegistry]) -> LocalRegistry:
    """An open registry with TLS."""
    return registries()


@pytest.fixture
def node(make_node: MakeNode, registry: LocalRegistry) -> Node:
    """A node that knows the open registry."""
    return make_node({"Registries": [entry(registry)]})


@pytest.fixture
def repository(request: pytest.FixtureRequest) -> str:
    """A repository name of the test's own."""
    name = "".join(char if char.isalnum() else "-" for char in request.node.name.lower())
    return "-".join(filter(None, name.split("-")))[:120]


@pytest.fixture(scope="package")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def hostile(authority: CertificateAuthority) -> Iterator[HostileRegistry]:
    registry = HostileRegistry(authority.issue("hostile", ["localhost"]))
    yield registry
    registry.stop()


@pytest.fixture
def foreign(authority: CertificateAuthority) -> Iterator[HostileRegistry]:
    """Another host, which must never see a secret."""
    registry = HostileRegistry(authority.issue("foreign", ["127.0.0.1"]), host="127.0.0.1")
    yield registry
    registry.stop()


@pytest.fixture
def victim(make_node: MakeNode, hostile: HostileRegistry, authority: CertificateAuthority) -> Victim:
    """Makes a node that trusts the hostile registry's CA."""

    def make(keys: dict[str, Any] | None = None, **top: Any) -> Node:
        entry = {"Host": hostile.address, "CA": str(authority.path), **(keys or {})}
        return make_node({"Registries": [entry], **top}, state=f"state-{time.monotonic_ns()}")

    return make
