"""Where an image is asked for: Images.Registries, and hosts.toml as containerd reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shim_core import errors
from shim_core.types import RegistryEndpoint
from tests.registry_auth.support import image, make

HOST = "registry.example.org"


def endpoints(settings: dict[str, Any], registry: str = HOST) -> list[RegistryEndpoint] | None:
    found = make({"ConfigPath": "/nonexistent", **settings}).registry_endpoints(image(registry))
    return None if found is None else list(found)


# -- Images.Registries -------------------------------------------------------------------------------------------------


def test_nothing_configured_is_no_answer() -> None:
    assert endpoints({}) is None
    assert endpoints({"Registries": [{"Host": HOST, "AuthToken": "t"}]}) is None
    assert endpoints({}, "docker.io") is None


def test_mirrors_come_first_and_the_registry_last() -> None:
    entry = {
        "Host": HOST,
        "Mirrors": ["https://one.example.org", "https://two.example.org:5000/v2/proxy/"],
        "CA": "/ca",
    }
    assert endpoints({"Registries": [entry]}) == [
        RegistryEndpoint("https://one.example.org/v2", "one.example.org", ca_paths=("/ca",)),
        RegistryEndpoint("https://two.example.org:5000/v2/proxy/v2", "two.example.org:5000", ca_paths=("/ca",)),
        RegistryEndpoint("https://registry.example.org/v2", HOST, ca_paths=("/ca",)),
    ]


def test_a_mirror_with_an_entry_of_its_own() -> None:
    entries = [
        {
            "Host": HOST,
            "Mirrors": ["https://mirror.example.org"],
            "CA": "/ca",
            "ClientCert": "/cert",
            "ClientKey": "/key",
        },
        {"Host": "mirror.example.org", "CA": ["/other-ca"], "ClientCert": "/other-cert"},
    ]
    mirror, own = endpoints({"Registries": entries}) or []
    assert (mirror.ca_paths, mirror.client_certs) == (("/other-ca",), (("/other-cert", ""),))
    assert (own.ca_paths, own.client_certs) == (("/ca",), (("/cert", "/key"),))


def test_our_certificate_is_not_shown_to_mirrors() -> None:
    entry = {"Host": HOST, "Mirrors": ["https://mirror.example.org"], "ClientCert": "/cert", "ClientKey": "/key"}
    mirror, own = endpoints({"Registries": [entry]}) or []
    assert mirror.client_certs == ()
    assert own.client_certs == (("/cert", "/key"),)


def test_insecure_tries_tls_first() -> None:
    found = endpoints({"Registries": [{"Host": f"{HOST}:5000", "Insecure": True}]}, f"{HOST}:5000") or []
    assert [(one.url, one.insecure) for one in found] == [
        (f"https://{HOST}:5000/v2", True), (f"http://{HOST}:5000/v2", True),
    ]  # fmt: skip


@pytest.mark.parametrize("host", ["docker.io", "index.docker.io", "registry-1.docker.io"])
def test_docker_hub(host: str) -> None:
    found = endpoints({"Registries": [{"Host": host, "Mirrors": ["https://mirror.gcr.io"]}]}, "docker.io") or []
    assert [(one.url, one.registry) for one in found] == [
        ("https://mirror.gcr.io/v2", "mirror.gcr.io"), ("https://registry-1.docker.io/v2", "docker.io"),
    ]  # fmt: skip


# -- hosts.toml --------------------------------------------------------------------------------------------------------


def from_toml(tmp_path: Path, text: str, registry: str = HOST, directory: str = HOST) -> list[RegistryEndpoint]:
    where = tmp_path / directory
    where.mkdir(parents=True, exist_ok=True)
    (where / "hosts.toml").write_text(text)
    return endpoints({"ConfigPath": str(tmp_path)}, registry) or []


def test_a_whole_file(tmp_path: Path) -> None:
    text = """
        server = "https://upstream.example.org"
        ca = ["/etc/a.pem", "b.pem"]

        [host."https://mirror.example.org:5000"]
          capabilities = ["pull"]
          ca = "mirror.pem"
          client = [["cert.pem", "key.pem"], ["/both.pem", ""]]
          dial_timeout = "1m30s"
          [host."https://mirror.example.org:5000".header]
            x-one = "1"
            x-many = ["2", "3"]

        [host."http://plain.example.org"]
          capabilities = ["resolve", "push"]

        [host."https://path.example.org/a/b"]
          skip_verify = true

        [host."https://override.example.org/a/b"]
          override_path = true
          client = "both.pem"

        [host."bare.example.org"]
    """
    base = str(tmp_path / HOST)
    assert from_toml(tmp_path, text) == [
        RegistryEndpoint(
            "https://mirror.example.org:5000/v2", "mirror.example.org:5000", can_resolve=False,
            ca_paths=(f"{base}/mirror.pem",),
            client_certs=((f"{base}/cert.pem", f"{base}/key.pem"), ("/both.pem", "")),
            headers={"x-one": "1", "x-many": "2, 3"}, connect_timeout_s=90.0,
        ),
        RegistryEndpoint("http://plain.example.org/v2", "plain.example.org", can_pull=False, insecure=True),
        RegistryEndpoint("https://path.example.org/a/b/v2", "path.example.org", insecure=True),
        RegistryEndpoint(
            "https://override.example.org/a/b", "override.example.org", client_certs=((f"{base}/both.pem", ""),)
        ),
        RegistryEndpoint("https://bare.example.org/v2", "bare.example.org"),
        RegistryEndpoint(
            "https://upstream.example.org/v2", HOST, ca_paths=("/etc/a.pem", f"{base}/b.pem")
        ),
    ]  # fmt: skip


def test_without_a_server_it_is_the_registry_itself(tmp_path: Path) -> None:
    assert from_toml(tmp_path, "") == [RegistryEndpoint(f"https://{HOST}/v2", HOST)]
    assert from_toml(tmp_path, "skip_verify = true", "docker.io", "docker.io") == [
        RegistryEndpoint("https://registry-1.docker.io/v2", "docker.io", insecure=True)
    ]
    named = from_toml(tmp_path, 'server = "https://registry-1.docker.io"', "docker.io", "docker.io")
    assert named == [RegistryEndpoint("https://registry-1.docker.io/v2", "docker.io")]


@pytest.mark.parametrize(
    ("registry", "directory"),
    [
        (f"{HOST}:5000", f"{HOST}_5000_"),
        (f"{HOST}:5000", f"{HOST}:5000"),
        (HOST, "_default"),
        ("[::1]:5000", "[::1]_5000_"),
    ],
)
def test_names_of_directories(tmp_path: Path, registry: str, directory: str) -> None:
    (found,) = from_toml(tmp_path, "skip_verify = true", registry, directory)
    assert (found.url, found.insecure) == (f"https://{registry}/v2", True)


def test_the_first_directory_counts(tmp_path: Path) -> None:
    for root, directory in (("one", "_default"), ("two", HOST)):
        (tmp_path / root / directory).mkdir(parents=True)
        (tmp_path / root / directory / "hosts.toml").write_text(f'server = "https://{root}.example.org"')
    found = endpoints({"ConfigPath": f"{tmp_path}/one:{tmp_path}/two"}) or []
    assert [one.url for one in found] == ["https://one.example.org/v2"]


def test_docker_style_certificates(tmp_path: Path) -> None:
    directory = tmp_path / HOST
    directory.mkdir()
    for name in ("a.crt", "b.crt", "client.cert", "client.key", "README"):
        (directory / name).touch()
    assert endpoints({"ConfigPath": str(tmp_path)}) == [
        RegistryEndpoint(
            f"https://{HOST}/v2", HOST, ca_paths=(f"{directory}/a.crt", f"{directory}/b.crt"),
            client_certs=((f"{directory}/client.cert", f"{directory}/client.key"),),
        )
    ]  # fmt: skip


def test_our_own_configuration_outweighs_hosts_toml(tmp_path: Path) -> None:
    (tmp_path / HOST).mkdir()
    (tmp_path / HOST / "hosts.toml").write_text('server = "https://toml.example.org"')
    settings = {"ConfigPath": str(tmp_path), "Registries": [{"Host": HOST, "CA": "/ca"}]}
    assert [one.url for one in endpoints(settings) or []] == [f"https://{HOST}/v2"]
    settings["Registries"] = [{"Host": HOST, "AuthToken": "only who we are"}]
    assert [one.url for one in endpoints(settings) or []] == ["https://toml.example.org/v2"]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("server = 1", "server: must be a text"),
        ('server = "ftp://x"', "server: must be an http"),
        ('server = "https://user:pw@x"', "server: must be an http"),
        ("nonsense", "hosts.toml: "),
        ("skip_verfy = true", "server: unknown key skip_verfy; known here: ca, capabilities"),
        ('skip_verify = "yes"', "skip_verify: must be true or false"),
        ('capabilities = ["fly"]', "capabilities: only pull, push, referrers, resolve are known"),
        ("capabilities = 1", "capabilities: must be a text or a list"),
        ("client = 1", "client: must be a file"),
        ('client = [["a", "b", "c"]]', "client: must be a file"),
        ('dial_timeout = "fast"', "dial_timeout: not a duration"),
        ("host = 1", "host: must be tables"),
        ("[host]\nx = 1", "host.x: must be a table"),
        ("[header]\nx = 1", "header.x: must be a text"),
        ('[header]\nx = "a\\nb"', "must be printable text"),
        ('[host."https://x"]\nca = [1]', r'host."https://x".ca: must be'),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, pattern: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=pattern) as caught:
        from_toml(tmp_path, text)
    assert caught.value.message.startswith(f"{tmp_path}/{HOST}/hosts.toml: ")


def test_a_file_without_end(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="larger than"):
        from_toml(tmp_path, "#" * 2_000_000)
