"""Packed layers that are kept, so that an image can be written to a file again byte for byte."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from shim_porto_runtime.images import digests
from shim_porto_runtime.images.store import Store


class Blobs:
    """Files by digest, in a directory. Safe to use from many threads."""

    def __init__(self, directory: Path, store: Store) -> None:
        self._directory = directory
        self._store = store
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def find(self, digest: str) -> Path | None:
        """A kept blob."""
        path = self._path(digest)
        return path if digest in self._store.blobs() and path.exists() else None

    def keep(self, path: Path, digest: str) -> None:
        """Take over a file whose digest has been checked, and which is on the same filesystem."""
        size = path.stat().st_size
        _sync(path)
        os.replace(path, self._path(digest))
        _sync(self._directory)
        self._store.add_blob(digest, size)

    def collect(self, wanted: Iterable[str]) -> None:
        """Remove all but some; and what is no blob of the store."""
        known, wanted = set(self._store.blobs()), set(wanted)
        if known - wanted:
            self._store.remove_blobs(known - wanted)
        keep = {digests.hex_of(digest) for digest in known & wanted}
        for entry in os.scandir(self._directory):
            if entry.name not in keep:
                os.unlink(entry.path)

    def copy(self, digest: str, target: Path) -> None:
        """A copy of a kept blob."""
        shutil.copyfile(self._path(digest), target)

    def _path(self, digest: str) -> Path:
        return self._directory / digests.hex_of(digests.check(digest))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
