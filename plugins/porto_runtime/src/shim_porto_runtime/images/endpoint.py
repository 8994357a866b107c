"""One place an image may be had from, and what we have learned about it during a pull."""

from __future__ import annotations

import threading
import urllib.parse

from shim_core.types import ImageReference, RegistryCredentials, RegistryEndpoint
from shim_porto_runtime.images.failures import Failure
from shim_porto_runtime.images.reference import DOCKER_HUB
from shim_porto_runtime.images.tls import Tls

_HUB_HOST = "registry-1.docker.io"


class Endpoint:
    """An endpoint of a pull. Its lock guards who we are there."""

    def __init__(self, spec: RegistryEndpoint) -> None:
        self.spec = spec
        self.host = urllib.parse.urlsplit(spec.url).netloc
        self.tls = Tls(spec.ca_paths, spec.client_certs, spec.insecure)
        self.lock = threading.Lock()
        self.authorization = ""
        """The header that is sent; empty before the first challenge."""
        self.asked = False
        self.credentials: RegistryCredentials | None = None
        self.down: Failure | None = None
        """Why it is not asked any more, unless there is no other."""
        self._secrets = set(spec.headers.values())

    def authorize(self, header: str) -> None:
        """Send another header from now on."""
        self._secrets |= {header, header.partition(" ")[2]}
        self.authorization = header

    def identify(self, credentials: RegistryCredentials | None) -> None:
        """Whom the plugins say we are."""
        self.asked, self.credentials = True, credentials
        if credentials is not None:
            values = (credentials.password, credentials.identity_token, credentials.registry_token, credentials.header)
            self._secrets |= {form for value in values for form in (value, urllib.parse.quote(value, safe=""))}

    @property
    def secrets(self) -> tuple[str, ...]:
        """What a message must not repeat, even if the server does; the longest first."""
        return tuple(sorted(filter(None, self._secrets), key=len, reverse=True))


def default_endpoint(image: ImageReference) -> RegistryEndpoint:
    """The image's own registry, over HTTPS."""
    host = _HUB_HOST if image.registry == DOCKER_HUB else image.registry
    return RegistryEndpoint(url=f"https://{host}/v2", registry=image.registry)
