"""What outlives the daemon: a file a container, a file a volume, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shim_embedded_porto import kernel
from shim_embedded_porto.removal import try_remove_tree

logger = logging.getLogger("shim.embedded_porto.store")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Store:
    """Records as JSON objects in a directory private to root.

    As portod's, they are of no use after a reboot: opened on another boot's records, the store is empty.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._containers = directory / "containers"
        self._volumes = directory / "volumes"
        self.rebooted = False
        """True when there were records of another boot."""

    def open(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self.directory, 0o700)
        boot = _BOOT_ID.read_text().strip()
        marker = self.directory / "boot_id"
        try:
            self.rebooted = marker.read_text() != boot
        except OSError:
            self.rebooted = False
        if self.rebooted:
            for path in (self._containers, self._volumes, self.directory / "exits"):
                try_remove_tree(path)
        for path in (self._containers, self._volumes):
            path.mkdir(mode=0o700, exist_ok=True)
        _write(marker, boot)

    def save_container(self, number: int, record: Mapping[str, Any]) -> None:
        _write(self._containers / str(number), json.dumps(record))

    def remove_container(self, number: int) -> None:
        (self._containers / str(number)).unlink(missing_ok=True)

    def containers(self) -> Iterator[dict[str, Any]]:
        yield from _records(self._containers)

    def save_volume(self, number: str, record: Mapping[str, Any]) -> None:
        _write(self._volumes / number, json.dumps(record))

    def remove_volume(self, number: str) -> None:
        (self._volumes / number).unlink(missing_ok=True)

    def volumes(self) -> Iterator[dict[str, Any]]:
        yield from _records(self._volumes)

    def remove(self) -> None:
        """Everything, once nothing is left to remember."""
        try_remove_tree(self.directory)


def _write(path: Path, content: str) -> None:
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        left = memoryview(content.encode())
        while left:
            left = left[os.write(fd, left) :]
    finally:
        os.close(fd)
    # A file that another is renamed over is written to the disk first, on ext4: of no use here, and it takes time.
    try:
        kernel.exchange(temporary, str(path))
    except OSError:  # there was none, or the file system can't
        os.rename(temporary, path)
    else:
        os.unlink(temporary)


def _records(directory: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(directory.iterdir()):
        if path.name.endswith(".new"):
            path.unlink()  # the daemon was killed while it wrote
            continue
        try:
            yield json.loads(path.read_text())
        except (OSError, ValueError):
            logger.exception("the record %s can't be read and is left out", path)
