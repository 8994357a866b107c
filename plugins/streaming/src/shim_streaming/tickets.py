"""What a URL stands for, and the tokens in URLs that are given out and not used yet."""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from shim_core.errors import ResourceExhausted

TOKEN_BYTES = 32
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
"""What a token looks like: 256 random bits."""


@dataclass(frozen=True, slots=True)
class CommandTicket:
    """An exec or an attach that was asked for."""

    kind: str
    """``exec`` or ``attach``."""
    request_id: str
    container_id: str
    command: tuple[str, ...] = ()
    tty: bool = False
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False


@dataclass(frozen=True, slots=True)
class ForwardTicket:
    """A port-forward that was asked for."""

    request_id: str
    sandbox_id: str
    ports: tuple[int, ...] = ()
    """Only plain WebSocket clients need them here; the others name a port with each connection."""
    kind: str = "portforward"


Ticket = CommandTicket | ForwardTicket


class Tickets:
    """Tickets by token: each can be taken once, and not for long. Safe to use from many threads.

    Tokens themselves aren't kept: a look-up compares digests, whose timing tells nothing about a token.
    """

    def __init__(self, limit: int, ttl_s: float) -> None:
        self._limit = limit
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._tickets: OrderedDict[bytes, tuple[float, Ticket]] = OrderedDict()

    def issue(self, ticket: Ticket) -> str:
        """A token for the ticket.

        :raises ResourceExhausted: too many are waiting to be used (kubelet answers its client 429).
        """
        token = secrets.token_urlsafe(TOKEN_BYTES)
        with self._lock:
            self._expire()
            if len(self._tickets) >= self._limit:
                raise ResourceExhausted(
                    f"{self._limit} exec, attach and port-forward requests wait for their clients already; try again in"
                    f" {self._ttl_s:g} seconds"
                )
            self._tickets[_digest(token)] = (time.monotonic() + self._ttl_s, ticket)
        return token

    def take(self, token: str, kind: str) -> Ticket | None:
        """The ticket of a token, once; None for one that is unknown, used, too old or for something else."""
        with self._lock:
            self._expire()
            _, ticket = self._tickets.pop(_digest(token), (0.0, None))
        return ticket if ticket is not None and ticket.kind == kind else None

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._tickets)

    def _expire(self) -> None:
        now = time.monotonic()
        while self._tickets:
            digest, (expires, _) = next(iter(self._tickets.items()))
            if expires > now:
                return
            del self._tickets[digest]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
