"""What lies in a place: layers and storages, their owners and private values, importing and exporting them."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits, names, paths, rights, text
from shim_embedded_porto.client import Client
from shim_embedded_porto.container import Container
from shim_embedded_porto.credentials import UNKNOWN, Cred
from shim_embedded_porto.errors import Fault, invalid_path, invalid_value, permission, system, system_call
from shim_embedded_porto.removal import remove_tree
from shim_embedded_porto.volumes import archive, mounts

logger = logging.getLogger("shim.embedded_porto.storage")

LAYER, STORAGE = "layer", "storage"
_DIRECTORIES = {LAYER: "porto_layers", STORAGE: "porto_storage"}
_PLACE_PERMISSIONS = {"porto_volumes": 0o755, "porto_layers": 0o700, "porto_storage": 0o700}
_PARALLEL = 2
"""Archives packed, unpacked or removed at a time in one place: Porto's place_load_limit."""


@dataclass(slots=True)
class Item:
    """A layer or a storage. Its owner and private value are those of the file beside it."""

    kind: str
    place: str
    name: str
    owner: Cred = UNKNOWN
    private: str = ""
    changed: float = 0.0

    @property
    def path(self) -> str:
        meta, separator, rest = self.name.partition("/")
        if not separator:
            return f"{self.place}/{_DIRECTORIES[self.kind]}/{self.name}"
        prefix = "_layer_" if self.kind == LAYER else ""
        return f"{self.place}/porto_storage/_meta_{meta}/{prefix}{rest}"

    def beside(self, prefix: str) -> str:
        directory, name = os.path.split(self.path)
        return f"{directory}/{prefix}{name}"

    @property
    def weak(self) -> bool:
        """True for those that go with the last volume that uses them."""
        return self.name.rpartition("/")[2].startswith("_weak_")

    @property
    def last_usage(self) -> int:
        """Seconds since it was used."""
        return int(time.time() - self.changed) if self.changed else 0

    def load(self) -> None:
        """:raises Fault: LayerNotFound, VolumeNotFound."""
        names.check_storage(self.name)
        try:
            fd = os.open(self.beside("_private_"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
        except FileNotFoundError:
            try:
                found = os.lstat(self.path)
            except FileNotFoundError:
                raise self._missing() from None
            self.owner, self.private, self.changed = UNKNOWN, "", found.st_mtime
            return
        try:
            found = os.fstat(fd)
            self.owner, self.changed = Cred(found.st_uid, found.st_gid), found.st_mtime
            self.private = os.read(fd, limits.PRIVATE_MAX).decode(errors="replace")
        finally:
            os.close(fd)

    def _missing(self) -> Fault:
        if self.kind == LAYER:
            return Fault(pb.LayerNotFound, f"Layer {self.name} not found")
        return Fault(pb.VolumeNotFound, f"Storage {self.name} not found")

    def save_owner(self, owner: Cred) -> None:
        fd = os.open(self.beside("_private_"), os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            os.fchown(fd, owner.uid, owner.gid)
        finally:
            os.close(fd)
        self.owner = owner

    def save_private(self, value: str) -> None:
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.beside("_private_"), flags, 0o644)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
        self.private = value

    def touch(self) -> None:
        """It has been used."""
        for path in (self.beside("_private_"), self.path):
            try:
                os.utime(path, follow_symlinks=False)
                return
            except FileNotFoundError:
                continue


class Storages:
    """The layers and storages of all places.

    :param place: the default place.
    :param in_use: the path of a volume that uses an item, if there is one.
    :param origin: the volume a path lies in.
    """

    def __init__(self, place: str, in_use: Callable[[Item], str | None], origin: rights.Origin) -> None:
        self.place = place
        self._in_use = in_use
        self._origin = origin
        self._condition = threading.Condition()
        self._busy: set[str] = set()
        """Directories being unpacked or removed."""
        self._load: dict[str, int] = {}
        self.imported = self.exported = self.removed = 0

    # -- places ----------------------------------------------------------------------------------------------------

    def resolve_place(self, wanted: str, ct: Container, *, strict: bool = False) -> str:
        """The place a client means, if its container may use it.

        :raises Fault: Permission, InvalidPath.
        """
        place = wanted
        if place.startswith("///"):
            place = paths.join(ct.root_path, place[2:])
        found: str | None = None
        for policy in ct.place_policy:
            alias, separator, target = policy.partition("=")
            if place.startswith("/"):
                pattern = policy if policy.startswith("/") or policy == "***" else target if separator else ""
                if pattern and text.matches(place, pattern, strict=strict):
                    found = place
            elif not place:
                found = policy
            elif separator and alias == place:
                found = target
            if found is not None:
                break
        if found is None:
            raise permission(f"Place {wanted} is not permitted")
        while found.endswith("***"):
            found = os.path.dirname(found) if len(found) > 3 else self.place
        if not paths.is_normal(found):
            raise invalid_path(f"Place path {found} must be normalized")
        if paths.is_system(found):
            raise invalid_path(f"Place path {found} in system directory")
        return found

    def prepare_place(self, place: str) -> None:
        """Make what belongs in a place.

        :raises Fault: InvalidPath and others.
        """
        if not place.startswith("/"):
            raise invalid_path(f"Place path {place} must be absolute")
        if not paths.is_normal(place):
            raise invalid_path(f"Place path {place} must be normalized")
        if paths.is_system(place):
            raise invalid_path(f"Place path {place} in system directory")
        for name, mode in _PLACE_PERMISSIONS.items():
            path = f"{place}/{name}"
            try:
                os.makedirs(path, mode, exist_ok=True)
                if stat.S_IMODE(os.lstat(path).st_mode) != mode:
                    os.chmod(path, mode)
            except OSError as err:
                raise system(err, f"mkdir({path})") from err

    def item(self, kind: str, place: str, name: str, client: Client, *, strict: bool = False) -> Item:
        """An item by name, whether it exists or not."""
        return Item(kind, self.resolve_place(place, client.container, strict=strict), name)

    # -- lists -----------------------------------------------------------------------------------------------------

    def list(self, kind: str, place: str) -> list[Item]:
        """The items of a kind in a place, by name."""
        found: list[Item] = []
        for name in _subdirectories(f"{place}/{_DIRECTORIES[kind]}"):
            if _valid(name):
                found.append(Item(kind, place, name))
        for meta in _subdirectories(f"{place}/porto_storage"):
            if not meta.startswith("_meta_"):
                continue
            for name in _subdirectories(f"{place}/porto_storage/{meta}"):
                layer = name.startswith("_layer_")
                if layer == (kind == LAYER) and (layer or _valid(name)):
                    found.append(Item(kind, place, f"{meta[6:]}/{name.removeprefix('_layer_')}"))
        return found

    # -- work ------------------------------------------------------------------------------------------------------

    def set_private(self, item: Item, value: str, client: Client) -> None:
        if len(value.encode()) > limits.PRIVATE_MAX:
            raise invalid_value(f"Private value too log, max {limits.PRIVATE_MAX} bytes")
        item.load()
        _control(item, client, f"Cannot set private {item.name}")
        item.save_private(value)

    def import_archive(
        self,
        item: Item,
        path: str,
        client: Client,
        *,
        compress: str = "",
        merge: bool = False,
        private: str = "",
        memory_cgroup: str = "",
        verbose_error: bool = False,
    ) -> None:
        """Unpack an archive as a layer or storage: it appears whole, or not at all.

        :raises Fault: LayerAlreadyExists, InvalidValue, Busy, HelperError, Permission.
        """
        names.check_storage(item.name)
        self.prepare_place(item.place)
        fd = _open_archive(path, item, client, self._origin)
        try:
            option = archive.compression_of(fd, path, compress)
            if os.path.lexists(item.beside("_remove_")):
                raise Fault(pb.Busy, f"{item.name} is being removed")
            temporary = item.beside("_import_")
            with self._claimed(temporary, f"{item.name} is importing right now", wait=not merge):
                self._begin_import(item, temporary, client, merge=merge)
                try:
                    with self._loaded(item.place):
                        self.imported += 1
                        archive.unpack(fd, temporary, option, memory_cgroup, verbose_error=verbose_error)
                    if not merge and item.kind == LAYER:
                        archive.sanitize(temporary)
                    item.save_owner(client.cred)
                    if private:
                        item.save_private(private)
                    os.rename(temporary, item.path)
                except OSError as err:
                    self._discard(temporary)
                    raise system(err, f"Cannot import {item.name}") from err
                except BaseException:
                    self._discard(temporary)
                    raise
        finally:
            os.close(fd)

    def _begin_import(self, item: Item, temporary: str, client: Client, *, merge: bool) -> None:
        if os.path.lexists(temporary):
            self._discard(temporary)  # of an import that was cut short
        if os.path.lexists(item.path):
            if not merge:
                raise Fault(pb.LayerAlreadyExists, "Layer already exists")
            existing = Item(item.kind, item.place, item.name)
            existing.load()
            _control(existing, client, f"Cannot merge {item.path}")
            self._check_unused(item)
            os.rename(item.path, temporary)
        else:
            try:
                os.mkdir(temporary)
                os.chmod(temporary, 0o775)  # noqa: S103  as portod's, below a directory for root alone
            except OSError as err:
                raise system(err, f"mkdir({temporary}, 0775)") from err

    @staticmethod
    def _discard(path: str) -> None:
        try:
            remove_tree(path)
        except OSError as err:
            logger.warning("cannot remove %s: %s", path, err)

    def export_archive(self, item: Item, directory: str, path: str, client: Client, *, compress: str = "") -> None:
        """Pack a layer, a storage, or what a volume has changed.

        :param directory: what to pack.
        :raises Fault: InvalidValue: the archive is there already; Permission, HelperError.
        """
        _control(item, client, f"Cannot export {directory}")
        if not path.startswith("/"):
            raise invalid_value("archive path must be absolute")
        if os.path.lexists(path):
            raise invalid_value("archive already exists")
        option = archive.compression_for(path, compress)
        self._check_directory(os.path.dirname(path), client)
        if item.kind == STORAGE:
            self._check_unused(item)
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o664)
        except OSError as err:
            raise system(err, f"open {path}") from err
        try:
            with self._loaded(item.place):
                self.exported += 1
                archive.pack(directory, fd, option)
            os.fchown(fd, client.task_cred.uid, client.task_cred.gid)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)

    def _check_directory(self, path: str, client: Client) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as err:
            raise system(err, f"open {path}") from err
        try:
            rights.check_write(fd, client, self._origin)
        finally:
            os.close(fd)

    def remove(self, item: Item, client: Client, *, weak: bool = False, later: bool = False) -> None:
        """Remove a layer or storage.

        :param weak: whoever owns it. :param later: in the background.
        :raises Fault: LayerNotFound, VolumeNotFound, Busy, Permission.
        """
        names.check_storage(item.name)
        temporary = item.beside("_remove_")
        try:
            item.load()
        except Fault as fault:
            if fault.code in (pb.LayerNotFound, pb.VolumeNotFound) and os.path.lexists(temporary):
                with system_call(f"Cannot remove {temporary}"):
                    remove_tree(temporary)
                return
            raise
        if not weak:
            _control(item, client, f"Cannot remove {item.path}")
        with self._condition:
            self._check_unused(item)
            try:
                os.unlink(item.beside("_private_"))
            except FileNotFoundError:
                pass
            os.rename(item.path, temporary)
        self.removed += 1
        if later:
            threading.Thread(target=self._discard, args=(temporary,), name="remover", daemon=True).start()
            return
        with self._loaded(item.place):
            self._discard(temporary)

    def _check_unused(self, item: Item) -> None:
        if not os.path.lexists(item.path):
            raise item._missing()
        user = self._in_use(item)
        if user is not None:
            kind = "Layer" if item.kind == LAYER else "Storage"
            raise Fault(pb.Busy, f"{kind} {item.name} in use by volume {user}")

    def remove_stale_volumes(self, place: str, volumes: set[str]) -> None:
        """Remove what is left of volumes nobody knows any more.

        :param volumes: ids of the volumes there are.
        """
        for name in _subdirectories(f"{place}/porto_volumes"):
            if name not in volumes:
                mounts.unmount_below(f"{place}/porto_volumes/{name}")
                self._discard(f"{place}/porto_volumes/{name}")

    def clean_place(self, place: str) -> None:
        """Remove what interrupted imports and removals have left in a place."""
        for directory in ("porto_layers", "porto_storage"):
            base = f"{place}/{directory}"
            for name in os.listdir(base) if os.path.isdir(base) else []:
                path = f"{base}/{name}"
                if (name.startswith(("_import_", "_remove_", "_tmp_")) and path not in self._busy) or (
                    name.startswith("_private_") and not self._belongs(base, name)
                ):
                    self._discard(path)

    @staticmethod
    def _belongs(base: str, private: str) -> bool:
        name = private.removeprefix("_private_")
        return os.path.isdir(f"{base}/{name}") or os.path.isdir(f"{base}/_import_{name}")

    # -- taking turns ----------------------------------------------------------------------------------------------

    @contextmanager
    def _claimed(self, path: str, busy: str, *, wait: bool) -> Iterator[None]:
        with self._condition:
            while path in self._busy:
                if not wait:
                    raise Fault(pb.Busy, busy)
                self._condition.wait()
            self._busy.add(path)
        try:
            yield
        finally:
            with self._condition:
                self._busy.discard(path)
                self._condition.notify_all()

    @contextmanager
    def _loaded(self, place: str) -> Iterator[None]:
        with self._condition:
            while self._load.get(place, 0) >= _PARALLEL:
                self._condition.wait()
            self._load[place] = self._load.get(place, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._load[place] -= 1
                self._condition.notify_all()


def _control(item: Item, client: Client, where: str) -> None:
    try:
        client.check_cred(item.owner)
    except Fault as fault:
        raise fault.within(where) from None


def _open_archive(path: str, item: Item, client: Client, origin: rights.Origin) -> int:
    if not path.startswith("/"):
        raise invalid_value("archive path must be absolute")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise invalid_value("archive not found") from None
    except OSError as err:
        raise system(err, f"open {path}") from err
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise invalid_value("archive not a file")
        try:
            rights.check_read(fd, client, origin)
        except Fault as fault:
            raise fault.within(f"Cannot import {item.name} from {path}") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _subdirectories(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def _valid(name: str) -> bool:
    try:
        names.check_storage(name, part=True)
    except Fault:
        return False
    return True
