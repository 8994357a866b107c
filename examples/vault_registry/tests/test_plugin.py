"""The plugin by itself: `shim_core.testing` is all it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from shim_vault_registry.plugin import VaultRegistry, VaultSection

from shim_core import config, testing
from shim_core.errors import ConfigError, Unauthenticated
from shim_core.types import ImageReference, RegistryCredentials, Shim

APP = ImageReference("registry.example.org:5000", "team/app", "1.0")
OTHER = ImageReference("docker.io", "library/busybox", "latest")
FIRST, SECOND = "t0ken", "an0ther"


@pytest.fixture
def vault(tmp_path: Path) -> Path:
    (tmp_path / "registry.example.org_5000").write_text(f"{FIRST}\n")
    return tmp_path


def make(vault: Path, **keys: str) -> VaultRegistry:
    plugin = VaultRegistry()
    manager = testing.manager(vault_registry=plugin)
    parsed = config.parse({"Vault": {"Directory": str(vault), **keys}}, [VaultSection])
    manager.hook.shim_configure.call_historic(kwargs={"shim": Shim(parsed, manager.hook)})
    return plugin


def test_a_token_for_a_registry_in_the_vault(vault: Path) -> None:
    plugin = make(vault)
    assert plugin.registry_credentials(APP) == RegistryCredentials(registry_token=FIRST)
    assert plugin.registry_credentials(OTHER) is None


def test_a_new_token_is_used_at_once(vault: Path) -> None:
    plugin = make(vault)
    (vault / "registry.example.org_5000").write_text(SECOND)
    assert plugin.registry_credentials(APP) == RegistryCredentials(registry_token=SECOND)


def test_no_token_is_an_error_that_says_where_it_should_be(vault: Path) -> None:
    (vault / "registry.example.org_5000").write_text("")
    with pytest.raises(Unauthenticated, match=r"registry\.example\.org_5000: the vault's token is empty"):
        make(vault).registry_credentials(APP)


def test_the_mirror_comes_first(vault: Path) -> None:
    plugin = make(vault, Mirror="https://cache.example.org")
    endpoints = plugin.registry_endpoints(APP)
    assert endpoints is not None
    assert [endpoint.url for endpoint in endpoints] == [
        "https://cache.example.org/v2",
        "https://registry.example.org:5000/v2",
    ]
    assert plugin.registry_endpoints(OTHER) is None
    assert make(vault).registry_endpoints(APP) is None


def test_a_mistake_stops_the_start(vault: Path) -> None:
    with pytest.raises(ConfigError, match=r"Vault\.Mirror: must be an https:// address"):
        make(vault, Mirror="http://cache.example.org")


def test_the_status_holds_no_token(vault: Path) -> None:
    assert FIRST not in str(make(vault).runtime_info())
