"""What a pull and an archive have in common: from a top document to the layers an image consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shim_core import errors
from shim_porto_runtime.images import documents, platforms
from shim_porto_runtime.images.documents import BadDocument, Config, Descriptor, Index, Manifest
from shim_porto_runtime.images.model import Document
from shim_porto_runtime.images.platforms import Platform
from shim_porto_runtime.images.settings import ImageSettings

_MAX_INDEX_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Resolved:
    """A document, and what it says."""

    document: Document
    content: Manifest | Index


@dataclass(frozen=True, slots=True)
class Part:
    """A layer of a manifest, with what the config says is in it."""

    descriptor: Descriptor
    diff_id: str


class Assembly:
    """The rules for putting an image together on this machine."""

    def __init__(self, settings: ImageSettings) -> None:
        self._settings = settings
        self.platform = Platform.parse(settings.platform) if settings.platform else Platform.of_machine()

    def choose(self, what: str, top: Resolved, fetch: Callable[[Descriptor], Resolved]) -> tuple[Document, Manifest]:
        """The manifest for our platform.

        :param what: the image, for messages. :param fetch: gives what an index refers to.
        :raises errors.UnknownError: there is none.
        """
        document, content = top.document, top.content
        for depth in range(_MAX_INDEX_DEPTH + 1):
            if isinstance(content, Manifest):
                return document, content
            if depth < _MAX_INDEX_DEPTH:
                inner = fetch(self._entry_for(what, content))
                document, content = inner.document, inner.content
        raise errors.UnknownError(f"{what}: its indexes are nested more than {_MAX_INDEX_DEPTH} deep")

    def parts(self, what: str, manifest: Manifest, config: Config) -> list[Part]:
        """The layers of an image, the lowest first.

        :raises errors.UnknownError: manifest and config don't agree, or it isn't for this machine.
        """
        if len(config.diff_ids) != len(manifest.layers):
            raise errors.UnknownError(
                f"{what}: the manifest has {len(manifest.layers)} layers, and the config {len(config.diff_ids)}"
            )
        stated = config.platform
        if stated.os and stated.architecture and self.platform.runs(stated) is None:
            raise errors.UnknownError(f"{what}: made for {stated}, and this machine is {self.platform}")
        packed, limit = sum(layer.size_bytes for layer in manifest.layers), self._settings.max_image_size
        if packed > limit:
            raise errors.UnknownError(f"{what}: its layers have {packed} bytes; Images.MaxImageSize allows {limit}")
        for layer in manifest.layers:
            if layer.size_bytes > self._settings.max_layer_size:
                raise errors.UnknownError(
                    f"{what}: layer {layer.digest} has {layer.size_bytes} bytes; Images.MaxLayerSize allows"
                    f" {self._settings.max_layer_size}"
                )
        return [Part(*pair) for pair in zip(manifest.layers, config.diff_ids, strict=True)]

    def budget(self) -> Budget:
        """How much an image may take up."""
        return Budget(self._settings.max_image_size)

    def _entry_for(self, what: str, index: Index) -> Descriptor:
        named = [(entry.platform, entry) for entry in index.manifests if entry.platform is not None]
        if not named and len(index.manifests) == 1:
            return index.manifests[0]  # an index of one that names no platform is a plain wrapper
        chosen = platforms.best(self.platform, named)
        if chosen is None:
            there = platforms.describe([platform for platform, _ in named])
            raise errors.UnknownError(f"{what}: not made for {self.platform}; it is there for {there}")
        return chosen


class Budget:
    """How much an image's layers may take up together."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._spent = 0

    def spend(self, size_bytes: int) -> None:
        """Count a layer.

        :raises errors.UnknownError: that was one too many.
        """
        self._spent += size_bytes
        if self._spent > self._limit:
            raise errors.UnknownError(f"its layers are larger than {self._limit} bytes (Images.MaxImageSize)")


def read_config(what: str, digest: str, data: bytes) -> Config:
    """An image's config.

    :raises errors.UnknownError: it is no good.
    """
    try:
        return documents.parse_config(data)
    except BadDocument as err:
        raise errors.UnknownError(f"{what}: its config {digest} is refused: {err}") from None
