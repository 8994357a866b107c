"""The plugin: answers the registry hooks from configuration."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping, Sequence

from shim_core import errors
from shim_core.config import Section
from shim_core.context import CallContext
from shim_core.hookspecs import hookimpl
from shim_core.types import (
    ImageReference,
    RegistryAuthorization,
    RegistryChallenge,
    RegistryCredentials,
    RegistryEndpoint,
    Shim,
)
from shim_core.types import RegistryAuth as PullAuth
from shim_registry_auth import challenge as challenges
from shim_registry_auth import endpoints, tokens
from shim_registry_auth.credentials import CredentialSources
from shim_registry_auth.hosts import is_token_host, normalize
from shim_registry_auth.settings import BUILT_IN, Registry, RegistryAuthSettings


class RegistryAuth:
    """Credentials and endpoints as the operator has configured them. Asked after all other plugins."""

    def __init__(self) -> None:
        self._configure(RegistryAuthSettings.model_validate({}))

    @hookimpl
    def shim_config_section(self) -> type[Section]:
        return RegistryAuthSettings

    @hookimpl
    def shim_configure(self, shim: Shim) -> None:
        self._configure(shim.config.get(RegistryAuthSettings))

    @hookimpl(trylast=True)
    def registry_endpoints(self, image: ImageReference) -> Sequence[RegistryEndpoint] | None:
        return endpoints.find(image, self._settings)

    @hookimpl(trylast=True)
    def registry_credentials(
        self, image: ImageReference, auth: PullAuth | None, context: CallContext
    ) -> RegistryCredentials | None:
        return self._sources.find(image, auth, context)

    @hookimpl(trylast=True)
    def registry_authorization(
        self,
        image: ImageReference,
        credentials: RegistryCredentials | None,
        challenge: RegistryChallenge,
        context: CallContext,
    ) -> RegistryAuthorization | None:
        if credentials is not None:
            self._check_encrypted(challenge)
            ready = _ready_header(credentials)
            if ready:
                # Nothing better can be had when it was refused.
                return None if challenge.retry else RegistryAuthorization(ready)
        asked = {item.scheme: item for item in challenges.parse(challenge.header)}
        entry = self._settings.registry(image.registry)
        if "bearer" in asked or (entry is not None and _has_token_server(entry) and "basic" not in asked):
            parameters = asked["bearer"].parameters if "bearer" in asked else {}
            return self._token(image, credentials, challenge, parameters, entry, context)
        if credentials is None or not credentials.username or challenge.retry:
            return None
        return RegistryAuthorization(tokens.basic(credentials))

    @hookimpl
    def runtime_info(self) -> Mapping[str, str]:
        """Which registries are configured, without who we are there."""
        known = {normalize(entry.host): entry for entry in (*BUILT_IN, *self._settings.registries)}
        shown = {
            host: {"mirrors": list(entry.mirrors), "insecure": entry.insecure, "hasAuthToken": bool(entry.auth_token)}
            for host, entry in sorted(known.items())
        }
        return {
            "registries": json.dumps(
                {
                    "configured": shown,
                    "configPath": list(self._settings.config_path),
                    "dockerConfig": list(self._settings.docker_config),
                }
            )
        }

    def _configure(self, settings: RegistryAuthSettings) -> None:
        self._settings = settings
        self._sources = CredentialSources(settings)
        self._tokens = tokens.TokenCache()

    def _token(
        self,
        image: ImageReference,
        credentials: RegistryCredentials | None,
        challenge: RegistryChallenge,
        parameters: Mapping[str, str],
        entry: Registry | None,
        context: CallContext,
    ) -> RegistryAuthorization | None:
        configured = entry.auth_path.get_secret_value() if entry is not None else ""
        realm = configured or parameters.get("realm", "")
        service = parameters.get("service", "")
        if entry is not None and entry.auth_service:
            service = entry.auth_service
        elif configured and not service:
            service = urllib.parse.urlsplit(configured).hostname or ""
        if not configured:
            self._check_realm(realm, credentials, challenge, entry, image)
        request = tokens.TokenRequest(realm, service, challenge.scope, credentials)
        text, lifetime_s = self._tokens.get(request, challenge.endpoint, context, fresh=challenge.retry)
        return RegistryAuthorization(f"Bearer {text}", lifetime_s)

    def _check_realm(
        self,
        realm: str,
        credentials: RegistryCredentials | None,
        challenge: RegistryChallenge,
        entry: Registry | None,
        image: ImageReference,
    ) -> None:
        """A registry names its token server itself: it must not be able to send our credentials anywhere it likes.

        :raises errors.Unauthenticated: nothing may be sent there; the message says what would allow it.
        """
        try:
            parts = urllib.parse.urlsplit(realm)
            host, netloc = parts.hostname, parts.netloc
            is_address = parts.scheme in ("http", "https") and bool(host) and parts.username is None
        except ValueError:
            is_address = False
        if not is_address:
            raise errors.Unauthenticated(f"{image.registry} names a token server that is no web address")
        insecure = challenge.endpoint is not None and challenge.endpoint.insecure
        if parts.scheme == "http" and not insecure:
            raise errors.Unauthenticated(
                f"{image.registry} names a token server without TLS, http://{netloc}, which is refused"
            )
        if credentials is None or is_token_host(challenge.url, realm):
            return
        allowed = entry.token_hosts if entry is not None else ()
        if not any(netloc.lower() == other.lower() or host == other.lower() for other in allowed):
            raise errors.Unauthenticated(
                f"{image.registry} sends us to {netloc} for a token; credentials go there only if TokenHosts of its"
                " entry in Images.Registries names that host"
            )

    def _check_encrypted(self, challenge: RegistryChallenge) -> None:
        insecure = challenge.endpoint is not None and challenge.endpoint.insecure
        if not challenge.url.startswith("https://") and not insecure:
            raise errors.Unauthenticated(
                "credentials aren't sent without TLS: set Insecure for this registry to allow it"
            )


def _ready_header(credentials: RegistryCredentials) -> str:
    if credentials.header:
        return credentials.header
    return f"Bearer {credentials.registry_token}" if credentials.registry_token else ""


def _has_token_server(entry: Registry) -> bool:
    return bool(entry.auth_path.get_secret_value() or entry.auth_service)
