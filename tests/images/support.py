"""What the tests of images share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shim_porto_runtime.images import Image, ImageService, ImageSettings
from shim_porto_runtime.images.registry import Patience
from shim_registry_auth.plugin import RegistryAuth as RegistryAuthPlugin
from shim_registry_auth.settings import RegistryAuthSettings

from porto_api import Client
from shim_core import config, testing
from shim_core.context import CallContext
from shim_core.types import RegistryAuth, Shim
from tests.images.fakeporto import FakePorto
from tools.registry import LocalRegistry

IMPATIENT = Patience(tries=5, first_delay_s=0.01)


@dataclasses.dataclass
class Node:
    """An image service with all it stands on."""

    service: ImageService
    client: Client
    state_dir: Path
    layers_in_use: set[str]
    fake: FakePorto | None

    def pull(self, name: str, auth: RegistryAuth | None = None, context: CallContext | None = None) -> Image:
        return self.service.pull(name, auth, context or testing.context("PullImage"))

    def layer_names(self) -> set[str]:
        """Layers of ours that Porto has."""
        return {layer.name for layer in self.client.list_layers(mask="portoshim-*")}

    def temporary_files(self) -> list[Path]:
        return [path for path in (self.state_dir / "images" / "tmp").rglob("*") if path.is_file()]

    def layer_dir(self, image: Image, index: int = 0) -> Path:
        """The directory of an image's layer, the lowest one first."""
        place = self.fake.place if self.fake is not None else Path("/place")
        return place / "porto_layers" / image.layers[len(image.layers) - 1 - index]


def open_node(
    images: dict[str, Any], porto_socket: str | None, state_dir: Path, fake: FakePorto | None = None, **plugins: Any
) -> Node:
    """A node that is started.

    :param plugins: asked before the registry plugin.
    """
    parsed = config.parse({"Images": images}, [RegistryAuthSettings, ImageSettings])
    plugin = RegistryAuthPlugin()
    manager = testing.manager(**plugins, registry_auth=plugin)
    plugin.shim_configure(Shim(parsed, manager.hook))
    client = Client(porto_socket)
    in_use: set[str] = set()
    service = ImageService(
        client,
        manager.hook,
        parsed.get(ImageSettings),
        lambda: in_use,
        state_dir=state_dir,
        images_dir=str(fake.layers_dir) if fake is not None else "/place/porto_layers",
        patience=IMPATIENT,
    )
    service.start()
    return Node(service, client, state_dir, in_use, fake)


MakeNode = Callable[..., Node]


def entry(registry: LocalRegistry, **keys: Any) -> dict[str, Any]:
    """The entry of Images.Registries that trusts a registry's CA."""
    return {"Host": registry.address, "CA": str(registry.ca_path), **keys}
