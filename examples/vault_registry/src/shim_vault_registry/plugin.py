"""Registries whose tokens are files in a directory, which an agent of a secret store keeps fresh."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from shim_core.config import AbsolutePath, Section
from shim_core.errors import ConfigError, Unauthenticated
from shim_core.hookspecs import hookimpl
from shim_core.types import ImageReference, RegistryCredentials, RegistryEndpoint, Shim

MAX_TOKEN_BYTES = 64 * 1024


class VaultSection(Section):
    """The keys of this plugin: a section of its own in portoshim.yaml."""

    section: ClassVar[str] = "Vault"

    directory: AbsolutePath = Field("/run/vault/registries", description="Tokens, one file for each registry.")
    mirror: str = Field("", description="The https:// address of a mirror that is asked first for these registries.")


class VaultRegistry:
    """Answers for the registries that have a file in the vault, and for no others."""

    def __init__(self) -> None:
        self._directory = Path("/nonexistent")
        self._mirror = ""

    @hookimpl
    def shim_config_section(self) -> type[Section]:
        return VaultSection

    @hookimpl
    def shim_configure(self, shim: Shim) -> None:
        settings = shim.config.get(VaultSection)
        if settings.mirror and not settings.mirror.startswith("https://"):
            raise ConfigError("Vault.Mirror: must be an https:// address")
        self._directory = Path(settings.directory)
        self._mirror = settings.mirror.rstrip("/")

    @hookimpl
    def registry_credentials(self, image: ImageReference) -> RegistryCredentials | None:
        path = self._file(image)
        try:
            with path.open("rb") as file:
                token = file.read(MAX_TOKEN_BYTES).decode().strip()
        except FileNotFoundError:
            return None  # not one of ours: whoever is asked next may know it
        except (OSError, UnicodeDecodeError) as err:
            reason = err.strerror if isinstance(err, OSError) else "not text"
            raise Unauthenticated(f"{path}: the vault's token can't be read: {reason}") from None
        if not token:
            raise Unauthenticated(f"{path}: the vault's token is empty")
        return RegistryCredentials(registry_token=token)

    @hookimpl
    def registry_endpoints(self, image: ImageReference) -> Sequence[RegistryEndpoint] | None:
        if not self._mirror or not self._file(image).exists():
            return None
        host = self._mirror.removeprefix("https://").partition("/")[0]
        return [
            RegistryEndpoint(url=f"{self._mirror}/v2", registry=host),
            RegistryEndpoint(url=f"https://{image.registry}/v2", registry=image.registry),
        ]

    @hookimpl
    def runtime_info(self) -> Mapping[str, str]:
        """What `crictl info` shows: which registries there are tokens for. Never a token."""
        names = sorted(os.listdir(self._directory)) if self._directory.is_dir() else []
        return {"vault": f'{{"registries": {len(names)}}}'}

    def _file(self, image: ImageReference) -> Path:
        """The file of an image's registry. The name can't lead elsewhere: references have a grammar without ``/..``."""
        return self._directory / image.registry.replace(":", "_")
