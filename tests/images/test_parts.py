"""The small parts: platforms, sizes, packing, proxies."""

from __future__ import annotations

import gzip
import io
import os
import socket
import socketserver
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from shim_porto_runtime.images import compression
from shim_porto_runtime.images.platforms import Platform, best
from shim_porto_runtime.images.settings import ImageSettings, format_size, parse_size

from shim_core import config, errors
from tests.images.support import MakeNode, entry
from tools import images
from tools.images import File
from tools.registry import LocalRegistry

# -- platforms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "there", "chosen"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], 1),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64"], 1),
        ("linux/amd64", ["linux/amd64/v2"], None),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], 1),
        ("linux/arm64", ["linux/arm64/v8"], 0),
        ("linux/arm64/v8", ["linux/arm64"], 0),
        ("linux/aarch64", ["linux/arm64"], 0),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], 2),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6"], 1),
        ("linux/arm/v6", ["linux/arm/v7"], None),
        ("linux/arm64", ["linux/arm/v7"], None),
        ("linux/s390x", ["windows/s390x", "linux/s390x", "linux/s390x"], 1),
        ("linux/riscv64/rva22", ["linux/riscv64", "linux/riscv64/rva22"], 1),
        ("linux/amd64", ["unknown/unknown"], None),
        ("linux/amd64", [], None),
    ],
)
def test_the_best_platform(mine: str, there: list[str], chosen: int | None) -> None:
    candidates = [(Platform(*text.split("/")), number) for number, text in enumerate(there)]
    assert best(Platform.parse(mine), candidates) == chosen


@pytest.mark.parametrize("text", ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/amd 64"])
def test_platforms_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="must be os/architecture"):
        Platform.parse(text)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), (7, 7), ("512MiB", 512 << 20), ("16 GiB", 16 << 30), ("1kib", 1024), ("3B", 3), ("2TiB", 2 << 40)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ({"MaxLayerSize": "big"}, "MaxLayerSize: not a size: write a number"),
        ({"MaxLayerSize": "10MB"}, "not a size"),
        ({"MaxLayerSize": 0}, "greater than 0"),
        ({"MaxLayerSize": -5}, "greater than 0"),
        ({"MaxConcurrentDownloads": 0}, "MaxConcurrentDownloads"),
        ({"PullProgressTimeout": "0s"}, "must be longer than nothing"),
        ({"PullProgressTimeout": 5}, r"did you mean 5s\?"),
        ({"PauseImage": "UPPER"}, "PauseImage: not a valid reference.*; write an image reference, or none"),
        ({"Place": "relative"}, "must be an absolute path without '..'"),
        ({"Place": "/a/../b"}, "must be an absolute path without '..'"),
        ({"Platform": "amd64"}, "must be os/architecture"),
        ({"KeepBlobs": "some"}, "KeepBlobs"),
        ({"Pined": []}, "unknown key; did you mean Pinned?"),
    ],
)
def test_mistakes_are_named(keys: dict[str, Any], pattern: str) -> None:
    with pytest.raises(errors.ConfigError, match=pattern):
        config.parse({"Images": keys}, [ImageSettings])


def test_defaults_are_what_they_have_always_been() -> None:
    made = config.parse({}, [ImageSettings])
    assert (made.get(ImageSettings).pause_image, made.get(ImageSettings).place) == ("registry.k8s.io/pause:3.7", "")
    assert "MaxLayerSize: 32GiB" in made.dump()
    assert config.parse({"Images": {"PauseImage": "none"}}, [ImageSettings]).get(ImageSettings).pause_image == "none"


# -- packing -----------------------------------------------------------------------------------------------------------


def unpack(data: bytes, limit: int) -> bytes:
    reader = compression.open_layer(io.BytesIO(data))
    pieces = []
    while piece := reader.read(limit):
        assert len(piece) <= limit
        pieces.append(piece)
    return b"".join(pieces)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor(level=3).compress,
    "none": lambda data: b"plain " + data,
}


@pytest.mark.parametrize("fast", [True, False], ids=["isal", "zlib"])
@pytest.mark.parametrize("kind", PACKERS)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=50), st.integers(1, 20_000)), max_size=5),
    st.sampled_from([1000, 1024, 65536, 1 << 20]),
)
def test_what_was_packed_comes_out(fast: bool, kind: str, parts: list[tuple[bytes, int]], limit: int) -> None:
    content = b"".join(piece * count for piece, count in parts)
    with pytest.MonkeyPatch.context() as patch:
        if not fast:
            patch.setitem(sys.modules, "isal", None)
        packed = PACKERS[kind](content)
        assert unpack(packed, limit) == (b"plain " + content if kind == "none" else content)


@pytest.mark.parametrize("limit", [100, 65536])
def test_members_and_frames_one_after_the_other(limit: int) -> None:
    parts = [os.urandom(5000), b"", b"z" * 100_000]
    assert unpack(b"".join(gzip.compress(part) for part in parts), limit) == b"".join(parts)
    assert unpack(b"".join(gzip.compress(part) for part in parts) + bytes(512), limit) == b"".join(parts)
    zstd = zstandard.ZstdCompressor()
    skippable = b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + b"anything"
    assert unpack(skippable + b"".join(zstd.compress(part) for part in parts), limit) == b"".join(parts)


@pytest.mark.parametrize("fast", [True, False], ids=["isal", "zlib"])
def test_every_truncation_of_gzip_is_an_error(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setitem(sys.modules, "isal", None)
    packed = gzip.compress(b"some text, " * 300 + os.urandom(300))
    for end in range(4, len(packed), 7):
        with pytest.raises(compression.CorruptLayer):
            unpack(packed[:end], 1000)


def test_a_wrong_checksum_is_an_error() -> None:
    packed = bytearray(gzip.compress(b"text" * 100))
    packed[-6] ^= 1
    with pytest.raises(compression.CorruptLayer, match="corrupt"):
        unpack(bytes(packed), 1000)
    assert zlib.decompress(bytes(packed)[10:-8], -15) == b"text" * 100


# -- proxies -----------------------------------------------------------------------------------------------------------


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy: CONNECT, and plain requests passed on."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.headers: list[str] = []
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class _ProxyHandler(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        line = self.rfile.readline().decode().strip()
        self.server.lines.append(line)
        headers = []
        while (header := self.rfile.readline()) not in (b"\r\n", b""):
            headers.append(header)
        self.server.headers += [header.decode().strip() for header in headers]
        method, target, _ = line.split(" ")
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            with socket.create_connection((host, int(port))) as upstream:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                self._pass_on(upstream)
        else:
            host, _, path = target.removeprefix("http://").partition("/")
            name, _, port = host.rpartition(":")
            with socket.create_connection((name, int(port))) as upstream:
                kept = [header for header in headers if not header.lower().startswith(b"proxy-")]
                upstream.sendall(
                    f"{method} /{path} HTTP/1.1\r\nConnection: close\r\n".encode() + b"".join(kept) + b"\r\n"
                )
                while data := upstream.recv(65536):
                    self.wfile.write(data)

    def _pass_on(self, upstream: socket.socket) -> None:
        def back() -> None:
            try:
                while data := upstream.recv(65536):
                    self.connection.sendall(data)
            except OSError:
                pass

        thread = threading.Thread(target=back, daemon=True)
        thread.start()
        try:
            while data := self.connection.recv(65536):
                upstream.sendall(data)
            upstream.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        thread.join(60)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Proxy()
    yield server
    server.shutdown()
    server.server_close()


def test_https_goes_through_a_tunnel(
    make_node: MakeNode, registry: LocalRegistry, repository: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("http://", "http://me:s%40cret@"))
    image = images.build([images.layer([File("a", b"a")])])
    images.push(image, registry, repository)
    node = make_node({"Registries": [entry(registry)]})
    assert node.pull(f"{registry.address}/{repository}").id == image.id
    assert {line.rpartition(" ")[0] for line in proxy.lines} == {f"CONNECT {registry.address}"}
    assert "proxy-authorization: basic bWU6c0BjcmV0".lower() in [header.lower() for header in proxy.headers]
    assert not any(header.lower().startswith("authorization") for header in proxy.headers)


def test_plain_http_is_passed_on(
    make_node: MakeNode,
    registries: Callable[..., LocalRegistry],
    repository: str,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = registries(tls=False)
    monkeypatch.setenv("http_proxy", proxy.url)
    image = images.build([images.layer([File("a", b"a")])])
    images.push(image, registry, repository)
    node = make_node({"Registries": [{"Host": registry.address, "Insecure": True}]})
    assert node.pull(f"{registry.address}/{repository}").id == image.id
    assert f"GET http://{registry.address}/v2/{repository}/manifests/latest HTTP/1.1" in proxy.lines


def test_no_proxy(
    make_node: MakeNode, registry: LocalRegistry, repository: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.setenv("NO_PROXY", "localhost")
    images.push(images.build([]), registry, repository)
    make_node({"Registries": [entry(registry)]}).pull(f"{registry.address}/{repository}")
    assert proxy.lines == []


def test_a_proxy_that_is_away(make_node: MakeNode, registry: LocalRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@127.0.0.1:1")
    node = make_node({"Registries": [entry(registry)]})
    with pytest.raises(errors.UnknownError, match=r"^RegistryUnavailable: .*can't connect to localhost:\d+ by way of"):
        node.pull(f"{registry.address}/x")
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1")
    with pytest.raises(errors.UnknownError, match="the proxy in HTTPS_PROXY must be an http:// URL"):
        node.pull(f"{registry.address}/x")
