"""What the store knows: images, layers, references."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from shim_porto_runtime.images.documents import ImageConfig

_NUMERIC_USER = re.compile(r"[0-9]{1,10}")
_MAX_UID = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is here, complete and verified."""

    id: str
    """The config's digest, ``sha256:...``."""
    repo_tags: tuple[str, ...]
    """``docker.io/library/busybox:latest``."""
    repo_digests: tuple[str, ...]
    """``docker.io/library/busybox@sha256:...``."""
    size_bytes: int
    """Of all its layers, unpacked; layers it shares with others included."""
    pinned: bool
    config: ImageConfig
    layers: tuple[str, ...]
    """Names of Porto layers, in the order of a volume's property: the top one first."""
    diff_ids: tuple[str, ...] = ()
    """Digests of the layers, the lowest first."""

    @property
    def uid(self) -> int | None:
        """The user's number, if the image gives one that a process can have (CRI ``Image.uid``)."""
        user = self.config.user.partition(":")[0]
        if _NUMERIC_USER.fullmatch(user) and int(user) <= _MAX_UID:
            return int(user)
        return 0 if not user else None

    @property
    def username(self) -> str:
        """The user's name, if the image gives no number (CRI ``Image.username``)."""
        return self.config.user.partition(":")[0] if self.uid is None else ""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that was imported into Porto."""

    diff_id: str
    name: str
    """Porto's name for it."""
    place: str
    """The Porto place it is in; empty for Porto's own."""
    size_bytes: int
    """On disk."""
    inodes: int
    boot_id: str
    """The boot of the machine it was imported in."""
    synced: bool
    """True once it is known to have reached the disk; until then it doesn't survive a crash of the machine."""


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as it came, byte for byte."""

    digest: str
    media_type: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image as it is written down."""

    id: str
    config: bytes = field(repr=False)
    """The config document, byte for byte."""
    manifest_digest: str
    diff_ids: tuple[str, ...]
    from_file: bool
    """It was loaded from an archive: there may be no registry to fetch it from again."""


@dataclass(frozen=True, slots=True)
class Index:
    """All images at one moment; never changed, only replaced."""

    images: Mapping[str, Image] = field(default_factory=dict)
    """By id, in the order of ids."""
    by_reference: Mapping[str, str] = field(default_factory=dict)
    """Ids by full reference."""
    used_bytes: int = 0
    """Of all layers and kept blobs; shared ones once."""
    used_inodes: int = 0
