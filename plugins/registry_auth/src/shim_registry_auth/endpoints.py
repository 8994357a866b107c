"""Where an image is asked for: mirrors and TLS settings, of the configuration or of hosts.toml."""

from __future__ import annotations

import urllib.parse

from shim_core.types import ImageReference, RegistryEndpoint
from shim_registry_auth import hoststoml
from shim_registry_auth.hosts import own_host
from shim_registry_auth.settings import Registry, RegistryAuthSettings


def find(image: ImageReference, settings: RegistryAuthSettings) -> list[RegistryEndpoint] | None:
    """The endpoints for an image, in the order to ask them; None when nothing is configured for its registry.

    An entry of ``Images.Registries`` that says how its registry is reached outweighs hosts.toml.

    :raises errors.InvalidArgument: a hosts.toml is wrong.
    """
    entry = settings.registry(image.registry)
    if entry is not None and entry.says_where:
        return [*_mirrors(entry, settings), *_own(image.registry, entry)]
    return hoststoml.find(image.registry, settings.config_path)


def _mirrors(entry: Registry, settings: RegistryAuthSettings) -> list[RegistryEndpoint]:
    found = []
    for address in entry.mirrors:
        parts = urllib.parse.urlsplit(address)
        # A mirror with an entry of its own is reached as that says.
        own = settings.registry(parts.netloc)
        tls = own if own is not None and own.says_where else entry
        path = parts.path.rstrip("/")
        found.append(
            RegistryEndpoint(
                url=f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v2') else path + '/v2'}",
                registry=parts.netloc,
                ca_paths=tls.ca,
                client_certs=_client_certs(tls) if tls is own else (),
                insecure=tls.insecure,
            )
        )
    return found


def _own(registry: str, entry: Registry) -> list[RegistryEndpoint]:
    """The registry itself; without TLS as well, if that is allowed and there is none."""
    schemes = ("https", "http") if entry.insecure else ("https",)
    return [
        RegistryEndpoint(
            url=f"{scheme}://{own_host(registry)}/v2",
            registry=registry,
            ca_paths=entry.ca,
            client_certs=_client_certs(entry),
            insecure=entry.insecure,
        )
        for scheme in schemes
    ]


def _client_certs(entry: Registry) -> tuple[tuple[str, str], ...]:
    return ((entry.client_cert, entry.client_key),) if entry.client_cert else ()
