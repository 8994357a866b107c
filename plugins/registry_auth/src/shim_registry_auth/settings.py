"""This plugin's keys in the section ``Images``: who we are at which registry, and where registries are found."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_pascal

from shim_core.config import AbsolutePath, Section
from shim_registry_auth.hosts import normalize

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?")


def _host(text: str) -> str:
    if not _HOST.fullmatch(text):
        raise ValueError("must be a host, with a port if any: registry.example.org:5000")
    return text


def _web_address(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("must be an http:// or https:// address")
    return text


def _auth_path(text: SecretStr) -> SecretStr:
    value = text.get_secret_value()
    if value and "://" not in value:
        value = f"https://{value}"  # as Porto reads it
    if value:
        _web_address(value)
    return SecretStr(value)


def _show_auth_path(text: SecretStr) -> str:
    """An address may hold a user and a password: those are hidden, the rest is not."""
    parts = urllib.parse.urlsplit(text.get_secret_value())
    if parts.username is None:
        return text.get_secret_value()
    return urllib.parse.urlunsplit(parts._replace(netloc=f"**********@{parts.netloc.rpartition('@')[2]}"))


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Host = Annotated[str, AfterValidator(_host)]
WebAddress = Annotated[str, AfterValidator(_web_address)]
AuthPath = Annotated[
    SecretStr, AfterValidator(_auth_path), PlainSerializer(_show_auth_path, return_type=str, when_used="json")
]
Paths = Annotated[tuple[AbsolutePath, ...], BeforeValidator(_one_or_more)]


class Registry(BaseModel):
    """One registry (``Images.Registries[]``)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_pascal, hide_input_in_errors=True, populate_by_name=True
    )

    host: Host
    """As in image references. Docker Hub is ``registry-1.docker.io``, ``docker.io`` or ``index.docker.io``."""
    auth_token: SecretStr = SecretStr("")
    """The value of an Authorization header, or ``file:PATH`` of a file that holds one and is read anew when it
    changes. Without a scheme in it, it is a bearer token."""
    auth_path: AuthPath = SecretStr("")
    """The token server, when it is not to be the one that the registry names. May hold a user and a password."""
    auth_service: str = ""
    """The service a token is asked for, when it is not to be the one that the registry names."""
    token_hosts: tuple[Host, ...] = ()
    """Other hosts that may be sent credentials of this registry in exchange for a token."""
    mirrors: tuple[WebAddress, ...] = ()
    """Asked first, in this order."""
    ca: Paths = Field((), alias="CA")
    """Certificates of authorities that are trusted for this registry, besides those of the system; PEM files."""
    client_cert: str = ""
    """Our own certificate at this registry; PEM file."""
    client_key: str = ""
    """Its key; PEM file."""
    insecure: bool = False
    """Don't check certificates, and use plain HTTP where there is no TLS."""

    @field_validator("client_cert", "client_key")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError("must be an absolute path")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Registry:
        if self.client_key and not self.client_cert:
            raise ValueError("a ClientKey needs ClientCert beside it")
        if not self.insecure and any(mirror.startswith("http://") for mirror in self.mirrors):
            raise ValueError("a mirror without TLS needs Insecure: true")
        if not self.insecure and self.auth_path.get_secret_value().startswith("http://"):
            raise ValueError("an AuthPath without TLS needs Insecure: true")
        return self

    @property
    def says_where(self) -> bool:
        """True when this entry says how the registry is reached, and not just who we are there."""
        return bool(self.mirrors or self.ca or self.client_cert or self.insecure)


BUILT_IN = tuple(
    Registry.model_validate(entry)
    for entry in ({"Host": "registry-1.docker.io"}, {"Host": "quay.io", "AuthPath": "https://quay.io/v2/auth"})
)


class RegistryAuthSettings(Section):
    """``Images``, the registries' part."""

    section: ClassVar[str] = "Images"

    registries: tuple[Registry, ...] = Field(
        (),
        description="Who we are at which registry: Host, AuthToken (an Authorization header, or file:PATH), AuthPath"
        " and AuthService\n(the token server), TokenHosts; and how it is reached: Mirrors, CA, ClientCert, ClientKey,"
        " Insecure.\nAn entry replaces a built-in one: registry-1.docker.io, quay.io.",
    )
    docker_config: Annotated[tuple[AbsolutePath, ...], BeforeValidator(_one_or_more)] = Field(
        (), description="Docker's config.json, one file or several: auths, credsStore, credHelpers."
    )
    config_path: Annotated[tuple[AbsolutePath, ...], BeforeValidator(lambda v: _split(v))] = Field(
        ("/etc/portoshim/certs.d",),
        description="Directories of hosts.toml files as containerd reads them: a list, or separated by colons.",
    )

    @field_validator("registries")
    @classmethod
    def _once_each(cls, value: Sequence[Registry]) -> tuple[Registry, ...]:
        seen = set()
        for entry in value:
            name = normalize(entry.host)
            if name in seen:
                raise ValueError(f"{entry.host} stands twice")
            seen.add(name)
        return tuple(value)

    def registry(self, host: str) -> Registry | None:
        """The entry for a registry, configured or built in; by any of Docker Hub's names."""
        wanted = normalize(host)
        return next((entry for entry in (*self.registries, *BUILT_IN) if normalize(entry.host) == wanted), None)


def _split(value: object) -> object:
    return tuple(filter(None, value.split(":"))) if isinstance(value, str) else value
