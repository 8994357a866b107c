"""What the tests of a hostile registry share: who pulls, what, and what is to be seen when it fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shim_core import errors
from shim_core.types import RegistryAuth
from tests.images.hostile import Exchange, HostileRegistry
from tests.images.support import Node
from tools import images
from tools.images import File

SECRET = "S3CR3T-do-not-leak"
MISMATCH = r"^SignatureValidationFailed: "
UNAVAILABLE = r"^RegistryUnavailable: "
MIB = 1024 * 1024
AUTH = RegistryAuth(username="user", password=SECRET)

Victim = Callable[..., Node]


def image(text: str = "hello", size: int = 0) -> images.Image:
    return images.build([images.layer([File("file", text.encode() + bytes(size))], "none")])


def refused(node: Node, hostile: HostileRegistry, pattern: str, auth: RegistryAuth | None = None, ref: str = "") -> str:
    """Pull, see it fail, and see that nothing is left of it."""
    name = f"{hostile.address}/x{ref}"
    with pytest.raises(errors.UnknownError, match=pattern) as caught:
        node.pull(name, auth)
    assert f"{hostile.address}/x" in caught.value.message
    assert node.service.resolve(name) is None
    assert node.service._store.index().images == {}
    assert node.temporary_files() == []
    return caught.value.message


def challenge(hostile: HostileRegistry, realm: str | None) -> None:
    """Ask for credentials: for a token of that realm, or for Basic ones."""
    text = 'Basic realm="r"' if realm is None else f'Bearer realm="{realm}",service="s"'

    def ask(x: Exchange) -> None:
        if "authorization" in x.seen.headers:
            hostile.serve(x)
        else:
            x.error(401, "UNAUTHORIZED", "who are you?", {"WWW-Authenticate": text})

    hostile.on("/v2/", ask)
