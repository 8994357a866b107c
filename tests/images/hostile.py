"""A registry that does whatever a test wants it to: wrong, endless, slow, or sending us elsewhere."""

from __future__ import annotations

import http.server
import json
import re
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools import images
from tools.certificates import Certificate

Behaviour = Callable[["Exchange"], None]


@dataclass
class Seen:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: str = ""


class HostileRegistry:
    """Serves the content of images, except where a test has put something else.

    :param tls: HTTPS with that certificate; plain HTTP when None.
    """

    def __init__(self, tls: Certificate | None, host: str = "localhost") -> None:
        self.documents: dict[str, tuple[bytes, str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.behaviours: list[tuple[re.Pattern[str], Behaviour]] = []
        self.seen: list[Seen] = []
        self.sent_bytes = 0
        self.connections = 0
        self.stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.registry = self
        if tls is not None:
            self._server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._server.tls.load_cert_chain(tls.cert_path, tls.key_path)
        self.address = f"{host}:{self._server.server_address[1]}"
        self.url = f"{'https' if tls is not None else 'http'}://{self.address}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def put(self, image: images.Image | images.Index, tag: str = "latest") -> str:
        """Have an image; its digest."""
        self.blobs |= image.blobs()
        for document, media_type in image.manifests():
            self.documents[images.digest_of(document)] = document, media_type
        self.documents[tag] = image.manifests()[-1]
        return image.digest

    def put_document(self, document: Any, media_type: str = images.OCI_MANIFEST, tag: str = "latest") -> str:
        """Have a manifest that is no good; its digest."""
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.documents[tag] = self.documents[images.digest_of(data)] = data, media_type
        return images.digest_of(data)

    def on(self, path: str, behaviour: Behaviour) -> None:
        """Do something else for paths that match."""
        self.behaviours.insert(0, (re.compile(path), behaviour))

    def requests(self, part: str) -> list[Seen]:
        """The requests whose path holds ``part``."""
        return [seen for seen in self.seen if part in seen.path]

    def serve(self, exchange: Exchange) -> None:
        """As a good registry does."""
        path = exchange.seen.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if "/manifests/" in path and name in self.documents:
            data, media_type = self.documents[name]
            headers = {"Content-Type": media_type, "Docker-Content-Digest": images.digest_of(data)}
            exchange.answer(200, data, headers)
        elif "/blobs/" in path and name in self.blobs:
            data = self.blobs[name]
            start = re.fullmatch(r"bytes=(\d+)-", exchange.seen.headers.get("range", ""))
            if start:
                first = int(start[1])
                exchange.answer(206, data[first:], {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"})
            else:
                exchange.answer(200, data)
        else:
            exchange.error(404, "NOT_FOUND")


class Exchange:
    """One request, and the means to answer it in any way."""

    def __init__(self, registry: HostileRegistry, handler: http.server.BaseHTTPRequestHandler, seen: Seen) -> None:
        self.registry = registry
        self.seen = seen
        self._handler = handler

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.head(status, {"Content-Length": str(len(body)), **(headers or {})})
        self.send(body)

    def error(self, status: int, code: str, message: str = "", headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps({"errors": [{"code": code, "message": message}]}).encode(), headers)

    def head(self, status: int, headers: dict[str, str]) -> None:
        """The header alone; what follows is up to the test."""
        self._handler.send_response(status)
        for name, value in headers.items():
            self._handler.send_header(name, value)
        self._handler.end_headers()

    def send(self, data: bytes) -> None:
        self._handler.wfile.write(data)
        self.registry.sent_bytes += len(data)

    def hang_up(self) -> None:
        """Close without ceremony."""
        self._handler.close_connection = True

    def endless(self, piece: bytes = b"x" * 65536, headers: dict[str, str] | None = None) -> None:
        """Bytes until the client has had enough."""
        self.head(200, {"Connection": "close", **(headers or {})})
        while not self.registry.stopping.is_set():
            self.send(piece)

    def wait(self, seconds: float) -> None:
        """Do nothing for a while, or until the test is over."""
        self.registry.stopping.wait(seconds)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    tls: ssl.SSLContext | None = None
    registry: HostileRegistry

    def get_request(self) -> tuple[Any, Any]:
        sock, address = super().get_request()
        self.registry.connections += 1
        if self.tls is not None:
            sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return sock, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up on it all the time."""


def _handler(registry: HostileRegistry) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a body waits for nobody's acknowledgement of its header

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
            seen = Seen(self.path, {key.lower(): value for key, value in self.headers.items()}, body)
            registry.seen.append(seen)
            exchange = Exchange(registry, self, seen)
            for pattern, behaviour in registry.behaviours:
                if pattern.search(self.path):
                    behaviour(exchange)
                    return
            registry.serve(exchange)

        do_GET = do_POST = do_HEAD = _serve  # noqa: N815 - http.server's names

        def log_message(self, *_: Any) -> None:
            """Tests look at ``seen`` instead."""

    return Handler
