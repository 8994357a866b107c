"""The section StreamingServer."""

from __future__ import annotations

from typing import Any

import pytest
from shim_streaming.settings import StreamingServerSection, base_url

from shim_core import config
from shim_core.errors import ConfigError

TLS = {"TLSCert": "/etc/tls.crt", "TLSKey": "/etc/tls.key"}


def parse(**keys: Any) -> StreamingServerSection:
    return config.parse({"StreamingServer": keys}, [StreamingServerSection]).get(StreamingServerSection)


def test_defaults_are_those_of_portoshim() -> None:
    section = parse()
    assert (section.address, section.port, section.idle_timeout) == ("[::]", 7255, 4 * 3600)
    assert not section.tls


def test_keys_of_the_file() -> None:
    assert set(config.parse({}, [StreamingServerSection])._tree()["StreamingServer"]) == {
        "Address", "Port", "TLSCert", "TLSKey", "ClientCA", "AdvertiseURL", "IdleTimeout",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "address"),
    [
        ({}, "127.0.0.1"),
        ({"Port": 1}, "127.0.0.1"),
        (TLS, "::"),
        ({"Address": "[::]"}, "::"),
        ({"Address": "::"}, "::"),
        ({"Address": "0.0.0.0"}, "0.0.0.0"),
        ({"Address": "10.1.2.3", **TLS}, "10.1.2.3"),
    ],
)
def test_without_tls_only_an_address_in_the_file_leaves_loopback(keys: dict[str, Any], address: str) -> None:
    assert parse(**keys).listen_address == address


@pytest.mark.parametrize(
    ("keys", "bound", "url"),
    [
        ({}, "127.0.0.1", "http://127.0.0.1:99"),
        ({}, "::", "http://127.0.0.1:99"),
        ({}, "0.0.0.0", "http://127.0.0.1:99"),
        ({}, "fd00::1", "http://[fd00::1]:99"),
        (TLS, "10.1.2.3", "https://10.1.2.3:99"),
        ({"AdvertiseURL": "https://node7:7255/cri/"}, "::", "https://node7:7255/cri"),
    ],
)
def test_urls_are_absolute(keys: dict[str, Any], bound: str, url: str) -> None:
    assert base_url(parse(**keys), bound, 99) == url


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"Address": "example.org"}, "StreamingServer.Address: must be an IP address"),
        ({"Address": "127.0.0.1:7255"}, "StreamingServer.Address: must be an IP address"),
        ({"Port": 65536}, "StreamingServer.Port"),
        ({"Port": -1}, "StreamingServer.Port"),
        ({"TLSCert": "/a"}, "set both of TLSCert and TLSKey"),
        ({"TLSKey": "/a"}, "set both of TLSCert and TLSKey"),
        ({"TLSCert": "a", "TLSKey": "/b"}, "StreamingServer.TLSCert: must be an absolute path"),
        ({"ClientCA": "/a"}, "a ClientCA needs TLS"),
        ({"AdvertiseURL": "node7:7255"}, "StreamingServer.AdvertiseURL: must be http"),
        ({"AdvertiseURL": "ftp://node7"}, "StreamingServer.AdvertiseURL"),
        ({"AdvertiseURL": "http://user:pass@node7"}, "StreamingServer.AdvertiseURL"),
        ({"AdvertiseURL": "http://node7?x=1"}, "StreamingServer.AdvertiseURL"),
        ({"AdvertiseURL": "http://node7:port"}, "StreamingServer.AdvertiseURL"),
        ({"AdvertiseURL": "http://"}, "StreamingServer.AdvertiseURL"),
        ({"IdleTimeout": "0"}, "StreamingServer.IdleTimeout: must be longer than 0"),
        ({"IdleTimeout": 30}, "StreamingServer.IdleTimeout"),
        ({"TlsCert": "/a"}, "did you mean TLSCert"),
    ],
)
def test_mistakes_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**keys)
