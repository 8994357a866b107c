"""Platforms: which part of a multi-platform image is for this machine (OCI image-spec, image index)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_MACHINES = {
    "x86_64": ("amd64", ""), "i386": ("386", ""), "i686": ("386", ""), "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v8"), "armv7l": ("arm", "v7"), "armv6l": ("arm", "v6"), "armv5tel": ("arm", "v5"),
    "loongarch64": ("loong64", ""), "riscv64": ("riscv64", ""), "ppc64le": ("ppc64le", ""), "s390x": ("s390x", ""),
}  # fmt: skip
_SYNONYMS = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "armhf": "arm", "armel": "arm"}


@dataclass(frozen=True, slots=True)
class Platform:
    """Operating system and processor by Go's names, as image indexes and configs give them."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """``linux/arm64/v8``.

        :raises ValueError: it is no platform.
        """
        parts = text.split("/")
        if not 2 <= len(parts) <= 3 or not all(part.isalnum() or "_" in part for part in parts):
            raise ValueError("must be os/architecture or os/architecture/variant, such as linux/arm64")
        return cls(parts[0].lower(), parts[1].lower(), parts[2].lower() if len(parts) == 3 else "").normal()

    @classmethod
    def of_machine(cls) -> Platform:
        """The platform we run on."""
        machine = os.uname().machine
        return cls("linux", *_MACHINES.get(machine, (machine, "")))

    def normal(self) -> Platform:
        """The same platform in the usual spelling: ``aarch64`` is ``arm64``, and arm64 without a variant is ``v8``."""
        architecture = _SYNONYMS.get(self.architecture, self.architecture)
        variant = self.variant
        if architecture == "arm64" and variant in ("", "8"):
            variant = "v8"
        elif architecture == "arm" and not variant:
            variant = "v7"
        elif architecture == "amd64" and variant == "v1":
            variant = ""
        return Platform(self.os, architecture, variant)

    def runs(self, other: Platform) -> int | None:
        """How well an image for ``other`` suits this machine: 0 is best; None: not at all."""
        mine, other = self.normal(), other.normal()
        if (mine.os, mine.architecture) != (other.os, other.architecture):
            return None
        own, wanted = _level(mine), _level(other)
        if own is None or wanted is None:
            return 0 if mine.variant == other.variant else None
        # A processor runs what was built for its forerunners, and the closest is the best.
        return own - wanted if wanted <= own else None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


def best(mine: Platform, candidates: Iterable[tuple[Platform, T]]) -> T | None:
    """What suits this machine best; of equals, what stands first. None when nothing does."""
    found = [(suits, item) for platform, item in candidates if (suits := mine.runs(platform)) is not None]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def describe(platforms: Sequence[Platform]) -> str:
    """Platforms for an error message."""
    names = sorted({str(platform) for platform in platforms if platform.os != "unknown"})
    shown = ", ".join(names[:16]) + (", ..." if len(names) > 16 else "")
    return shown or "no platform at all"


def _level(platform: Platform) -> int | None:
    """A variant as a number; None for one that isn't of the form ``v8``."""
    variant = platform.variant
    if not variant and platform.architecture == "amd64":
        return 1
    return int(variant[1:]) if variant[:1] == "v" and variant[1:].isdigit() and len(variant) < 5 else None
