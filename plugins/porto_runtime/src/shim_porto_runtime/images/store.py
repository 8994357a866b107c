"""What images there are: in SQLite, so that it outlives us, and in memory, so that asking costs nothing.

The database is the truth about which layers are complete: a Porto layer that isn't in it was left half done by a
crash, or isn't ours. Another process (`portoshim images load`) may write to it; that is noticed at the next question.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shim_core import errors
from shim_porto_runtime.images import documents
from shim_porto_runtime.images.documents import BadDocument, ImageConfig
from shim_porto_runtime.images.model import Document, Image, ImageRecord, Index, Layer

logger = logging.getLogger("shim.porto_runtime.images")

FILE_NAME = "images.db"
_VERSION = 1
_BUSY_TIMEOUT_S = 30.0
_SCHEMA = """
CREATE TABLE layers (
    diff_id TEXT PRIMARY KEY, name TEXT NOT NULL, place TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    inodes INTEGER NOT NULL, boot_id TEXT NOT NULL, synced INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE documents (digest TEXT PRIMARY KEY, media_type TEXT NOT NULL, data BLOB NOT NULL);
CREATE TABLE images (
    id TEXT PRIMARY KEY, config BLOB NOT NULL, manifest TEXT NOT NULL, diff_ids TEXT NOT NULL,
    from_file INTEGER NOT NULL
);
CREATE TABLE refs (reference TEXT PRIMARY KEY, image TEXT NOT NULL, document TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE blobs (digest TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL) WITHOUT ROWID;
"""


class Store:
    """The records, in ``directory``/images.db. Safe to use from many threads.

    :param pinned: whether an image of that id and those references is pinned.
    :raises errors.StartupError: the database can't be made.
    """

    def __init__(self, directory: Path, pinned: Callable[[str, Sequence[str]], bool]) -> None:
        self._path = directory / FILE_NAME
        self._pinned = pinned
        self._lock = threading.RLock()
        self._configs: dict[str, ImageConfig] = {}
        self._index = Index()
        self._data_version = -1
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._db = self._open()
        except (sqlite3.Error, BadDocument, ValueError) as err:
            # One bad file must not keep the node down: images can be had again.
            self._quarantine(err)
            try:
                self._db = self._open()
            except sqlite3.Error as again:
                raise errors.StartupError(f"{self._path}: can't be opened: {again}") from again
        self.instance = _instance(directory / "instance")
        """Marks the Porto layers that belong to this store. Kept beside the database, to outlive it."""

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # -- reading ---------------------------------------------------------------------------------------------------

    def index(self) -> Index:
        """All images, as they are now."""
        # Whoever holds the lock is writing, and replaces the index when done.
        if self._lock.acquire(blocking=False):
            try:
                if self._db.execute("PRAGMA data_version").fetchone()[0] != self._data_version:
                    self._reload()
            except sqlite3.Error as err:
                logger.warning("%s: %s; answering from memory", self._path, err)
            finally:
                self._lock.release()
        return self._index

    def layers(self) -> dict[str, Layer]:
        """All layers that are complete, by diff_id."""
        with self._lock:
            return {row[0]: _layer(row) for row in self._db.execute("SELECT * FROM layers")}

    def layer(self, diff_id: str) -> Layer | None:
        """A layer, if it is here and complete."""
        with self._lock:
            row = self._db.execute("SELECT * FROM layers WHERE diff_id = ?", (diff_id,)).fetchone()
        return _layer(row) if row else None

    def image(self, image_id: str) -> ImageRecord | None:
        """An image's record."""
        with self._lock:
            row = self._db.execute("SELECT * FROM images WHERE id = ?", (image_id,)).fetchone()
        return ImageRecord(row[0], row[1], row[2], tuple(json.loads(row[3])), bool(row[4])) if row else None

    def document(self, digest: str) -> Document | None:
        """A manifest or index."""
        with self._lock:
            row = self._db.execute("SELECT * FROM documents WHERE digest = ?", (digest,)).fetchone()
        return Document(*row) if row else None

    def document_of(self, reference: str) -> str | None:
        """The digest of the document that a reference stands for."""
        with self._lock:
            row = self._db.execute("SELECT document FROM refs WHERE reference = ?", (reference,)).fetchone()
        return row[0] if row else None

    def unreferenced_layers(self) -> list[Layer]:
        """Layers that no image has."""
        with self._lock:
            used = {
                diff_id for (text,) in self._db.execute("SELECT diff_ids FROM images") for diff_id in json.loads(text)
            }
            return [layer for diff_id, layer in self.layers().items() if diff_id not in used]

    def blobs(self) -> dict[str, int]:
        """Sizes of packed layers that are kept, by digest."""
        with self._lock:
            return dict(self._db.execute("SELECT digest, size_bytes FROM blobs"))

    def manifest_digests(self) -> list[str]:
        """Manifests of all images."""
        with self._lock:
            return [row[0] for row in self._db.execute("SELECT manifest FROM images")]

    # -- writing ---------------------------------------------------------------------------------------------------

    def add_layer(self, layer: Layer) -> None:
        """A layer is complete."""
        with self._writing():
            self._db.execute(
                "INSERT OR REPLACE INTO layers VALUES (?, ?, ?, ?, ?, ?, ?)",
                (layer.diff_id, layer.name, layer.place, layer.size_bytes, layer.inodes, layer.boot_id, layer.synced),
            )

    def set_synced(self, diff_ids: Iterable[str]) -> None:
        """Layers have reached the disk."""
        with self._writing():
            self._db.executemany("UPDATE layers SET synced = 1 WHERE diff_id = ?", [(item,) for item in diff_ids])

    def remove_unreferenced_layer(self, diff_id: str) -> bool:
        """Forget a layer, unless an image has it; True when it was forgotten."""
        with self._writing():
            for (text,) in self._db.execute("SELECT diff_ids FROM images"):
                if diff_id in json.loads(text):
                    return False
            self._db.execute("DELETE FROM layers WHERE diff_id = ?", (diff_id,))
        return True

    def remove_layers(self, diff_ids: Iterable[str]) -> None:
        """Layers are gone: images that need them go with them."""
        gone = set(diff_ids)
        with self._writing():
            self._db.executemany("DELETE FROM layers WHERE diff_id = ?", [(item,) for item in gone])
            for image_id, text in self._db.execute("SELECT id, diff_ids FROM images").fetchall():
                if gone.intersection(json.loads(text)):
                    self._delete_image(image_id)

    def add_image(self, record: ImageRecord, contents: Iterable[Document], references: dict[str, str]) -> None:
        """An image is complete: all its layers have been added.

        :param references: tags and digests that stand for it now, each with its document's digest.
        :raises errors.Aborted: another process has removed one of them meanwhile.
        """
        with self._writing():
            if not self.layers().keys() >= set(record.diff_ids):
                raise errors.Aborted(f"image {record.id}: one of its layers was removed meanwhile; try again")
            self._db.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET manifest = excluded.manifest,"
                " from_file = excluded.from_file",
                (record.id, record.config, record.manifest_digest, json.dumps(record.diff_ids), record.from_file),
            )
            for document in contents:
                self._db.execute(
                    "INSERT OR IGNORE INTO documents VALUES (?, ?, ?)",
                    (document.digest, document.media_type, document.data),
                )
            for reference, digest in references.items():
                self._db.execute("INSERT OR REPLACE INTO refs VALUES (?, ?, ?)", (reference, record.id, digest))

    def remove_image(self, image_id: str) -> None:
        """An image with all that refers to it. An unknown one is success."""
        with self._writing():
            self._delete_image(image_id)

    def add_blob(self, digest: str, size_bytes: int) -> None:
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?)", (digest, size_bytes))

    def remove_blobs(self, gone: Iterable[str]) -> None:
        with self._writing():
            self._db.executemany("DELETE FROM blobs WHERE digest = ?", [(item,) for item in gone])

    # -- inside ----------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.close(fd)
        db = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
            elif version != _VERSION:
                raise sqlite3.DatabaseError(f"written by another version of portoshim ({version})")
            if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
            self._db = db
            self._reload()
        except BaseException:
            db.close()
            raise
        return db

    def _quarantine(self, err: Exception) -> None:
        aside = self._path.with_name(f"{FILE_NAME}.broken")
        logger.error("%s: %s; set aside as %s, images will be pulled again", self._path, err, aside)
        self._path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(FILE_NAME + suffix).unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction; the index is made anew after it."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._collect_documents()
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
                self._reload()
            except sqlite3.OperationalError as err:
                raise errors.ResourceExhausted(f"{self._path}: {err}") from err

    def _delete_image(self, image_id: str) -> None:
        self._db.execute("DELETE FROM refs WHERE image = ?", (image_id,))
        self._db.execute("DELETE FROM images WHERE id = ?", (image_id,))

    def _collect_documents(self) -> None:
        self._db.execute(
            "DELETE FROM documents WHERE digest NOT IN (SELECT document FROM refs UNION SELECT manifest FROM images)"
        )

    def _reload(self) -> None:
        """Make the index of what the database holds."""
        self._data_version = self._db.execute("PRAGMA data_version").fetchone()[0]
        layers = self.layers()
        references: dict[str, list[str]] = {}
        by_reference: dict[str, str] = {}
        for reference, image_id in self._db.execute("SELECT reference, image FROM refs ORDER BY reference"):
            references.setdefault(image_id, []).append(reference)
            by_reference[reference] = image_id
        images: dict[str, Image] = {}
        configs: dict[str, ImageConfig] = {}
        for image_id, text in self._db.execute("SELECT id, diff_ids FROM images ORDER BY id").fetchall():
            diff_ids = tuple(json.loads(text))
            if any(diff_id not in layers for diff_id in diff_ids):
                logger.warning("image %s lacks a layer; it has to be pulled again", image_id)
                continue
            configs[image_id] = self._configs.get(image_id) or self._config(image_id)
            names = references.get(image_id, [])
            images[image_id] = Image(
                id=image_id,
                repo_tags=tuple(name for name in names if "@" not in name),
                repo_digests=tuple(name for name in names if "@" in name),
                size_bytes=sum(layers[diff_id].size_bytes for diff_id in set(diff_ids)),
                pinned=self._pinned(image_id, names),
                config=configs[image_id],
                # The same layer twice is one directory to overlayfs: the upper one counts.
                layers=tuple(dict.fromkeys(layers[diff_id].name for diff_id in reversed(diff_ids))),
                diff_ids=diff_ids,
            )
        self._configs = configs
        self._index = Index(
            images,
            {reference: image_id for reference, image_id in by_reference.items() if image_id in images},
            sum(layer.size_bytes for layer in layers.values()) + sum(self.blobs().values()),
            sum(layer.inodes for layer in layers.values()),
        )

    def _config(self, image_id: str) -> ImageConfig:
        row = self._db.execute("SELECT config FROM images WHERE id = ?", (image_id,)).fetchone()
        return documents.parse_config(row[0]).config


def _instance(path: Path) -> str:
    """What the file says; a new one says something new."""
    try:
        text = path.read_text().strip()
        if text.isalnum():
            return text
    except FileNotFoundError:
        pass
    text = secrets.token_hex(8)
    partial = path.with_suffix(".new")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(fd, text.encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    partial.replace(path)
    return text


def _layer(row: tuple[Any, ...]) -> Layer:
    diff_id, name, place, size_bytes, inodes, boot, synced = row
    return Layer(diff_id, name, place, size_bytes, inodes, boot, bool(synced))
