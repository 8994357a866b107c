"""Which cgroup hierarchies this machine has, and which directory of each is a container's.

Version 1 has a hierarchy a controller. As in Porto, a container has its own cgroup in those it has enabled; the name is
its path with ``%`` where an ancestor has none: ``pod/ctr``, or ``pod%ctr``. In the freezer and in version 2
every container has one, nested as the containers are. On a machine with version 2 alone its one hierarchy serves for
everything, and processes live in a ``leaf`` of each cgroup: one with controllers for its children may hold none.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

from porto_api import rpc_pb2 as pb
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, system

logger = logging.getLogger("shim.embedded_porto.cgroups")

CONTROLLERS = (
    *("freezer", "memory", "cpu", "cpuacct", "net_cls", "blkio", "devices", "hugetlb"),
    *("cpuset", "pids", "perf_event", "systemd", "cgroup2"),
)
"""Porto's names, in the order Porto prints them."""

SUBSYSTEMS = (
    *("memory", "freezer", "cpu", "cpuacct", "cpuset", "net_cls", "blkio"),
    *("devices", "hugetlb", "pids", "perf_event", "systemd", "unified"),
)
"""The names under which Porto reports cgroup paths, in its order."""

_V2_NAMES = {"cpu": ("cpu", "cpuacct"), "io": ("blkio",), "memory": ("memory",), "pids": ("pids",)}
_V2_NAMES |= {"cpuset": ("cpuset",), "hugetlb": ("hugetlb",)}
_V2_ALWAYS = ("freezer", "devices", "perf_event", "cgroup2", "cpuacct")
_LEAF = "leaf"
_REMOVE_TIMEOUT_S = 30.0
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted hierarchy."""

    mount: str
    controllers: frozenset[str]
    """By Porto's names."""
    v2: bool = False


class Cgroups:
    """The cgroups of all containers.

    :param base: the cgroup, below each hierarchy's root, that holds them.
    """

    def __init__(self, hierarchies: list[Hierarchy], base: str) -> None:
        self.hierarchies = hierarchies
        self.base = base.strip("/")
        self._by_controller = {name: h for h in reversed(hierarchies) for name in h.controllers}
        self.pure_v2 = all(hierarchy.v2 for hierarchy in hierarchies)
        """Version 2 manages everything; else it only counts pressure."""

    # -- what there is ---------------------------------------------------------------------------------------------

    def has(self, controller: str) -> bool:
        """True when the kernel offers it here."""
        return controller in self._by_controller

    def hierarchy(self, controller: str) -> Hierarchy | None:
        return self._by_controller.get(controller)

    def common_controllers(self) -> set[str]:
        """Those every container has."""
        return {name for name in ("freezer", "cgroup2", "perf_event") if self.has(name) or name == "freezer"} | (
            {"cpuacct"} if self.has("cpuacct") else set()
        )

    def first_level_controllers(self) -> set[str]:
        """Those a container of the first level has besides."""
        names = {"memory", "cpu", "cpuacct", "devices"}
        return names | {name for name in ("blkio", "cpuset", "hugetlb", "pids") if self.has(name)}

    # -- where it is -----------------------------------------------------------------------------------------------

    def base_path(self, hierarchy: Hierarchy) -> str:
        return f"{hierarchy.mount}/{self.base}"

    def name(self, ct: Container, hierarchy: Hierarchy) -> str:
        """A container's cgroup below the base; empty when it has none there."""
        if ct.is_root:
            return ""
        if ct.job_mode and ct.parent is not None:
            return self.name(ct.parent, hierarchy)
        if self._everybodys(hierarchy):
            return ct.name
        name = ""
        for other in ct.lineage():
            if other.is_root:
                break
            enabled = bool(other.controllers & hierarchy.controllers)
            if name:
                name = ("/" if enabled else "%") + name
            if name or enabled:
                name = other.first_name + name
        return name

    def path(self, ct: Container, controller: str) -> str:
        """The directory of the cgroup that ``controller`` limits and counts the container in.

        :raises Fault: NotSupported: the machine has no such controller.
        """
        hierarchy = self._by_controller.get(controller)
        if hierarchy is None:
            raise Fault(pb.NotSupported, f"no cgroup controller {controller} on this machine")
        return self._path(ct, hierarchy)

    def _path(self, ct: Container, hierarchy: Hierarchy) -> str:
        name = self.name(ct, hierarchy)
        return f"{self.base_path(hierarchy)}/{name}" if name else self.base_path(hierarchy)

    def reported_paths(self, ct: Container) -> dict[str, tuple[str, bool]]:
        """What the property ``cgroups`` shows: path by subsystem, and whether it is an ancestor's."""
        result = {}
        for name in SUBSYSTEMS:
            controller = "cgroup2" if name == "unified" else name
            hierarchy = self._by_controller.get(controller)
            if hierarchy is None:
                continue
            if ct.is_root or (controller == "systemd" and "systemd" not in ct.controllers):
                path = hierarchy.mount
            else:
                path = self._path(ct, hierarchy)
            result[name] = (path, not ct.controllers & hierarchy.controllers)
        return result

    def process_files(self, ct: Container, *, threads: bool = False) -> list[str]:
        """The files a process's pid, or a thread's, is written to, to move it into the container."""
        return [
            os.path.join(self._processes(ct, hierarchy), _thread_file(hierarchy) if threads else "cgroup.procs")
            for hierarchy in self._hierarchies_of(ct)
        ]

    def _hierarchies_of(self, ct: Container) -> list[Hierarchy]:
        return [
            hierarchy
            for hierarchy in self.hierarchies
            if "systemd" not in hierarchy.controllers or "systemd" in ct.controllers
        ]

    def entry_files(self, ct: Container) -> list[str]:
        """The files to which a process that has one thread writes 0 to get into the container.

        In version 1 that is the file of threads: then the kernel need not stop others from forking meanwhile.
        """
        return [
            os.path.join(self._processes(ct, hierarchy), "cgroup.procs" if hierarchy.v2 else "tasks")
            for hierarchy in self._hierarchies_of(ct)
        ]

    def process_file(self, ct: Container, controller: str) -> str:
        """Of :meth:`process_files`, that of one controller."""
        return os.path.join(self._processes(ct, self._by_controller[controller]), "cgroup.procs")

    def _processes(self, ct: Container, hierarchy: Hierarchy) -> str:
        path = self._path(ct, hierarchy)
        return os.path.join(path, _LEAF) if self.pure_v2 and not ct.is_root else path

    def locate(self, pid: int) -> str | None:
        """The name of the container a process is in; empty for none of ours. None: no such process."""
        try:
            with open(f"/proc/{pid}/cgroup") as file:
                lines = file.read().splitlines()
        except OSError:
            return None
        hierarchy = self._by_controller["freezer"]
        wanted = "" if hierarchy.v2 else "freezer"
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if wanted in controllers.split(","):
                prefix = f"/{self.base}/"
                if not path.startswith(prefix):
                    return ""
                return path[len(prefix) :].removesuffix("/" + _LEAF)
        return ""

    # -- making and removing ---------------------------------------------------------------------------------------

    def prepare_base(self) -> None:
        """Make the cgroup that holds all containers' cgroups."""
        for hierarchy in self.hierarchies:
            path = hierarchy.mount
            for component in self.base.split("/"):
                path = os.path.join(path, component)
                self._make(path, hierarchy)
                self._delegate(path, hierarchy)

    def create(self, ct: Container) -> None:
        """Make a container's own cgroups.

        :raises Fault: something can't be made.
        """
        if not os.path.isdir(self.base_path(self.hierarchies[0])):
            self.prepare_base()  # somebody has tidied up empty cgroups
        done: list[str] = []
        for hierarchy in self.hierarchies:
            shared = ct.controllers & hierarchy.controllers
            if ct.job_mode or not (shared or self._everybodys(hierarchy)):
                continue
            if shared and shared != hierarchy.controllers and not hierarchy.v2:
                ct.controllers |= hierarchy.controllers
            path = self._path(ct, hierarchy)
            try:
                self._make(path, hierarchy)
                if self.pure_v2:
                    self._delegate(path, hierarchy)
                    self._make(os.path.join(path, _LEAF), hierarchy)
            except Fault:
                for made in reversed(done):
                    self._remove_tree(made)
                raise
            done.append(path)

    @staticmethod
    def _everybodys(hierarchy: Hierarchy) -> bool:
        """True where every container has a cgroup: processes are found and frozen by it."""
        return hierarchy.v2 or "freezer" in hierarchy.controllers

    @staticmethod
    def _make(path: str, hierarchy: Hierarchy) -> None:
        try:
            os.mkdir(path)
        except FileExistsError:
            pass
        except OSError as err:
            raise system(err, f"mkdir({path})") from err
        if "cpuset" in hierarchy.controllers and not hierarchy.v2:
            for knob in ("cpuset.cpus", "cpuset.mems"):
                if not _read(os.path.join(path, knob)):
                    write(os.path.join(path, knob), _read(os.path.join(os.path.dirname(path), knob)))

    def _delegate(self, path: str, hierarchy: Hierarchy) -> None:
        """Let the children of a version 2 cgroup be limited by all controllers."""
        if not self.pure_v2:
            return
        available = _read(os.path.join(path, "cgroup.controllers")).split()
        enabled = _read(os.path.join(path, "cgroup.subtree_control")).split()
        for name in sorted(set(available) - set(enabled)):
            write(os.path.join(path, "cgroup.subtree_control"), f"+{name}")

    def remove(self, ct: Container) -> None:
        """Remove a container's own cgroups; the freezer's last, since it shows what is left after a crash.

        :raises Fault: Busy and the like: there are processes that can't be killed.
        """
        if ct.job_mode:
            return
        ordered = sorted(self.hierarchies, key=lambda hierarchy: "freezer" in hierarchy.controllers)
        for hierarchy in ordered:
            if ct.controllers & hierarchy.controllers or self._everybodys(hierarchy):
                path = self._path(ct, hierarchy)
                if self.name(ct, hierarchy):
                    self._remove_tree(path)

    @staticmethod
    def _remove_tree(path: str) -> None:
        deadline = time.monotonic() + _REMOVE_TIMEOUT_S
        while True:
            try:
                for directory, _, _ in os.walk(path, topdown=False):
                    os.rmdir(directory)
                return
            except FileNotFoundError:
                return
            except OSError as err:
                # EBUSY: killed processes are still on their way out.
                if time.monotonic() >= deadline:
                    raise system(err, f"rmdir({path})") from err
                kill_tree(path)
                time.sleep(_POLL_S)

    def remove_stale(self, keep: set[str]) -> None:
        """Kill and remove cgroups below the base whose container isn't among ``keep`` (names with ``/``)."""
        for hierarchy in self.hierarchies:
            base = self.base_path(hierarchy)
            stale = []
            for directory, _, _ in os.walk(base):
                name = directory[len(base) + 1 :].removesuffix("/" + _LEAF).replace("%", "/")
                if name and name not in keep:
                    _thaw(directory)  # what stands still can't be killed
                    stale.append(directory)
            for directory in reversed(stale):
                logger.info("removing the stale cgroup %s", directory)
                try:
                    self._remove_tree(directory)
                except Fault as fault:
                    logger.warning("%s", fault)

    def remove_base(self) -> None:
        """Remove the base, if it is empty."""
        for hierarchy in self.hierarchies:
            path = hierarchy.mount
            names = self.base.split("/")
            for count in range(len(names), 0, -1):
                try:
                    os.rmdir(os.path.join(path, *names[:count]))
                except OSError:
                    break

    # -- processes -------------------------------------------------------------------------------------------------

    def exists(self, ct: Container) -> bool:
        return os.path.isdir(self.path(ct, "freezer"))

    def pids(self, ct: Container) -> list[int]:
        """The processes in the container itself, those of its children not counted."""
        hierarchy = self._by_controller["freezer"]
        return _pids(os.path.join(self._processes(ct, hierarchy), "cgroup.procs"))

    def threads(self, ct: Container) -> list[int]:
        hierarchy = self._by_controller["freezer"]
        return _pids(os.path.join(self._processes(ct, hierarchy), _thread_file(hierarchy)))

    def subtree_pids(self, ct: Container) -> Iterator[int]:
        """The processes in the container and below it."""
        for directory, _, _ in os.walk(self.path(ct, "freezer")):
            yield from _pids(os.path.join(directory, "cgroup.procs"))

    def kill(self, ct: Container, number: int = signal.SIGKILL) -> None:
        """Send a signal to all processes of the container itself, until none is left that had not got it.

        :raises Fault: a process can't be signalled.
        """
        if ct.job_mode:
            return
        seen: set[int] = set()
        while fresh := [pid for pid in self.pids(ct) if pid not in seen]:
            for pid in fresh:
                _kill(pid, number)
            seen.update(fresh)

    def wait_empty(self, ct: Container, timeout_s: float) -> bool:
        """Return once the container itself holds no process any more; False when the time is up."""
        deadline = time.monotonic() + timeout_s
        while self.pids(ct):
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True


def detect(base: str) -> Cgroups:
    """The hierarchies that are mounted.

    :raises Fault: NotSupported: there is none that processes can be frozen or killed by.
    """
    hierarchies: list[Hierarchy] = []
    unified: str | None = None
    with open("/proc/self/mountinfo") as file:
        for line in file:
            fields, _, tail = line.partition(" - ")
            kind, _, options = tail.split()
            mount = fields.split()[4].replace("\\040", " ")
            if kind == "cgroup2" and unified is None:
                unified = mount
            elif kind == "cgroup":
                names = frozenset(
                    name.removeprefix("name=")
                    for name in options.split(",")
                    if name.removeprefix("name=") in CONTROLLERS
                )
                if names and not any(names & other.controllers for other in hierarchies):
                    hierarchies.append(Hierarchy(mount, names))
    if unified is not None:
        offered = {"cgroup2"}
        if not hierarchies:
            offered.update(_V2_ALWAYS)
            for kernel_name in _read(os.path.join(unified, "cgroup.controllers")).split():
                offered.update(_V2_NAMES.get(kernel_name, ()))
        hierarchies.append(Hierarchy(unified, frozenset(offered), v2=True))
    if not any("freezer" in hierarchy.controllers for hierarchy in hierarchies):
        raise Fault(pb.NotSupported, "no freezer cgroup is mounted: mount the cgroup hierarchies at /sys/fs/cgroup")
    # The freezer first: it is how a container's processes are found.
    hierarchies.sort(key=lambda hierarchy: "freezer" not in hierarchy.controllers)
    return Cgroups(hierarchies, base)


def write(path: str, value: str) -> None:
    """:raises Fault: with the errno the kernel gave."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as err:
        raise system(err, f"Cannot set cgroup {os.path.basename(path)} = {value}: Cannot write {path}: write") from err


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _thread_file(hierarchy: Hierarchy) -> str:
    return "cgroup.threads" if hierarchy.v2 else "tasks"


def _pids(path: str) -> list[int]:
    return [int(word) for word in _read(path).split()]


def kill_tree(path: str) -> None:
    """SIGKILL to every process in a cgroup directory and below."""
    for directory, _, _ in os.walk(path):
        for pid in _pids(os.path.join(directory, "cgroup.procs")):
            _kill(pid, signal.SIGKILL)


def _thaw(directory: str) -> None:
    for knob, value in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
        path = os.path.join(directory, knob)
        if os.path.exists(path):
            write(path, value)


def _kill(pid: int, number: int) -> None:
    if pid <= 1:
        return
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except OSError as err:
        raise system(err, f"kill({pid}, {number})") from err
