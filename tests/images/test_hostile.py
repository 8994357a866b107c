"""A registry that lies, dawdles, and sends us elsewhere: each ends in the documented error and leaves nothing."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard

from shim_core import errors, testing
from shim_core.types import RegistryAuth
from tests.images.hostile import Exchange, HostileRegistry
from tests.images.support import MakeNode, Node
from tests.images.tars import f, tar
from tools import images
from tools.certificates import CertificateAuthority
from tools.images import File

SECRET = "S3CR3T-do-not-leak"
MISMATCH = r"^SignatureValidationFailed: "
UNAVAILABLE = r"^RegistryUnavailable: "
MIB = 1024 * 1024


@pytest.fixture(scope="package")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def hostile(authority: CertificateAuthority) -> Iterator[HostileRegistry]:
    registry = HostileRegistry(authority.issue("hostile", ["localhost"]))
    yield registry
    registry.stop()


@pytest.fixture
def foreign(authority: CertificateAuthority) -> Iterator[HostileRegistry]:
    """Another host, which must never see a secret."""
    registry = HostileRegistry(authority.issue("foreign", ["127.0.0.1"]), host="127.0.0.1")
    yield registry
    registry.stop()


Victim = Callable[..., Node]


@pytest.fixture
def victim(make_node: MakeNode, hostile: HostileRegistry, authority: CertificateAuthority) -> Victim:
    """Makes a node that trusts the hostile registry's CA."""

    def make(keys: dict[str, Any] | None = None, **top: Any) -> Node:
        entry = {"Host": hostile.address, "CA": str(authority.path), **(keys or {})}
        return make_node({"Registries": [entry], **top}, state=f"state-{time.monotonic_ns()}")

    return make


def image(text: str = "hello", size: int = 0) -> images.Image:
    return images.build([images.layer([File("file", text.encode() + bytes(size))], "none")])


def refused(node: Node, hostile: HostileRegistry, pattern: str, auth: RegistryAuth | None = None, ref: str = "") -> str:
    """Pull, see it fail, and see that nothing is left of it."""
    name = f"{hostile.address}/x{ref}"
    with pytest.raises(errors.UnknownError, match=pattern) as caught:
        node.pull(name, auth)
    assert f"{hostile.address}/x" in caught.value.message
    assert node.service.resolve(name) is None
    assert node.service._store.index().images == {}
    assert node.temporary_files() == []
    return caught.value.message


# -- wrong digests -----------------------------------------------------------------------------------------------------


def test_another_manifest_than_asked_for(victim: Victim, hostile: HostileRegistry) -> None:
    good = hostile.put(image("good"))
    hostile.documents[good] = hostile.documents[hostile.put(image("evil"))]
    refused(victim(), hostile, MISMATCH + rf".*asked for {good}", ref=f"@{good}")
    assert hostile.requests("/blobs/") == []


def test_a_tag_whose_digest_is_a_lie(victim: Victim, hostile: HostileRegistry) -> None:
    hostile.put(image())
    lie = {"Content-Type": images.OCI_MANIFEST, "Docker-Content-Digest": "sha256:" + "0" * 64}
    hostile.on("/manifests/latest", lambda x: x.answer(200, hostile.documents["latest"][0], lie))
    refused(victim(), hostile, MISMATCH + r".*calls its manifest sha256:000")


def test_another_manifest_than_the_index_says(victim: Victim, hostile: HostileRegistry) -> None:
    inner = image()
    hostile.put(images.index([inner]))
    evil = image("evil")
    hostile.on(f"/manifests/{inner.digest}", lambda x: x.answer(200, evil.manifest, {"Content-Type": evil.media_type}))
    refused(victim(), hostile, MISMATCH)


@pytest.mark.parametrize("what", ["flipped", "shorter", "longer", "other"])
@pytest.mark.parametrize("part", ["config", "layer"])
def test_another_blob_than_the_manifest_says(victim: Victim, hostile: HostileRegistry, part: str, what: str) -> None:
    good = image(size=100_000)
    hostile.put(good)
    digest = good.id if part == "config" else good.layers[0].digest
    data = bytearray(hostile.blobs[digest])
    data[len(data) // 2] ^= 1
    wrong = {"flipped": data, "shorter": data[:-10], "longer": data + b"more", "other": b"{}"}[what]
    hostile.on(f"/blobs/{digest}", lambda x: x.answer(200, bytes(wrong)))
    node = victim()
    expected = UNAVAILABLE if part == "layer" and what in ("shorter", "other") else f"{MISMATCH}|larger than the limit"
    refused(node, hostile, expected)
    # Nothing of it is used again.
    hostile.behaviours.clear()
    assert node.pull(f"{hostile.address}/x").id == good.id


def test_a_config_that_lies_about_a_layer(victim: Victim, hostile: HostileRegistry) -> None:
    layer = images.layer([File("a", b"b")])
    hostile.put(images.build([images.Layer(layer.blob, "sha256:" + "0" * 64, "gzip")]))
    node = victim()
    refused(node, hostile, MISMATCH + r".*the config says that a layer is sha256:000")
    assert node.layer_names() == set()


def test_a_mirror_that_lies_is_passed_over(
    make_node: MakeNode, hostile: HostileRegistry, foreign: HostileRegistry, authority: CertificateAuthority
) -> None:
    good = image(size=10_000)
    hostile.put(good)
    foreign.put(good)
    foreign.blobs[good.layers[0].digest] = bytes(len(good.layers[0].blob))
    entry = {"Host": hostile.address, "CA": str(authority.path), "Mirrors": [foreign.url]}
    assert make_node({"Registries": [entry]}).pull(f"{hostile.address}/x").id == good.id


# -- truncated, broken -------------------------------------------------------------------------------------------------


def test_a_blob_that_breaks_off_is_continued(victim: Victim, hostile: HostileRegistry) -> None:
    good = image(size=3 * MIB)
    hostile.put(good)
    data = good.layers[0].blob
    broken = iter([1 * MIB, 2 * MIB])

    def break_off(x: Exchange) -> None:
        start = int(x.seen.headers.get("range", "bytes=0-")[6:-1])
        end = next(broken, len(data))
        headers = {
            "Content-Length": str(len(data) - start),
            "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}",
        }
        x.head(206 if start else 200, headers)
        x.send(data[start:end])
        if end < len(data):
            x.hang_up()

    hostile.on("/blobs/" + good.layers[0].digest, break_off)
    assert victim().pull(f"{hostile.address}/x").id == good.id
    asked = [seen.headers.get("range") for seen in hostile.requests(good.layers[0].digest)]
    assert asked == [None, f"bytes={MIB}-", f"bytes={2 * MIB}-"]


def test_a_server_that_can_not_continue_starts_again(victim: Victim, hostile: HostileRegistry) -> None:
    good = image(size=2 * MIB)
    hostile.put(good)
    data = good.layers[0].blob
    ends = iter([1 * MIB])

    def from_the_start(x: Exchange) -> None:
        x.head(200, {"Content-Length": str(len(data))})
        end = next(ends, len(data))
        x.send(data[:end])
        if end < len(data):
            x.hang_up()

    hostile.on("/blobs/" + good.layers[0].digest, from_the_start)
    assert victim().pull(f"{hostile.address}/x").id == good.id


def test_another_range_than_asked_for(victim: Victim, hostile: HostileRegistry) -> None:
    good = image(size=2 * MIB)
    hostile.put(good)
    data = good.layers[0].blob

    def confused(x: Exchange) -> None:
        if "range" in x.seen.headers:
            x.answer(206, data[:100], {"Content-Range": f"bytes 0-99/{len(data)}"})
        else:
            x.head(200, {"Content-Length": str(len(data))})
            x.send(data[:MIB])
            x.hang_up()

    hostile.on("/blobs/" + good.layers[0].digest, confused)
    refused(victim(), hostile, UNAVAILABLE + ".*another part of the blob")


def test_always_truncated(victim: Victim, hostile: HostileRegistry) -> None:
    good = image(size=MIB)
    hostile.put(good)
    hostile.on("/blobs/" + good.layers[0].digest, lambda x: x.answer(200, good.layers[0].blob[:-1]))
    refused(victim(), hostile, UNAVAILABLE + r".* sent \d+ of \d+ bytes")
    assert len(hostile.requests(good.layers[0].digest)) <= 6


def test_a_server_that_hangs_up(victim: Victim, hostile: HostileRegistry) -> None:
    hostile.on("/v2/", lambda x: x.hang_up())
    refused(victim(), hostile, UNAVAILABLE + ".*no answer from")
    assert len(hostile.seen) <= 5


def test_a_mirror_that_sends_garbage_and_breaks_off(
    make_node: MakeNode, hostile: HostileRegistry, foreign: HostileRegistry, authority: CertificateAuthority
) -> None:
    good = image(size=2 * MIB)
    hostile.put(good)
    foreign.put(good)

    def garbage(x: Exchange) -> None:
        x.head(200, {"Content-Length": str(len(good.layers[0].blob))})
        x.send(bytes(MIB))
        x.hang_up()

    foreign.on(f"/blobs/{good.layers[0].digest}", garbage)
    entry = {"Host": hostile.address, "CA": str(authority.path), "Mirrors": [foreign.url]}
    assert make_node({"Registries": [entry]}).pull(f"{hostile.address}/x").id == good.id


def test_parts_that_do_not_fit_together(victim: Victim, hostile: HostileRegistry) -> None:
    """A first part that is wrong, and the right rest: the whole is asked for once more."""
    good = image(size=2 * MIB)
    hostile.put(good)
    answers = iter([0])

    def wrong_start(x: Exchange) -> None:
        if next(answers, None) is None:
            hostile.serve(x)
        else:
            x.head(200, {"Content-Length": str(len(good.layers[0].blob))})
            x.send(bytes(MIB))
            x.hang_up()

    hostile.on(f"/blobs/{good.layers[0].digest}", wrong_start)
    assert victim().pull(f"{hostile.address}/x").id == good.id
    asked = [seen.headers.get("range") for seen in hostile.requests(good.layers[0].digest)]
    assert asked == [None, f"bytes={MIB}-", None]


def test_connections_are_kept(victim: Victim, hostile: HostileRegistry) -> None:
    good = images.build([images.layer([File(f"f{n}", bytes([n]) * 5000)]) for n in range(12)])
    hostile.put(good)
    node = victim(None, MaxConcurrentDownloads=2)
    assert node.pull(f"{hostile.address}/x").id == good.id
    assert len(hostile.seen) == 14
    assert hostile.connections <= 3


def test_a_connection_that_was_closed_while_idle(victim: Victim, hostile: HostileRegistry) -> None:
    good = images.build([images.layer([File(f"f{n}", bytes([n]) * 5000)]) for n in range(6)])
    hostile.put(good)

    def close_after(x: Exchange) -> None:
        hostile.serve(x)
        x.hang_up()  # and the header said nothing of it

    hostile.on("/v2/", close_after)
    assert victim(None, MaxConcurrentDownloads=1).pull(f"{hostile.address}/x").id == good.id


def test_chunked_answers(victim: Victim, hostile: HostileRegistry) -> None:
    good = image(size=MIB)
    hostile.put(good)

    def chunked(x: Exchange) -> None:
        name = x.seen.path.rpartition("/")[2]
        data = hostile.blobs.get(name) or hostile.documents[name][0]
        x.head(200, {"Transfer-Encoding": "chunked", "Content-Type": images.OCI_MANIFEST})
        for start in range(0, len(data), 100_000):
            piece = data[start : start + 100_000]
            x.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        x.send(b"0\r\n\r\n")

    hostile.on("/v2/", chunked)
    assert victim().pull(f"{hostile.address}/x").id == good.id
    assert hostile.connections <= 2


# -- endless -----------------------------------------------------------------------------------------------------------


def test_an_endless_manifest(victim: Victim, hostile: HostileRegistry) -> None:
    hostile.on("/manifests/", lambda x: x.endless(headers={"Content-Type": images.OCI_MANIFEST}))
    refused(victim(), hostile, r"larger than the limit of 4194304 bytes")
    assert hostile.sent_bytes < 12 * MIB


def test_an_endless_config(victim: Victim, hostile: HostileRegistry) -> None:
    good = image()
    hostile.put(good)
    hostile.on(f"/blobs/{good.id}", lambda x: x.endless())
    refused(victim(), hostile, r"larger than the limit of \d+ bytes")
    assert hostile.sent_bytes < 8 * MIB


def test_an_endless_layer(victim: Victim, hostile: HostileRegistry) -> None:
    good = image(size=MIB)
    hostile.put(good)
    hostile.on("/blobs/" + good.layers[0].digest, lambda x: x.endless())
    refused(victim(), hostile, MISMATCH + r".*sends more than \d+ bytes")
    assert hostile.sent_bytes < 16 * MIB


def test_an_endless_error_page(victim: Victim, hostile: HostileRegistry) -> None:
    def endless_error(x: Exchange) -> None:
        x.head(404, {"Connection": "close"})
        while not x.registry.stopping.is_set():
            x.send(b"x" * 65536)

    hostile.on("/v2/", endless_error)
    refused(victim(), hostile, "answers 404")
    assert hostile.sent_bytes < 16 * MIB


def test_an_endless_token(victim: Victim, hostile: HostileRegistry) -> None:
    challenge(hostile, f"{hostile.url}/token")
    hostile.on("/token", lambda x: x.endless())
    refused(victim(), hostile, r"the answer of the token server \S+ exceeds 1048576 bytes")
    assert hostile.sent_bytes < 3 * 16 * MIB


def test_headers_without_end(victim: Victim, hostile: HostileRegistry) -> None:
    def endless_header(x: Exchange) -> None:
        x.head(200, {f"X-{number}": "y" * 1000 for number in range(500)})

    hostile.on("/v2/", endless_header)
    refused(victim(), hostile, UNAVAILABLE)


# -- slow --------------------------------------------------------------------------------------------------------------


def test_a_stall_is_given_up(victim: Victim, hostile: HostileRegistry) -> None:
    good = image(size=MIB)
    hostile.put(good)

    def stall(x: Exchange) -> None:
        x.head(200, {"Content-Length": str(len(good.layers[0].blob))})
        x.send(b"x" * 1000)
        x.wait(60)

    hostile.on("/blobs/" + good.layers[0].digest, stall)
    started = time.monotonic()
    refused(victim(None, PullProgressTimeout="500ms"), hostile, UNAVAILABLE + r".*nothing came from \S+ for 500ms")
    assert time.monotonic() - started < 5


def test_a_trickle_is_given_up(victim: Victim, hostile: HostileRegistry) -> None:
    good = image(size=MIB)
    hostile.put(good)

    def trickle(x: Exchange) -> None:
        x.head(200, {"Content-Length": str(len(good.layers[0].blob))})
        while not x.registry.stopping.is_set():
            x.send(b"x")
            x.wait(0.1)

    hostile.on("/blobs/" + good.layers[0].digest, trickle)
    started = time.monotonic()
    refused(victim(None, PullProgressTimeout="500ms"), hostile, UNAVAILABLE + r".*nothing came from \S+ for 500ms")
    assert time.monotonic() - started < 5


def test_slow_but_moving_goes_on(victim: Victim, hostile: HostileRegistry) -> None:
    good = image(size=40_000)
    hostile.put(good)
    data = good.layers[0].blob

    def slow(x: Exchange) -> None:
        x.head(200, {"Content-Length": str(len(data))})
        for start in range(0, len(data), 2048):
            x.send(data[start : start + 2048])
            x.wait(0.05)

    hostile.on("/blobs/" + good.layers[0].digest, slow)
    started = time.monotonic()
    assert victim(None, PullProgressTimeout="400ms").pull(f"{hostile.address}/x").id == good.id
    assert time.monotonic() - started > 0.8  # longer than the timeout: it is one for progress


def test_a_client_that_leaves(victim: Victim, hostile: HostileRegistry) -> None:
    good = image(size=MIB)
    hostile.put(good)
    context = testing.context("PullImage")

    def stall(x: Exchange) -> None:
        x.head(200, {"Content-Length": str(len(good.layers[0].blob))})
        x.send(b"x" * 1000)
        context.cancel()
        x.wait(60)

    hostile.on("/blobs/" + good.layers[0].digest, stall)
    node = victim()
    started = time.monotonic()
    with pytest.raises(errors.Cancelled):
        node.pull(f"{hostile.address}/x", context=context)
    assert time.monotonic() - started < 3
    node.service._puller.close()  # waits until what was under way has ended
    assert time.monotonic() - started < 5
    assert node.temporary_files() == []


def test_a_deadline(victim: Victim, hostile: HostileRegistry) -> None:
    hostile.put(image())
    hostile.on("/manifests/", lambda x: x.wait(60))
    context = testing.context("PullImage")
    context.deadline = time.monotonic() + 0.2
    started = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded):
        victim().pull(f"{hostile.address}/x", context=context)
    assert time.monotonic() - started < 2


# -- busy, broken ------------------------------------------------------------------------------------------------------


def test_429_with_retry_after(victim: Victim, hostile: HostileRegistry) -> None:
    good = image()
    hostile.put(good)
    answers = iter([429])

    def busy(x: Exchange) -> None:
        if next(answers, 200) == 429:
            x.error(429, "TOOMANYREQUESTS", "slow down", {"Retry-After": "1"})
        else:
            hostile.serve(x)

    hostile.on("/manifests/", busy)
    started = time.monotonic()
    assert victim().pull(f"{hostile.address}/x").id == good.id
    assert 1 <= time.monotonic() - started < 5


def test_429_for_an_hour(victim: Victim, hostile: HostileRegistry) -> None:
    hostile.on("/manifests/", lambda x: x.error(429, "TOOMANYREQUESTS", "slow down", {"Retry-After": "3600"}))
    started = time.monotonic()
    message = refused(victim(), hostile, UNAVAILABLE)
    assert "429: TOOMANYREQUESTS: slow down" in message
    assert time.monotonic() - started < 5
    assert len(hostile.seen) == 1


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
def test_a_few_tries_and_no_more(victim: Victim, hostile: HostileRegistry, status: int) -> None:
    hostile.on("/v2/", lambda x: x.answer(status, b"<html>oops</html>"))
    refused(victim(), hostile, UNAVAILABLE + rf".*answers {status}$")
    assert len(hostile.seen) == 5


@pytest.mark.parametrize("status", [400, 403, 404, 405, 410, 451])
def test_no_second_try_for_a_clear_no(victim: Victim, hostile: HostileRegistry, status: int) -> None:
    hostile.on("/v2/", lambda x: x.error(status, "DENIED", "no"))
    message = refused(victim(), hostile, rf"answers {status}: DENIED: no")
    assert not message.startswith("RegistryUnavailable")
    assert len(hostile.seen) == 1


# -- redirects ---------------------------------------------------------------------------------------------------------


def challenge(hostile: HostileRegistry, realm: str | None) -> None:
    """Ask for credentials: for a token of that realm, or for Basic ones."""
    text = 'Basic realm="r"' if realm is None else f'Bearer realm="{realm}",service="s"'

    def ask(x: Exchange) -> None:
        if "authorization" in x.seen.headers:
            hostile.serve(x)
        else:
            x.error(401, "UNAUTHORIZED", "who are you?", {"WWW-Authenticate": text})

    hostile.on("/v2/", ask)


AUTH = RegistryAuth(username="user", password=SECRET)


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


# -- documents ---------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = json.loads(image().manifest)
DIGEST = "sha256:" + "a" * 64


def with_layer(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "layers": [{**GOOD["layers"][0], **changes}]}


@pytest.mark.parametrize(
    ("document", "pattern"),
    [
        ({**GOOD, "manifests": []}, "a manifest and an index at once"),
        ({"schemaVersion": 2, "manifests": [], "config": GOOD["config"]}, "a manifest and an index at once"),
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1 manifests are not supported"),
        ({**GOOD, "mediaType": images.OCI_INDEX}, "is an image manifest, and is called"),
        ({**GOOD, "mediaType": images.DOCKER_MANIFEST}, "by the server and .* by itself"),
        ({**GOOD, "mediaType": "text/html"}, "is called 'text/html'"),
        ({**GOOD, "config": {**GOOD["config"], "mediaType": "application/vnd.cncf.helm.config.v1+json"}},
         "not a container image"),
        (with_layer(mediaType="application/vnd.oci.image.layer.v1.tar+gzip+encrypted"), "not supported"),
        (with_layer(mediaType="application/x-evil"), "not supported"),
        (with_layer(size=-1), "size is not a number"),
        (with_layer(size="12"), "size is not a number"),
        (with_layer(size=1 << 63), "size is not a number"),
        (with_layer(size=True), "size is not a number"),
        *[(with_layer(digest=digest), "the digest must be sha256:") for digest in
          ("sha256:../../etc/x", "", "sha256:" + "A" * 64, "sha256:" + "a" * 63, "sha256:" + "a" * 65,
           "md5:" + "a" * 32, "sha256:" + "a" * 63 + "\0", "sha512:" + "a" * 128, None, 7, ["x"])],
        ({**GOOD, "layers": GOOD["layers"] * 300}, "300 entries, and 256 is the limit"),
        ({**GOOD, "layers": {}}, "layers: not a list"),
        ({**GOOD, "layers": [1]}, "not a descriptor"),
        ({**GOOD, "config": None}, "not a descriptor"),
        ({}, "neither a manifest nor an index"),
        (b"[]", "not a JSON object"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"schemaVersion": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)  # fmt: skip
def test_manifests_that_break_a_rule(victim: Victim, hostile: HostileRegistry, document: Any, pattern: str) -> None:
    hostile.put_document(document)
    refused(victim(), hostile, pattern)


@pytest.mark.parametrize("kind", ["v1+json", "v1+prettyjws"])
def test_schema_1_by_its_type(victim: Victim, hostile: HostileRegistry, kind: str) -> None:
    hostile.put_document(GOOD, f"application/vnd.docker.distribution.manifest.{kind}")
    refused(victim(), hostile, "schema 1 manifests are not supported: push the image again")


def test_an_index_of_many(victim: Victim, hostile: HostileRegistry) -> None:
    entry = {"mediaType": images.OCI_MANIFEST, "digest": DIGEST, "size": 1}
    hostile.put_document({"schemaVersion": 2, "manifests": [entry] * 5000}, images.OCI_INDEX)
    refused(victim(), hostile, "5000 entries, and 4096 is the limit")


def test_an_index_in_an_index_in_an_index(victim: Victim, hostile: HostileRegistry) -> None:
    document: Any = images.index([image()])
    hostile.put(document)
    data = document.manifest
    for depth in range(4):
        platform = {"os": "linux", "architecture": images.machine_architecture()}
        inner = {**images.descriptor(data, images.OCI_INDEX), "platform": platform}
        data = json.dumps(
            {"schemaVersion": 2, "mediaType": images.OCI_INDEX, "manifests": [inner], "n": depth}
        ).encode()
        hostile.put_document(data, images.OCI_INDEX)
    refused(victim(), hostile, "nested more than 3 deep")


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        (b"{}", "no rootfs"),
        (b'{"rootfs": {"type": "layers", "diff_ids": ["sha256:../x"]}}', "diff_ids: the digest must be"),
        (b'{"rootfs": {"type": "layers", "diff_ids": []}}', "the manifest has 1 layers, and the config 0"),
        (b'{"rootfs": {"type": "layers"}, "config": {"Env": "\\u0000"}}', "not a list of texts"),
        (b'{"rootfs": {"type": "layers"}, "config": {"User": "a\\u0000b"}}', "NUL"),
        (b'{"rootfs": {"type": "layers"}, "config": {"Cmd": [1]}}', "config.Cmd: not a list of texts"),
        (b'{"rootfs": {"type": "layers"}, "config": {"Labels": {"a": 1}}}', "config.Labels"),
        (b'{"rootfs": {"type": "layers"}, "config": []}', "config: not an object"),
        (b"nonsense", "not valid JSON"),
    ],
)
def test_configs_that_break_a_rule(victim: Victim, hostile: HostileRegistry, config: bytes, pattern: str) -> None:
    manifest = {**GOOD, "config": images.descriptor(config, images.OCI_CONFIG)}
    hostile.blobs[images.digest_of(config)] = config
    hostile.blobs |= image().blobs()
    hostile.put_document(manifest)
    refused(victim(), hostile, pattern)


# -- bombs -------------------------------------------------------------------------------------------------------------


def zeros(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield bytes(MIB)


@pytest.mark.parametrize("packer", ["gzip", "zstd"])
@pytest.mark.parametrize("where", ["in a file", "after the end", "in a header"])
def test_a_decompression_bomb(victim: Victim, hostile: HostileRegistry, packer: images.Compression, where: str) -> None:
    """A few hundred kilobytes that are 300 MiB: given up at the limit, whatever they are to be."""
    packed = io.BytesIO()
    file: Any = gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) if packer == "gzip" else (
        zstandard.ZstdCompressor(level=1).stream_writer(packed, closefd=False)
    )  # fmt: skip
    with file:
        if where == "after the end":
            file.write(tar([f("small")]))
        else:
            info = f("bomb").info()
            info.size = 300 * MIB
            info.type = b"g" if where == "in a header" else info.type
            file.write(info.tobuf())
        for piece in zeros(300):
            file.write(piece)
    blob = packed.getvalue()
    assert len(blob) < 2 * MIB
    hostile.put(images.build([images.Layer(blob, DIGEST, packer)]))
    node = victim(None, MaxLayerSize="20MiB")
    refused(node, hostile, r"is refused: .*larger than \d+ bytes")
    assert node.layer_names() == set()


def test_a_zstd_window_of_gigabytes(victim: Victim, hostile: HostileRegistry) -> None:
    # Magic, frame header without size, window descriptor: 2^(10+21) = 2 GiB. One raw block, the last one.
    blob = b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00"
    hostile.put(images.build([images.Layer(blob, DIGEST, "zstd")]))
    refused(victim(), hostile, "zstd data are corrupt, or need too much memory")


@pytest.mark.parametrize(
    ("blob", "pattern"),
    [
        (gzip.compress(tar([f("a")]), mtime=0)[:-20], "gzip data end too early|gzip data are corrupt"),
        (b"\x1f\x8b\x08" + b"garbage" * 10, "gzip data are corrupt|gzip data end too early"),
        (b"\x28\xb5\x2f\xfd" + b"garbage" * 10, "zstd data are corrupt"),
        (b"BZh91AY&SY", "packed with bzip2"),
        (b"\xfd7zXZ\x00", "packed with xz"),
        (b"not a tar at all" * 100, "no tar archive"),
    ],
)
def test_layers_that_can_not_be_unpacked(victim: Victim, hostile: HostileRegistry, blob: bytes, pattern: str) -> None:
    hostile.put(images.build([images.Layer(blob, DIGEST, "gzip")]))
    refused(victim(), hostile, pattern)


def test_an_image_larger_than_allowed(victim: Victim, hostile: HostileRegistry) -> None:
    layers = [images.layer([File(f"f{n}", bytes([n]) * 3 * MIB)], "gzip") for n in range(4)]
    hostile.put(images.build(layers))
    refused(victim(None, MaxImageSize="10MiB"), hostile, r"larger than 10485760 bytes \(Images.MaxImageSize\)")


def test_a_layer_that_says_it_is_too_large(victim: Victim, hostile: HostileRegistry) -> None:
    hostile.blobs |= image().blobs()
    hostile.put_document(with_layer(size=1 << 40))
    refused(victim(None, MaxImageSize="4TiB"), hostile, "Images.MaxLayerSize allows")
    refused(victim(), hostile, "Images.MaxImageSize allows")
    assert hostile.requests(GOOD["layers"][0]["digest"]) == []


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip, gzip, gzip, gzip, gzip", "br", "deflate"])
def test_content_encoding_unpacks_nothing(victim: Victim, hostile: HostileRegistry, encoding: str) -> None:
    packed = gzip.compress(bytes(50 * MIB), 9)
    headers = {"Content-Type": images.OCI_MANIFEST, "Content-Encoding": encoding}
    hostile.on("/manifests/", lambda x: x.answer(200, packed, headers))
    refused(victim(), hostile, "not valid JSON")
    assert all(seen.headers["accept-encoding"] == "identity" for seen in hostile.seen)


# -- others that pull --------------------------------------------------------------------------------------------------


def test_a_layer_that_another_pull_can_not_have(
    make_node: MakeNode, hostile: HostileRegistry, foreign: HostileRegistry, authority: CertificateAuthority
) -> None:
    """Who waits for a layer that is under way from elsewhere doesn't share its failure."""
    shared = image().layers[0]
    bad, good = images.build([shared], {"Cmd": ["bad"]}), images.build([shared], {"Cmd": ["good"]})
    hostile.put(bad)
    foreign.put(good)
    under_way, go_on = threading.Event(), threading.Event()

    def refuse(x: Exchange) -> None:
        under_way.set()
        go_on.wait(60)
        x.error(403, "DENIED")

    hostile.on(f"/blobs/{shared.digest}", refuse)
    node = make_node({"Registries": [{"Host": one.address, "CA": str(authority.path)} for one in (hostile, foreign)]})
    flights = node.service._puller._fetches
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(node.pull, f"{hostile.address}/x")
        assert under_way.wait(60)
        second = pool.submit(node.pull, f"{foreign.address}/x")
        deadline = time.monotonic() + 10
        while not any(len(flight.waiters) > 1 for flight in list(flights._flights.values())):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        go_on.set()
        with pytest.raises(errors.UnknownError, match="403"):
            first.result()
        assert second.result().id == good.id


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


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.skipif("PORTO_SOCKET" in os.environ, reason="mounts something")
def test_a_full_disk(victim: Victim, hostile: HostileRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = image(size=12 * MIB)
    hostile.put(good)
    node = victim()
    temporary = node.service._temporary
    for size, passes in (("4m", False), ("16m", False), ("64m", True)):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", temporary], check=True)
        try:
            if passes:
                assert node.pull(f"{hostile.address}/x").id == good.id
            else:
                with pytest.raises(errors.ResourceExhausted, match=r"can't write the layer to disk: No space left"):
                    node.pull(f"{hostile.address}/x")
            assert node.temporary_files() == []
        finally:
            subprocess.run(["umount", "-l", temporary], check=True)
