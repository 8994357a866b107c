"""Pinned images: those that kubelet's image collection must leave alone (CRI ``Image.pinned``)."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from shim_porto_runtime.images import reference
from shim_porto_runtime.images.settings import NO_PAUSE_IMAGE, ImageSettings


class Pins:
    """The pause image, and what ``Images.Pinned`` names."""

    def __init__(self, settings: ImageSettings) -> None:
        self._patterns = list(settings.pinned)
        if settings.pause_image != NO_PAUSE_IMAGE:
            self._patterns.append(str(reference.parse(settings.pause_image)))

    def match(self, image_id: str, references: Sequence[str]) -> bool:
        """True when an image of that id and those references is pinned."""
        names = [image_id, *references]
        for name in references:
            names.append(reference.familiar(reference.parse(name)))
        names += [name.rpartition(":")[0] for name in names if "@" not in name]
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns for name in names)
