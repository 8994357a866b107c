"""The documents of an image: manifests, indexes, configs (OCI image-spec, Docker schema 2), read with suspicion.

Everything here is pure: bytes in, frozen objects out, :class:`BadDocument` for what breaks a rule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shim_porto_runtime.images import digests
from shim_porto_runtime.images.platforms import Platform

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
ACCEPT = ", ".join((OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST))

MAX_DOCUMENT_BYTES = 4 * 1024 * 1024
"""What registries and runtimes agree on for manifests; configs are given the same."""
MAX_LAYERS = 256
"""Overlayfs takes 500; Docker makes 127 at most."""
MAX_INDEX_ENTRIES = 4096

_SCHEMA_1_TYPES = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)
# What servers say when they don't know better; the document's own word counts then.
_VAGUE_TYPES = frozenset({"", "application/json", "text/plain", "application/octet-stream"})
_CONFIG_TYPES = frozenset({OCI_CONFIG, DOCKER_CONFIG})
_LAYER_PREFIXES = (
    "application/vnd.oci.image.layer.",
    "application/vnd.docker.image.rootfs.diff.",
    "application/vnd.docker.image.rootfs.foreign.diff.",
    "application/vnd.docker.container.image.rootfs.diff",
)


class BadDocument(ValueError):
    """A document that is not what it should be; the text names the rule it breaks."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A pointer to content: what it is, its digest, its size."""

    media_type: str
    digest: str
    size_bytes: int
    platform: Platform | None = None


@dataclass(frozen=True, slots=True)
class Index:
    """An image for several platforms."""

    media_type: str
    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image for one platform."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    """The lowest first."""


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an image says about the containers made of it."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    """``NAME=value``."""
    user: str = ""
    working_dir: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    exposed_ports: tuple[str, ...] = ()
    """``80/tcp``."""


@dataclass(frozen=True, slots=True)
class Config:
    """An image's config document."""

    platform: Platform
    diff_ids: tuple[str, ...]
    """Digests of the uncompressed layers, the lowest first."""
    config: ImageConfig


def parse_manifest(data: bytes, content_type: str = "") -> Manifest | Index:
    """A manifest or an index, whichever it is.

    :param content_type: what the server or the descriptor called it; must agree with the document.
    :raises BadDocument: it is neither, or both.
    """
    content_type = content_type.partition(";")[0].strip().lower()
    if content_type in _SCHEMA_1_TYPES:
        raise BadDocument("Docker schema 1 manifests are not supported: push the image again with a current tool")
    document = load(data)
    media_type = _text(document, "mediaType")
    if document.get("schemaVersion") == 1 or "fsLayers" in document:
        raise BadDocument("Docker schema 1 manifests are not supported: push the image again with a current tool")
    is_index, is_manifest = "manifests" in document, "layers" in document or "config" in document
    if is_index and is_manifest:
        raise BadDocument("the document is a manifest and an index at once")
    if not is_index and not is_manifest:
        raise BadDocument("the document is neither a manifest nor an index")
    known = INDEX_TYPES if is_index else MANIFEST_TYPES
    for name in (media_type, content_type):
        if name not in known and name not in _VAGUE_TYPES:
            raise BadDocument(f"the document is an {'index' if is_index else 'image manifest'}, and is called {name!r}")
    if media_type and content_type not in _VAGUE_TYPES and media_type != content_type:
        raise BadDocument(f"the document is called {content_type!r} by the server and {media_type!r} by itself")
    own_type = next((name for name in (media_type, content_type) if name in known), None)
    if is_index:
        entries = _list(document, "manifests", MAX_INDEX_ENTRIES)
        return Index(own_type or OCI_INDEX, tuple(parse_descriptor(entry, "manifests") for entry in entries))
    config = parse_descriptor(document.get("config"), "config")
    if config.media_type not in _CONFIG_TYPES:
        raise BadDocument(f"not a container image: its config is of type {config.media_type!r}")
    layers = tuple(parse_descriptor(layer, "layers") for layer in _list(document, "layers", MAX_LAYERS))
    for layer in layers:
        if not layer.media_type.startswith(_LAYER_PREFIXES) or layer.media_type.endswith("+encrypted"):
            raise BadDocument(f"layers of type {layer.media_type!r} are not supported")
    return Manifest(own_type or OCI_MANIFEST, config, layers)


def parse_config(data: bytes) -> Config:
    """An image's config.

    :raises BadDocument: it is none.
    """
    document = load(data)
    rootfs = document.get("rootfs")
    if not isinstance(rootfs, dict) or rootfs.get("type") != "layers":
        raise BadDocument("the config has no rootfs of type 'layers'")
    try:
        diff_ids = tuple(digests.check(item) for item in _list(rootfs, "diff_ids", MAX_LAYERS))
    except digests.BadDigest as err:
        raise BadDocument(f"rootfs.diff_ids: {err}") from None
    platform = Platform(
        _text(document, "os").lower(), _text(document, "architecture").lower(), _text(document, "variant").lower()
    )
    return Config(platform, diff_ids, _image_config(document.get("config")))


def load(data: bytes) -> dict[str, Any]:
    """A JSON object.

    :raises BadDocument: it is none.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise BadDocument("not valid JSON") from None
    if not isinstance(document, dict):
        raise BadDocument("not a JSON object")
    return document


def _image_config(value: Any) -> ImageConfig:
    if value is None:
        return ImageConfig()
    if not isinstance(value, dict):
        raise BadDocument("config: not an object")
    labels = value.get("Labels") or {}
    if not isinstance(labels, dict) or not all(isinstance(item, str) for item in labels.values()):
        raise BadDocument("config.Labels: not an object of texts")
    return ImageConfig(
        entrypoint=_texts(value, "Entrypoint"),
        cmd=_texts(value, "Cmd"),
        env=_texts(value, "Env"),
        user=_text(value, "User"),
        working_dir=_text(value, "WorkingDir"),
        stop_signal=_text(value, "StopSignal"),
        volumes=_keys(value, "Volumes"),
        labels=labels,
        exposed_ports=_keys(value, "ExposedPorts"),
    )


def parse_descriptor(value: Any, where: str) -> Descriptor:
    """A descriptor of a document.

    :param where: for messages. :raises BadDocument: it is none.
    """
    if not isinstance(value, dict):
        raise BadDocument(f"{where}: not a descriptor")
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62:
        raise BadDocument(f"{where}: size is not a number of bytes")
    try:
        digest = digests.check(value.get("digest"))
    except digests.BadDigest as err:
        raise BadDocument(f"{where}: {err}") from None
    platform = value.get("platform")
    if platform is not None and not isinstance(platform, dict):
        raise BadDocument(f"{where}: platform is not an object")
    return Descriptor(
        _text(value, "mediaType").lower(),
        digest,
        size,
        Platform(
            _text(platform, "os").lower(), _text(platform, "architecture").lower(), _text(platform, "variant").lower()
        )
        if platform
        else None,
    )


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadDocument(f"{key}: not a text")
    if "\0" in value:
        raise BadDocument(f"{key}: holds a NUL byte")
    return value


def _list(document: Mapping[str, Any], key: str, limit: int) -> Sequence[Any]:
    value = document.get(key)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadDocument(f"{key}: not a list")
    if len(value) > limit:
        raise BadDocument(f"{key}: {len(value)} entries, and {limit} is the limit")
    return value


def _texts(document: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = document.get(key)
    if value is None:
        return ()
    if isinstance(value, str):  # written by very old builders
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, str) and "\0" not in item for item in value):
        raise BadDocument(f"config.{key}: not a list of texts")
    return tuple(value)


def _keys(document: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = document.get(key)
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise BadDocument(f"config.{key}: not an object")
    return tuple(value)
