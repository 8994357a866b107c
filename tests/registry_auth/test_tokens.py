"""Challenges, tokens, and how long they are kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs, urlsplit

import pytest
from shim_registry_auth.challenge import Challenge, parse
from shim_registry_auth.plugin import RegistryAuth as Plugin
from shim_registry_auth.tokens import TokenRequest

from shim_core import errors, testing
from shim_core.types import RegistryAuthorization, RegistryChallenge, RegistryCredentials, RegistryEndpoint
from tests.images.hostile import Exchange, HostileRegistry
from tests.registry_auth.support import SECRET, image, make
from tools.certificates import CertificateAuthority

USER = RegistryCredentials(username="user", password=SECRET)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", []),
        ("Bearer", [Challenge("bearer")]),
        ('Basic realm="a b"', [Challenge("basic", {"realm": "a b"})]),
        ("Basic realm=a", [Challenge("basic", {"realm": "a"})]),
        (
            'Bearer realm="https://a/t",service="s",scope="repository:a:pull,push"',
            [Challenge("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:a:pull,push"})],
        ),
        (
            'Basic realm="x", bearer  Realm = "y" , service=z',
            [Challenge("basic", {"realm": "x"}), Challenge("bearer", {"realm": "y", "service": "z"})],
        ),
        ('Negotiate, NTLM abc==, Basic realm="q\\"x"',
         [Challenge("negotiate"), Challenge("ntlm"), Challenge("basic", {"realm": 'q"x'})]),
        ('Bearer realm="one",realm="two"', [Challenge("bearer", {"realm": "one"})]),
        ('Bearer realm="never closed', [Challenge("bearer")]),
        ("=,=,", []),
        ("\x00\xff", []),
    ],
)  # fmt: skip
def test_challenges(header: str, expected: list[Challenge]) -> None:
    assert parse(header) == expected


def test_a_long_header_takes_no_time() -> None:
    parse('Bearer realm="' + "\\a" * 1_000_000)
    parse("a=" * 1_000_000)
    parse("Bearer " + ", ".join(f'k{n}="v"' for n in range(100_000)))


class Server:
    """A token server, and the registry that sends us there."""

    def __init__(self, http: HostileRegistry, authority: CertificateAuthority) -> None:
        self.http = http
        self.endpoint = RegistryEndpoint(f"{http.url}/v2", http.address, ca_paths=(str(authority.path),))
        self.answer: dict[str, Any] = {"token": "t", "expires_in": 300}
        self.count = 0
        http.on("/token", self._answer)

    def _answer(self, exchange: Exchange) -> None:
        self.count += 1
        answer = {key: f"{value}{self.count}" if key.endswith("token") else value for key, value in self.answer.items()}
        exchange.answer(200, json.dumps(answer).encode())

    def challenge(self, *, retry: bool = False, scope: str = "repository:team/app:pull") -> RegistryChallenge:
        header = f'Bearer realm="{self.http.url}/token",service="the service"'
        return RegistryChallenge(f"{self.http.url}/v2/team/app/manifests/x", header, scope, retry, self.endpoint)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    authority = CertificateAuthority(tmp_path / "ca")
    http = HostileRegistry(authority.issue("token", ["localhost"]))
    yield Server(http, authority)
    http.stop()


def authorize(
    plugin: Plugin, server: Server, credentials: RegistryCredentials | None, **more: Any
) -> RegistryAuthorization | None:
    return plugin.registry_authorization(
        image(server.http.address), credentials, server.challenge(**more), testing.context()
    )


def header(answer: RegistryAuthorization | None) -> str:
    assert answer is not None
    return answer.header


def test_a_token_by_password(server: Server) -> None:
    answer = authorize(make(), server, USER)
    assert answer == RegistryAuthorization("Bearer t1", 300.0)
    (seen,) = server.http.seen
    assert parse_qs(urlsplit(seen.path).query) == {"service": ["the service"], "scope": ["repository:team/app:pull"]}
    assert seen.headers["authorization"].startswith("Basic ")
    assert SECRET not in seen.path


def test_a_token_by_identity_token(server: Server) -> None:
    server.answer = {"access_token": "a"}
    answer = authorize(make(), server, RegistryCredentials(identity_token=SECRET))
    assert answer == RegistryAuthorization("Bearer a1", 60.0)
    (seen,) = server.http.seen
    assert "authorization" not in seen.headers
    assert parse_qs(seen.body) == {
        "grant_type": ["refresh_token"], "refresh_token": [SECRET], "client_id": ["portoshim"],
        "service": ["the service"], "scope": ["repository:team/app:pull"],
    }  # fmt: skip
    assert SECRET not in seen.path


def test_an_anonymous_token(server: Server) -> None:
    assert header(authorize(make(), server, None)) == "Bearer t1"
    assert "authorization" not in server.http.seen[0].headers


def test_tokens_are_kept_until_they_expire(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = make()
    now = [1000.0]
    monkeypatch.setattr("shim_registry_auth.tokens.time.monotonic", lambda: now[0])
    assert header(authorize(plugin, server, USER)) == "Bearer t1"
    assert header(authorize(plugin, server, USER)) == "Bearer t1"
    now[0] += 285
    kept = authorize(plugin, server, USER)
    assert kept is not None
    assert kept.header == "Bearer t1"
    assert kept.expires_in_s == pytest.approx(5)
    now[0] += 10
    assert header(authorize(plugin, server, USER)) == "Bearer t2"


def test_tokens_are_kept_apart(server: Server) -> None:
    plugin = make()
    tokens = [
        header(authorize(plugin, server, USER)),
        header(authorize(plugin, server, None)),
        header(authorize(plugin, server, RegistryCredentials(username="user", password="other"))),
        header(authorize(plugin, server, USER, scope="repository:team/other:pull")),
    ]
    assert tokens == ["Bearer t1", "Bearer t2", "Bearer t3", "Bearer t4"]
    assert header(authorize(plugin, server, USER)) == "Bearer t1"


def test_a_refused_token_is_replaced(server: Server) -> None:
    plugin = make()
    assert header(authorize(plugin, server, USER)) == "Bearer t1"
    assert header(authorize(plugin, server, USER, retry=True)) == "Bearer t2"
    assert header(authorize(plugin, server, USER)) == "Bearer t2"


def test_many_ask_for_one_token_once(server: Server) -> None:
    plugin = make()
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(header(authorize(plugin, server, USER)))) for _ in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["Bearer t1"] * 10
    assert server.count == 1


def test_the_cache_has_no_secret_and_an_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shim_registry_auth.tokens._MAX_TOKENS", 3)
    plugin = make()
    for number in range(6):
        authorize(plugin, server, USER, scope=f"repository:{number}:pull")
    assert len(plugin._tokens._tokens) <= 4
    assert plugin._tokens._turns == {}
    assert SECRET not in repr(plugin._tokens._tokens)


def test_auth_path_and_service_outweigh_the_challenge(server: Server) -> None:
    keys = {"AuthPath": f"{server.http.url}/other-token", "AuthService": "my service"}
    plugin = make({"Registries": [{"Host": server.http.address, **keys}]})
    server.http.on("/other-token", lambda x: x.answer(200, b'{"token": "other"}'))
    assert header(authorize(plugin, server, USER)) == "Bearer other"
    (seen,) = server.http.seen
    assert parse_qs(urlsplit(seen.path).query)["service"] == ["my service"]


def test_auth_path_serves_registries_that_say_nothing(server: Server) -> None:
    """As Porto does: a token of the configured server, whatever the registry asks for."""
    plugin = make({"Registries": [{"Host": server.http.address, "AuthPath": f"{server.http.url}/token"}]})
    challenge = RegistryChallenge(f"{server.http.url}/v2/", "", "repository:a:pull", endpoint=server.endpoint)
    answer = plugin.registry_authorization(image(server.http.address), None, challenge, testing.context())
    assert header(answer) == "Bearer t1"
    assert parse_qs(urlsplit(server.http.seen[0].path).query)["service"] == ["localhost"]


def test_basic() -> None:
    plugin = make()
    challenge = RegistryChallenge("https://registry.example.org/v2/", 'Basic realm="x"', "s")
    answer = plugin.registry_authorization(image(), USER, challenge, testing.context())
    assert header(answer).startswith("Basic ")
    assert SECRET not in repr(answer)
    refused = RegistryChallenge(challenge.url, challenge.header, "s", retry=True)
    assert plugin.registry_authorization(image(), USER, refused, testing.context()) is None
    assert plugin.registry_authorization(image(), None, challenge, testing.context()) is None


@pytest.mark.parametrize(
    ("credentials", "expected"),
    [
        (RegistryCredentials(header="OAuth x"), "OAuth x"),
        (RegistryCredentials(registry_token="t"), "Bearer t"),
    ],
)
def test_ready_headers_are_sent_as_they_are(credentials: RegistryCredentials, expected: str) -> None:
    plugin = make()
    challenge = RegistryChallenge("https://registry.example.org/v2/", "", "s")
    assert header(plugin.registry_authorization(image(), credentials, challenge, testing.context())) == expected
    refused = RegistryChallenge(challenge.url, "", "s", retry=True)
    assert plugin.registry_authorization(image(), credentials, refused, testing.context()) is None


@pytest.mark.parametrize(
    "credentials",
    [USER, RegistryCredentials(header="OAuth x"), RegistryCredentials(registry_token="t"),
     RegistryCredentials(identity_token="i")],
)  # fmt: skip
def test_nothing_is_sent_without_tls(credentials: RegistryCredentials) -> None:
    plugin = make()
    challenge = RegistryChallenge("http://registry.example.org/v2/", 'Basic realm="x"', "s")
    with pytest.raises(errors.Unauthenticated, match="aren't sent without TLS: set Insecure"):
        plugin.registry_authorization(image(), credentials, challenge, testing.context())


def test_insecure_allows_it() -> None:
    plugin = make()
    endpoint = RegistryEndpoint("http://registry.example.org/v2", "registry.example.org", insecure=True)
    challenge = RegistryChallenge("http://registry.example.org/v2/", 'Basic realm="x"', "s", endpoint=endpoint)
    assert header(plugin.registry_authorization(image(), USER, challenge, testing.context())).startswith("Basic ")


@pytest.mark.parametrize(
    ("url", "realm", "allowed"),
    [
        ("https://registry-1.docker.io/v2/", "https://auth.docker.io/token", True),
        ("https://registry.gitlab.com/v2/", "https://gitlab.com/jwt/auth", True),
        ("https://registry.example.org/v2/", "https://registry.example.org/token", True),
        ("https://registry.example.org:5000/v2/", "https://registry.example.org:5001/token", True),
        ("https://registry.example.org/v2/", "https://auth.example.org/token", False),
        ("https://registry.example.org/v2/", "https://registry.example.org.evil.test/token", False),
        ("https://registry.example.org/v2/", "https://evil.test/registry.example.org", False),
        ("https://registry.example.org/v2/", "https://auth.docker.io/token", False),
        ("https://127.0.0.1/v2/", "https://127.0.0.2/token", False),
    ],
)
def test_realms_that_may_see_credentials(url: str, realm: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(request: TokenRequest, *_: object) -> NoReturn:
        asked.append(request.realm)
        raise errors.Unavailable("not really")

    monkeypatch.setattr("shim_registry_auth.tokens.fetch_token", fetch)
    challenge = RegistryChallenge(url, f'Bearer realm="{realm}",service="s"', "s")
    with pytest.raises(errors.Unavailable if allowed else errors.Unauthenticated):
        make().registry_authorization(image(urlsplit(url).netloc), USER, challenge, testing.context())
    assert asked == ([realm] if allowed else [])


def test_a_token_server_that_is_away() -> None:
    plugin = make()
    challenge = RegistryChallenge("https://localhost:1/v2/", 'Bearer realm="https://localhost:1/t"', "s")
    with pytest.raises(errors.Unavailable, match=r"localhost:1 can't be asked: .*Connection refused"):
        plugin.registry_authorization(image("localhost:1"), USER, challenge, testing.context())


def test_a_call_that_is_over_asks_nobody(server: Server) -> None:
    context = testing.context()
    context.cancel()
    with pytest.raises(errors.Cancelled):
        make().registry_authorization(image(server.http.address), USER, server.challenge(), context)
    assert server.http.seen == []
