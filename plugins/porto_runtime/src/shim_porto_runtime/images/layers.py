"""Layers: from a verified blob to a native Porto layer, and back to nothing.

The name of a Porto layer says which image layer it holds; its private value says which store it belongs to. Only
layers that the store knows are used: it hears of one when Porto has finished it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import porto_api
from porto_api import CancelToken, Client
from porto_api import errors as porto_errors
from shim_core import errors
from shim_core.context import CallContext
from shim_porto_runtime.images import compression, digests, unpack
from shim_porto_runtime.images.failures import SIGNATURE_VALIDATION_FAILED
from shim_porto_runtime.images.flights import Slots
from shim_porto_runtime.images.model import Layer
from shim_porto_runtime.images.scratchfiles import ScratchFiles
from shim_porto_runtime.images.store import Store
from shim_porto_runtime.images.tarread import BadLayer, TarReader
from shim_porto_runtime.images.tarwrite import TarWriter
from shim_porto_runtime.porto_errors import translate

logger = logging.getLogger("shim.porto_runtime.images")

NAME_PREFIX = "portoshim-"
_PRIVATE = "portoshim "
_IMPORT_TIMEOUT_S = 3600.0
_MAX_NAMES = 8
_MAX_UNPACKERS = 4
_MAX_IMPORTERS = 4
_OTHER_PROCESS_S = 2.0
_FULL = ("No space left on device", "Disk quota exceeded")  # as tar says it
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_libc = ctypes.CDLL(None, use_errno=True)


class Layers:
    """The Porto layers of one store. Safe to use from many threads.

    :param directory: for archives on their way to Porto; portod has to see the same path.
    :param place: the Porto place they go to; Porto's own when empty.
    """

    def __init__(
        self,
        porto: Client,
        store: Store,
        directory: Path,
        place: str,
        in_use: Callable[[], Collection[str]],
    ) -> None:
        self._porto = porto
        self._store = store
        self._archives = ScratchFiles(directory, ".tar")
        self._place = place
        self._in_use = in_use
        self._changed = threading.Condition()
        self._leases: dict[str, int] = {}
        self._busy: set[str] = set()
        self._imported: dict[str, float] = {}
        self._boot_id = boot_id()
        self._unpackers = Slots(min(_MAX_UNPACKERS, os.cpu_count() or 1))
        # Porto works on one layer in one process, and takes a while to notice that it has ended.
        self._importers = Slots(_MAX_IMPORTERS)

    # -- in ------------------------------------------------------------------------------------------------------------

    def import_blob(
        self,
        blob: Path,
        diff_id: str,
        limit_bytes: int,
        context: CallContext,
        on_unpacked: Callable[[], None] = lambda: None,
    ) -> Layer:
        """Import a blob, whose own digest has been checked, under the digest of its content.

        :param limit_bytes: of the content. :param on_unpacked: called when the blob isn't needed any more.
        :raises errors.ShimError: it isn't that content, or no good layer.
        """
        with self._archives.borrow() as archive:
            with self._unpackers.hold(context):
                usage = self._write_archive(blob, archive, diff_id, limit_bytes, context)
            on_unpacked()
            with self._importers.hold(context), self._alone_with(diff_id):
                if (existing := self._store.layer(diff_id)) is not None:
                    return existing
                name = self._import(archive, diff_id, context)
                layer = Layer(diff_id, name, self._place, usage.size_bytes, usage.inodes, self._boot_id, synced=False)
                self._store.add_layer(layer)
                self._imported[diff_id] = time.monotonic()
                return layer

    def _write_archive(
        self, blob: Path, archive: Path, diff_id: str, limit_bytes: int, context: CallContext
    ) -> unpack.Usage:
        try:
            return self._sanitize(blob, archive, diff_id, limit_bytes, context, None)
        except unpack.Conflict:
            pass
        with _Checked(blob, diff_id, limit_bytes, context) as content:
            superseded = unpack.find_superseded(TarReader(content.read), limit_bytes)
        return self._sanitize(blob, archive, diff_id, limit_bytes, context, superseded)

    def _sanitize(
        self,
        blob: Path,
        archive: Path,
        diff_id: str,
        limit_bytes: int,
        context: CallContext,
        superseded: frozenset[int] | None,
    ) -> unpack.Usage:
        fd = os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with _Checked(blob, diff_id, limit_bytes, context) as content:
                writer = TarWriter(fd)
                try:
                    usage = unpack.sanitize(TarReader(content.read), writer, limit_bytes, superseded)
                except BadLayer as err:
                    raise BadLayer(f"layer {diff_id} is refused: {err.message}") from None
                content.verify()
            os.ftruncate(fd, writer.written)
            return usage
        finally:
            os.close(fd)

    def _import(self, archive: Path, diff_id: str, context: CallContext) -> str:
        """Have Porto unpack an archive; the layer's name."""
        token = CancelToken()
        undo = context.on_cancel(token.cancel)
        try:
            for name in _names(diff_id, self._store.instance):
                for _ in range(2):
                    try:
                        self._porto.import_layer(
                            name,
                            str(archive),
                            place=self._place or None,
                            private_value=_PRIVATE + self._store.instance,
                            compress="tar",
                            timeout_s=_IMPORT_TIMEOUT_S,
                            cancel=token,
                        )
                        return name
                    except porto_errors.LayerAlreadyExists:
                        if self._recorded_by_other(diff_id, context) == name:
                            return name
                        # Nobody has told the store: a crash left it, or it is somebody else's.
                        if not self._remove_stray(name):
                            break
                    except porto_errors.Busy:
                        break  # Porto is still removing one of that name
        except porto_api.PortoError as err:
            context.check()
            if any(text in err.message for text in _FULL):
                raise errors.ResourceExhausted(f"importing layer {diff_id}: Porto: no space left in the place") from err
            raise translate(err, f"importing layer {diff_id}") from err
        finally:
            undo()
        raise errors.AlreadyExists(f"layer {diff_id}: Porto has layers of that name that are not ours; remove them")

    def _recorded_by_other(self, diff_id: str, context: CallContext) -> str:
        """The name of a layer that another process has just imported, and records any moment; empty when none has."""
        deadline = time.monotonic() + _OTHER_PROCESS_S
        while (layer := self._store.layer(diff_id)) is None:
            if time.monotonic() >= deadline:
                return ""
            context.wait(0.05)
            context.check()
        return layer.name

    def _remove_stray(self, name: str) -> bool:
        """Remove a layer that the store doesn't know; False when it isn't ours, or in use."""
        if any(layer.name == name for layer in self._store.layers().values()):
            return False
        try:
            private = self._porto.get_layer_private(name, place=self._place or None)
            if private != _PRIVATE + self._store.instance:
                return False
            self._porto.remove_layer(name, place=self._place or None)
        except porto_errors.LayerNotFound:
            pass
        except porto_errors.Busy:
            return False
        return True

    # -- out -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def lease(self, diff_ids: Collection[str]) -> Iterator[None]:
        """Keep layers from being collected, whether they are here already or not."""
        with self._changed:
            for diff_id in diff_ids:
                self._leases[diff_id] = self._leases.get(diff_id, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                for diff_id in diff_ids:
                    self._leases[diff_id] -= 1
                    if not self._leases[diff_id]:
                        del self._leases[diff_id]

    def collect(self, spare_s: float = 0.0) -> None:
        """Remove layers that no image has and no container uses. What can't be removed now is tried again later.

        :param spare_s: leave those that were imported so recently: the pull may be tried again.
        """
        in_use = set(self._in_use())
        since = time.monotonic() - spare_s
        for layer in self._store.unreferenced_layers():
            if layer.name in in_use or self._imported.get(layer.diff_id, -math.inf) > since:
                continue
            with self._alone_with(layer.diff_id):
                with self._changed:
                    if layer.diff_id in self._leases:
                        continue
                    # Forgotten first: a crash from here on leaves a stray, never a record of what is gone.
                    if not self._store.remove_unreferenced_layer(layer.diff_id):
                        continue
                    self._imported.pop(layer.diff_id, None)
                try:
                    self._porto.remove_layer(layer.name, place=layer.place or None)
                except porto_errors.LayerNotFound:
                    pass
                except porto_errors.Busy:
                    self._store.add_layer(layer)
                    logger.info("layer %s is in use; it will be removed later", layer.name)
                except porto_api.PortoError as err:
                    logger.warning("layer %s can't be removed: %s; it will be at the next start", layer.name, err)

    def forget_unsure(self) -> None:
        """Drop the records of layers that can't be relied on. Needs no Porto."""
        # Porto doesn't sync what it unpacks: after a power cut a complete-looking layer may hold empty files.
        self._forget("was imported right before the machine went down", self._may_be_torn)
        self._forget("is in another place than Images.Place", lambda layer: layer.place != self._place)

    def recover(self, old_places: Collection[str] = ()) -> None:
        """Put records and Porto's layers in agreement after a crash of either.

        :param old_places: Porto places to be cleared of our layers. :raises porto_api.PortoError: portod is away.
        """
        known = self._store.layers()
        here = self._ours_in(self._place)
        self._forget("has gone from Porto", lambda layer: layer.diff_id in known and layer.name not in here)
        in_use = set(self._in_use())
        for name in sorted(here - in_use):
            self._remove_leftover(name, self._place)
        for place in old_places:
            for name in sorted(self._ours_in(place)):
                self._remove_leftover(name, place)

    def _may_be_torn(self, layer: Layer) -> bool:
        return not layer.synced and layer.boot_id != self._boot_id

    def _forget(self, why: str, applies: Callable[[Layer], bool]) -> None:
        lost = [layer for layer in self._store.layers().values() if applies(layer)]
        for layer in lost:
            logger.warning("layer %s %s; images that have it must be pulled again", layer.diff_id, why)
        if lost:
            self._store.remove_layers([layer.diff_id for layer in lost])

    def _remove_leftover(self, name: str, place: str) -> None:
        """Remove a layer unless there is a record of it, or it is being imported this very moment."""
        with self._alone_with(_diff_id_of(name)):
            if any(layer.name == name and layer.place == place for layer in self._store.layers().values()):
                return
            try:
                self._porto.remove_layer(name, place=place or None)
                logger.info("removed layer %s, left by a crash", name)
            except porto_errors.LayerNotFound:
                pass
            except porto_api.PortoError as err:
                logger.warning("layer %s, left by a crash, can't be removed: %s", name, err)

    def _ours_in(self, place: str) -> set[str]:
        listed = self._porto.list_layers(place=place or None, mask=f"{NAME_PREFIX}*")
        return {layer.name for layer in listed if layer.private_value == _PRIVATE + self._store.instance}

    @contextmanager
    def _alone_with(self, diff_id: str) -> Iterator[None]:
        """Nobody else imports or removes that layer meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: diff_id not in self._busy)
            self._busy.add(diff_id)
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(diff_id)
                self._changed.notify_all()

    # -- to the disk ---------------------------------------------------------------------------------------------------

    def sync(self, path: Path) -> None:
        """Have what was imported so far reach the disk, and note that it has.

        :param path: a directory on the filesystem of the layers.
        """
        waiting = [diff_id for diff_id, layer in self._store.layers().items() if not layer.synced]
        if not waiting:
            return
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as err:
            logger.warning("%s: %s; layers can't be synced", path, err.strerror)
            return
        try:
            if _libc.syncfs(fd) != 0:
                logger.warning("%s: %s; layers can't be synced", path, os.strerror(ctypes.get_errno()))
                return
        finally:
            os.close(fd)
        self._store.set_synced(waiting)


def boot_id() -> str:
    """Names the time since the machine was booted."""
    return _BOOT_ID.read_text().strip()


def _names(diff_id: str, instance: str) -> list[str]:
    """What a layer may be called. Other shims, and earlier ones whose state is gone, have layers in the place too."""
    base = NAME_PREFIX + digests.hex_of(diff_id)
    return [base, f"{base}.{instance}", *(f"{base}.{instance}.{number}" for number in range(2, _MAX_NAMES))]


def _diff_id_of(name: str) -> str:
    return digests.PREFIX + name.removeprefix(NAME_PREFIX).partition(".")[0]


class _Checked:
    """The content of a blob, counted and hashed as it is read."""

    def __init__(self, blob: Path, diff_id: str, limit_bytes: int, context: CallContext) -> None:
        self._file = blob.open("rb", buffering=0)
        try:
            self._reader = compression.open_layer(self._file)
        except BaseException:
            self._file.close()
            raise
        self._diff_id = diff_id
        self._limit = limit_bytes
        self._context = context
        self._hash = hashlib.sha256()
        self._total = 0

    def read(self, limit_bytes: int) -> bytes:
        self._context.check()
        data = self._reader.read(limit_bytes)
        self._hash.update(data)
        self._total += len(data)
        if self._total > self._limit:
            raise BadLayer(f"unpacked it is larger than {self._limit} bytes (Images.MaxLayerSize, Images.MaxImageSize)")
        return data

    def verify(self) -> None:
        """To be called at the end.

        :raises errors.UnknownError: the content is not what the image's config says.
        """
        digest = digests.PREFIX + self._hash.hexdigest()
        if digest != self._diff_id:
            raise errors.UnknownError(
                f"{SIGNATURE_VALIDATION_FAILED}: the config says that a layer is {self._diff_id}, and it is {digest}"
            )

    def __enter__(self) -> _Checked:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
