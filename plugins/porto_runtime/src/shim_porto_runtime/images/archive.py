"""A file of images, opened for reading: any part of it by name, nothing of it unpacked."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from shim_core import errors
from shim_core.context import CallContext
from shim_porto_runtime.images import compression, digests

_MAX_MEMBERS = 100_000
_MAX_LINKS = 8
_PIECE_BYTES = 1024 * 1024


class Archive:
    """A tar, packed or not. Safe to use from many threads.

    :param scratch: a path that may be used for an unpacked copy, and is removed at the end.
    :raises errors.InvalidArgument: the file can't be read, or is no tar.
    """

    def __init__(self, path: Path, scratch: Path, context: CallContext) -> None:
        self.path = path
        self._scratch = scratch
        self._context = context
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        try:
            self._fd = self._open_plain()
            self._index()
        except OSError as err:
            raise errors.InvalidArgument(f"{path}: can't be read: {err.strerror}") from err
        except (tarfile.TarError, compression.CorruptLayer, ValueError) as err:
            self.close()
            raise errors.InvalidArgument(f"{path}: is no tar archive: {err}") from err

    def has(self, name: str) -> bool:
        """True when there is a file of that name."""
        return self._find(name) is not None

    def read(self, name: str, limit_bytes: int) -> bytes:
        """A small file.

        :raises errors.InvalidArgument: it isn't there, or is larger than that.
        """
        offset, size = self._at(name)
        if size > limit_bytes:
            raise errors.InvalidArgument(f"{self.path}: {name} is larger than the limit of {limit_bytes} bytes")
        return b"".join(self._pieces(offset, size, name))

    def measure(self, name: str) -> tuple[str, int]:
        """A file's digest and size.

        :raises errors.InvalidArgument: it isn't there.
        """
        offset, size = self._at(name)
        sha = hashlib.sha256()
        for piece in self._pieces(offset, size, name):
            self._context.check()
            sha.update(piece)
        return digests.PREFIX + sha.hexdigest(), size

    def extract(self, name: str, target: Path) -> tuple[str, int]:
        """Copy a file out of the archive; its digest and size.

        :raises errors.InvalidArgument: it isn't there.
        """
        offset, size = self._at(name)
        sha = hashlib.sha256()
        with target.open("xb", buffering=0) as file:
            for piece in self._pieces(offset, size, name):
                self._context.check()
                sha.update(piece)
                _write_all(file.fileno(), piece)
        return digests.PREFIX + sha.hexdigest(), size

    def close(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)
        self._scratch.unlink(missing_ok=True)

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open_plain(self) -> int:
        """The archive without its packing."""
        with self.path.open("rb", buffering=0) as packed:
            reader = compression.open_layer(packed)
            if reader is packed:
                return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            with self._scratch.open("xb", buffering=0) as plain:
                while piece := reader.read(_PIECE_BYTES):
                    self._context.check()
                    _write_all(plain.fileno(), piece)
        return os.open(self._scratch, os.O_RDONLY | os.O_CLOEXEC)

    def _index(self) -> None:
        with os.fdopen(os.dup(self._fd), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for number, member in enumerate(tar):
                if number >= _MAX_MEMBERS:
                    raise ValueError(f"more than {_MAX_MEMBERS} files")
                name = _normal(member.name)
                if member.isreg():
                    self._files[name] = (member.offset_data, member.size)
                elif member.issym():
                    self._links[name] = _normal(posixpath.join(posixpath.dirname(name), member.linkname))
                elif member.islnk():
                    self._links[name] = _normal(member.linkname)

    def _find(self, name: str) -> tuple[int, int] | None:
        # `docker save` once wrote a layer that several images have as symlinks to one of them.
        name = _normal(name)
        for _ in range(_MAX_LINKS):
            if name in self._files or name not in self._links:
                break
            name = self._links[name]
        return self._files.get(name)

    def _at(self, name: str) -> tuple[int, int]:
        found = self._find(name)
        if found is None:
            raise errors.InvalidArgument(f"{self.path}: {name} is missing in it")
        return found

    def _pieces(self, offset: int, size: int, name: str) -> Iterator[bytes]:
        while size:
            piece = os.pread(self._fd, min(size, _PIECE_BYTES), offset)
            if not piece:
                raise errors.InvalidArgument(f"{self.path}: ends in the middle of {name}")
            yield piece
            offset += len(piece)
            size -= len(piece)


def _normal(name: str) -> str:
    return posixpath.normpath("/" + name.lstrip("/"))


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as err:
        raise errors.ResourceExhausted(f"can't write to disk: {err.strerror}") from err
