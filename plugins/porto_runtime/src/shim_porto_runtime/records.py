"""What the shim knows of its sandboxes and containers, kept in SQLite so that it outlives the daemon and portod.

Records are frozen; a change is a new record in place of the old one, written to disk before anybody sees it. Reads come
from memory. CRI metadata lives here and never in Porto's labels, which are too few and too small for it.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import AlreadyExists, InvalidArgument, ResourceExhausted, StartupError
from shim_porto_runtime.names import may_be_id

logger = logging.getLogger("shim.porto_runtime.records")

SCHEMA_VERSION = 1


class SandboxState(enum.Enum):
    CREATING = "creating"
    """Being made, or left behind by a daemon that died making it: not listed, reclaimed at the next start."""
    READY = "ready"
    NOTREADY = "notready"
    """Stopped, or failed and not yet fully reclaimed."""


class ContainerState(enum.Enum):
    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class SandboxRecord:
    """One pod sandbox."""

    id: str
    config: pb.PodSandboxConfig
    """As the client sent it. Never changed."""
    created_at: int
    """Nanoseconds since the epoch."""
    state: SandboxState
    runtime_handler: str = ""
    network: dict[str, Any] | None = None
    """What ``network_attach`` returned, as JSON values; None on the host's network."""
    attached: bool = False
    """True from before ``network_attach`` until ``network_detach`` has succeeded."""
    reason: str = ""
    """Why it is NOTREADY, where that wasn't asked for."""
    layers: tuple[str, ...] = ()
    """Porto layers of its pause process."""
    devices: Sequence[Sequence[str]] = ()
    """Device nodes its containers may be given (see ``devices.py``)."""
    resources: str = ""
    """The pod's resources since they were updated, serialized, in hex; empty: those of the config."""
    overhead_in_force: str = ""
    """Likewise its overhead."""
    memo: dict[object, Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    """See :func:`remembered`."""

    @property
    def key(self) -> str:
        """What kubelet means by "the same sandbox" when it repeats a call."""
        metadata = self.config.metadata
        return "\n".join((metadata.name, metadata.namespace, metadata.uid, str(metadata.attempt)))

    @property
    def limits(self) -> pb.LinuxContainerResources:
        """The resources in force."""
        return _in_force(self.resources, self.config.linux.resources)

    @property
    def overhead(self) -> pb.LinuxContainerResources:
        """The overhead in force."""
        return _in_force(self.overhead_in_force, self.config.linux.overhead)

    @classmethod
    def load(cls, record_id: str, config: bytes, status: dict[str, Any]) -> SandboxRecord:
        """From a row. :raises ValueError, TypeError, KeyError, DecodeError: the row is damaged."""
        state = SandboxState(status.pop("state"))
        status["layers"] = tuple(status["layers"])
        status["devices"] = tuple(tuple(node) for node in status["devices"])
        return cls(id=record_id, config=pb.PodSandboxConfig.FromString(config), state=state, **status)


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """One container."""

    id: str
    sandbox_id: str
    config: pb.ContainerConfig
    """As the client sent it. Never changed."""
    created_at: int
    """Nanoseconds since the epoch, as the other times; 0: not yet."""
    state: ContainerState
    image_id: str = ""
    """``sha256:...``: the config digest."""
    layers: tuple[str, ...] = ()
    """Porto layers of its root volume: they outlive their image's removal."""
    image_ref: str = ""
    """A digested reference where the image has one, else its id."""
    mount_images: Mapping[str, str] = field(default_factory=dict)
    """Images that are mounted as volumes: as the config names them, and their ids."""
    log_path: str = ""
    """The absolute path of the log, empty when none is wanted."""
    stop_signal: int = 15
    resources: str = ""
    """Resources in force since they were updated, serialized, in hex; empty: those of the config."""
    late_mounts: Sequence[Mapping[str, Any]] = ()
    """Mounts to be attached when it starts (see ``late.py``)."""
    process: dict[str, Any] = field(default_factory=dict)
    """How processes of this container are started (see ``process.py``); exec follows it."""
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    memo: dict[object, Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    """See :func:`remembered`."""

    @property
    def key(self) -> str:
        metadata = self.config.metadata
        return "\n".join((self.sandbox_id, metadata.name, str(metadata.attempt)))

    @property
    def limits(self) -> pb.LinuxContainerResources:
        """The resources in force."""
        return _in_force(self.resources, self.config.linux.resources)

    @property
    def visible(self) -> bool:
        """False while it is being made, and clients know nothing of it."""
        return self.state is not ContainerState.CREATING

    @classmethod
    def load(cls, record_id: str, config: bytes, status: dict[str, Any]) -> ContainerRecord:
        """From a row. :raises ValueError, TypeError, KeyError, DecodeError: the row is damaged."""
        state = ContainerState(status.pop("state"))
        status["layers"] = tuple(status["layers"])
        status["late_mounts"] = tuple(status["late_mounts"])
        return cls(id=record_id, config=pb.ContainerConfig.FromString(config), state=state, **status)


R = TypeVar("R", SandboxRecord, ContainerRecord)
T = TypeVar("T")


def remembered(make: Callable[[R], T]) -> Callable[[R], T]:
    """Make something of a record once: a record never changes. What is made is for copying, never to be changed."""

    def made(record: R) -> T:
        if make not in record.memo:
            record.memo[make] = make(record)
        found: T = record.memo[make]
        return found

    return made


class Table(Generic[R]):
    """Records of one kind: in memory by id and by key, on disk in one table."""

    def __init__(self, database: Database, name: str, load: Callable[[str, bytes, dict[str, Any]], R]) -> None:
        self._database = database
        self._name = name
        self._load_row: Callable[[str, bytes, dict[str, Any]], R] = load
        self._lock = threading.Lock()
        self._by_id: dict[str, R] = {}
        self._by_key: dict[str, str] = {}

    def load(self) -> None:
        """Read all records; one that can't be read is put aside and named in the log."""
        for row_id, config, status in self._database.rows(self._name):
            try:
                record = self._load_row(row_id, config, json.loads(status))
            except (ValueError, TypeError, KeyError, AttributeError, DecodeError) as err:
                logger.error("%s: the record %s can't be read (%s); it is put aside", self._database.path, row_id, err)
                self._database.quarantine(self._name, row_id)
                continue
            self._by_id[record.id] = record
            self._by_key[record.key] = record.id

    def insert(self, record: R) -> None:
        """Add a record.

        :raises AlreadyExists: one with the same key is there.
        """
        with self._lock:
            if record.key in self._by_key:
                raise AlreadyExists(f"{self._name}: one with this metadata exists already: {self._by_key[record.key]}")
            self._database.write(self._name, record.id, record.config, _status(record))
            self._by_id[record.id] = record
            self._by_key[record.key] = record.id

    def update(self, record_id: str, expect: enum.Enum | None = None, **changes: Any) -> R | None:
        """Change fields of a record.

        :param expect: only if its state is still this one.
        :returns: the new record; None if there is none of that id, or not in that state.
        """
        with self._lock:
            old = self._by_id.get(record_id)
            if old is None or (expect is not None and old.state is not expect):
                return None
            record = dataclasses.replace(old, **changes)
            self._database.write_status(self._name, record.id, _status(record))
            self._by_id[record_id] = record
            return record

    def delete(self, record_id: str) -> R | None:
        """Remove a record; it as it was last, None if it isn't there."""
        with self._lock:
            record = self._by_id.get(record_id)
            if record is not None:
                self._database.delete(self._name, record_id)
                del self._by_id[record_id]
                del self._by_key[record.key]
            return record

    def get(self, record_id: str) -> R | None:
        return self._by_id.get(record_id)

    def by_key(self, key: str) -> R | None:
        found = self._by_key.get(key)
        return self._by_id.get(found) if found else None

    def find(self, prefix: str) -> R | None:
        """The record whose id is, or begins with, ``prefix``; None for what is no id.

        :raises InvalidArgument: several do.
        """
        record = self._by_id.get(prefix)
        if record is not None or len(prefix) == 64 or not may_be_id(prefix):
            return record
        found = [record for record in self.all() if record.id.startswith(prefix)]
        if len(found) > 1:
            raise InvalidArgument(f"{prefix}: {len(found)} ids begin with this; give more digits")
        return found[0] if found else None

    def all(self) -> list[R]:
        """Every record, oldest first."""
        return list(self._by_id.values())


class Database:
    """The SQLite file: two tables of id, config (protobuf) and status (JSON)."""

    TABLES = ("sandboxes", "containers")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._connection = self._open()
        except OSError as err:
            raise StartupError(f"{err.filename or path}: {err.strerror}; set Portoshim.StateDir elsewhere") from err
        except sqlite3.DatabaseError as err:
            if err.sqlite_errorcode not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise StartupError(f"{path}: {err}") from err
            aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
            logger.error("%s is damaged (%s): moved to %s; pods are cleaned up and made anew", path, err, aside)
            path.rename(aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        try:
            # A killed daemon loses nothing; after a power cut the last records may be missing, and their pods are too.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StartupError(f"{self.path}: written by a newer portoshim (schema {version}); upgrade this one")
            for table in self.TABLES:
                for name in (table, f"{table}_aside"):
                    connection.execute(
                        f"CREATE TABLE IF NOT EXISTS {name} (id TEXT PRIMARY KEY, config BLOB, status TEXT)"
                    )
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except BaseException:
            connection.close()
            raise
        return connection

    def rows(self, table: str) -> list[tuple[str, bytes, str]]:
        with self._lock:
            return self._connection.execute(f"SELECT id, config, status FROM {table} ORDER BY rowid").fetchall()  # noqa: S608

    def write(self, table: str, record_id: str, config: Message, status: str) -> None:
        self._execute(
            f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)",  # noqa: S608
            (record_id, config.SerializeToString(), status),
        )

    def write_status(self, table: str, record_id: str, status: str) -> None:
        self._execute(f"UPDATE {table} SET status = ? WHERE id = ?", (status, record_id))  # noqa: S608

    def delete(self, table: str, record_id: str) -> None:
        self._execute(f"DELETE FROM {table} WHERE id = ?", (record_id,))  # noqa: S608

    def quarantine(self, table: str, record_id: str) -> None:
        self._execute(f"INSERT OR REPLACE INTO {table}_aside SELECT * FROM {table} WHERE id = ?", (record_id,))  # noqa: S608
        self.delete(table, record_id)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _execute(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            with self._lock:
                self._connection.execute(statement, values)
        except sqlite3.OperationalError as err:
            raise ResourceExhausted(f"{self.path}: the record can't be written: {err}") from err


class Records:
    """All records of the shim.

    :param path: the SQLite file; made if missing, put aside if damaged.
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path)
        self.sandboxes = Table(self._database, "sandboxes", SandboxRecord.load)
        self.containers = Table(self._database, "containers", ContainerRecord.load)
        self.sandboxes.load()
        self.containers.load()

    def containers_of(self, sandbox_id: str) -> Iterator[ContainerRecord]:
        """The containers of one sandbox."""
        return (record for record in self.containers.all() if record.sandbox_id == sandbox_id)

    def close(self) -> None:
        self._database.close()


def _in_force(updated: str, config: pb.LinuxContainerResources) -> pb.LinuxContainerResources:
    return pb.LinuxContainerResources.FromString(bytes.fromhex(updated)) if updated else config


def _status(record: SandboxRecord | ContainerRecord) -> str:
    kept = (f.name for f in dataclasses.fields(record) if f.init and f.name not in ("id", "config"))
    values = {name: getattr(record, name) for name in kept}
    values["state"] = record.state.value
    return json.dumps(values)
