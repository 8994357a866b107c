"""Images from a file (OCI archive, docker-archive), checked as if they came from a registry."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shim_core import errors
from shim_core.context import CallContext
from shim_porto_runtime.images import digests, documents, reference
from shim_porto_runtime.images.archive import Archive
from shim_porto_runtime.images.assembly import Assembly, Part, Resolved, read_config
from shim_porto_runtime.images.blobs import Blobs
from shim_porto_runtime.images.documents import BadDocument, Descriptor, Manifest
from shim_porto_runtime.images.failures import SIGNATURE_VALIDATION_FAILED
from shim_porto_runtime.images.flights import run_together
from shim_porto_runtime.images.layers import Layers
from shim_porto_runtime.images.model import Document, ImageRecord
from shim_porto_runtime.images.settings import ImageSettings
from shim_porto_runtime.images.store import Store

logger = logging.getLogger("shim.porto_runtime.images")

LAYOUT_FILE, INDEX_FILE, DOCKER_FILE = "oci-layout", "index.json", "manifest.json"
CONTAINERD_NAME = "io.containerd.image.name"
OCI_NAME = "org.opencontainers.image.ref.name"
_MAX_IMAGES = 1000
_WORKERS = 4


class Loader:
    """Brings images of archives into a store.

    :param directory: for blobs on their way.
    """

    def __init__(
        self,
        settings: ImageSettings,
        store: Store,
        layers: Layers,
        blobs: Blobs,
        assembly: Assembly,
        directory: Path,
    ) -> None:
        self._settings = settings
        self._store = store
        self._layers = layers
        self._blobs = blobs
        self._assembly = assembly
        self._directory = directory

    def load(self, path: Path, context: CallContext) -> list[str]:
        """All images in a file that are for this machine; their ids.

        :raises errors.ShimError: the file is none of images, or an image in it is no good. Those before it stay.
        """
        with Archive(path, self._temporary(), context) as archive:
            if archive.has(INDEX_FILE) and archive.has(LAYOUT_FILE):
                return self._load_oci(archive, context)
            if archive.has(DOCKER_FILE):
                return self._load_docker(archive, context)
        raise errors.InvalidArgument(
            f"{path}: neither an OCI archive ({INDEX_FILE}) nor a docker-archive ({DOCKER_FILE})"
        )

    # -- OCI archives --------------------------------------------------------------------------------------------------

    def _load_oci(self, archive: Archive, context: CallContext) -> list[str]:
        top = _object(archive, INDEX_FILE)
        entries = top.get("manifests")
        if not isinstance(entries, list) or not entries or len(entries) > _MAX_IMAGES:
            raise errors.InvalidArgument(f"{archive.path}: {INDEX_FILE} lists no images, or too many")
        ids = []
        for entry in entries:
            try:
                descriptor = documents.parse_descriptor(entry, INDEX_FILE)
            except BadDocument as err:
                raise errors.InvalidArgument(f"{archive.path}: {err}") from None
            ids.append(self._load_oci_image(archive, descriptor, _names_of(entry), context))
        return ids

    def _load_oci_image(
        self, archive: Archive, descriptor: Descriptor, names: Sequence[str], context: CallContext
    ) -> str:
        what = f"{archive.path}: {names[0] if names else descriptor.digest}"

        def fetch(wanted: Descriptor) -> Resolved:
            document = Document(wanted.digest, wanted.media_type, _blob(archive, wanted))
            try:
                return Resolved(document, documents.parse_manifest(document.data, wanted.media_type))
            except BadDocument as err:
                raise errors.UnknownError(f"{what}: the manifest {wanted.digest} is refused: {err}") from None

        top = fetch(descriptor)
        document, manifest = self._assembly.choose(what, top, fetch)
        config = _blob(archive, manifest.config)
        references = {}
        for name in names:
            parsed = reference.parse(name)
            references[str(parsed)] = top.document.digest
            references[f"{parsed.name}@{top.document.digest}"] = top.document.digest
        return self._add(
            archive,
            what,
            manifest,
            config,
            document.digest,
            {top.document, document},
            references,
            lambda part: _blob_name(part.descriptor.digest),
            context,
        )

    # -- docker-archives -----------------------------------------------------------------------------------------------

    def _load_docker(self, archive: Archive, context: CallContext) -> list[str]:
        entries = _json(archive, DOCKER_FILE)
        if not isinstance(entries, list) or not entries or len(entries) > _MAX_IMAGES:
            raise errors.InvalidArgument(f"{archive.path}: {DOCKER_FILE} lists no images, or too many")
        return [self._load_docker_image(archive, entry, context) for entry in entries]

    def _load_docker_image(self, archive: Archive, entry: Any, context: CallContext) -> str:
        config_name, layer_names, tags = _docker_entry(archive, entry)
        config = archive.read(config_name, documents.MAX_DOCUMENT_BYTES)
        what = f"{archive.path}: {tags[0] if tags else config_name}"
        # Such archives have no manifests: one is made, which says just what is in the file.
        names: dict[str, str] = {}
        layers = []
        for name in layer_names:
            digest, size = archive.measure(name)
            names[digest] = name
            layers.append({"mediaType": documents.OCI_LAYER, "digest": digest, "size": size})
        manifest_data = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": documents.OCI_MANIFEST,
                "config": {"mediaType": documents.OCI_CONFIG, "digest": digests.of(config), "size": len(config)},
                "layers": layers,
            }
        ).encode()
        document = Document(digests.of(manifest_data), documents.OCI_MANIFEST, manifest_data)
        try:
            manifest = documents.parse_manifest(manifest_data, documents.OCI_MANIFEST)
        except BadDocument as err:
            raise errors.UnknownError(f"{what}: {err}") from None
        assert isinstance(manifest, Manifest)
        references = {str(reference.parse(tag)): document.digest for tag in tags}
        return self._add(
            archive,
            what,
            manifest,
            config,
            document.digest,
            [document],
            references,
            lambda part: names[part.descriptor.digest],
            context,
        )

    # -- both ----------------------------------------------------------------------------------------------------------

    def _add(
        self,
        archive: Archive,
        what: str,
        manifest: Manifest,
        config_data: bytes,
        manifest_digest: str,
        contents: Iterable[Document],
        references: dict[str, str],
        name_of: Callable[[Part], str],
        context: CallContext,
    ) -> str:
        config = read_config(what, manifest.config.digest, config_data)
        parts = self._assembly.parts(what, manifest, config)
        budget = self._assembly.budget()
        missing = list({part.diff_id: part for part in parts if not self._store.layer(part.diff_id)}.values())

        def job(part: Part) -> Callable[[CallContext], None]:
            return lambda own: budget.spend(self._load_layer(archive, name_of(part), part, own))

        with self._layers.lease(config.diff_ids):
            run_together(_WORKERS, [job(part) for part in missing], context)
            for part in parts:
                self._keep(archive, name_of(part), part.descriptor)
            self._store.add_image(
                ImageRecord(manifest.config.digest, config_data, manifest_digest, config.diff_ids, from_file=True),
                contents,
                references,
            )
        logger.info("%s: loaded as %s", what, manifest.config.digest)
        return manifest.config.digest

    def _load_layer(self, archive: Archive, name: str, part: Part, context: CallContext) -> int:
        """Import a layer; its size on disk."""
        path = self._temporary()
        try:
            _extract(archive, name, part.descriptor, path)
            layer = self._layers.import_blob(path, part.diff_id, self._settings.max_layer_size, context)
            if self._settings.keep_blobs != "none":
                self._blobs.keep(path, part.descriptor.digest)
            return layer.size_bytes
        finally:
            path.unlink(missing_ok=True)

    def _keep(self, archive: Archive, name: str, descriptor: Descriptor) -> None:
        """Keep the packed form of a layer that was here already, unpacked alone."""
        if self._settings.keep_blobs == "none" or self._blobs.find(descriptor.digest) is not None:
            return
        path = self._temporary()
        try:
            _extract(archive, name, descriptor, path)
            self._blobs.keep(path, descriptor.digest)
        finally:
            path.unlink(missing_ok=True)

    def _temporary(self) -> Path:
        return self._directory / f"{secrets.token_hex(8)}.load"


def _blob_name(digest: str) -> str:
    return f"blobs/sha256/{digests.hex_of(digest)}"


def _blob(archive: Archive, descriptor: Descriptor) -> bytes:
    """A small blob, checked."""
    data = archive.read(_blob_name(descriptor.digest), documents.MAX_DOCUMENT_BYTES)
    if (found := digests.of(data)) != descriptor.digest or len(data) != descriptor.size_bytes:
        raise errors.UnknownError(
            f"{SIGNATURE_VALIDATION_FAILED}: {archive.path}: {descriptor.digest} is {found} with {len(data)} bytes"
        )
    return data


def _extract(archive: Archive, name: str, descriptor: Descriptor, path: Path) -> None:
    """A layer to a file, checked."""
    digest, size = archive.extract(name, path)
    if (digest, size) != (descriptor.digest, descriptor.size_bytes):
        raise errors.UnknownError(
            f"{SIGNATURE_VALIDATION_FAILED}: {archive.path}: {name} is {digest} with {size} bytes rather than"
            f" {descriptor.digest} with {descriptor.size_bytes}"
        )


def _json(archive: Archive, name: str) -> Any:
    try:
        return json.loads(archive.read(name, documents.MAX_DOCUMENT_BYTES))
    except (ValueError, RecursionError):
        raise errors.InvalidArgument(f"{archive.path}: {name} is not valid JSON") from None


def _object(archive: Archive, name: str) -> Mapping[str, Any]:
    value = _json(archive, name)
    if not isinstance(value, dict):
        raise errors.InvalidArgument(f"{archive.path}: {name} is not a JSON object")
    return value


def _names_of(entry: Any) -> list[str]:
    """The full references that an index gives to an image: containerd's annotation, or OCI's if it is a whole name."""
    annotations = entry.get("annotations") if isinstance(entry, dict) else None
    if not isinstance(annotations, dict):
        return []
    for key in (CONTAINERD_NAME, OCI_NAME):
        name = annotations.get(key)
        # OCI's may be a tag alone, of no repository.
        if isinstance(name, str) and (key == CONTAINERD_NAME or ":" in name or "/" in name):
            try:
                reference.parse(name)
            except errors.InvalidArgument:
                continue
            return [name]
    return []


def _docker_entry(archive: Archive, entry: Any) -> tuple[str, list[str], list[str]]:
    """Config, layers and tags of one image of a docker-archive."""
    found = entry if isinstance(entry, dict) else {}
    config, layers, tags = found.get("Config"), found.get("Layers"), found.get("RepoTags") or []
    if (
        not isinstance(config, str)
        or not isinstance(layers, list)
        or not isinstance(tags, list)
        or not all(isinstance(name, str) for name in (*layers, *tags))
    ):
        raise errors.InvalidArgument(f"{archive.path}: {DOCKER_FILE} is malformed")
    return config, layers, tags
