"""A registry that sends us elsewhere, or asks for what is not its: secrets stay where they belong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from shim_core.types import RegistryAuth
from tests.images.hostile import Exchange, HostileRegistry
from tests.images.support import MakeNode
from tests.images.victim import AUTH, SECRET, UNAVAILABLE, Victim, challenge, image, refused
from tools.certificates import CertificateAuthority

# -- redirects ---------------------------------------------------------------------------------------------------------


def test_credentials_stay_at_home(
    victim: Victim, hostile: HostileRegistry, foreign: HostileRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer behind a redirect to another host: it is fetched there, and no credentials go along."""
    good = image(size=5000)
    hostile.put(good)
    foreign.put(good)
    challenge(hostile, None)
    layer = good.layers[0].digest
    hostile.on(
        f"/blobs/{layer}", lambda x: x.answer(307, b"", {"Location": f"{foreign.url}{x.seen.path}?sig={SECRET}"})
    )
    assert victim().pull(f"{hostile.address}/x", AUTH).id == good.id
    assert len(foreign.seen) == 1
    assert "authorization" not in foreign.seen[0].headers
    assert hostile.requests(layer)[0].headers["authorization"].startswith("Basic ")


def test_headers_of_hosts_toml_stay_at_home(
    make_node: MakeNode,
    hostile: HostileRegistry,
    foreign: HostileRegistry,
    authority: CertificateAuthority,
    tmp_path: Path,
) -> None:
    good = image(size=5000)
    hostile.put(good)
    foreign.put(good)
    layer = good.layers[0].digest
    hostile.on(f"/blobs/{layer}", lambda x: x.answer(302, b"", {"Location": f"{foreign.url}{x.seen.path}"}))
    directory = tmp_path / "certs.d" / hostile.address
    directory.mkdir(parents=True)
    (directory / "hosts.toml").write_text(
        f'server = "{hostile.url}"\nca = "{authority.path}"\n[header]\n  x-key = "{SECRET}"\n'
    )
    make_node({"ConfigPath": str(tmp_path / "certs.d")}).pull(f"{hostile.address}/x")
    assert hostile.requests(layer)[0].headers["x-key"] == SECRET
    assert SECRET not in str(foreign.seen)


def test_a_redirect_that_asks_for_credentials(
    victim: Victim, hostile: HostileRegistry, foreign: HostileRegistry
) -> None:
    good = image()
    hostile.put(good)
    challenge(hostile, None)
    challenge(foreign, f"{foreign.url}/token")
    hostile.on("/blobs/", lambda x: x.answer(307, b"", {"Location": f"{foreign.url}{x.seen.path}"}))
    message = refused(victim(), hostile, r"redirects to \S+, which asks for credentials", AUTH)
    assert SECRET not in message + str(foreign.seen)
    assert foreign.requests("/token") == []


@pytest.mark.parametrize(
    ("location", "pattern"),
    [
        ("http://127.0.0.1:1/x", "without TLS, which is refused"),
        ("file:///etc/shadow", "no web address"),
        ("ftp://127.0.0.1/x", "no web address"),
        ("", "no web address"),
        ("https://user:pw@127.0.0.1/", "no web address"),
        ("https://[::1", "no web address"),
        ("//", "more than 10 times"),
        ("/v2/x/manifests/latest", "more than 10 times"),
    ],
)
def test_redirects_that_lead_nowhere(victim: Victim, hostile: HostileRegistry, location: str, pattern: str) -> None:
    hostile.on("/v2/", lambda x: x.answer(302, b"", {"Location": location}))
    refused(victim(), hostile, pattern)
    assert len(hostile.seen) <= 11


# -- foreign places ----------------------------------------------------------------------------------------------------


def test_urls_in_a_manifest_are_not_followed(
    victim: Victim, hostile: HostileRegistry, foreign: HostileRegistry
) -> None:
    good = image(size=1000)
    foreign.put(good)
    hostile.put(good)
    manifest = json.loads(good.manifest)
    manifest["layers"][0] |= {
        "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "urls": [f"{foreign.url}/v2/x/blobs/{good.layers[0].digest}"],
    }
    hostile.put_document(manifest)
    del hostile.blobs[good.layers[0].digest]
    challenge(hostile, None)
    challenge(foreign, None)
    refused(victim(), hostile, r"layer: \S+ answers 404", AUTH)
    assert foreign.seen == []


@pytest.mark.parametrize("flow", ["password", "identity"])
def test_a_foreign_realm_gets_no_credentials(
    victim: Victim, hostile: HostileRegistry, foreign: HostileRegistry, flow: str
) -> None:
    hostile.put(image())
    challenge(hostile, f"{foreign.url}/token")
    auth = AUTH if flow == "password" else RegistryAuth(identity_token=SECRET)
    refused(
        victim(), hostile, r"sends us to 127\.0\.0\.1:\d+ for a token; credentials go there only if TokenHosts", auth
    )
    assert foreign.seen == []


def test_a_foreign_realm_that_is_allowed(victim: Victim, hostile: HostileRegistry, foreign: HostileRegistry) -> None:
    good = image()
    hostile.put(good)
    challenge(hostile, f"{foreign.url}/token")
    foreign.on("/token", lambda x: x.answer(200, b'{"token": "t0ken"}'))
    node = victim({"TokenHosts": ["127.0.0.1"]})
    assert node.pull(f"{hostile.address}/x", AUTH).id == good.id
    assert foreign.seen[0].headers["authorization"].startswith("Basic ")
    assert foreign.seen[0].path == "/token?service=s&scope=repository%3Ax%3Apull"
    assert hostile.requests("/blobs/")[0].headers["authorization"] == "Bearer t0ken"


def test_a_foreign_realm_may_serve_the_anonymous(
    victim: Victim, hostile: HostileRegistry, foreign: HostileRegistry
) -> None:
    good = image()
    hostile.put(good)
    challenge(hostile, f"{foreign.url}/token")
    foreign.on("/token", lambda x: x.answer(200, b'{"access_token": "t0ken"}'))
    assert victim().pull(f"{hostile.address}/x").id == good.id
    assert "authorization" not in foreign.seen[0].headers


@pytest.mark.parametrize(
    ("realm", "pattern"),
    [
        ("http://localhost:1/token", "a token server without TLS, http://localhost:1, which is refused"),
        ("https://user:pw@localhost/token", "no web address"),
        ("file:///etc/shadow", "no web address"),
        ("", "no web address"),
        ("https://[", "no web address"),
    ],
)
@pytest.mark.parametrize("anonymous", [True, False])
def test_realms_that_are_refused(
    victim: Victim, hostile: HostileRegistry, realm: str, pattern: str, anonymous: bool
) -> None:
    hostile.put(image())
    challenge(hostile, realm)
    refused(victim(), hostile, pattern, None if anonymous else AUTH)


def test_a_token_server_that_redirects(victim: Victim, hostile: HostileRegistry, foreign: HostileRegistry) -> None:
    hostile.put(image())
    challenge(hostile, f"{hostile.url}/token")
    hostile.on("/token", lambda x: x.answer(307, b"", {"Location": f"{foreign.url}/token"}))
    refused(victim(), hostile, UNAVAILABLE + r".*the token server \S+ answers 307", AUTH)
    assert foreign.seen == []


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b"{}", b'{"token": 1}', b'{"token": "a b"}', b'{"token": "a\\nb"}', b"{" * 999]
)
def test_a_token_server_that_talks_nonsense(victim: Victim, hostile: HostileRegistry, answer: bytes) -> None:
    hostile.put(image())
    challenge(hostile, f"{hostile.url}/token")
    hostile.on("/token", lambda x: x.answer(200, answer))
    refused(victim(), hostile, UNAVAILABLE + ".*answers with no token", AUTH)


def test_401_for_ever(victim: Victim, hostile: HostileRegistry) -> None:
    headers = {"WWW-Authenticate": f'Bearer realm="{hostile.url}/token",service="s"'}
    hostile.on("/v2/", lambda x: x.error(401, "UNAUTHORIZED", "no", headers))
    tokens = iter(range(1000))
    hostile.on("/token", lambda x: x.answer(200, json.dumps({"token": f"t{next(tokens)}"}).encode()))
    refused(victim(), hostile, "refuses: UNAUTHORIZED: no", AUTH)
    assert len(hostile.requests("/v2/")) == 3
    assert len(hostile.requests("/token")) == 2


def test_a_mirror_does_not_get_the_credentials_of_the_registry(
    make_node: MakeNode, hostile: HostileRegistry, foreign: HostileRegistry, authority: CertificateAuthority
) -> None:
    good = image(size=1000)
    hostile.put(good)
    challenge(hostile, None)
    challenge(foreign, None)
    entry = {"Host": hostile.address, "CA": str(authority.path), "Mirrors": [foreign.url]}
    node = make_node({"Registries": [entry]})
    assert node.pull(f"{hostile.address}/x", AUTH).id == good.id
    assert foreign.requests("/v2/")
    assert not [seen for seen in foreign.seen if "authorization" in seen.headers]
    assert f"?ns={hostile.address.replace(':', '%3A')}" in foreign.seen[0].path
    assert not [seen for seen in hostile.seen if "ns=" in seen.path]


def test_a_mirror_gets_its_own_credentials(
    make_node: MakeNode, hostile: HostileRegistry, foreign: HostileRegistry, authority: CertificateAuthority
) -> None:
    good = image(size=1000)
    foreign.put(good)
    challenge(foreign, None)
    ca = {"CA": str(authority.path)}
    entries = [
        {"Host": hostile.address, "Mirrors": [foreign.url], **ca},
        {"Host": foreign.address, "AuthToken": "Basic bTptaXJyb3I=", **ca},
    ]
    assert make_node({"Registries": entries}).pull(f"{hostile.address}/x", AUTH).id == good.id
    sent = {seen.headers["authorization"] for seen in foreign.seen if "authorization" in seen.headers}
    assert sent == {"Basic bTptaXJyb3I="}
    assert hostile.seen == []


# -- secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["manifest", "config", "layer", "token", "redirect", "echo", "truncated"])
def test_no_secret_in_messages_and_logs(
    victim: Victim, hostile: HostileRegistry, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    caplog.set_level(logging.DEBUG)
    good = image(size=1000)
    hostile.put(good)
    challenge(hostile, f"{hostile.url}/token")
    token = f"tok-{SECRET}"
    hostile.on("/token", lambda x: x.answer(200, json.dumps({"token": token}).encode()))
    layer = good.layers[0].digest
    elsewhere = {"Location": f"https://localhost:1/a/{SECRET}?sig={SECRET}"}

    def break_off(x: Exchange) -> None:
        x.head(200, {"Content-Length": "1001"})
        x.hang_up()

    fail: dict[str, tuple[str, Callable[[Exchange], None]]] = {
        "manifest": ("/manifests/.*", lambda x: x.error(500, "X", f"you sent {x.seen.headers['authorization']}")),
        "config": (f"/blobs/{good.id}", lambda x: x.error(403, SECRET, f"{token} and {SECRET}")),
        "layer": (f"/blobs/{layer}", lambda x: x.answer(200, b"x" * 100)),
        "token": ("/token", lambda x: x.error(401, "X", x.seen.headers["authorization"] + SECRET)),
        "redirect": ("/blobs/", lambda x: x.answer(307, b"", elsewhere)),
        "echo": ("/manifests/.*", lambda x: x.error(404, f"Bearer {token}", json.dumps(x.seen.headers))),
        "truncated": (f"/blobs/{layer}", break_off),
    }
    ask = hostile.behaviours[-1][1]
    path, behaviour = fail[step]
    hostile.on(path, lambda x: behaviour(x) if step == "token" or "authorization" in x.seen.headers else ask(x))
    message = refused(victim({"AuthToken": ""}), hostile, ".", AUTH)
    logged = "\n".join(record.getMessage() + str(record.exc_text or "") for record in caplog.records)
    for secret in (SECRET, token, "dXNlcjpTM0NSM1Q"):  # the last one is the start of user:S3CR3T in base64
        assert secret not in message
        assert secret not in logged
    assert SECRET not in repr(AUTH)
