"""Who we are at a registry: what came with the pull, else what is configured, else what Docker's files say."""

from __future__ import annotations

import logging
import threading
import urllib.parse

from shim_core import errors
from shim_core.context import CallContext
from shim_core.types import ImageReference, RegistryAuth, RegistryCredentials
from shim_registry_auth.dockerconfig import DockerConfigFile, decode_auth
from shim_registry_auth.hosts import host_of, normalize
from shim_registry_auth.secretfile import WatchedFile, parse_secret
from shim_registry_auth.settings import Registry, RegistryAuthSettings

logger = logging.getLogger("shim.registry_auth")

_FILE_PREFIX = "file:"


class CredentialSources:
    """All places credentials may come from. Safe to use from many threads."""

    def __init__(self, settings: RegistryAuthSettings) -> None:
        self._settings = settings
        self._docker = [DockerConfigFile(path) for path in settings.docker_config]
        self._lock = threading.Lock()
        self._files: dict[str, WatchedFile[str]] = {}

    def find(
        self, image: ImageReference, auth: RegistryAuth | None, context: CallContext
    ) -> RegistryCredentials | None:
        """Credentials for an image's registry; None: be anonymous.

        :raises errors.Unauthenticated: there should be some, and can't be had.
        """
        if auth is not None:
            if matches(auth.server_address, image.registry):
                found = from_auth(auth)
                if found is not None:
                    return found
            else:
                logger.info("[%s] the pull's credentials are for another registry than %s's", context.request_id, image)
        entry = self._settings.registry(image.registry)
        if entry is not None:
            found = self._configured(entry)
            if found is not None:
                return found
        for file in self._docker:
            found = file.credentials(image, context)
            if found is not None:
                return found
        return None

    def _configured(self, entry: Registry) -> RegistryCredentials | None:
        token = entry.auth_token.get_secret_value()
        if token.startswith(_FILE_PREFIX):
            token = self._read(token.removeprefix(_FILE_PREFIX), entry)
        if token:
            return from_header(token, entry)
        parts = urllib.parse.urlsplit(entry.auth_path.get_secret_value())
        if parts.username is not None:
            return RegistryCredentials(
                username=urllib.parse.unquote(parts.username), password=urllib.parse.unquote(parts.password or "")
            )
        return None

    def _read(self, path: str, entry: Registry) -> str:
        with self._lock:
            file = self._files.setdefault(path, WatchedFile(path, parse_secret))
        try:
            return file.get()
        except (OSError, ValueError) as err:
            reason = err.strerror if isinstance(err, OSError) else err
            raise errors.Unauthenticated(
                f"{path}, the AuthToken of {entry.host} (Images.Registries), can't be used: {reason}"
            ) from None


def matches(server_address: str, registry: str) -> bool:
    """True when credentials for an address (CRI ``AuthConfig.server_address``) may go to a registry."""
    return not server_address or normalize(host_of(server_address)) == normalize(registry)


def from_auth(auth: RegistryAuth) -> RegistryCredentials | None:
    """The credentials in a CRI ``AuthConfig``; None when it is empty.

    :raises errors.Unauthenticated: it is malformed.
    """
    if auth.identity_token:
        return RegistryCredentials(identity_token=auth.identity_token)
    if auth.registry_token:
        return RegistryCredentials(registry_token=auth.registry_token)
    if auth.username:
        return RegistryCredentials(username=auth.username, password=auth.password)
    if auth.auth:
        try:
            user, password = decode_auth(auth.auth)
        except ValueError as err:
            raise errors.Unauthenticated(f"the pull's credentials can't be used: auth is {err}") from None
        return RegistryCredentials(username=user, password=password)
    if auth.password:
        # The Go portoshim took a password alone for a token.
        return RegistryCredentials(registry_token=auth.password)
    return None


def from_header(token: str, entry: Registry) -> RegistryCredentials:
    """The credentials in the value of an Authorization header.

    :raises errors.Unauthenticated: it is malformed.
    """
    scheme, space, rest = token.partition(" ")
    if not space:
        return RegistryCredentials(registry_token=token)
    if scheme.lower() == "bearer":
        return RegistryCredentials(registry_token=rest.strip())
    if scheme.lower() == "basic":
        # Taken apart, since a token server may have to be shown them as well.
        try:
            user, password = decode_auth(rest.strip())
        except ValueError as err:
            raise errors.Unauthenticated(f"AuthToken of {entry.host} (Images.Registries): {err}") from None
        return RegistryCredentials(username=user, password=password)
    return RegistryCredentials(header=token)
