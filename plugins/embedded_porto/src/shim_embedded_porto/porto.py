"""Porto: all parts of the daemon, put together. What its parts do to each other goes through here."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import states, streams
from shim_embedded_porto.cgroups import hierarchy
from shim_embedded_porto.cgroups.control import Control
from shim_embedded_porto.cgroups.freezer import Freezer
from shim_embedded_porto.client import system_client
from shim_embedded_porto.container import Container, Stream
from shim_embedded_porto.errors import Fault, not_supported, permission
from shim_embedded_porto.lifecycle import stop
from shim_embedded_porto.lifecycle.events import Events
from shim_embedded_porto.oom import OomWatch
from shim_embedded_porto.plans import Host
from shim_embedded_porto.properties.base import Context
from shim_embedded_porto.properties.files import sync_device_nodes, write_resolv_conf
from shim_embedded_porto.statistics import Statistics
from shim_embedded_porto.store import Store
from shim_embedded_porto.tasks import Tasks
from shim_embedded_porto.timers import Timers
from shim_embedded_porto.tree import Tree
from shim_embedded_porto.volumes.manager import Volumes
from shim_embedded_porto.volumes.registry import Registry
from shim_embedded_porto.volumes.storage import Storages
from shim_embedded_porto.waiters import Waiters

logger = logging.getLogger("shim.embedded_porto")

_RESOLV_CONF = Path("/etc/resolv.conf")
_DEVICE_PROPERTIES = frozenset({"devices", "devices_explicit", "enable_fuse"})


@dataclass(frozen=True, slots=True)
class Options:
    """Where the daemon works."""

    socket: str
    place: str
    """The default place: layers, storages, volumes, containers' working directories."""
    state: Path
    """What it remembers; private to root."""
    cgroup: str
    """Its cgroup below every hierarchy's root."""


class Porto:
    """The daemon without its socket.

    :raises Fault: the machine lacks what it needs.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.cores = os.cpu_count() or 1
        self.hostname = os.uname().nodename
        self.frozen = False
        """Nobody but root may change anything."""
        self.statistics = Statistics()
        self.cgroups: hierarchy.Cgroups = hierarchy.detect(options.cgroup)
        self.freezer = Freezer(self.cgroups)
        self.tree = Tree(
            f"{options.place}/porto", self.cgroups.common_controllers(), self.cgroups.first_level_controllers()
        )
        self.control = Control(self.cgroups, self.tree.all)
        self.waiters = Waiters()
        self.timers = Timers(workers=16)
        self.store = Store(options.state)
        self.client = system_client(self.tree)
        """The daemon itself."""
        self.context = Context(self, self.client)
        self.events = Events(self)
        self.oom = OomWatch(self.cgroups, self.events.out_of_memory)
        self.tasks = Tasks(options.state, self.events.ended, self.events.keeper_lost)
        registry = Registry(self.store, self.tree.root)
        self.storages = Storages(options.place, registry.in_use, registry.rights)
        self.volumes = Volumes(self, registry)
        self.host = Host(self.cgroups, options.socket, options.state / "bundles", self.tree.root, registry.rights)
        self.tree.root.place_policy = [options.place, "***"]

    # -- for properties --------------------------------------------------------------------------------------------

    def enable_controllers(self, ct: Container, names: Iterable[str]) -> None:
        """A property needs cgroup controllers: they can be had before the start alone.

        :raises Fault: NotSupported.
        """
        wanted = set(names)
        if ct.state == states.STOPPED:
            ct.controllers |= wanted
            ct.required_controllers |= wanted
        elif not wanted <= ct.controllers:
            raise not_supported("Cannot enable controllers in runtime")

    def apply(self, ct: Container, names: set[str]) -> None:
        """Give effect to properties of a container that has resources.

        :raises Fault: the kernel refuses.
        """
        self.control.apply(ct, names)
        if names & _DEVICE_PROPERTIES:
            for other in ct.subtree():
                if other.task.pid:
                    sync_device_nodes(other)

    def translate_pid(self, pid: int, client_pid: int) -> int:
        """A process id as a client in another PID namespace sees it.

        :raises Fault: Permission: it doesn't.
        """
        try:
            namespace = os.stat(f"/proc/{client_pid}/ns/pid").st_ino
            depth = len(_namespaced_pids(client_pid))
            found = _namespaced_pids(pid)
            # The process is seen from there if one of the namespaces it has a pid in is the client's.
            if namespace in _pid_namespaces(pid) and len(found) >= depth:
                return found[depth - 1]
        except OSError:
            pass
        raise permission("pid is unreachable")

    def collect_oom_kills(self, ct: Container) -> int:
        """See :func:`stop.collect_oom`."""
        return stop.collect_oom(self, ct)

    def rotate(self, stream: Stream, ct: Container) -> None:
        """Cut stored output short, if it is too long."""
        try:
            self.statistics.add("log_rotate_bytes", streams.rotate(stream, ct))
        except (Fault, OSError) as err:
            self.statistics.add("log_rotate_errors")
            logger.warning("can't rotate stream %d of %s: %s", stream.number, ct.name, err)

    # -- for events ------------------------------------------------------------------------------------------------

    def respawn(self, ct: Container) -> None:
        """A respawn is due."""
        self.events.respawn(ct)

    def destroy(self, ct: Container, *, weak: bool = False) -> None:
        """Destroy a container and the volumes nobody else is linked with.

        :param weak: only if it still is a weak one.
        :raises Fault: it can't be stopped.
        """
        try:
            with self.tree.locked(ct):
                if weak and not ct.weak:
                    return
                unlinked = stop.destroy(self, ct)
        except Fault as fault:
            if fault.code == pb.ContainerDoesNotExist and weak:
                return
            raise
        self.volumes.destroy_all(unlinked)

    def follow_resolv_conf(self) -> None:
        """Take over the machine's resolv.conf when it has changed: containers that have no other get it as well."""
        try:
            content = _RESOLV_CONF.read_text()
        except (OSError, ValueError):
            return
        if content == self.tree.root.resolv_conf:
            return
        self.tree.root.resolv_conf = content
        for ct in self.tree.all():
            if ct.task.pid and ct.root != "/" and "resolv_conf" not in ct.assigned:
                _replace_resolv_conf(ct, content)

    # -- the whole -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Prepare to work; nothing is restored yet.

        :raises Fault: something can't be made. :raises OSError: so too.
        """
        self.store.open()
        self.host.bundles.mkdir(mode=0o700, exist_ok=True)
        os.makedirs(f"{self.options.place}/porto", 0o755, exist_ok=True)
        self.storages.prepare_place(self.options.place)
        self.cgroups.prepare_base()
        self.tasks.connect()
        self.follow_resolv_conf()

    def close(self) -> None:
        """Let go of everything; containers go on."""
        self.timers.stop()
        self.oom.stop()
        self.tasks.close()

    def destroy_everything(self) -> None:
        """Destroy all containers and volumes, and remove every trace."""
        for ct in self.tree.all():
            if ct.level == 1:
                try:
                    self.destroy(ct)
                except Fault as fault:
                    logger.error("cannot destroy %s: %s", ct.name, fault)
        self.volumes.destroy_all(list(self.volumes.registry.volumes.values()))
        self.timers.stop()
        self.oom.stop()
        self.tasks.close(quit_keeper=True)
        self.cgroups.remove_stale(set())
        self.cgroups.remove_base()
        self.store.remove()


def _namespaced_pids(pid: int) -> list[int]:
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("NSpid:"):
                return [int(word) for word in line.split()[1:]]
    return []


def _pid_namespaces(pid: int) -> set[int]:
    """The PID namespaces a process has a pid in: its own and those above, as far as Porto sees."""
    get_parent = 0xB702
    found: set[int] = set()
    fd = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            found.add(os.fstat(fd).st_ino)
            try:
                above = fcntl.ioctl(fd, get_parent)
            except PermissionError:
                return found
            os.close(fd)
            fd = above
    finally:
        os.close(fd)


def _replace_resolv_conf(ct: Container, content: str) -> None:
    try:
        write_resolv_conf(ct, content)
    except Fault as fault:
        logger.warning("can't update resolv.conf of %s: %s", ct.name, fault)
