"""The configuration: what is taken, what is refused and with which words, and that no secret is shown."""

from __future__ import annotations

from typing import Any

import pytest

from shim_core.errors import ConfigError
from tests.registry_auth.support import SECRET, make, parse

HOST = "registry.example.org"


@pytest.mark.parametrize(
    ("entry", "pattern"),
    [
        ({}, r"Images\.Registries\[0\]\.Host: field required"),
        ({"Host": ""}, "must be a host"),
        ({"Host": "https://registry.example.org"}, "must be a host"),
        ({"Host": "registry.example.org/path"}, "must be a host"),
        ({"Host": HOST, "AuthTokn": SECRET}, "unknown key; did you mean AuthToken?"),
        ({"Host": HOST, "Mirrors": ["mirror.example.org"]}, r"Mirrors\[0\]: must be an http:// or https:// address"),
        ({"Host": HOST, "Mirrors": ["http://mirror.example.org"]}, "a mirror without TLS needs Insecure: true"),
        ({"Host": HOST, "AuthPath": "http://auth.example.org"}, "AuthPath without TLS needs Insecure: true"),
        ({"Host": HOST, "AuthPath": "ftp://auth.example.org"}, "AuthPath: must be an http"),
        ({"Host": HOST, "ClientKey": "/k"}, "ClientKey needs ClientCert beside it"),
        ({"Host": HOST, "ClientCert": "k"}, "ClientCert: must be an absolute path"),
        ({"Host": HOST, "CA": "k"}, r"CA\[0\]: must be an absolute path"),
        ({"Host": HOST, "Insecure": "perhaps"}, "Insecure: "),
    ],
)
def test_mistakes_are_named(entry: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        parse({"Registries": [entry]})
    assert SECRET not in str(caught.value)


def test_a_registry_stands_once() -> None:
    with pytest.raises(ConfigError, match=r"index\.docker\.io stands twice"):
        parse({"Registries": [{"Host": "docker.io"}, {"Host": "index.docker.io"}]})


def test_what_portoshim_has_always_taken() -> None:
    parse(
        {
            "Registries": [
                {"Host": "registry-1.docker.io", "AuthToken": f"file:/etc/{SECRET}"},
                {"Host": "quay.io", "AuthPath": "quay.io/v2/auth", "AuthService": "quay.io"},
                {"Host": "cr.example.org:5000", "AuthToken": f"Basic {SECRET}"},
            ]
        }
    )


def test_no_secret_is_shown() -> None:
    entry = {"Host": HOST, "AuthToken": SECRET, "AuthPath": f"https://user:{SECRET}@auth.example.org/token"}
    configuration = parse({"Registries": [entry]})
    shown = configuration.dump() + configuration.describe() + repr(vars(configuration))
    assert SECRET not in shown
    assert "https://**********@auth.example.org/token" in configuration.dump()


def test_several_files_and_directories() -> None:
    from shim_registry_auth.settings import RegistryAuthSettings

    one = parse({"DockerConfig": "/a", "ConfigPath": "/a:/b"}).get(RegistryAuthSettings)
    two = parse({"DockerConfig": ["/a"], "ConfigPath": ["/a", "/b"]}).get(RegistryAuthSettings)
    assert one == two
    with pytest.raises(ConfigError, match="must be an absolute path"):
        parse({"ConfigPath": "a:b"})


def test_the_built_in_ones_can_be_replaced() -> None:
    from shim_registry_auth.settings import RegistryAuthSettings

    settings = parse({"Registries": [{"Host": "quay.io"}]}).get(RegistryAuthSettings)
    quay, hub = settings.registry("quay.io"), settings.registry("docker.io")
    assert quay is not None
    assert hub is not None
    assert quay.auth_path.get_secret_value() == ""
    default = parse({}).get(RegistryAuthSettings).registry("quay.io")
    assert default is not None
    assert default.auth_path.get_secret_value() == "https://quay.io/v2/auth"


def test_runtime_info_has_no_secret() -> None:
    info = make({"Registries": [{"Host": HOST, "AuthToken": SECRET, "Mirrors": ["https://m"]}]}).runtime_info()
    assert SECRET not in str(info)
    assert '"registry.example.org": {"mirrors": ["https://m"]' in info["registries"]
