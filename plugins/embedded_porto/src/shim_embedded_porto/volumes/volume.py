"""A volume: a file tree that Porto has made or bound, and the containers it is linked to."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import credentials, paths, text
from shim_embedded_porto.client import Client
from shim_embedded_porto.container import Container
from shim_embedded_porto.credentials import UNKNOWN, Cred

INITIAL, BUILDING, READY, TUNING = "initial", "building", "ready", "tuning"
UNLINKED, TO_DESTROY, DESTROYING, DESTROYED = "unlinked", "to-destroy", "destroying", "destroyed"
USABLE = frozenset({READY, TUNING})

REMOTE = frozenset({"tmpfs", "hugetmpfs", "dir", "quota", "lvm", "rbd", "nbd"})
"""Backends that keep no data in a storage directory."""


@dataclass(eq=False, slots=True)
class Link:
    """A container's hold on a volume."""

    volume: Volume
    container: Container
    target: str = ""
    """Where the container wants it mounted, in its own root; empty: nowhere."""
    host_target: str = ""
    """Where it is mounted, as Porto sees it."""
    read_only: bool = False
    required: bool = False
    busy: bool = False

    def dump(self, out: pb.TVolumeLink, client: Client) -> None:
        out.container = client.relative_name(self.container.name)
        if self.target:
            out.target = self.target
        if self.read_only:
            out.read_only = True
        if self.required:
            out.required = True


@dataclass(frozen=True, slots=True)
class Space:
    """What df would say."""

    used: int = 0
    available: int = 0
    inodes_used: int = 0
    inodes_available: int = 0


@dataclass(eq=False)
class Volume:
    """A volume. Guarded by the manager's lock; paths are as Porto itself sees them."""

    id: str
    place: str
    path: str = ""
    auto_path: bool = False
    backend: str = ""
    storage: str = ""
    storage_path: str = ""
    keep_storage: bool = False
    state: str = INITIAL
    read_only: bool = False
    image: str = ""
    layers: list[str] = field(default_factory=list)
    space_limit: int = 0
    space_guarantee: int = 0
    inode_limit: int = 0
    inode_guarantee: int = 0
    owner: Cred = UNKNOWN
    cred: Cred = UNKNOWN
    permissions: int = 0o775
    creator: str = ""
    private: str = ""
    device_name: str = ""
    fs_type: str = ""
    build_time: int = 0
    change_time: int = field(default_factory=lambda: int(time.time()))
    owner_container: Container | None = None
    links: list[Link] = field(default_factory=list)
    nested: set[Volume] = field(default_factory=set)
    """Volumes that lie in this one: they go when it goes."""
    has_dependents: bool = False
    """True once a container requires it."""
    space: Space = Space()
    mounting: threading.Lock = field(default_factory=threading.Lock)
    """Held while a link is mounted: they take turns in one work directory."""

    def __repr__(self) -> str:
        return f"<Volume {self.id} {self.backend} {self.path} {self.state}>"

    # -- where its parts are ---------------------------------------------------------------------------------------

    def internal(self, name: str = "") -> str:
        base = f"{self.place}/porto_volumes/{self.id}"
        return f"{base}/{name}" if name else base

    @property
    def internal_path(self) -> str:
        """Where the backend mounts it."""
        if self.backend in ("dir", "quota"):
            return self.path
        if self.binds_file:
            return self.internal("volume/" + os.path.basename(self.storage_path))
        return self.internal("volume")

    @property
    def user_storage(self) -> bool:
        """True when the data lie in a directory the user has named."""
        return self.storage.startswith("/")

    @property
    def remote(self) -> bool:
        return self.backend in REMOTE

    @property
    def binds_file(self) -> bool:
        """True when the volume is a single file."""
        path = self.storage_path
        return self.backend == "bind" and os.path.exists(path) and not os.path.isdir(path)

    @property
    def upper(self) -> str:
        """The directory with what was changed."""
        return f"{self.storage_path}/upper" if self.backend == "overlay" else self.path

    def path_for(self, ct: Container) -> str:
        """Where a container finds it; empty when nowhere."""
        for link in ct.volume_links:
            if link.volume is self and link.target:
                return link.target
        for link in self.links:
            if link.host_target:
                found = paths.inner(ct.root_path, link.host_target)
                if found:
                    return found
        return paths.inner(ct.root_path, self.path)

    # -- for clients -----------------------------------------------------------------------------------------------

    def _shown_storage(self, client: Client) -> str:
        if self.user_storage and not self.remote:
            return client.compose_path(self.storage_path)
        return self.storage

    def _shown_layers(self, client: Client) -> list[str]:
        return [client.compose_path(layer) if layer.startswith("/") else layer for layer in self.layers]

    def dump(self, out: pb.TVolumeSpec, client: Client) -> None:
        out.path = client.compose_path(self.path)
        out.container = client.relative_name(client.container.name)
        if self.auto_path:
            out.auto_path = True
        out.id, out.state, out.backend = self.id, self.state, self.backend
        out.creator, out.build_time, out.change_time = self.creator, self.build_time, self.change_time
        out.place = self.place
        out.permissions, out.read_only = self.permissions, self.read_only
        optional = {
            "private_value": self.private,
            "device_name": self.device_name,
            "storage": self._shown_storage(client),
            "image": self.image,
        }
        for name, value in optional.items():
            if value:
                setattr(out, name, value)
        if self.owner_container is not None:
            out.owner_container = client.relative_name(self.owner_container.name)
        if not self.owner.unknown:
            self.owner.dump(out.owner)
        if not self.cred.unknown:
            Cred(self.cred.uid, self.cred.gid).dump(out.cred)
        for resource, limit, guarantee, used, available in (
            (out.space, self.space_limit, self.space_guarantee, self.space.used, self.space.available),
            (out.inodes, self.inode_limit, self.inode_guarantee, self.space.inodes_used, self.space.inodes_available),
        ):
            if limit:
                resource.limit = limit
            if guarantee:
                resource.guarantee = guarantee
            resource.usage, resource.available = used, available
        out.layers.extend(self._shown_layers(client))
        for link in self.links:
            entry = out.links.add()
            link.dump(entry, client)
            if link.host_target:
                entry.host_target = link.host_target

    def describe(self, link: Link | None, path: str, out: pb.TVolumeDescription, client: Client) -> None:
        """The older form: properties by name.

        :param link: the one that is looked at; the volume's own path shows all.
        """
        values: dict[str, str] = {
            "id": self.id,
            "storage": self._shown_storage(client),
            "backend": self.backend,
            "owner_user": self.owner.user,
            "owner_group": self.owner.group,
            "permissions": text.format_octal(self.permissions),
            "creator": self.creator,
            "ready": text.format_bool(self.state in USABLE),
            "change_time": _moment(self.change_time),
            "state": self.state,
            "private": self.private,
            "read_only": text.format_bool(self.read_only),
            "image": self.image,
            "space_limit": str(self.space_limit),
            "inode_limit": str(self.inode_limit),
            "space_guarantee": str(self.space_guarantee),
            "inode_guarantee": str(self.inode_guarantee),
            "place": self.place,
            "space_used": str(self.space.used),
            "inode_used": str(self.space.inodes_used),
            "space_available": str(self.space.available),
            "inode_available": str(self.space.inodes_available),
        }
        if self.owner_container is not None:
            values["owner_container"] = client.relative_name(self.owner_container.name)
        if self.cred.uid != credentials.NOBODY_KNOWN:
            values["user"] = self.cred.user
        if self.cred.gid != credentials.NOBODY_KNOWN:
            values["group"] = self.cred.group
        if self.build_time:
            values["build_time"] = _moment(self.build_time)
        if self.layers:
            values["layers"] = text.merge(self._shown_layers(client), ";")
        if self.device_name:
            values["device_name"] = self.device_name
        out.path, out.change_time = path, self.change_time
        for shown in self.links if link is None or link.host_target == self.path else [link]:
            out.containers.append(client.relative_name(shown.container.name))
            shown.dump(out.links.add(), client)
        for name in sorted(values):
            out.properties.add(name=name, value=values[name])

    # -- for the store ---------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What is remembered."""
        plain = {name: getattr(self, name) for name in _STORED}
        return plain | {
            "owner": self.owner.format(),
            "cred": self.cred.format(),
            "ready": self.state in USABLE,
            "has_dependents": self.has_dependents,
            "owner_container": self.owner_container.name if self.owner_container else "",
            "links": [
                [link.container.name, link.target, link.host_target, link.read_only, link.required]
                for link in self.links
            ],
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Volume:
        """A volume without its links: those need the containers."""
        volume = cls(record["id"], record["place"])
        for name in _STORED:
            setattr(volume, name, record[name])
        volume.owner = credentials.parse(record["owner"])
        volume.cred = credentials.parse(record["cred"])
        volume.state = READY if record["ready"] else TO_DESTROY
        volume.has_dependents = record["has_dependents"]
        return volume


_STORED = (
    *("id", "place", "path", "auto_path", "backend", "storage", "storage_path", "keep_storage", "read_only", "image"),
    *("layers", "space_limit", "space_guarantee", "inode_limit", "inode_guarantee", "permissions", "creator"),
    *("private", "device_name", "fs_type", "build_time", "change_time"),
)


def _moment(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
