"""Tokens: had from a token server in exchange for credentials, kept until they expire (distribution's token spec)."""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shim_core import __version__, errors
from shim_core.context import CallContext
from shim_core.types import RegistryCredentials, RegistryEndpoint

MAX_ANSWER_BYTES = 1024 * 1024
DEFAULT_LIFETIME_S = 60.0
"""Of a token whose server doesn't say (distribution's token specification)."""
_EARLY_S = 10.0
_MAX_LIFETIME_S = 86400.0
_MAX_TOKENS = 1024
_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 30.0
_CLIENT_ID = "portoshim"


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What to ask which token server for."""

    realm: str
    service: str
    scope: str
    credentials: RegistryCredentials | None = field(repr=False)

    @property
    def key(self) -> tuple[str, ...]:
        """Names the token that answers it. Secrets are in it as a digest alone."""
        secret = self.credentials
        values = () if secret is None else (secret.username, secret.password, secret.identity_token)
        digest = hashlib.sha256("\0".join(values).encode("utf-8", "surrogateescape")).hexdigest()
        return self.realm, self.service, self.scope, digest if secret is not None else ""

    @property
    def host(self) -> str:
        """For messages."""
        return urllib.parse.urlsplit(self.realm).netloc.rpartition("@")[2]


@dataclass(frozen=True, slots=True)
class Token:
    text: str = field(repr=False)
    lifetime_s: float
    """From the moment it was had."""


class TokenCache:
    """Tokens that are still good. Safe to use from many threads; the same token is asked for once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: dict[tuple[str, ...], tuple[str, float]] = {}
        self._turns: dict[tuple[str, ...], threading.Lock] = {}

    def get(
        self, request: TokenRequest, endpoint: RegistryEndpoint | None, context: CallContext, *, fresh: bool
    ) -> tuple[str, float]:
        """A token, and the seconds it is good for.

        :param endpoint: whose TLS settings hold. :param fresh: the one we have was refused.
        :raises errors.Unauthenticated: the server refuses. :raises errors.Unavailable: it can't be asked.
        """
        key = request.key
        refused = self._known(key)[0] if fresh else None
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            text, left_s = self._known(key)
            if text and text != refused:
                return text, left_s
            asked = time.monotonic()
            try:
                token = fetch_token(request, endpoint, context)
            finally:
                with self._lock:
                    self._turns.pop(key, None)
            self._keep(key, token.text, asked + token.lifetime_s - min(_EARLY_S, token.lifetime_s / 10))
            return token.text, token.lifetime_s

    def _keep(self, key: tuple[str, ...], text: str, until: float) -> None:
        with self._lock:
            now = time.monotonic()
            # Known tokens are few; a registry with endless repositories must not fill the memory.
            self._tokens = {k: v for k, v in list(self._tokens.items())[-_MAX_TOKENS:] if v[1] > now}
            self._tokens[key] = (text, until)

    def _known(self, key: tuple[str, ...]) -> tuple[str, float]:
        with self._lock:
            text, until = self._tokens.get(key, ("", 0.0))
        left_s = until - time.monotonic()
        return (text, left_s) if left_s > 0 else ("", 0.0)


def fetch_token(request: TokenRequest, endpoint: RegistryEndpoint | None, context: CallContext) -> Token:
    """Ask a token server: GET, or POST when there is an identity token to be exchanged.

    :raises errors.Unauthenticated: the server refuses. :raises errors.Unavailable: it can't be asked.
    """
    credentials = request.credentials
    parts = urllib.parse.urlsplit(request.realm)
    where = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
    query = {"service": request.service, "scope": request.scope}
    headers: dict[str, str] = {}
    if credentials is not None and credentials.identity_token:
        form = {"grant_type": "refresh_token", "refresh_token": credentials.identity_token, "client_id": _CLIENT_ID}
        status, body = _send("POST", where, headers, {**form, **query}, endpoint, request, context)
    else:
        if credentials is not None and credentials.username:
            headers["Authorization"] = basic(credentials)
        wanted = urllib.parse.urlencode({key: value for key, value in query.items() if value})
        where += ("&" if parts.query else "?") + wanted
        status, body = _send("GET", where, headers, None, endpoint, request, context)
    return _read_answer(status, body, request)


def basic(credentials: RegistryCredentials) -> str:
    """The Authorization header for user and password (RFC 7617)."""
    pair = f"{credentials.username}:{credentials.password}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _read_answer(status: int, body: bytes, request: TokenRequest) -> Token:
    if status in (400, 401, 403, 404):
        who = "these credentials" if request.credentials is not None else "an anonymous client"
        raise errors.Unauthenticated(f"the token server {request.host} refuses {who} ({status})")
    if status != 200:
        raise errors.Unavailable(f"the token server {request.host} answers {status}")
    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    text = (answer.get("token") or answer.get("access_token")) if isinstance(answer, dict) else None
    if not isinstance(text, str) or not text.isascii() or not text.isprintable() or " " in text:
        raise errors.Unavailable(f"the token server {request.host} answers with no token")
    stated = answer.get("expires_in")
    is_number = isinstance(stated, int | float) and not isinstance(stated, bool) and stated > 0
    return Token(text, min(float(stated), _MAX_LIFETIME_S) if is_number else DEFAULT_LIFETIME_S)


def _send(
    method: str,
    url: str,
    headers: Mapping[str, str],
    form: Mapping[str, str] | None,
    endpoint: RegistryEndpoint | None,
    request: TokenRequest,
    context: CallContext,
) -> tuple[int, bytes]:
    """One request without retries and redirects; status and body."""
    import urllib3  # loaded with the first pull, not with the daemon

    context.check()
    timeout = urllib3.Timeout(
        connect=max(context.remaining_s(_CONNECT_TIMEOUT_S), 0.001),
        read=max(context.remaining_s(_READ_TIMEOUT_S), 0.001),
    )
    headers = {"User-Agent": f"portoshim/{__version__}", "Accept-Encoding": "identity", **headers}
    if form is not None:
        headers["Content-Type"] = "application/x-www-form-urlencoded"
    try:
        with _pool(url, endpoint) as pool:
            answer = pool.request(
                method,
                url,
                headers=headers,
                body=None if form is None else urllib.parse.urlencode(form),
                timeout=timeout,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            body = answer.read(MAX_ANSWER_BYTES + 1)
            status = answer.status
            answer.close()
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as err:
        # What libraries say may quote the URL; the kind of error is enough.
        raise errors.Unavailable(f"the token server {request.host} can't be asked: {_reason(err)}") from None
    if len(body) > MAX_ANSWER_BYTES:
        raise errors.Unavailable(f"the answer of the token server {request.host} exceeds {MAX_ANSWER_BYTES} bytes")
    return status, body


def _pool(url: str, endpoint: RegistryEndpoint | None) -> Any:
    import urllib3

    parts = urllib.parse.urlsplit(url)
    options: dict[str, Any] = {"num_pools": 1}
    if parts.scheme == "https":
        options["ssl_context"] = _tls(endpoint, parts.hostname)
    proxy = urllib.request.getproxies_environment().get(parts.scheme)
    if proxy and parts.hostname and not urllib.request.proxy_bypass(parts.netloc):
        return urllib3.ProxyManager(proxy if "://" in proxy else f"http://{proxy}", **options)
    return urllib3.PoolManager(**options)


def _tls(endpoint: RegistryEndpoint | None, host: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if endpoint is None:
        return context
    if endpoint.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for path in endpoint.ca_paths:
        context.load_verify_locations(cafile=path)
    at_registry = urllib.parse.urlsplit(endpoint.url).hostname == host
    for path, key in endpoint.client_certs if at_registry else ():
        context.load_cert_chain(path, key or None, password="")
    return context


def _reason(err: BaseException) -> str:
    chain: BaseException | None = err
    while chain is not None:
        if isinstance(chain, ssl.SSLCertVerificationError):
            return f"its certificate isn't trusted: {chain.verify_message}"
        if isinstance(chain, ssl.SSLError):
            return "TLS failed"
        if isinstance(chain, TimeoutError):
            return "timed out"
        if isinstance(chain, OSError) and chain.strerror:
            return chain.strerror
        chain = chain.__cause__ or chain.__context__
    return type(err).__name__
