"""A node with a registry beside it, for the whole run: on the embedded Porto, or on the one ``PORTO_SOCKET`` names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.pods import Pods
from tools import images
from tools.node import PAUSE, Node, crictl_path
from tools.registry import LocalRegistry

USERS = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:100:Web:/srv:/bin/sh\n"
GROUPS = "root:x:0:\nusers:x:100:\nlogs:x:200:web\n"


@pytest.fixture(scope="package")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    """A registry with TLS and token authentication; ``pause`` and ``public/*`` may be pulled by anybody."""
    directory = tmp_path_factory.mktemp("registry")
    with LocalRegistry(directory, auth="token", public=["pause", "public/*"]) as made:
        images.push(images.pause(), made, *_split(PAUSE))
        users = images.layer([images.File("etc/passwd", USERS.encode()), images.File("etc/group", GROUPS.encode())])
        images.push(images.busybox(extra=[users]), made, "public/busybox", ["1"])
        images.push(images.busybox({"Env": ["PRIVATE=1"]}), made, "private/busybox", ["1"])
        images.push(
            images.busybox(
                {"User": "web", "WorkingDir": "/work/here", "Entrypoint": ["echo"], "Cmd": ["from", "cmd"]}, [users]
            ),
            made,
            "public/web",
            ["1"],
        )
        yield made


@pytest.fixture(scope="package")
def node(registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A running node."""
    made = Node(tmp_path_factory.mktemp("node"), registry=registry, debug=True)
    with made:
        yield made
        made.remove_pods()


@pytest.fixture(scope="package")
def busybox(node: Node, registry: LocalRegistry) -> str:
    """A pulled image with a shell."""
    return pull(node, f"{registry.address}/public/busybox:1")


@pytest.fixture
def pods(node: Node, busybox: str) -> Iterator[Pods]:
    """Makes pods that are gone after the test."""
    made = Pods(node, busybox)
    yield made
    made.remove_all()


@pytest.fixture
def crictl(node: Node) -> Callable[..., str]:
    """Runs crictl; its standard output."""
    require_crictl()
    return lambda *arguments, **options: node.crictl(*arguments, **options).stdout


def require_crictl() -> None:
    """Skip where crictl could not be built; in CI that is a failure."""
    if crictl_path() is None:
        reason = "crictl could not be built: `make prepare` says why"
        if "PORTOSHIM_CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)


def pull(node: Node, name: str) -> str:
    node.cri.PullImage(pb.PullImageRequest(image=pb.ImageSpec(image=name)))
    return name


def _split(reference: str) -> tuple[str, list[str]]:
    repository, _, tag = reference.partition(":")
    return repository, [tag]


def files_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}
