"""All containers, and who may work on which of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits, names, states
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_value


class Tree:
    """The containers by name.

    ``lock`` guards the registry, labels and states, for moments only. What takes longer runs under a container's
    *action lock*: exclusive on the container, shared on its ancestors, so that nothing happens to a container while
    something happens to one below it. Waiting writers keep new readers out.
    """

    def __init__(self, workdirs: str, controllers: set[str], level1_controllers: set[str]) -> None:
        """
        :param workdirs: the directory of the containers' working directories.
        :param controllers: cgroup controllers every container has, ``level1_controllers`` those of the first level.
        """
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._workdirs = workdirs
        self._controllers = controllers
        self._level1_controllers = level1_controllers
        self.root = self._make(None, limits.ROOT_ID, limits.ROOT)
        self.root.state = states.META
        self.root.sanitize_capabilities()
        self.root.times.started = time.time()
        self._by_name = {limits.ROOT: self.root}
        self._ids = {limits.ROOT_ID}
        self._last_id = limits.FIRST_ID - 1

    def __len__(self) -> int:
        """The number of containers, the root not counted."""
        return len(self._by_name) - 1

    def _make(self, parent: Container | None, number: int, name: str) -> Container:
        first = parent is None or parent.parent is None
        controllers = self._controllers | (self._level1_controllers if first else set())
        return Container(parent, number, name, self._workdirs, controllers)

    # -- the registry ----------------------------------------------------------------------------------------------

    def all(self) -> list[Container]:
        """Every container by name, the root first."""
        with self.lock:
            return [self._by_name[name] for name in sorted(self._by_name)]

    def find(self, name: str) -> Container:
        """:raises Fault: ContainerDoesNotExist."""
        ct = self._by_name.get(name)
        if ct is None:
            raise Fault(pb.ContainerDoesNotExist, f"container {name} not found")
        return ct

    def get(self, name: str) -> Container | None:
        return self._by_name.get(name)

    def by_id(self, number: int) -> Container | None:
        with self.lock:
            return next((ct for ct in self._by_name.values() if ct.id == number), None)

    def add(self, name: str, *, superuser: bool, number: int | None = None) -> Container:
        """Make a container, stopped and with defaults. Call it with ``lock`` held.

        :param number: the id it had before; a new one when None.
        :raises Fault: ContainerAlreadyExists, ContainerDoesNotExist (the parent), ResourceNotAvailable, InvalidValue.
        """
        parent = self._by_name.get(names.parent_of(name))
        if parent is None:
            raise Fault(pb.ContainerDoesNotExist, f"parent container not found for {name}")
        if parent.level == limits.LEVEL_MAX:
            raise invalid_value(f"You shall not go deeper! Maximum level is {limits.LEVEL_MAX}")
        if name in self._by_name:
            raise Fault(pb.ContainerAlreadyExists, f"container {name} already exists")
        most = limits.CONTAINERS_MAX + (limits.SUPERUSER_EXTRA if superuser else 0)
        if len(self) >= most:
            raise Fault(pb.ResourceNotAvailable, f"number of containers reached limit: {most}")
        if number is None:
            number = self._next_id()
        ct = self._make(parent, number, name)
        self._ids.add(number)
        self._by_name[name] = ct
        parent.children[ct.first_name] = ct
        return ct

    def _next_id(self) -> int:
        for offset in range(limits.LAST_ID):
            number = limits.FIRST_ID + (self._last_id + 1 - limits.FIRST_ID + offset) % (
                limits.LAST_ID - limits.FIRST_ID + 1
            )
            if number not in self._ids:
                self._last_id = number
                return number
        raise Fault(pb.ResourceNotAvailable, "no free container id")

    def remove(self, ct: Container) -> None:
        """Take a stopped container without children out of the registry."""
        with self.lock:
            del self._by_name[ct.name]
            self._ids.discard(ct.id)
            if ct.parent is not None:
                ct.parent.children.pop(ct.first_name, None)
            ct.state = states.DESTROYED
            self._changed.notify_all()

    # -- action locks ----------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, ct: Container, *, shared: bool = False) -> Iterator[None]:
        """Hold a container's action lock.

        :raises Fault: ContainerDoesNotExist: it was destroyed meanwhile.
        """
        self.acquire(ct, shared=shared)
        try:
            yield
        finally:
            self.release(ct)

    def acquire(self, ct: Container, *, shared: bool = False) -> None:
        with self.lock:
            try:
                while True:
                    if ct.state == states.DESTROYED:
                        raise Fault(pb.ContainerDoesNotExist, "Container was destroyed")
                    if not self._busy(ct, shared):
                        break
                    if not shared:
                        ct.pending_write = True
                    self._changed.wait()
            finally:
                if not shared and ct.pending_write:
                    ct.pending_write = False
                    self._changed.notify_all()
            ct.action_locked += 1 if shared else -1
            for other in ct.ancestors():
                other.subtree_read += 1

    @staticmethod
    def _busy(ct: Container, shared: bool) -> bool:
        if shared and (ct.action_locked < 0 or ct.pending_write):
            return True
        if not shared and (ct.action_locked or ct.subtree_read):
            return True
        return any(
            other.pending_write or (other.action_locked < 0 if shared else other.action_locked != 0)
            for other in ct.ancestors()
        )

    def release(self, ct: Container) -> None:
        with self.lock:
            for other in ct.ancestors():
                other.subtree_read -= 1
            ct.action_locked += -1 if ct.action_locked > 0 else 1
            self._changed.notify_all()

    @contextmanager
    def downgraded(self, ct: Container) -> Iterator[None]:
        """Let readers in for the duration of a slow step under an exclusive lock."""
        with self.lock:
            ct.action_locked = 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self.lock:
                ct.pending_write = True
                while ct.action_locked != 1:
                    self._changed.wait()
                ct.action_locked = -1
                ct.pending_write = False
