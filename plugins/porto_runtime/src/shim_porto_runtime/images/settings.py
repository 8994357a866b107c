"""The puller's keys in the section ``Images``. Where and how registries are asked belongs to ``registry_auth``."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from shim_core.config import Duration, Section
from shim_core.errors import InvalidArgument
from shim_porto_runtime.images import reference
from shim_porto_runtime.images.platforms import Platform

NO_PAUSE_IMAGE = "none"

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"(\d{1,15})\s*([A-Za-z]*)")


def parse_size(value: object) -> int:
    """Bytes of a size written with its unit: ``512MiB``, ``16GiB``.

    :raises ValueError: it is none; the text says what one looks like.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError("not a size: write a number of bytes, or one with its unit, such as 512MiB or 16GiB")
    return int(match[1]) * _UNITS[match[2].upper()]


def format_size(size_bytes: int) -> str:
    """The largest unit that divides it: 1024 → ``1KiB``."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


Size = Annotated[
    int, BeforeValidator(parse_size), PlainSerializer(format_size, return_type=str, when_used="json"), Field(gt=0)
]


class ImageSettings(Section):
    """``Images``, the puller's part."""

    section: ClassVar[str] = "Images"

    pause_image: str = Field(
        "registry.k8s.io/pause:3.7",
        description="The image of sandboxes; never removed by kubelet's image collection. `none`: sandboxes need none.",
    )
    pinned: tuple[str, ...] = Field(
        (),
        description="Images that kubelet's image collection leaves alone: names, tags and digests, * as in file names.",
    )
    place: str = Field("", description="The Porto place that layers are imported into; Porto's own when empty.")
    platform: str = Field(
        "", description="Of a multi-platform image, take this one: linux/arm64/v8. Empty: this machine's."
    )
    max_concurrent_downloads: int = Field(3, ge=1, le=64, description="Layers fetched at once for one image.")
    pull_progress_timeout: Duration = Field(300.0, description="A pull that gets nothing for this long is given up.")
    max_layer_size: Size = Field(32 << 30, description="The largest layer, unpacked; a larger one fails the pull.")
    max_image_size: Size = Field(128 << 30, description="The largest image, all layers unpacked.")
    keep_blobs: Literal["none", "loaded", "all"] = Field(
        "loaded",
        description="Layers to keep in packed form as well, for `images save`: those of images that came from a file"
        " (a registry has the others), all, or none.",
    )

    @field_validator("pause_image")
    @classmethod
    def _is_reference(cls, value: str) -> str:
        if value != NO_PAUSE_IMAGE:
            try:
                reference.parse(value)
            except InvalidArgument as err:
                raise ValueError(f"{err.message.removeprefix('image: ')}; write an image reference, or none") from None
        return value

    @field_validator("place")
    @classmethod
    def _is_place(cls, value: str) -> str:
        normal = value == "" or (value.startswith("/") and ".." not in value.split("/") and "\0" not in value)
        if not normal:
            raise ValueError("must be an absolute path without '..', or empty")
        return value.rstrip("/") or ("/" if value else "")

    @field_validator("platform")
    @classmethod
    def _is_platform(cls, value: str) -> str:
        if value:
            Platform.parse(value)
        return value

    @field_validator("pull_progress_timeout")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("must be longer than nothing, such as 5m")
        return value
