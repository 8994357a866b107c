"""What the tests of registry_auth share."""

from __future__ import annotations

from typing import Any

from shim_registry_auth.plugin import RegistryAuth as Plugin
from shim_registry_auth.settings import RegistryAuthSettings

from shim_core import config, testing
from shim_core.types import ImageReference, RegistryAuth, RegistryCredentials, Shim

SECRET = "S3CR3T-do-not-leak"


def image(registry: str = "registry.example.org", repository: str = "team/app") -> ImageReference:
    return ImageReference(registry, repository, "latest")


def parse(images: dict[str, Any]) -> config.Config:
    return config.parse({"Images": images}, [RegistryAuthSettings])


def make(images: dict[str, Any] | None = None) -> Plugin:
    """The plugin, configured."""
    plugin = Plugin()
    plugin.shim_configure(Shim(parse(images or {}), testing.manager().hook))
    return plugin


def credentials(
    plugin: Plugin,
    registry: str = "registry.example.org",
    auth: RegistryAuth | None = None,
    repository: str = "team/app",
) -> RegistryCredentials | None:
    return plugin.registry_credentials(image(registry, repository), auth, testing.context())
