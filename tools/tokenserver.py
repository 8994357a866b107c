"""A token server as docker-registry's ``auth: token`` wants one: JWTs signed with a key the registry trusts.

Speaks both ways to ask (distribution's token and OAuth2 specifications): GET with Basic credentials, POST with a
refresh token or a password.
"""

from __future__ import annotations

import base64
import fnmatch
import http.server
import json
import secrets
import ssl
import threading
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tools.certificates import Certificate


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One request the server has seen."""

    method: str
    user: str
    """Who asked; empty when anonymous."""
    scope: str
    granted: bool


class TokenServer:
    """Hands out tokens for one registry, over HTTPS.

    :param users: passwords by name.
    :param public: patterns of repositories that anybody may pull.
    :param tls: the server's certificate; plain HTTP when None.
    :param signer: the certificate whose root the registry trusts.
    """

    issuer = "portoshim test token server"

    def __init__(
        self,
        service: str,
        users: dict[str, str],
        signer: Certificate,
        *,
        public: Sequence[str] = (),
        tls: Certificate | None = None,
        address: str = "127.0.0.1",
        host: str = "127.0.0.1",
    ) -> None:
        self.service = service
        self.users = users
        self.public = tuple(public)
        self.refresh_tokens: dict[str, str] = {}
        """Names by refresh token; drop one to revoke it."""
        self.lifetime_s = 300.0
        """How long new tokens live. Negative: they are dead on arrival (the registry allows a minute of skew)."""
        self.claimed_lifetime_s: float | None = None
        """What the answer's ``expires_in`` says; the truth when None."""
        self.requests: list[TokenRequest] = []
        self._signer = signer
        self._key = signer.private_key()
        self._lock = threading.Lock()
        self._server = _Server((address, 0), _handler(self))
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.cert_path, tls.key_path)
            self._server.tls = context
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://{host}:{self._server.server_address[1]}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, name="token-server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def new_refresh_token(self, user: str) -> str:
        """An identity token for a user."""
        token = secrets.token_urlsafe(24)
        self.refresh_tokens[token] = user
        return token

    def answer(self, method: str, user: str, scope: str) -> dict[str, Any]:
        """A token for what the user may do of ``scope``."""
        access = []
        for item in scope.split():
            kind, _, rest = item.partition(":")
            name, _, actions = rest.rpartition(":")
            allowed = [action for action in actions.split(",") if user or self._is_public(name, action)]
            if allowed:
                access.append({"type": kind, "name": name, "actions": allowed})
        with self._lock:
            self.requests.append(TokenRequest(method, user, scope, bool(access)))
        now = time.time()
        token = self.sign(
            {
                "iss": self.issuer,
                "aud": self.service,
                "sub": user,
                "iat": int(now - 600),
                "nbf": int(now - 600),
                "exp": int(now + self.lifetime_s),
                "jti": secrets.token_hex(8),
                "access": access,
            }
        )
        claimed = self.lifetime_s if self.claimed_lifetime_s is None else self.claimed_lifetime_s
        name = "token" if method == "GET" else "access_token"
        return {name: token, "expires_in": int(claimed)}

    def sign(self, claims: dict[str, Any]) -> str:
        """A JWT (ES256) that carries the signer's certificate."""
        chain = [base64.b64encode(self._signer.der()).decode()]
        signed = f"{_b64url_json({'typ': 'JWT', 'alg': 'ES256', 'x5c': chain})}.{_b64url_json(claims)}"
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_b64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def user_of(self, authorization: str) -> str | None:
        """The user of a Basic header; empty when there is none, None when it is wrong."""
        if not authorization:
            return ""
        try:
            name, _, password = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
        except ValueError:
            return None
        return name if self.users.get(name) == password else None

    def _is_public(self, name: str, action: str) -> bool:
        return action == "pull" and any(fnmatch.fnmatch(name, pattern) for pattern in self.public)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    tls: ssl.SSLContext | None = None

    def get_request(self) -> tuple[Any, Any]:
        sock, address = super().get_request()
        if self.tls is not None:
            # The handshake happens in the request's own thread, at the first read.
            sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return sock, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up or refuse the certificate are part of the tests."""


def _handler(server: TokenServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            user = server.user_of(self.headers.get("Authorization", ""))
            self._send("GET", user, " ".join(query.get("scope", [])))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
            form = {key: values[0] for key, values in urllib.parse.parse_qs(body).items()}
            user: str | None = None
            if form.get("grant_type") == "refresh_token":
                user = server.refresh_tokens.get(form.get("refresh_token", ""))
            elif form.get("grant_type") == "password":
                name = form.get("username", "")
                user = name if name and server.users.get(name) == form.get("password") else None
            self._send("POST", user, form.get("scope", ""))

        def log_message(self, format: str, *args: Any) -> None:
            """Tests look at ``requests`` instead."""

        def _send(self, method: str, user: str | None, scope: str) -> None:
            if user is None:
                status, answer = 401, {"errors": [{"code": "UNAUTHORIZED", "message": "incorrect credentials"}]}
                server.requests.append(TokenRequest(method, "?", scope, False))
            else:
                status, answer = 200, server.answer(method, user, scope)
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def write_trust(path: Path, signer: Certificate) -> Path:
    """The file that makes a registry trust a signer (its ``rootcertbundle``)."""
    path.write_bytes(signer.cert_path.read_bytes())
    return path


def _b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _b64url_json(value: Any) -> str:
    return _b64url(json.dumps(value, separators=(",", ":")).encode())
