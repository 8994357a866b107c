"""What all clients of the tests need: HTTP up to the upgrade, TLS, and how exit codes are read.

The clients share no code with the server: they send what Kubernetes' Go clients send.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

TIMEOUT_S = 20.0


@dataclass
class Answer:
    """What the server said to a request."""

    status: int
    headers: dict[str, str]
    body: bytes = b""


class UpgradeRefused(Exception):
    """The server has answered something else than 101."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.status}: {answer.body!r}")
        self.answer = answer


class SharedTls:
    """A TLS connection that one thread reads and another writes: OpenSSL's must not be used by two at once."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._timeout_s = TIMEOUT_S
        sock.setblocking(False)

    def settimeout(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        self._sock.setsockopt(level, option, value)

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                with self._lock:
                    view = view[self._sock.send(view) :]
            except ssl.SSLWantWriteError:
                if not select.select([], [self._sock], [], self._timeout_s)[1]:
                    raise TimeoutError("nothing goes out") from None

    def recv(self, count: int) -> bytes:
        while True:
            try:
                with self._lock:
                    return self._sock.recv(count)
            except ssl.SSLWantReadError:
                if not select.select([self._sock], [], [], self._timeout_s)[0]:
                    raise TimeoutError("nothing came in") from None

    def shutdown(self, how: int) -> None:
        with self._lock:
            socket.socket.shutdown(self._sock, how)  # without TLS's goodbye

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> SharedTls:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Connection = socket.socket | SharedTls


def connect(url: str, tls: ssl.SSLContext | None = None) -> Connection:
    """A connection to the server of a URL."""
    parts = urlsplit(url)
    sock = socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is None:
        return sock
    try:
        return SharedTls(tls.wrap_socket(sock, server_hostname=parts.hostname))
    except OSError:
        sock.close()
        raise


def request(url: str, headers: Mapping[str, str], method: str = "POST") -> bytes:
    """An HTTP request, as Go writes it."""
    parts = urlsplit(url)
    lines = [f"{method} {parts.path}{f'?{parts.query}' if parts.query else ''} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in ({"Host": parts.netloc} | dict(headers)).items()]
    return "\r\n".join([*lines, "", ""]).encode()


def read_answer(sock: Connection) -> tuple[Answer, bytes]:
    """An answer's head, and what came after it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            raise ConnectionError(f"closed after {data!r}")
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(first.split()[1]), headers), rest


def ask(url: str, headers: Mapping[str, str], method: str = "POST", tls: ssl.SSLContext | None = None) -> Answer:
    """Send a request that isn't going to be granted; the whole answer."""
    with connect(url, tls) as sock:
        sock.sendall(request(url, headers, method))
        answer, body = read_answer(sock)
        while more := sock.recv(65536):
            body += more
        answer.body = body
        return answer


def upgrade(
    url: str, headers: Mapping[str, str], method: str = "POST", tls: ssl.SSLContext | None = None
) -> tuple[Connection, Answer, bytes]:
    """Connect and change over.

    :raises UpgradeRefused: the server wouldn't.
    """
    sock = connect(url, tls)
    try:
        sock.sendall(request(url, headers, method))
        answer, rest = read_answer(sock)
    except OSError:
        sock.close()
        raise
    if answer.status != 101:
        answer.body = rest
        sock.close()
        raise UpgradeRefused(answer)
    return sock, answer, rest


class Closed(Exception):
    """The server has closed the connection."""


def exit_code(status: bytes) -> int:
    """The exit code in a Status, read as client-go reads it."""
    parsed = json.loads(status)
    if parsed["status"] == "Success":
        return 0
    assert parsed["reason"] == "NonZeroExitCode", parsed
    causes = [cause["message"] for cause in parsed["details"]["causes"] if cause["reason"] == "ExitCode"]
    return int(causes[0])
