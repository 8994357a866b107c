"""What the keeper, its holder, its successor and its clients say to each other.

Packets of a ``SOCK_SEQPACKET`` Unix socket: one JSON object each, with descriptors beside it (``SCM_RIGHTS``).
A request names the protocol's version (``v``), an operation (``op``) and what it needs; the answer is
``{"ok": true, ...}`` or ``{"ok": false, "code": "NOT_FOUND", "message": "..."}``, the code by gRPC's name.
"""

from __future__ import annotations

import json
import os
import socket

TYPE_CHECKING = False  # typing costs the keeper 0.8 MB
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

VERSION = 1
"""Raised when an older keeper couldn't understand what a newer client sends. A keeper answers any version's
``hand-over`` and ``stats``."""

SOCKET_NAME = "keeper.sock"
LOCK_NAME = "keeper.lock"
LOG_NAME = "keeper.log"

PACKET_BYTES = 128 * 1024
"""The longest packet: below the kernel's default for a socket's buffer."""
LIST_BYTES = 32 * 1024
"""How much one answer to ``list`` holds; the client asks for the next from there."""
FDS = 16
"""The most descriptors with one packet."""


class ProtocolError(Exception):
    """The other side sent what it must not."""


class Refusal(Exception):
    """A request can't be done; the code is one of gRPC's names."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = (), flags: int = 0) -> None:
    """Send one packet.

    :raises OSError: the other side is gone, or its buffer is full.
    """
    data = json.dumps(message, separators=(",", ":")).encode()
    if fds:
        socket.send_fds(sock, [data], fds, flags | socket.MSG_NOSIGNAL)
    else:
        sock.send(data, flags | socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, flags: int = 0) -> tuple[dict[str, Any], list[int]] | None:
    """Receive one packet with its descriptors, which then belong to the caller; None at the end.

    :raises ProtocolError: it isn't one.
    :raises OSError: nothing has come, or the connection is broken.
    """
    data, fds, received, _ = socket.recv_fds(sock, PACKET_BYTES, FDS, flags | socket.MSG_CMSG_CLOEXEC)
    if not data and not fds:
        return None
    try:
        if received & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("a packet is too long, or has too many descriptors")
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ProtocolError("a packet has to be an object")
    except BaseException as err:
        close_all(fds)
        if isinstance(err, ValueError | RecursionError):
            raise ProtocolError(f"a packet isn't JSON: {err}") from err
        raise
    return message, fds


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


class Address:
    """A Unix socket's address that is short enough whatever the directory's path is.

    ``sun_path`` holds 107 bytes; a way through ``/proc/self/fd`` always fits.
    """

    def __init__(self, directory: str) -> None:
        self._fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.path = f"/proc/self/fd/{self._fd}/{SOCKET_NAME}"

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
