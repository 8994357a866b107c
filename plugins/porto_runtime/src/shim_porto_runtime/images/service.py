"""The CRI's ImageService, and what the runtime needs of images."""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import porto_api
from shim_core import errors
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.types import RegistryAuth
from shim_porto_runtime.images import cri, digests, reference
from shim_porto_runtime.images.assembly import Assembly
from shim_porto_runtime.images.blobs import Blobs
from shim_porto_runtime.images.documents import Descriptor, Manifest, parse_manifest
from shim_porto_runtime.images.guard import Guard
from shim_porto_runtime.images.layers import Layers
from shim_porto_runtime.images.load import Loader
from shim_porto_runtime.images.model import Image
from shim_porto_runtime.images.pins import Pins
from shim_porto_runtime.images.puller import Puller
from shim_porto_runtime.images.registry import Patience
from shim_porto_runtime.images.save import Saver
from shim_porto_runtime.images.settings import ImageSettings
from shim_porto_runtime.images.store import Store
from shim_porto_runtime.removal import remove_tree

logger = logging.getLogger("shim.porto_runtime.images")

_STREAM_BYTES = 1024 * 1024
_SPARE_S = 3600.0
"""Layers of a failed pull are kept that long for the next try."""
_STOP_TIMEOUT_S = 60.0


class ImageService:
    """Images of this node. Safe to use from many threads once :meth:`start` has returned.

    :param hooks: the plugin manager's hooks: who knows registries.
    :param layers_in_use: names of Porto layers that containers need.
    :param state_dir: ``Portoshim.StateDir``; portod has to see the same path.
    :param images_dir: a path on the filesystem of Porto's own place; it need not exist.
    :param container_filesystems: where writable layers are, and what they take up.
    """

    def __init__(
        self,
        porto: porto_api.Client,
        hooks: Any,
        settings: ImageSettings,
        layers_in_use: Callable[[], Collection[str]],
        *,
        state_dir: Path,
        images_dir: str = "/place/porto_layers",
        container_filesystems: Callable[[], Sequence[pb.FilesystemUsage]] = tuple,
        patience: Patience | None = None,
    ) -> None:
        self._porto = porto
        self._hooks = hooks
        self._settings = settings
        self._layers_in_use = layers_in_use
        self._directory = state_dir / "images"
        self._images_dir = Path(settings.place or "/", "porto_layers") if settings.place else Path(images_dir)
        self._container_filesystems = container_filesystems
        self._patience = patience or Patience()
        self._pins = Pins(settings)
        self._assembly = Assembly(settings)
        self._recovering = threading.Lock()
        self._recovered = threading.Event()
        self._old_places: set[str] = set()
        self._wake = threading.Event()
        self._stopping = False
        self._keeper: threading.Thread | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the store, and clean up what a crash has left. portod may be away: that part is done when it is back.

        :raises errors.StartupError: the state directory can't be used.
        """
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory.chmod(0o700)
            self._guard = Guard(self._directory)
            self._store = Store(self._directory, self._pins.match)
            self._blobs = Blobs(self._directory / "blobs", self._store)
            temporary = self._directory / "tmp"
            temporary.mkdir(mode=0o700, exist_ok=True)
            self._temporary = temporary / f"{os.getpid()}-{secrets.token_hex(4)}"
            with self._guard.alone() as alone:
                if alone:
                    for entry in temporary.iterdir():
                        _remove(entry)
                self._temporary.mkdir(mode=0o700)
        except OSError as err:
            raise errors.StartupError(
                f"{err.filename or self._directory}: {err.strerror}; set Portoshim.StateDir elsewhere"
            ) from err
        self._layers = Layers(self._porto, self._store, self._temporary, self._settings.place, self._layers_in_use)
        self._puller = Puller(
            self._hooks,
            self._settings,
            self._store,
            self._layers,
            self._blobs,
            self._assembly,
            self._temporary,
            self._patience,
        )
        self._old_places = {layer.place for layer in self._store.layers().values()} - {self._settings.place}
        self._layers.forget_unsure()
        self._recover()
        self._keeper = threading.Thread(target=self._keep_up, name="image-keeper", daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """Cancel pulls, let the disk catch up, close the store. Twice is as good as once."""
        if self._stopping:
            return
        self._puller.close()
        self._stopping = True
        self._wake.set()
        if self._keeper is not None:
            self._keeper.join(_STOP_TIMEOUT_S)
        _remove(self._temporary)
        self._store.close()
        self._guard.close()

    # -- for the runtime -----------------------------------------------------------------------------------------------

    def images(self) -> Sequence[Image]:
        """All images there are. From memory."""
        return list(self._store.index().images.values())

    def resolve(self, name: str) -> Image | None:
        """The image of a name, tag, digest or id (12 digits of it will do), if it is here. From memory."""
        index = self._store.index()
        if reference.is_image_id(name):
            return index.images.get(name)
        try:
            image_id = index.by_reference.get(str(reference.parse(name)))
        except errors.InvalidArgument:
            image_id = None
        if image_id is not None:
            return index.images[image_id]
        digits = reference.id_prefix(name)
        if digits is None:
            return None
        prefix = digests.PREFIX + digits
        found = [image for image_id, image in index.images.items() if image_id.startswith(prefix)]
        return found[0] if len(found) == 1 else None

    def ensure(self, name: str, context: CallContext) -> Image:
        """The image of a name, pulled if it isn't here.

        :raises errors.ShimError: it can't be had.
        """
        image = self.resolve(name)
        return image if image is not None else self.pull(name, None, context)

    def pull(self, name: str, auth: RegistryAuth | None, context: CallContext) -> Image:
        """Pull an image.

        :raises errors.ShimError: it can't be had; the message names the reason and never holds a secret.
        """
        if not name:
            raise errors.InvalidArgument("image: must not be empty")
        if reference.is_image_id(name):
            raise errors.InvalidArgument("image: an id can't be pulled; name a repository")
        wanted = reference.parse(name)
        self._recover()
        try:
            image_id = self._puller.pull(wanted, auth, context)
        finally:
            self._wake.set()
        image = self._store.index().images.get(image_id)
        if image is None:
            raise errors.Aborted(f"{wanted}: was removed while it was pulled; try again")
        return image

    def lease(self, image: Image) -> AbstractContextManager[None]:
        """Keep an image's layers while something is being made of them, even if the image is removed."""
        return self._layers.lease(image.diff_ids)

    # -- files ---------------------------------------------------------------------------------------------------------

    def load(self, path: Path, context: CallContext) -> list[Image]:
        """Bring in all images of a file: an OCI archive or a docker-archive, packed or not.

        May run in another process beside the daemon, on the same state directory.

        :raises errors.ShimError: it is no such file, or an image in it is no good.
        """
        self._recover()
        loader = Loader(self._settings, self._store, self._layers, self._blobs, self._assembly, self._temporary)
        try:
            ids = loader.load(path, context)
        finally:
            self._wake.set()
        images = self._store.index().images
        return [images[image_id] for image_id in ids if image_id in images]

    def save(self, names: Sequence[str], path: Path, context: CallContext, *, docker: bool = False) -> None:
        """Write images to a file: an OCI archive, or a docker-archive.

        :raises errors.NotFound: there is no image of that name.
        :raises errors.ShimError: a layer can't be had any more, or the file can't be written.
        """
        wanted = []
        for name in names:
            image = self.resolve(name)
            if image is None:
                raise errors.NotFound(f"{name}: no such image here")
            wanted.append((name, image))

        def fetch(image: Image, descriptor: Descriptor, blob: Path) -> None:
            source = next(iter((*image.repo_digests, *image.repo_tags)), None)
            if source is None:
                raise errors.NotFound(f"{image.id}: its layers aren't kept in packed form (Images.KeepBlobs)")
            self._puller.fetch_blob(reference.parse(source), descriptor, blob, context)

        Saver(self._store, self._blobs, fetch, self._temporary).save(wanted, path, context, docker=docker)

    # -- the CRI's calls -----------------------------------------------------------------------------------------------

    def list_images(self, request: pb.ListImagesRequest, context: CallContext) -> pb.ListImagesResponse:
        return pb.ListImagesResponse(images=[cri.image(image) for image in self._matching(request.filter)])

    def stream_images(self, request: pb.StreamImagesRequest, context: CallContext) -> Iterator[pb.StreamImagesResponse]:
        batch = pb.StreamImagesResponse()
        size = 0
        for image in self._matching(request.filter):
            message = cri.image(image)
            if size and size + message.ByteSize() > _STREAM_BYTES:
                yield batch
                batch, size = pb.StreamImagesResponse(), 0
            batch.images.append(message)
            size += message.ByteSize()
        if size:
            yield batch

    def image_status(self, request: pb.ImageStatusRequest, context: CallContext) -> pb.ImageStatusResponse:
        image = self.resolve(cri.named(request.image))
        response = pb.ImageStatusResponse()
        if image is not None:
            response.image.CopyFrom(cri.image(image))
            if request.verbose:
                response.info["info"] = self._describe(image)
        return response

    def pull_image(self, request: pb.PullImageRequest, context: CallContext) -> pb.PullImageResponse:
        return pb.PullImageResponse(image_ref=self.pull(request.image.image, cri.auth_of(request), context).id)

    def remove_image(self, request: pb.RemoveImageRequest, context: CallContext) -> pb.RemoveImageResponse:
        image = self.resolve(cri.named(request.image))
        if image is not None:
            self._store.remove_image(image.id)
            logger.info("[%s] removed image %s (%s)", context.request_id, image.id, ", ".join(image.repo_tags))
        self._collect(0.0)
        return pb.RemoveImageResponse()

    def image_fs_info(self, request: pb.ImageFsInfoRequest, context: CallContext) -> pb.ImageFsInfoResponse:
        index = self._store.index()
        usage = pb.FilesystemUsage(
            timestamp=time.time_ns(),
            fs_id=pb.FilesystemIdentifier(mountpoint=str(_existing(self._images_dir))),
            used_bytes=pb.UInt64Value(value=index.used_bytes),
            inodes_used=pb.UInt64Value(value=index.used_inodes),
        )
        return pb.ImageFsInfoResponse(
            image_filesystems=[usage], container_filesystems=list(self._container_filesystems())
        )

    # -- inside --------------------------------------------------------------------------------------------------------

    def _matching(self, image_filter: pb.ImageFilter) -> Sequence[Image]:
        name = image_filter.image.image
        if not name:
            return self.images()
        image = self.resolve(name)
        return [image] if image is not None else []

    def _describe(self, image: Image) -> str:
        """What `crictl inspecti` shows beyond the status."""
        record = self._store.image(image.id)
        layers = self._store.layers()
        return json.dumps(
            {
                "manifest": record.manifest_digest if record else "",
                "imageSpec": json.loads(record.config) if record else {},
                "layers": [
                    {"diffID": diff_id, "portoLayer": layers[diff_id].name, "sizeBytes": layers[diff_id].size_bytes}
                    for diff_id in image.diff_ids
                    if diff_id in layers
                ],
            }
        )

    def _recover(self) -> None:
        """Bring records and Porto together, once, as soon as Porto answers."""
        with self._recovering:
            if self._recovered.is_set():
                return
            try:
                with self._guard.alone() as alone:
                    if alone:
                        self._layers.recover(self._old_places)
                        self._collect_blobs()
                self._recovered.set()
            except porto_api.PortoError as err:
                logger.warning("images: portod can't be asked for its layers yet: %s", err)

    def _collect(self, spare_s: float) -> None:
        """Remove what nothing refers to; never fails."""
        try:
            with self._guard.alone() as alone:
                if alone:
                    self._layers.collect(spare_s)
                    self._collect_blobs()
        except (porto_api.PortoError, errors.ShimError, OSError) as err:
            logger.warning("images: unused layers can't be removed now: %s", err)

    def _collect_blobs(self) -> None:
        wanted: set[str] = set()
        for digest in self._store.manifest_digests():
            document = self._store.document(digest)
            content = parse_manifest(document.data, document.media_type) if document else None
            if isinstance(content, Manifest):
                wanted.update(layer.digest for layer in content.layers)
        self._blobs.collect(wanted)

    def _keep_up(self) -> None:
        """What can wait until a pull has been answered, in a thread of its own."""
        while not self._stopping:
            # What failed pulls have left is looked for even when nothing else happens.
            self._wake.wait(_SPARE_S)
            self._wake.clear()
            self._collect(_SPARE_S)
            try:
                self._layers.sync(_existing(self._images_dir))
            except errors.ShimError as err:
                logger.warning("images: %s", err.message)


def _existing(path: Path) -> Path:
    """A path, or the closest directory above it that is there."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _remove(path: Path) -> None:
    for what in remove_tree(path):
        logger.warning("images: %s; it is left as it is", what)
