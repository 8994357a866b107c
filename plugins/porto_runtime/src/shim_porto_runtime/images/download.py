"""A blob to a file: checked as it comes, continued where it broke off, given up when nothing comes any more."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from shim_core import errors
from shim_core.config import format_duration
from shim_core.context import CallContext
from shim_porto_runtime.images import digests
from shim_porto_runtime.images.documents import Descriptor
from shim_porto_runtime.images.endpoint import Endpoint
from shim_porto_runtime.images.failures import Failure, Kind
from shim_porto_runtime.images.registry import Registry
from shim_porto_runtime.images.transport import Response, TransportError

_PIECE_BYTES = 512 * 1024
_MIN_PROGRESS_BYTES = 1024
"""Less than this in a whole progress timeout is a trickle: it counts as nothing."""
_WORTH_ANOTHER_TRY_BYTES = 256 * 1024


def fetch_blob(
    registry: Registry, descriptor: Descriptor, path: Path, context: CallContext, progress_timeout_s: float
) -> None:
    """Write a blob to a file, over what is in it. When this returns, its size and digest are right; else it is gone.

    :raises errors.ShimError: no endpoint has it, or what came is wrong.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        download = _Download(registry, descriptor, fd, context, progress_timeout_s)
        registry.ask("layer", download.from_endpoint, context)
        os.ftruncate(fd, descriptor.size_bytes)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(fd)


class _Download:
    def __init__(
        self, registry: Registry, descriptor: Descriptor, fd: int, context: CallContext, progress_timeout_s: float
    ) -> None:
        self._registry = registry
        self._descriptor = descriptor
        self._fd = fd
        self._context = context
        self._progress_timeout_s = progress_timeout_s
        self._endpoint: Endpoint | None = None
        self._hash = hashlib.sha256()
        # One buffer, used again and again: memory that is new each time costs a page fault for every 4 KiB.
        self._buffer = memoryview(bytearray(_PIECE_BYTES))
        self._written = 0
        self._furthest = 0
        self._continued = False

    def from_endpoint(self, endpoint: Endpoint) -> None:
        """Fetch what is missing, or all of it when another endpoint has begun: its part may be what is wrong."""
        if endpoint is not self._endpoint:
            self._restart()
            self._endpoint = endpoint
        response, start = self._registry.open_blob(endpoint, self._descriptor.digest, self._written, self._context)
        with response:
            if start != self._written:
                self._restart()
            self._continued |= start > 0
            try:
                self._copy(response, endpoint)
            except TransportError as err:
                raise Failure(Kind.UNAVAILABLE, str(err), progressed=self._has_progressed()) from err
        if self._written < self._descriptor.size_bytes:
            got = f"{self._written} of {self._descriptor.size_bytes} bytes"
            raise Failure(
                Kind.UNAVAILABLE,
                f"{endpoint.host} sent {got} of {self._descriptor.digest}",
                tries=3,
                progressed=self._has_progressed(),
            )
        digest = digests.PREFIX + self._hash.hexdigest()
        if digest != self._descriptor.digest:
            # Parts that don't fit together are no lie yet: the whole in one piece decides.
            kind = Kind.UNAVAILABLE if self._continued else Kind.MISMATCH
            self._restart()
            raise Failure(kind, f"asked for {self._descriptor.digest}, {endpoint.host} sent {digest}")

    def _copy(self, response: Response, endpoint: Endpoint) -> None:
        size = self._descriptor.size_bytes
        waiting = 0
        window_start, window_bytes = time.monotonic(), 0
        try:
            # One byte more than there should be is asked for, so that an endless answer ends here.
            while piece := response.read(min(_PIECE_BYTES, size - self._written - waiting + 1)):
                if self._written + waiting + len(piece) > size:
                    waiting = 0
                    self._restart()
                    raise Failure(
                        Kind.MISMATCH, f"{endpoint.host} sends more than {size} bytes for {self._descriptor.digest}"
                    )
                if waiting + len(piece) > _PIECE_BYTES:
                    self._write(self._buffer[:waiting])
                    waiting = 0
                self._buffer[waiting : waiting + len(piece)] = piece
                waiting += len(piece)
                window_bytes += len(piece)
                now = time.monotonic()
                if now - window_start >= self._progress_timeout_s:
                    if window_bytes < _MIN_PROGRESS_BYTES:
                        raise TransportError(self._stalled(endpoint))
                    window_start, window_bytes = now, 0
        except TransportError as err:
            if time.monotonic() - window_start >= self._progress_timeout_s:
                raise Failure(Kind.UNAVAILABLE, self._stalled(endpoint), tries=1) from err
            raise
        finally:
            self._write(self._buffer[:waiting])

    def _has_progressed(self) -> bool:
        """True when this try has got noticeably further than all before it."""
        if self._written < self._furthest + _WORTH_ANOTHER_TRY_BYTES:
            return False
        self._furthest = self._written
        return True

    def _stalled(self, endpoint: Endpoint) -> str:
        return f"nothing came from {endpoint.host} for {format_duration(self._progress_timeout_s)}"

    def _write(self, data: memoryview) -> None:
        self._hash.update(data)
        self._written += len(data)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as err:
            raise errors.ResourceExhausted(f"can't write the layer to disk: {err.strerror}") from err

    def _restart(self) -> None:
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self._written = 0
        self._continued = False
