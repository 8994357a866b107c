"""A registry that lies, breaks off and dawdles: each ends in the documented error and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shim_core import errors, testing
from tests.images.hostile import Exchange, HostileRegistry
from tests.images.support import MakeNode
from tests.images.victim import MIB, MISMATCH, UNAVAILABLE, Victim, challenge, image, refused
from tools import images
from tools.certificates import CertificateAuthority
from tools.images import File

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
