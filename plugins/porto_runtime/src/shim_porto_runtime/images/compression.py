"""Layers unpacked as they are read: gzip, zstd, or not packed at all, told apart by their first bytes."""

from __future__ import annotations

import zlib
from typing import Any, BinaryIO, Protocol

from shim_core.errors import UnknownError

_READ_BYTES = 256 * 1024
_MAX_ZSTD_WINDOW_BYTES = 128 * 1024 * 1024
"""What zstd itself takes without being told otherwise; a larger one costs that much memory."""

_GZIP_MAGIC = b"\x1f\x8b\x08"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = (b"\x2a\x4d\x18",)
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"hsqs": "squashfs"}


class CorruptLayer(UnknownError):
    """Packed data that can't be unpacked."""


class Reader(Protocol):
    """Unpacked bytes."""

    def read(self, limit_bytes: int, /) -> bytes:
        """Up to that many bytes; none at the end."""
        ...


def open_layer(file: BinaryIO) -> Reader:
    """The unpacked bytes of a layer.

    :param file: the blob, at its start. :raises CorruptLayer: it is packed in a way we don't know.
    """
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(_GZIP_MAGIC):
        return _Gzip(file)
    if magic.startswith(_ZSTD_MAGIC) or (magic[1:4] in _ZSTD_SKIPPABLE and magic[0] & 0xF0 == 0x50):
        return _Zstd(file)
    for known, name in _OTHERS.items():
        if magic.startswith(known):
            raise CorruptLayer(f"the layer is packed with {name}, which images can't be: gzip, zstd or none")
    return file


class _Gzip:
    """Any number of gzip members, one after the other, as gzip(1) reads them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor, self._errors = _new_gzip()
        self._input = b""
        self._in_member = False

    def read(self, limit_bytes: int, /) -> bytes:
        while True:
            if not self._input:
                self._input = self._file.read(_READ_BYTES)
                if not self._input and not self._in_member:
                    return b""
            at_end = not self._input
            self._in_member = True
            try:
                # Without input there may still be output that an earlier limit held back.
                data: bytes = self._decompressor.decompress(self._input, limit_bytes)
            except self._errors as err:
                raise CorruptLayer("the layer's gzip data are corrupt") from err
            if self._decompressor.eof:
                # Zeros may pad the end of a member.
                self._input = self._decompressor.unused_data.lstrip(b"\0")
                self._decompressor, _ = _new_gzip()
                self._in_member = False
            else:
                self._input = self._decompressor.unconsumed_tail
                if at_end and not data:
                    raise CorruptLayer("the layer's gzip data end too early")
            if data:
                return data


def _new_gzip() -> tuple[Any, tuple[type[Exception], ...]]:
    """A decompressor, and what it raises."""
    try:
        from isal import isal_zlib  # three times as fast; there are builds of it for x86-64 and arm64

        isal_error: Any = isal_zlib.error  # its stub calls the class an instance
        return isal_zlib.decompressobj(31), (isal_error, zlib.error, ValueError)
    except ImportError:
        return zlib.decompressobj(31), (zlib.error, ValueError)


class _Zstd:
    def __init__(self, file: BinaryIO) -> None:
        import zstandard  # few images need it

        self._error = zstandard.ZstdError
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
        self._reader = decompressor.stream_reader(file, read_size=_READ_BYTES, read_across_frames=True, closefd=False)

    def read(self, limit_bytes: int, /) -> bytes:
        try:
            return self._reader.read(limit_bytes)
        except self._error as err:
            raise CorruptLayer("the layer's zstd data are corrupt, or need too much memory") from err
