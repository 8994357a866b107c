"""The values that cross hooks between plugins. Frozen, checked at the edge, units in the names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from shim_core.config import Config


@dataclass(frozen=True, slots=True)
class Shim:
    """The running daemon, as plugins see it: handed to ``shim_configure``."""

    config: Config
    hooks: Any
    """Call other plugins through this: ``shim.hooks.network_attach(sandbox=..., context=...)``."""
    embedded: bool = False
    """True when the operator asked for the embedded runtime."""


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand of ``portoshim`` that a plugin brings."""

    name: str
    help: str
    """One line."""
    add_arguments: Callable[[ArgumentParser], object]
    run: Callable[[Namespace], int]
    """Does the work; the exit status. A :class:`~shim_core.errors.ShimError` is shown to the operator, status 1."""


@dataclass(frozen=True, slots=True)
class RuntimeCondition:
    """One line of the node's health (CRI ``RuntimeCondition``), such as ``NetworkReady``."""

    type: str
    status: bool
    reason: str = ""
    """One word in CamelCase, for programs; empty when the status is True."""
    message: str = ""
    """One sentence, for people."""


# -- network -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A host port that leads to a port of the pod (CRI ``PortMapping``)."""

    protocol: str
    """``tcp``, ``udp`` or ``sctp``."""
    container_port: int
    host_port: int
    host_ip: str = ""


@dataclass(frozen=True, slots=True)
class DnsConfig:
    """CRI ``DNSConfig``."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkSandbox:
    """A sandbox as a network plugin needs it."""

    sandbox_id: str
    """64 hex digits."""
    name: str
    namespace: str
    uid: str
    attempt: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    port_mappings: tuple[PortMapping, ...] = ()
    dns: DnsConfig = DnsConfig()
    cgroup_parent: str = ""


@dataclass(frozen=True, slots=True)
class NetworkInterface:
    """An interface inside the sandbox."""

    name: str
    mac: str = ""
    addresses: tuple[str, ...] = ()
    """With prefix length: ``10.1.0.5/16``."""


@dataclass(frozen=True, slots=True)
class NetworkAttachment:
    """What a network plugin made of a sandbox."""

    netns_path: str
    """The bind-mounted network namespace the sandbox has to be started in. Empty when there is none: the runtime then
    makes a network of its own, with these addresses on the first of the interfaces."""
    addresses: tuple[str, ...]
    """The pod's addresses without prefix length, the primary one first."""
    interfaces: tuple[NetworkInterface, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    """What the plugin wants shown in the sandbox's verbose status; JSON values."""


# -- registries --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image reference in full: ``registry/repository[:tag][@digest]`` (distribution's grammar)."""

    registry: str
    """The registry's name as users write it, with its port if any: ``docker.io``, ``registry.k8s.io``."""
    repository: str
    """``library/busybox``."""
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Registry and repository."""
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


@dataclass(frozen=True, slots=True)
class RegistryAuth:
    """The credentials that came with a pull (CRI ``AuthConfig``), as the client sent them."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    auth: str = field(default="", repr=False)
    """base64 of ``username:password``."""
    server_address: str = ""
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class RegistryCredentials:
    """Who to be at a registry. Fill in one of: username and password, identity_token, registry_token, header."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    """An OAuth2 refresh token, to be exchanged at the token server."""
    registry_token: str = field(default="", repr=False)
    """A bearer token, to be sent as it is."""
    header: str = field(default="", repr=False)
    """A whole ``Authorization`` value, to be sent as it is."""


@dataclass(frozen=True, slots=True)
class RegistryEndpoint:
    """Where an image can be had: its registry, or a mirror of it."""

    url: str
    """Everything before the repository's name: ``https://mirror.example.org/v2``."""
    registry: str
    """Whose credentials are used here: the image's own registry, or the mirror's host with its port if any."""
    can_resolve: bool = True
    """May be asked what a tag stands for."""
    can_pull: bool = True
    """May be asked for manifests and blobs by digest."""
    ca_paths: tuple[str, ...] = ()
    """PEM files, trusted on top of what the system trusts."""
    client_certs: tuple[tuple[str, str], ...] = ()
    """PEM files of certificates and their keys; an empty key path: the key is in the certificate's file."""
    insecure: bool = False
    """Certificates aren't checked, and plain HTTP will do: for this endpoint and its token server."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with each request to this host, and to no other. May hold secrets."""
    connect_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class RegistryChallenge:
    """A registry has answered 401: what it asks for."""

    url: str
    """The URL that was refused; its host is the one the credentials are for."""
    header: str
    """The ``WWW-Authenticate`` values, joined by commas."""
    scope: str
    """What is needed: ``repository:library/busybox:pull``."""
    retry: bool = False
    """True when an authorization from :meth:`registry_authorization` was refused: a cached one is stale."""
    endpoint: RegistryEndpoint | None = None
    """The endpoint that was asked: its TLS settings hold for its token server as well."""


@dataclass(frozen=True, slots=True)
class RegistryAuthorization:
    """An ``Authorization`` header for one registry host."""

    header: str = field(repr=False)
    expires_in_s: float | None = None


# -- streaming ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExecSession:
    """A process to run in a container, with its streams already open.

    The descriptors are the process's ends; they belong to the caller, who closes them after the hook returned.
    With ``tty`` all three are one terminal, whichever of them were asked for.
    """

    container_id: str
    command: tuple[str, ...]
    tty: bool = False
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None


@dataclass(frozen=True, slots=True)
class AttachSession:
    """A client of a running container's own streams.

    The descriptors are the ends that the runtime reads (``stdin``) and writes; they belong to the caller. They are
    pipes even with ``tty``: the terminal is the container's, and a second one would change the bytes.
    """

    container_id: str
    tty: bool = False
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    on_resize: Callable[[Callable[[int, int], None]], None] | None = None
    """Registers a function to be called with columns and rows when the client's window changes."""


@dataclass(frozen=True, slots=True)
class PortForwardSession:
    """A connection to be made to a port inside a sandbox."""

    sandbox_id: str
    port: int
    """0 when the request names none, which is usual: each connection then says where it goes."""
