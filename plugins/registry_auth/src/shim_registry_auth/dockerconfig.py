"""Docker's ``config.json`` and its credential helpers.

Keys of ``auths`` may be narrower than a registry: ``registry.example.org/team`` counts for what is below it, the
longest one first, as in containers-auth.json(5).
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shim_core import errors
from shim_core.context import CallContext
from shim_core.types import ImageReference, RegistryCredentials
from shim_registry_auth.hosts import DOCKER_HUB, host_of, normalize
from shim_registry_auth.secretfile import WatchedFile

logger = logging.getLogger("shim.registry_auth")

HELPER_TIMEOUT_S = 30.0
_HELPER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_MAX_OUTPUT_BYTES = 1024 * 1024
_HUB_KEY = "https://index.docker.io/v1/"
_IDENTITY_TOKEN_USER = "<token>"  # noqa: S105 - the name that helpers give to an identity token
_NOT_FOUND = "credentials not found in native keychain"


@dataclass(frozen=True, slots=True)
class DockerConfig:
    """The parts of a config.json that say who we are."""

    auths: Mapping[str, RegistryCredentials] = field(default_factory=dict, repr=False)
    """By normalized host, with a path if the key has one."""
    helpers: Mapping[str, str] = field(default_factory=dict)
    """Names of credential helpers by normalized host."""
    default_helper: str = ""


class DockerConfigFile:
    """A config.json, read anew when it changes."""

    def __init__(self, path: str) -> None:
        self._file = WatchedFile(path, parse)

    def credentials(self, image: ImageReference, context: CallContext) -> RegistryCredentials | None:
        """Who we are at the registry of an image; None when the file doesn't say.

        :raises errors.Unauthenticated: it says so, and a helper fails.
        """
        try:
            config = self._file.get()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as err:
            reason = err.strerror if isinstance(err, OSError) else err
            raise errors.Unauthenticated(f"{self._file.path} (Images.DockerConfig) can't be used: {reason}") from None
        host = normalize(image.registry)
        helper = config.helpers.get(host)
        if helper is not None:
            return ask_helper(helper, host, context)
        for key in _keys(host, image.repository):
            if (found := config.auths.get(key)) is not None:
                return found
        return ask_helper(config.default_helper, host, context) if config.default_helper else None


def parse(data: bytes) -> DockerConfig:
    """A config.json.

    :raises ValueError: it is none. The text holds nothing of it.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("not valid JSON") from None
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    auths = {
        _key(address): credentials
        for address, entry in _objects(document, "auths")
        if (credentials := _credentials(entry)) is not None
    }
    helpers = document.get("credHelpers") or {}
    if not isinstance(helpers, dict) or not all(isinstance(name, str) for name in helpers.values()):
        raise ValueError("credHelpers is not an object of names")
    default = document.get("credsStore") or ""
    if not isinstance(default, str):
        raise ValueError("credsStore is not a name")
    return DockerConfig(auths, {normalize(host_of(host)): name for host, name in helpers.items()}, default)


def ask_helper(name: str, host: str, context: CallContext) -> RegistryCredentials | None:
    """Run ``docker-credential-<name> get``; None when it has nothing for the host.

    :raises errors.Unauthenticated: it isn't there, fails, hangs, or says something else than credentials.
    """
    program = f"docker-credential-{name}"
    path = shutil.which(program) if _HELPER_NAME.fullmatch(name) else None
    if path is None:
        raise errors.Unauthenticated(f"{program}: no such credential helper on PATH")
    address = _HUB_KEY if host == DOCKER_HUB else host
    output, status = _run(path, address, context.remaining_s(HELPER_TIMEOUT_S))
    if status != 0:
        if output.decode(errors="replace").strip() == _NOT_FOUND:
            return None
        raise errors.Unauthenticated(f"{program}: failed for {host}, exit status {status}")
    try:
        answer = json.loads(output)
        user, secret = answer["Username"], answer["Secret"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise errors.Unauthenticated(f"{program}: its answer for {host} holds no Username and Secret") from None
    if not isinstance(user, str) or not isinstance(secret, str):
        raise errors.Unauthenticated(f"{program}: its answer for {host} holds no Username and Secret")
    if user == _IDENTITY_TOKEN_USER:
        return RegistryCredentials(identity_token=secret)
    return RegistryCredentials(username=user, password=secret) if user or secret else None


def decode_auth(text: str) -> tuple[str, str]:
    """User and password of a base64 ``user:password``.

    :raises ValueError: it is none. The text holds nothing of it.
    """
    try:
        user, colon, password = base64.b64decode(text, validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise ValueError("not base64 of user:password") from None
    if not colon:
        raise ValueError("not base64 of user:password")
    return user, password.rstrip("\0")


def _run(path: str, text: str, timeout_s: float) -> tuple[bytes, int]:
    """A helper's output, bounded in time and size, and its exit status."""
    program = os.path.basename(path)
    try:
        process = subprocess.Popen(
            [path, "get"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as err:
        raise errors.Unauthenticated(f"{program}: can't be run: {err.strerror}") from None
    with process:
        try:
            output, _ = process.communicate(text.encode(), timeout=max(timeout_s, 0.001))
        except subprocess.TimeoutExpired:
            # Helpers are often scripts: whatever they have started goes with them.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise errors.Unauthenticated(f"{program}: gave no answer within {timeout_s:.0f} s") from None
    if len(output) > _MAX_OUTPUT_BYTES:
        raise errors.Unauthenticated(f"{program}: its answer is larger than {_MAX_OUTPUT_BYTES} bytes")
    return output, process.returncode


def _objects(document: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    value = document.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} is not an object")
    for name, entry in (value or {}).items():
        if not isinstance(entry, dict):
            raise ValueError(f"{key}: the entry of {name} is not an object")
        yield name, entry


def _credentials(entry: dict[str, Any]) -> RegistryCredentials | None:
    values = {key: entry.get(key) or "" for key in ("auth", "username", "password", "identitytoken", "registrytoken")}
    if not all(isinstance(value, str) for value in values.values()):
        raise ValueError("auths: an entry holds something that is no text")
    if values["identitytoken"]:
        return RegistryCredentials(identity_token=values["identitytoken"])
    if values["registrytoken"]:
        return RegistryCredentials(registry_token=values["registrytoken"])
    if values["auth"]:
        user, password = decode_auth(values["auth"])
        return RegistryCredentials(username=user, password=password)
    if values["username"]:
        return RegistryCredentials(username=values["username"], password=values["password"])
    return None  # the secret is in a helper


def _key(address: str) -> str:
    """A key of ``auths`` as we compare it: ``https://index.docker.io/v1/`` is ``docker.io``."""
    host = host_of(address)
    path = address.removeprefix("https://").removeprefix("http://").partition("/")[2].strip("/")
    return normalize(host) if path in ("", "v1", "v2") else f"{normalize(host)}/{path}"


def _keys(host: str, repository: str) -> Iterator[str]:
    """The keys that count for a repository, the narrowest first."""
    parts = repository.split("/")
    for count in range(len(parts), 0, -1):
        yield "/".join((host, *parts[:count]))
    yield host
