"""Images to a file (OCI archive, docker-archive), for machines without a registry.

An OCI archive holds the very manifests and blobs the image came with, so that digests stay what they were. Layers that
aren't kept in packed form are fetched once more from the registry the image came from.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from shim_core import errors
from shim_core.context import CallContext
from shim_porto_runtime.images import compression, digests, documents, reference
from shim_porto_runtime.images.blobs import Blobs
from shim_porto_runtime.images.documents import Descriptor, Index, Manifest
from shim_porto_runtime.images.load import CONTAINERD_NAME, DOCKER_FILE, INDEX_FILE, LAYOUT_FILE, OCI_NAME
from shim_porto_runtime.images.model import Document, Image
from shim_porto_runtime.images.store import Store

_PIECE_BYTES = 1024 * 1024

Fetch = Callable[[Image, Descriptor, Path], None]


class Saver:
    """Writes images of a store to files.

    :param fetch: gets a blob of an image into a new file. :param directory: for blobs on their way.
    """

    def __init__(self, store: Store, blobs: Blobs, fetch: Fetch, directory: Path) -> None:
        self._store = store
        self._blobs = blobs
        self._fetch = fetch
        self._directory = directory

    def save(self, wanted: Sequence[tuple[str, Image]], path: Path, context: CallContext, *, docker: bool) -> None:
        """Write images to a new file, in place of what was there.

        :param wanted: each with the name it was asked by.
        :raises errors.ShimError: a layer can't be had, or the file not written.
        """
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            # Images hold whatever was built into them: not for everyone's eyes.
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                writer = _Writer(tar, context)
                if docker:
                    self._save_docker(wanted, writer)
                else:
                    self._save_oci(wanted, writer)
            os.replace(partial, path)
        except OSError as err:
            raise errors.ResourceExhausted(f"{path}: can't be written: {err.strerror}") from err
        finally:
            partial.unlink(missing_ok=True)

    # -- OCI archives --------------------------------------------------------------------------------------------------

    def _save_oci(self, wanted: Sequence[tuple[str, Image]], writer: _Writer) -> None:
        entries = []
        for name, image in wanted:
            top, manifest_document, manifest = self._documents(name, image)
            for document in (top, manifest_document):
                writer.add(_blob_name(document.digest), document.data)
            writer.add(_blob_name(image.id), self._config(image))
            for layer in manifest.layers:
                self._with_blob(image, layer, writer, _blob_name(layer.digest), unpacked=False)
            entry: dict[str, Any] = {"mediaType": top.media_type, "digest": top.digest, "size": len(top.data)}
            if tag := _tag_of(name, image):
                parsed = reference.parse(tag)
                entry["annotations"] = {CONTAINERD_NAME: tag, OCI_NAME: parsed.tag or tag}
            entries.append(entry)
        index = {"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": entries}
        writer.add(INDEX_FILE, json.dumps(index).encode())
        writer.add(LAYOUT_FILE, b'{"imageLayoutVersion":"1.0.0"}')

    def _documents(self, name: str, image: Image) -> tuple[Document, Document, Manifest]:
        """What a reference stands for, and the manifest in it for this machine."""
        record = self._store.image(image.id)
        manifest_document = self._store.document(record.manifest_digest) if record else None
        if manifest_document is None:
            raise errors.NotFound(f"{name}: was removed meanwhile")
        manifest = documents.parse_manifest(manifest_document.data, manifest_document.media_type)
        assert isinstance(manifest, Manifest)
        top_digest = self._store.document_of(_tag_of(name, image) or name)
        top = self._store.document(top_digest) if top_digest else None
        if top is not None:
            content = documents.parse_manifest(top.data, top.media_type)
            if isinstance(content, Manifest):
                if content.config.digest == image.id:
                    return _typed(top, content), _typed(top, content), content
            elif any(entry.digest == manifest_document.digest for entry in content.manifests):
                return _typed(top, content), _typed(manifest_document, manifest), manifest
        return _typed(manifest_document, manifest), _typed(manifest_document, manifest), manifest

    # -- docker-archives -----------------------------------------------------------------------------------------------

    def _save_docker(self, wanted: Sequence[tuple[str, Image]], writer: _Writer) -> None:
        entries = []
        for name, image in wanted:
            _, _, manifest = self._documents(name, image)
            config = f"{digests.hex_of(image.id)}.json"
            writer.add(config, self._config(image))
            names = []
            for layer, diff_id in zip(manifest.layers, image.diff_ids, strict=True):
                names.append(f"{digests.hex_of(diff_id)}/layer.tar")
                self._with_blob(image, layer, writer, names[-1], unpacked=True)
            tag = _tag_of(name, image)
            tags = [reference.familiar(reference.parse(tag))] if tag and "@" not in tag else []
            entries.append({"Config": config, "RepoTags": tags, "Layers": names})
        writer.add(DOCKER_FILE, json.dumps(entries).encode())

    # -- both ----------------------------------------------------------------------------------------------------------

    def _config(self, image: Image) -> bytes:
        record = self._store.image(image.id)
        if record is None:
            raise errors.NotFound(f"{image.id}: was removed meanwhile")
        return record.config

    def _with_blob(self, image: Image, layer: Descriptor, writer: _Writer, name: str, *, unpacked: bool) -> None:
        """Write a layer, packed as it came or unpacked."""
        if writer.has(name):
            return
        fetched = self._directory / f"{secrets.token_hex(8)}.save"
        plain = self._directory / f"{secrets.token_hex(8)}.save"
        try:
            path = self._blobs.find(layer.digest)
            if path is None:
                self._fetch(image, layer, fetched)
                path = fetched
            if unpacked:
                with path.open("rb", buffering=0) as packed, plain.open("xb") as target:
                    reader = compression.open_layer(packed)
                    while piece := reader.read(_PIECE_BYTES):
                        target.write(piece)
                path = plain
            with path.open("rb") as source:
                writer.add_file(name, source, path.stat().st_size)
        finally:
            fetched.unlink(missing_ok=True)
            plain.unlink(missing_ok=True)


class _Writer:
    """A tar of files, each name once."""

    def __init__(self, tar: tarfile.TarFile, context: CallContext) -> None:
        self._tar = tar
        self._context = context
        self._names: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str, data: bytes) -> None:
        self.add_file(name, io.BytesIO(data), len(data))

    def add_file(self, name: str, source: BinaryIO, size: int) -> None:
        self._context.check()
        if name in self._names:
            return
        self._names.add(name)
        info = tarfile.TarInfo(name)
        info.size = size
        self._tar.addfile(info, source)


def _typed(document: Document, content: Manifest | Index) -> Document:
    """With the media type that the document goes by; servers don't always say one."""
    return Document(document.digest, content.media_type, document.data)


def _blob_name(digest: str) -> str:
    return f"blobs/sha256/{digests.hex_of(digest)}"


def _tag_of(name: str, image: Image) -> str:
    """The full reference to write an image under: the one it was asked by, else its first."""
    try:
        full = str(reference.parse(name))
    except errors.InvalidArgument:
        full = ""
    references = (*image.repo_tags, *image.repo_digests)
    return full if full in references else next(iter(image.repo_tags), "")
