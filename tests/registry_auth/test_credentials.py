"""Who we are at a registry: every source, in its order, and only for the registry it is meant for."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from shim_registry_auth.plugin import RegistryAuth as Plugin

from shim_core import errors, testing
from shim_core.hookspecs import hookimpl
from shim_core.types import ImageReference, RegistryAuth, RegistryCredentials
from tests.registry_auth.support import SECRET, credentials, image, make

PAIR = base64.b64encode(f"user:{SECRET}".encode()).decode()
USER = RegistryCredentials(username="user", password=SECRET)

MakeHelper = Callable[[str, str], Path]


# -- with the pull -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auth", "expected"),
    [
        (RegistryAuth(username="user", password=SECRET), USER),
        (RegistryAuth(username="user"), RegistryCredentials(username="user")),
        (RegistryAuth(auth=PAIR), USER),
        (RegistryAuth(username="user", password=SECRET, auth="ignored"), USER),
        (RegistryAuth(identity_token="i"), RegistryCredentials(identity_token="i")),
        (RegistryAuth(identity_token="i", username="u", password="p"), RegistryCredentials(identity_token="i")),
        (RegistryAuth(registry_token="r"), RegistryCredentials(registry_token="r")),
        (RegistryAuth(password="p"), RegistryCredentials(registry_token="p")),
        (RegistryAuth(server_address="registry.example.org"), None),
        (None, None),
    ],
)
def test_what_came_with_the_pull(auth: RegistryAuth | None, expected: RegistryCredentials | None) -> None:
    assert credentials(make(), auth=auth) == expected


@pytest.mark.parametrize(
    "auth", ["not base64!", base64.b64encode(b"nocolon").decode(), base64.b64encode(b"\xff:x").decode()]
)
def test_auth_that_is_malformed(auth: str) -> None:
    with pytest.raises(errors.Unauthenticated, match=r"auth is not base64 of user:password") as caught:
        credentials(make(), auth=RegistryAuth(auth=auth))
    assert auth not in caught.value.message


@pytest.mark.parametrize(
    ("address", "registry", "goes"),
    [
        ("", "registry.example.org", True),
        ("registry.example.org", "registry.example.org", True),
        ("https://registry.example.org", "registry.example.org", True),
        ("https://registry.example.org/v2/", "registry.example.org", True),
        ("https://registry.example.org/v1/", "registry.example.org", True),
        ("REGISTRY.Example.Org", "registry.example.org", True),
        ("registry.example.org:443", "registry.example.org", True),
        ("registry.example.org:5000", "registry.example.org:5000", True),
        ("registry.example.org", "registry.example.org:5000", False),
        ("registry.example.org:5000", "registry.example.org", False),
        ("example.org", "registry.example.org", False),
        ("registry.example.org.evil.test", "registry.example.org", False),
        ("evil-registry.example.org", "registry.example.org", False),
        ("https://registry.example.org@evil.test/", "registry.example.org", False),
        ("https://index.docker.io/v1/", "docker.io", True),
        ("docker.io", "docker.io", True),
        ("registry-1.docker.io", "docker.io", True),
        ("auth.docker.io", "docker.io", False),
    ],
)
def test_credentials_go_to_the_server_they_are_for(address: str, registry: str, goes: bool) -> None:
    auth = RegistryAuth(username="user", password=SECRET, server_address=address)
    assert credentials(make(), registry, auth) == (USER if goes else None)


# -- of the node -------------------------------------------------------------------------------------------------------


def test_the_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"registry.example.org": {"auth": PAIR}}}))
    both = make(
        {
            "Registries": [{"Host": "registry.example.org", "AuthToken": "Bearer configured"}],
            "DockerConfig": str(tmp_path / "config.json"),
        }
    )
    with_pull = RegistryAuth(username="a", password="b")
    assert credentials(both, auth=with_pull) == RegistryCredentials(username="a", password="b")
    elsewhere = RegistryAuth(username="a", password="b", server_address="other.example.org")
    assert credentials(both, auth=elsewhere) == RegistryCredentials(registry_token="configured")
    assert credentials(both) == RegistryCredentials(registry_token="configured")
    docker = make({"DockerConfig": [str(tmp_path / "none.json"), str(tmp_path / "config.json")]})
    assert credentials(docker) == USER
    assert credentials(docker, "other.example.org") is None


def test_another_plugin_is_asked_first() -> None:
    class Vault:
        @hookimpl
        def registry_credentials(self, image: ImageReference) -> RegistryCredentials | None:
            return RegistryCredentials(header="of the vault") if image.registry == "registry.example.org" else None

    # Registered after it, as if it stood last in Plugins.Order.
    manager = testing.manager(registry_auth=make(), vault=Vault())
    ask = manager.hook.registry_credentials
    auth = RegistryAuth(username="user", password=SECRET)
    assert ask(image=image(), auth=auth, context=testing.context()) == RegistryCredentials(header="of the vault")
    assert ask(image=image("other.example.org"), auth=auth, context=testing.context()) == USER


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (f"Basic {PAIR}", USER),
        (f"basic {PAIR}", USER),
        ("Bearer t", RegistryCredentials(registry_token="t")),
        ("t", RegistryCredentials(registry_token="t")),
        ("OAuth t", RegistryCredentials(header="OAuth t")),
        ("", None),
    ],
)
def test_auth_token(token: str, expected: RegistryCredentials | None) -> None:
    assert credentials(make({"Registries": [{"Host": "registry.example.org", "AuthToken": token}]})) == expected


@pytest.mark.parametrize("host", ["docker.io", "index.docker.io", "registry-1.docker.io"])
def test_docker_hub_has_many_names(host: str) -> None:
    plugin = make({"Registries": [{"Host": host, "AuthToken": "t"}]})
    assert credentials(plugin, "docker.io") == RegistryCredentials(registry_token="t")


def test_auth_path_may_hold_credentials() -> None:
    path = "https://us%40er:p%3Aw@auth.example.org/token"
    plugin = make({"Registries": [{"Host": "registry.example.org", "AuthPath": path}]})
    assert credentials(plugin) == RegistryCredentials(username="us@er", password="p:w")


def test_a_token_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "token"
    plugin = make({"Registries": [{"Host": "registry.example.org", "AuthToken": f"file:{path}"}]})
    with pytest.raises(errors.Unauthenticated, match=r"token, the AuthToken of registry\.example\.org .* No such file"):
        credentials(plugin)
    for text in ("one", "two\n", "Bearer three"):
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)
        expected = text.strip().removeprefix("Bearer ")
        assert credentials(plugin) == RegistryCredentials(registry_token=expected)
    path.write_text("four!")  # in place, within the same second
    assert credentials(plugin) == RegistryCredentials(registry_token="four!")


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"\xff", b"a\0b", b"x" * 2_000_000])
def test_a_token_file_that_is_no_good(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    plugin = make({"Registries": [{"Host": "registry.example.org", "AuthToken": f"file:{tmp_path}/token"}]})
    with pytest.raises(errors.Unauthenticated, match="can't be used") as caught:
        credentials(plugin)
    assert "lines" not in caught.value.message


# -- Docker's files ----------------------------------------------------------------------------------------------------


def docker(tmp_path: Path, document: object) -> Plugin:
    (tmp_path / "config.json").write_text(json.dumps(document))
    return make({"DockerConfig": str(tmp_path / "config.json")})


@pytest.mark.parametrize(
    ("key", "registry"),
    [
        ("registry.example.org", "registry.example.org"),
        ("https://registry.example.org", "registry.example.org"),
        ("https://registry.example.org/v1/", "registry.example.org"),
        ("https://registry.example.org/v2/", "registry.example.org"),
        ("registry.example.org:5000", "registry.example.org:5000"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
    ],
)
def test_keys_of_auths(tmp_path: Path, key: str, registry: str) -> None:
    plugin = docker(tmp_path, {"auths": {key: {"auth": PAIR}}})
    assert credentials(plugin, registry) == USER
    assert credentials(plugin, "other.example.org") is None


def test_the_narrowest_key_counts(tmp_path: Path) -> None:
    auths = {
        "registry.example.org": {"username": "all", "password": "p"},
        "registry.example.org/team": {"username": "team", "password": "p"},
        "registry.example.org/team/app": {"username": "app", "password": "p"},
    }
    plugin = docker(tmp_path, {"auths": auths})
    for repository, user in (("team/app", "app"), ("team/other", "team"), ("teammate", "all"), ("x/team", "all")):
        found = credentials(plugin, repository=repository)
        assert found is not None
        assert found.username == user


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"auth": PAIR}, USER),
        ({"username": "user", "password": SECRET}, USER),
        ({"identitytoken": "i", "auth": PAIR}, RegistryCredentials(identity_token="i")),
        ({"registrytoken": "r"}, RegistryCredentials(registry_token="r")),
        ({}, None),
    ],
)
def test_entries_of_auths(tmp_path: Path, entry: dict[str, str], expected: RegistryCredentials | None) -> None:
    assert credentials(docker(tmp_path, {"auths": {"registry.example.org": entry}})) == expected


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"auths": []}', '{"auths": {"x": 1}}', '{"auths": {"x": {"auth": "!"}}}', '{"credsStore": 1}',
     '{"credHelpers": {"x": 1}}', '{"auths": {"x": {"password": 1}}}', "[" * 100_000],
)  # fmt: skip
def test_a_config_that_is_no_good(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    plugin = make({"DockerConfig": str(tmp_path / "config.json")})
    with pytest.raises(errors.Unauthenticated, match=r"config\.json \(Images\.DockerConfig\) can't be used"):
        credentials(plugin)


# -- credential helpers ------------------------------------------------------------------------------------------------


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeHelper:
    """Makes a credential helper of a shell script."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def make_helper(name: str, script: str) -> Path:
        path = programs / f"docker-credential-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return programs

    return make_helper


def test_a_helper_for_a_registry(tmp_path: Path, helper: MakeHelper) -> None:
    answer = json.dumps({"ServerURL": "x", "Username": "user", "Secret": SECRET})
    helper(
        "mine", f"cat /proc/$$/cmdline > $0.argv; read -r server; echo $1 $server >> {tmp_path}/asked; echo '{answer}'"
    )
    plugin = docker(tmp_path, {"credHelpers": {"registry.example.org": "mine"}, "auths": {"registry.example.org": {}}})
    assert credentials(plugin) == USER
    assert (tmp_path / "asked").read_text() == "get registry.example.org\n"
    assert "example.org" not in (tmp_path / "bin" / "docker-credential-mine.argv").read_text()
    assert credentials(plugin, "other.example.org") is None


def test_the_helper_for_all(tmp_path: Path, helper: MakeHelper) -> None:
    helper("store", 'read -r server; echo "$server" >> "$0.asked"; echo \'{"Username":"<token>","Secret":"i"}\'')
    plugin = docker(tmp_path, {"credsStore": "store", "auths": {"inline.example.org": {"auth": PAIR}}})
    assert credentials(plugin) == RegistryCredentials(identity_token="i")
    assert credentials(plugin, "docker.io") == RegistryCredentials(identity_token="i")
    assert credentials(plugin, "inline.example.org") == USER
    asked = (tmp_path / "bin" / "docker-credential-store.asked").read_text()
    assert asked == "registry.example.org\nhttps://index.docker.io/v1/\n"


def test_a_helper_that_knows_nothing(tmp_path: Path, helper: MakeHelper) -> None:
    helper("none", 'echo "credentials not found in native keychain"; exit 1')
    assert credentials(docker(tmp_path, {"credsStore": "none"})) is None


@pytest.mark.parametrize(
    ("script", "pattern"),
    [
        (f"echo {SECRET}; exit 3", "failed for registry.example.org, exit status 3"),
        (f"echo {SECRET}", "holds no Username and Secret"),
        ("echo '{\"Username\": 1}'", "holds no Username and Secret"),
        ("echo '[]'", "holds no Username and Secret"),
        ("head -c 2000000 /dev/zero", "larger than"),
    ],
)
def test_a_helper_that_fails(tmp_path: Path, helper: MakeHelper, script: str, pattern: str) -> None:
    helper("bad", script)
    with pytest.raises(errors.Unauthenticated, match=rf"docker-credential-bad: .*{pattern}") as caught:
        credentials(docker(tmp_path, {"credsStore": "bad"}))
    assert SECRET not in caught.value.message


def test_a_helper_that_hangs(tmp_path: Path, helper: MakeHelper, monkeypatch: pytest.MonkeyPatch) -> None:
    helper("slow", f"sleep 60 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr("shim_registry_auth.dockerconfig.HELPER_TIMEOUT_S", 0.3)
    with pytest.raises(errors.Unauthenticated, match="gave no answer within"):
        credentials(docker(tmp_path, {"credsStore": "slow"}))
    pid = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 60
    while _is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("name", ["none-such", "../../bin/sh", "a/b", "", "-x", "$(id)"])
def test_helpers_that_do_not_exist(tmp_path: Path, name: str) -> None:
    plugin = docker(tmp_path, {"credHelpers": {"registry.example.org": name}})
    with pytest.raises(errors.Unauthenticated, match="no such credential helper on PATH"):
        credentials(plugin)
