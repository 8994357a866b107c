"""TLS: with a certificate, with clients that need one, and with certificates that are replaced."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from shim_core.errors import StartupError
from tests.streaming.forward_client import Forwarder
from tests.streaming.harness import Harness, eventually, limits
from tests.streaming.pods import Pods, echo
from tests.streaming.spdy_client import SpdyCommand
from tests.streaming.websocket_client import WebSocketCommand
from tools.certificates import Certificate, CertificateAuthority

Serve = Callable[..., Harness]


class Pki:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = CertificateAuthority(directory / "ca")
        self.server = self.authority.issue("server", ["127.0.0.1"])

    def keys(self, **more: object) -> dict[str, object]:
        return {"TLSCert": str(self.server.cert_path), "TLSKey": str(self.server.key_path), **more}

    def context(
        self, client: Certificate | None = None, authority: CertificateAuthority | None = None
    ) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str((authority or self.authority).path))
        if client is not None:
            context.load_cert_chain(client.cert_path, client.key_path)
        return context


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.mark.parametrize("client", [SpdyCommand, WebSocketCommand])
def test_exec(serve: Serve, pki: Pki, client: type[SpdyCommand | WebSocketCommand]) -> None:
    harness = serve(pki.keys())
    data = os.urandom(3_000_000)
    url = harness.exec_url("sh", "-c", f"head -c {len(data)}; exit 3", stdin=True)
    assert url.startswith("https://127.0.0.1:")
    if client is SpdyCommand:
        command: SpdyCommand | WebSocketCommand = SpdyCommand(url, stdin=True, tls=pki.context())
    else:
        command = WebSocketCommand(url, "v5.channel.k8s.io", tls=pki.context())
    command.write(data)
    assert command.exit_code() == 3
    assert command.out == data


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_versions(serve: Serve, pki: Pki, version: ssl.TLSVersion) -> None:
    harness, context = serve(pki.keys()), pki.context()
    context.minimum_version = context.maximum_version = version
    assert SpdyCommand(harness.exec_url("true"), tls=context).exit_code() == 0


def test_port_forward(serve: Serve, pki: Pki, pods: Pods) -> None:
    harness, pod, data = serve(pki.keys()), pods(echo), os.urandom(2_000_000)
    forwarder = Forwarder(harness.forward_url(), tls=pki.context())
    connection = forwarder.connect(pod.port)
    connection.send(data)
    connection.end()
    assert connection.wait_end() == data
    forwarder.close()


def test_plain_http_is_not_spoken(serve: Serve, pki: Pki) -> None:
    harness = serve(pki.keys())
    with socket.create_connection(("127.0.0.1", harness.port), timeout=60) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        data = b""
        try:
            while more := sock.recv(1000):
                data += more
        except ConnectionResetError:
            pass
    assert b"HTTP" not in data


def test_handshakes_that_go_nowhere_are_cut_off(serve: Serve, pki: Pki) -> None:
    harness = serve(pki.keys(), limits=limits(head_timeout_s=0.3))
    with socket.create_connection(("127.0.0.1", harness.port), timeout=60) as sock:
        assert sock.recv(1) == b""
    assert SpdyCommand(harness.exec_url("true"), tls=pki.context()).exit_code() == 0


def test_clients_need_a_certificate(serve: Serve, pki: Pki) -> None:
    harness = serve(pki.keys(ClientCA=str(pki.authority.path)))
    with pytest.raises(OSError):
        SpdyCommand(harness.exec_url("true"), tls=pki.context())
    stranger = CertificateAuthority(pki.directory / "other").issue("client", ["kubelet"], client=True)
    with pytest.raises(OSError):
        SpdyCommand(harness.exec_url("true"), tls=pki.context(stranger))
    kubelet = pki.authority.issue("client", ["kubelet"], client=True)
    assert SpdyCommand(harness.exec_url("true"), tls=pki.context(kubelet)).exit_code() == 0


def test_a_replaced_certificate_is_taken_up(serve: Serve, pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    harness = serve(pki.keys())
    assert SpdyCommand(harness.exec_url("true"), tls=pki.context()).exit_code() == 0
    good_cert, good_key = pki.server.cert_path.read_bytes(), pki.server.key_path.read_bytes()

    pki.server.cert_path.write_bytes(b"half a certifi")
    assert SpdyCommand(harness.exec_url("true"), tls=pki.context()).exit_code() == 0
    assert "keeping the old one" in caplog.text
    pki.server.cert_path.unlink()
    assert SpdyCommand(harness.exec_url("true"), tls=pki.context()).exit_code() == 0

    other = CertificateAuthority(pki.directory / "other")
    renewed = other.issue("server", ["127.0.0.1"])
    pki.server.key_path.write_bytes(renewed.key_path.read_bytes())
    pki.server.cert_path.write_bytes(renewed.cert_path.read_bytes())
    assert SpdyCommand(harness.exec_url("true"), tls=pki.context(authority=other)).exit_code() == 0
    assert (good_cert, good_key) != (pki.server.cert_path.read_bytes(), pki.server.key_path.read_bytes())


@pytest.mark.parametrize("broken", ["TLSCert", "TLSKey", "ClientCA"])
def test_files_that_cannot_be_used_stop_the_start(serve: Serve, pki: Pki, broken: str) -> None:
    path = pki.directory / "broken"
    with pytest.raises(StartupError, match=r"TLS can't be set up.*No such file"):
        serve({**pki.keys(), broken: str(path)})
    path.write_text("not PEM")
    with pytest.raises(StartupError, match="TLS can't be set up"):
        serve({**pki.keys(), broken: str(path)})


def test_a_key_with_a_password_stops_the_start(serve: Serve, pki: Pki) -> None:
    from cryptography.hazmat.primitives import serialization

    secret = serialization.BestAvailableEncryption(b"x")
    pem = pki.server.private_key().private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    pki.server.key_path.write_bytes(pem)
    with pytest.raises(StartupError, match="the private key is encrypted"):
        serve(pki.keys())


def test_a_client_that_goes_without_a_goodbye(serve: Serve, pki: Pki) -> None:
    harness = serve(pki.keys())
    client = SpdyCommand(harness.exec_url("sleep", "60"), tls=pki.context())
    eventually(lambda: harness.runtime.running == 1, "the command runs")
    client.close()
    eventually(lambda: harness.sessions() == 0, "the session is over", 5)


def test_the_exit_code_arrives_though_the_client_is_still_sending(serve: Serve, pki: Pki) -> None:
    """TLS has something to say about data after its goodbye; the status must be through by then."""
    harness = serve(pki.keys())
    for _ in range(20):
        url = harness.exec_url("sh", "-c", "head -c 1000; exit 6", stdin=True)
        client = SpdyCommand(url, stdin=True, tls=pki.context())
        try:
            client.write(bytes(2_000_000))
        except OSError:
            pass  # the server has closed meanwhile
        assert client.exit_code() == 6
