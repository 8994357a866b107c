"""Tars with anything in them, for the tests: names, links, devices and attributes that no honest tool writes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

DIR, REG, SYM, LNK = tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
CHR, BLK, FIFO = tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE


@dataclass
class Item:
    """One entry, written as it stands."""

    name: str
    kind: bytes = REG
    link: str = ""
    data: bytes = b""
    mode: int | None = None
    uid: int = 0
    device: tuple[int, int] = (0, 0)
    pax: dict[str, str] = field(default_factory=dict)

    def info(self) -> tarfile.TarInfo:
        info = tarfile.TarInfo(self.name)
        info.type, info.linkname, info.size, info.uid = self.kind, self.link, len(self.data), self.uid
        info.mode = self.mode if self.mode is not None else 0o755 if self.kind == DIR else 0o644
        info.devmajor, info.devminor = self.device
        info.mtime = 1_700_000_000
        info.pax_headers = dict(self.pax)
        return info


def d(name: str, **more: Any) -> Item:
    return Item(name, DIR, **more)


def f(name: str, data: str = "x", **more: Any) -> Item:
    return Item(name, REG, data=data.encode(), **more)


def s(name: str, target: str) -> Item:
    return Item(name, SYM, target)


def h(name: str, target: str) -> Item:
    return Item(name, LNK, target)


def tar(items: Iterable[Item], dialect: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of those entries, in that order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=dialect) as archive:
        for item in items:
            archive.addfile(item.info(), io.BytesIO(item.data))
    return buffer.getvalue()
