"""From an HTTP request to an agreed protocol, or to the reason why not. Pure functions.

Who may come in at all is decided here as well. A token proves that kubelet or crictl was given the URL, but a browser
on the node could be talked into sending requests to a loopback port; so what only browsers do is checked before
anything else: an ``Origin`` must be our own, and ``Host`` a name that is ours. Requests that came through kubelet are
exempt. It passes on its client's headers (a web console's Origin, the node's name as Host) after it has checked who
that is, and adds ``X-Forwarded-For``, which no web page can.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from wsproto.utilities import generate_accept_token

from shim_streaming.tickets import TOKEN, CommandTicket, Ticket

SPDY_31 = "SPDY/3.1"
PROTOCOL_HEADER = "X-Stream-Protocol-Version"
KINDS = ("exec", "attach", "portforward")


@dataclass(frozen=True, slots=True)
class CommandProtocol:
    """A version of ``channel.k8s.io``, as exec and attach speak it."""

    name: str
    version: int
    websocket: bool
    base64: bool = False

    @property
    def json_status(self) -> bool:
        """The error stream carries a Status rather than a text."""
        return self.version >= 4

    @property
    def resizes(self) -> bool:
        """There is a stream for window sizes."""
        return self.websocket or self.version >= 3

    @property
    def closes(self) -> bool:
        """A WebSocket client can close one channel."""
        return self.version >= 5


@dataclass(frozen=True, slots=True)
class ForwardProtocol:
    """How port-forward is spoken."""

    name: str
    websocket: bool
    base64: bool = False
    tunnel: bool = False
    """SPDY inside of binary WebSocket messages."""


Protocol = CommandProtocol | ForwardProtocol

_SPDY_COMMAND = tuple(
    CommandProtocol(f"{prefix}channel.k8s.io", version, websocket=False)
    for prefix, version in (("v4.", 4), ("v3.", 3), ("v2.", 2), ("", 1))
)
_WEBSOCKET_COMMAND = (
    CommandProtocol("v5.channel.k8s.io", 5, websocket=True),
    CommandProtocol("v4.channel.k8s.io", 4, websocket=True),
    CommandProtocol("v4.base64.channel.k8s.io", 4, websocket=True, base64=True),
    CommandProtocol("channel.k8s.io", 1, websocket=True),
    CommandProtocol("base64.channel.k8s.io", 1, websocket=True, base64=True),
    CommandProtocol("", 1, websocket=True),
)
_SPDY_FORWARD = (ForwardProtocol("portforward.k8s.io", websocket=False),)
_WEBSOCKET_FORWARD = (
    ForwardProtocol(f"{SPDY_31}+portforward.k8s.io", websocket=True, tunnel=True),
    ForwardProtocol("v4.channel.k8s.io", websocket=True),
    ForwardProtocol("v4.base64.channel.k8s.io", websocket=True, base64=True),
    ForwardProtocol("", websocket=True),
)


@dataclass(frozen=True, slots=True)
class Request:
    """The head of an HTTP request. Header names in lower case, values of one name joined by commas."""

    method: str
    target: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Upgrade:
    """The request is granted: answer 101 with these headers and change over."""

    ticket: Ticket
    protocol: Protocol
    headers: tuple[tuple[str, str], ...]


class Refused(Exception):
    """The request is not granted: the HTTP status and the text that say why. Never holds a token."""

    def __init__(self, status: int, message: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = tuple(headers)


@dataclass(frozen=True, slots=True)
class Gatekeeper:
    """Decides about requests.

    :param take: gives out the ticket of a token, once.
    :param own_hosts: names under which this server is reached, besides IP addresses and localhost; in lower case.
    :param path_prefix: what stands before ``/exec/...`` in the URLs that are given out.
    """

    take: Callable[[str, str], Ticket | None]
    own_hosts: frozenset[str] = field(default=frozenset())
    path_prefix: str = ""

    def admit(self, request: Request) -> Upgrade:
        """Check a request and agree on a protocol.

        :raises Refused: not this one.
        """
        if request.method not in ("GET", "POST"):
            raise Refused(405, "exec, attach and port-forward are asked for by GET or POST", [("Allow", "GET, POST")])
        self._check_sender(request.headers)
        kind, token = self._route(request.target)
        websocket = _wants_upgrade(request.headers, "websocket", exact=True)
        if not websocket and not _wants_upgrade(request.headers, SPDY_31.lower(), exact=False):
            raise Refused(400, f"this URL is for an upgrade to {SPDY_31} or WebSocket: unable to upgrade")
        # Whatever comes of it: a token that was shown can't be shown again.
        ticket = self.take(token, kind)
        if ticket is None:
            raise Refused(404, "no such request: unknown, used, or older than a minute")
        if websocket:
            protocol, headers = _websocket(request, ticket)
        else:
            protocol, headers = _spdy(request.headers, ticket)
        if isinstance(protocol, ForwardProtocol) and protocol.websocket and not protocol.tunnel and not _ports(ticket):
            raise Refused(400, "port-forward over this protocol needs the ports in the CRI request; it named none")
        return Upgrade(ticket, protocol, headers)

    def _check_sender(self, headers: Mapping[str, str]) -> None:
        host = _host_name(headers.get("host", ""))
        if host is None:
            raise Refused(400, "a request needs one valid Host header")
        if "x-forwarded-for" in headers:
            return
        if not self._is_own(host):
            raise Refused(403, "this Host is not one of this server's names")
        origin = headers.get("origin")
        if origin is not None and _authority(origin) != headers["host"].lower():
            raise Refused(403, "this Origin may not use this server")

    def _is_own(self, host: str) -> bool:
        if host == "localhost" or host in self.own_hosts:
            return True
        try:
            # Names can be made to point here (DNS rebinding); addresses can't.
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def _route(self, target: str) -> tuple[str, str]:
        path = target.partition("?")[0]
        if self.path_prefix and path.startswith(self.path_prefix + "/"):
            path = path.removeprefix(self.path_prefix)
        parts = path.split("/")
        if len(parts) != 3 or parts[0] or parts[1] not in KINDS or not TOKEN.fullmatch(parts[2]):
            raise Refused(404, "nothing here")
        return parts[1], parts[2]


def _ports(ticket: Ticket) -> tuple[int, ...]:
    return () if isinstance(ticket, CommandTicket) else ticket.ports


def _authority(origin: str) -> str:
    """Host and port of an Origin; empty for ``null`` and nonsense."""
    try:
        return urlsplit(origin.lower()).netloc
    except ValueError:
        return ""


def _host_name(host: str) -> str | None:
    """The name or address in a Host header, in lower case and without port; None if it isn't one."""
    try:
        parts = urlsplit(f"//{host}")
        valid = bool(parts.hostname) and parts.netloc == host and "@" not in host and (parts.port or 0) >= 0
    except ValueError:
        return None
    return parts.hostname if valid and "," not in host and " " not in host else None


def _wants_upgrade(headers: Mapping[str, str], protocol: str, *, exact: bool) -> bool:
    if "upgrade" not in headers.get("connection", "").lower():
        return False
    upgrade = headers.get("upgrade", "").lower()
    return upgrade == protocol if exact else protocol in upgrade


def _spdy(headers: Mapping[str, str], ticket: Ticket) -> tuple[Protocol, tuple[tuple[str, str], ...]]:
    served: tuple[Protocol, ...] = _SPDY_COMMAND if isinstance(ticket, CommandTicket) else _SPDY_FORWARD
    offered = _listed(headers.get(PROTOCOL_HEADER.lower()))
    if not offered:
        raise Refused(400, f"the header {PROTOCOL_HEADER} is missing: unable to upgrade")
    protocol = _choose(offered, served)
    if protocol is None:
        accepted = [("X-Accepted-Stream-Protocol-Versions", each.name) for each in served]
        raise Refused(403, f"unable to upgrade: {_not_served(served)}", accepted)
    return protocol, (("Connection", "Upgrade"), ("Upgrade", SPDY_31), (PROTOCOL_HEADER, protocol.name))


def _websocket(request: Request, ticket: Ticket) -> tuple[Protocol, tuple[tuple[str, str], ...]]:
    headers = request.headers
    if request.method != "GET":
        raise Refused(405, "a WebSocket is opened by GET", [("Allow", "GET")])
    if headers.get("sec-websocket-version") != "13":
        raise Refused(426, "WebSocket version 13 is spoken here", [("Sec-WebSocket-Version", "13")])
    key = headers.get("sec-websocket-key", "")
    if not _is_websocket_key(key):
        raise Refused(400, "the header Sec-WebSocket-Key must be 16 bytes in base64")
    served: tuple[Protocol, ...] = _WEBSOCKET_COMMAND if isinstance(ticket, CommandTicket) else _WEBSOCKET_FORWARD
    protocol = _choose(_listed(headers.get("sec-websocket-protocol")) or [""], served)
    if protocol is None:
        raise Refused(403, f"unable to upgrade: {_not_served(served)}")
    answer = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Accept", generate_accept_token(key.encode()).decode()),
    ]
    if protocol.name:
        answer.append(("Sec-WebSocket-Protocol", protocol.name))
    return protocol, tuple(answer)


def _is_websocket_key(key: str) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        return False


def _listed(value: str | None) -> list[str]:
    return [part for part in (part.strip() for part in (value or "").split(",")) if part]


def _choose(offered: list[str], served: Iterable[Protocol]) -> Protocol | None:
    """The client's first choice among what is served."""
    by_name = {protocol.name: protocol for protocol in served}
    return next((by_name[name] for name in offered if name in by_name), None)


def _not_served(served: Iterable[Protocol]) -> str:
    return "none of the protocols asked for is served; served are " + ", ".join(p.name for p in served if p.name)
