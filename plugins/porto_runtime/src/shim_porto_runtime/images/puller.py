"""Pulling: from a reference to an image in the store, each step verified before the next.

Pulls of the same reference with the same credentials are one pull; pulls of different images that share a layer fetch
it once. The work is done in threads of its own, and ends when the last client that waits for it has gone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shim_core import errors
from shim_core.context import CallContext
from shim_core.types import ImageReference, RegistryAuth
from shim_porto_runtime.images.assembly import Assembly, Part, read_config
from shim_porto_runtime.images.blobs import Blobs
from shim_porto_runtime.images.documents import Descriptor
from shim_porto_runtime.images.download import fetch_blob
from shim_porto_runtime.images.flights import Flights, Slots, run_together
from shim_porto_runtime.images.layers import Layers
from shim_porto_runtime.images.model import ImageRecord, Layer
from shim_porto_runtime.images.registry import Patience, Registry
from shim_porto_runtime.images.scratchfiles import ScratchFiles
from shim_porto_runtime.images.settings import ImageSettings
from shim_porto_runtime.images.store import Store
from shim_porto_runtime.images.tls import TlsContexts
from shim_porto_runtime.images.transport import Timeouts, Transport

logger = logging.getLogger("shim.porto_runtime.images")

_CLEAN_UP_S = 15.0
"""A pull that fails is answered when its layers under way have gone from the disk, or after this."""
_UNPACKED_MEANWHILE = 6
"""Layers that are on their way to Porto while others are being fetched."""


class Puller:
    """Pulls images into a store. Safe to use from many threads.

    :param directory: for blobs under way.
    """

    def __init__(
        self,
        hooks: Any,
        settings: ImageSettings,
        store: Store,
        layers: Layers,
        blobs: Blobs,
        assembly: Assembly,
        directory: Path,
        patience: Patience,
    ) -> None:
        self._hooks = hooks
        self._settings = settings
        self._store = store
        self._layers = layers
        self._blobs = blobs
        self._files = ScratchFiles(directory, ".blob")
        self._patience = patience
        self._assembly = assembly
        self._tls = TlsContexts()
        self._pulls: Flights[str] = Flights("image-pull")
        self._fetches: Flights[Layer] = Flights("image-layer", _CLEAN_UP_S)

    def pull(self, image: ImageReference, auth: RegistryAuth | None, context: CallContext) -> str:
        """Pull an image; its id. At once if it has not changed in the registry.

        :raises errors.ShimError: it can't be had; the message says why and never holds a secret.
        """
        return self._pulls.run((image, auth), context, lambda own: self._pull(image, auth, own))

    def fetch_blob(self, image: ImageReference, descriptor: Descriptor, path: Path, context: CallContext) -> None:
        """Fetch a packed layer once more, into a file, with the credentials of the node.

        :raises errors.ShimError: it can't be had.
        """
        transport = self._transport()
        try:
            registry = Registry(image, self._hooks, None, transport, context, self._patience)
            fetch_blob(registry, descriptor, path, context, self._settings.pull_progress_timeout)
        finally:
            transport.close()

    def close(self) -> None:
        """Cancel all pulls, and wait for them."""
        self._pulls.close()
        self._fetches.close()

    def _transport(self) -> Transport:
        return Transport(Timeouts(progress_s=self._settings.pull_progress_timeout), self._tls)

    # -- one pull ------------------------------------------------------------------------------------------------------

    def _pull(self, image: ImageReference, auth: RegistryAuth | None, context: CallContext) -> str:
        started = time.monotonic()
        transport = self._transport()
        try:
            registry = Registry(image, self._hooks, auth, transport, context, self._patience)
            top = registry.resolve(context)
            document, manifest = self._assembly.choose(
                str(image), top, lambda descriptor: registry.document(descriptor, context)
            )
            references = {f"{image.name}@{top.document.digest}": top.document.digest}
            if image.tag:
                references[str(image)] = top.document.digest
            known = self._store.image(manifest.config.digest)
            config_bytes = known.config if known else registry.blob(manifest.config, context)
            config = read_config(str(image), manifest.config.digest, config_bytes)
            parts = self._assembly.parts(str(image), manifest, config)
            with self._layers.lease(config.diff_ids):
                fetched = self._fetch_all(registry, image, parts, context)
                context.check()
                self._store.add_image(
                    ImageRecord(manifest.config.digest, config_bytes, document.digest, config.diff_ids, False),
                    {top.document, document},
                    references,
                )
        finally:
            transport.close()
        logger.info(
            "[%s] %s: %s, %d of %d layers fetched in %.1f s",
            context.request_id, image, manifest.config.digest, fetched, len(parts), time.monotonic() - started,
        )  # fmt: skip
        return manifest.config.digest

    # -- layers --------------------------------------------------------------------------------------------------------

    def _fetch_all(self, registry: Registry, image: ImageReference, parts: Sequence[Part], context: CallContext) -> int:
        """Have all layers in Porto; how many were not there before."""
        missing = list({part.diff_id: part for part in parts if not self._store.layer(part.diff_id)}.values())
        if not missing:
            return 0
        slots = Slots(self._settings.max_concurrent_downloads)
        budget = self._assembly.budget()

        def job(part: Part) -> Callable[[CallContext], None]:
            return lambda own: budget.spend(self._fetch(registry, part, slots, own).size_bytes)

        try:
            run_together(
                self._settings.max_concurrent_downloads + _UNPACKED_MEANWHILE, [job(part) for part in missing], context
            )
        except errors.UnknownError as err:
            if str(image) in err.message:
                raise
            raise _name_image(err, image) from err
        return len(missing)

    def _fetch(self, registry: Registry, part: Part, slots: Slots, context: CallContext) -> Layer:
        started = False

        def work(own: CallContext) -> Layer:
            nonlocal started
            started = True
            return self._fetch_alone(registry, part, slots, own)

        while True:
            try:
                return self._fetches.run((part.diff_id, part.descriptor.digest), context, work)
            except errors.ShimError:
                # What another pull can't have, from its registry or with its credentials, we may.
                if started:
                    raise
                context.check()

    def _fetch_alone(self, registry: Registry, part: Part, slots: Slots, context: CallContext) -> Layer:
        if (layer := self._store.layer(part.diff_id)) is not None:
            return layer
        descriptor, limit = part.descriptor, self._settings.max_layer_size
        with self._layers.lease([part.diff_id]):
            blob = self._blobs.find(descriptor.digest)
            if blob is not None:
                return self._layers.import_blob(blob, part.diff_id, limit, context)
            with ExitStack() as packed:
                path = packed.enter_context(self._files.borrow())
                with slots.hold(context):
                    fetch_blob(registry, descriptor, path, context, self._settings.pull_progress_timeout)
                if self._settings.keep_blobs != "all":
                    return self._layers.import_blob(path, part.diff_id, limit, context, packed.close)
                layer = self._layers.import_blob(path, part.diff_id, limit, context)
                self._blobs.keep(path, descriptor.digest)
                return layer


def _name_image(err: errors.ShimError, image: ImageReference) -> errors.ShimError:
    """The same error, with the image in it, after the word that kubelet looks for."""
    word, colon, rest = err.message.partition(": ")
    if colon and word.isalpha() and word[0].isupper():
        return type(err)(f"{word}: {image}: {rest}")
    return type(err)(f"{image}: {err.message}")
