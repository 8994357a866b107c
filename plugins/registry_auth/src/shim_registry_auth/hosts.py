"""Names of registries: which ones are the same."""

from __future__ import annotations

import urllib.parse

DOCKER_HUB = "docker.io"
HUB_ENDPOINT = "registry-1.docker.io"
_HUB_NAMES = frozenset({DOCKER_HUB, HUB_ENDPOINT, "index.docker.io"})

# Registries whose token server has another name than they have.
_KNOWN_TOKEN_HOSTS = {
    HUB_ENDPOINT: frozenset({"auth.docker.io"}),
    "registry.gitlab.com": frozenset({"gitlab.com"}),
}


def normalize(host: str) -> str:
    """A registry's one name: lower case, no default port, ``docker.io`` for all of Docker Hub's."""
    name = host.lower().removesuffix(":443")
    return DOCKER_HUB if name in _HUB_NAMES else name


def host_of(address: str) -> str:
    """The host, with its port if any, of an address as it stands in Docker's and kubelet's configurations.

    ``https://index.docker.io/v1/``, ``registry.example.org:5000`` and ``registry.example.org/team`` are all taken.
    """
    return address.removeprefix("https://").removeprefix("http://").partition("/")[0]


def own_host(registry: str) -> str:
    """Where a registry answers, by the name that images bear."""
    return HUB_ENDPOINT if normalize(registry) == DOCKER_HUB else registry


def is_token_host(url: str, realm: str) -> bool:
    """True when the token server at ``realm`` is known to belong to the registry at ``url``: same host, any port."""
    registry, server = urllib.parse.urlsplit(url).hostname, urllib.parse.urlsplit(realm).hostname
    if not registry or not server:
        return False
    return server == registry or server in _KNOWN_TOKEN_HOSTS.get(registry, frozenset())
