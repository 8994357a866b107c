"""The section ``StreamingServer`` of the configuration, and what follows from it."""

from __future__ import annotations

import ipaddress
from typing import ClassVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from shim_core.config import AbsolutePath, Duration, Section

LOOPBACK = "127.0.0.1"


class StreamingServerSection(Section):
    """``StreamingServer``: where kubelet's and crictl's exec, attach and port-forward connections come in."""

    section: ClassVar[str] = "StreamingServer"

    address: str = Field(
        "[::]",
        description="IP address to listen on; [::] and 0.0.0.0 are all. Without TLSCert, a file that doesn't name an"
        " address gets 127.0.0.1, for connections are not encrypted then.",
    )
    port: int = Field(7255, ge=0, le=65535, description="TCP port; 0 takes any free one.")
    tls_cert: AbsolutePath | None = Field(
        None,
        alias="TLSCert",
        description="PEM file of the server's certificate with its chain; read again when it changes.",
    )
    tls_key: AbsolutePath | None = Field(None, alias="TLSKey", description="PEM file of the certificate's private key.")
    client_ca: AbsolutePath | None = Field(
        None,
        alias="ClientCA",
        description="PEM file of certificate authorities; clients have to present a certificate of theirs.",
    )
    advertise_url: str = Field(
        "",
        alias="AdvertiseURL",
        description="Base of the URLs that clients are given, such as https://node7:7255, for when they reach this"
        " server by another address than the one it listens on.",
    )
    idle_timeout: Duration = Field(
        4 * 3600.0,
        description="Connections over which nothing moves are closed after this; keep-alives don't count.",
    )

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str) -> str:
        try:
            ipaddress.ip_address(bare_address(value))
        except ValueError:
            raise ValueError("must be an IP address, such as 127.0.0.1 or [::]") from None
        return value

    @field_validator("advertise_url")
    @classmethod
    def _is_base_url(cls, value: str) -> str:
        if not value:
            return value
        try:
            parts = urlsplit(value)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            valid = False
        if not valid or parts.query or parts.fragment or "@" in parts.netloc or not value.isascii() or " " in value:
            raise ValueError("must be http:// or https://, a host, and optionally a port and a path")
        return value.rstrip("/")

    @field_validator("idle_timeout")
    @classmethod
    def _is_positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("must be longer than 0")
        return value

    @model_validator(mode="after")
    def _tls_is_whole(self) -> StreamingServerSection:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("set both of TLSCert and TLSKey, or neither")
        if self.client_ca is not None and self.tls_cert is None:
            raise ValueError("a ClientCA needs TLS: set TLSCert and TLSKey as well")
        return self

    @property
    def tls(self) -> bool:
        """Connections are encrypted."""
        return self.tls_cert is not None

    @property
    def listen_address(self) -> str:
        """The address to listen on, without brackets."""
        if not self.tls and "address" not in self.model_fields_set:
            return LOOPBACK
        return bare_address(self.address)


def bare_address(address: str) -> str:
    """An IP address without the brackets it may stand in."""
    return address[1:-1] if address.startswith("[") and address.endswith("]") else address


def base_url(section: StreamingServerSection, bound_address: str, port: int) -> str:
    """What the URLs given to clients begin with; absolute, for kubelet can't use others since 1.36."""
    if section.advertise_url:
        return section.advertise_url
    address = ipaddress.ip_address(bound_address)
    host = f"[{address}]" if address.version == 6 else str(address)
    if address.is_unspecified:
        host = LOOPBACK  # kubelet and crictl are on this node
    return f"{'https' if section.tls else 'http'}://{host}:{port}"
