"""One container: what was set on it, what state it is in, and what follows from its ancestors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from porto_api import seccomp_pb2
from shim_embedded_porto import capabilities, limits, paths, states
from shim_embedded_porto.access import Access
from shim_embedded_porto.credentials import ROOT as ROOT_CRED
from shim_embedded_porto.credentials import Cred
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.settings import networks, ulimits
from shim_embedded_porto.settings.binds import Bind
from shim_embedded_porto.settings.cpusets import INHERIT, CpuSet
from shim_embedded_porto.settings.devices import DEFAULT as DEFAULT_DEVICES
from shim_embedded_porto.settings.devices import Devices, merge
from shim_embedded_porto.settings.environment import Environment
from shim_embedded_porto.settings.ulimits import Ulimit

if TYPE_CHECKING:
    from shim_embedded_porto.volumes.volume import Link, Volume


@dataclass(slots=True)
class Stream:
    """One of a container's standard streams.

    ``outside`` is a path of Porto's own (relative to the working directory); otherwise one in the container's root.
    """

    number: int
    path: str
    outside: bool = True
    inode: int = 0
    device: int = 0
    """Of what ``/dev/fd/N`` named when the path was set; 0: unknown."""
    offset: int = 0
    """Bytes rotated away."""

    @property
    def null(self) -> bool:
        return self.path in ("", "/dev/null")

    @property
    def redirect(self) -> bool:
        """True for a descriptor of the client."""
        return self.path.startswith("/dev/fd/")


@dataclass(slots=True)
class Task:
    """The processes that hold a running container.

    ``wait_pid`` is the one whose end is the container's end; ``pid`` the one the command runs in. 0: none.
    """

    key: str = ""
    wait_pid: int = 0
    pid: int = 0
    vpid: int = 0
    """``pid`` as the container's own processes see it."""
    wait_start: int = 0
    start: int = 0
    """When they began, in clock ticks since boot: with it a pid names one process for ever."""


@dataclass(slots=True)
class Times:
    """In seconds; ``*_mono`` count from boot."""

    created: float = field(default_factory=time.time)
    started: float = 0.0
    died: float = 0.0
    changed: float = field(default_factory=time.time)


class Container:
    """A container. Attributes are guarded as in Porto: written under the container's action lock alone."""

    def __init__(self, parent: Container | None, number: int, name: str, workdirs: str, controllers: set[str]) -> None:
        self.parent = parent
        self.id = number
        self.name = name
        self.level: int = parent.level + 1 if parent else 0
        self.first_name = name.rpartition("/")[2] if parent else ""
        self.workdirs = workdirs
        self.children: dict[str, Container] = {}
        self.state = states.STOPPED
        self.assigned: set[str] = set()
        """Names of the properties that were set: those that are stored."""
        self.task = Task()
        self.times = Times()
        self.running_below = 0
        self.starting_below = 0
        """How many containers below it are running, and starting."""
        self.start_error: Fault | None = None

        self.owner = ROOT_CRED
        self.cred = ROOT_CRED
        self.userns_cred = _userns_cred(parent)
        self.owner_containers: list[str] = []
        self.access = Access.NORMAL
        if parent and parent.access == Access.NONE:
            self.access = Access.NONE
        elif parent and parent.access <= Access.READ_ONLY:
            self.access = Access.READ_ONLY
        self.porto_namespace = "" if parent else limits.NAMESPACE
        self.weak = False
        self.private = ""
        self.labels: dict[str, str] = {}
        self.children_allowed = True
        self.aging_time_s = limits.AGING_TIME_S

        self.command = ""
        self.command_argv: tuple[str, ...] = ()
        self.env = ""
        self.env_secret = ""
        self.cwd = ""
        self.umask = 0o002
        self.stdin = Stream(0, "/dev/null")
        self.stdout = Stream(1, "stdout")
        self.stderr = Stream(2, "stderr")
        self.stdout_limit = limits.STDOUT_LIMIT
        self.ulimits: dict[str, Ulimit] = ulimits.defaults() if parent is None else {}
        self.oom_score_adj = 0
        self.session_info = ""
        self.respawn = False
        self.respawn_count = 0
        self.respawn_limit = -1
        self.respawn_delay_ns = limits.RESPAWN_DELAY_NS

        self.virt_mode = "app" if parent else "host"
        self.isolate = parent is not None
        self.userns = False
        self.unshare_on_exec = False
        self.fuse = False
        self.cgroupfs = "none"
        self.cap_limit: int = capabilities.every() if parent is None else parent.cap_limit
        if self.level == 1:
            self.cap_limit = capabilities.DEFAULT
        self.cap_ambient = 0
        self.cap_bound = 0
        self.seccomp: seccomp_pb2.TProfile | None = None
        self.seccomp_name = ""
        self.sysctl: dict[str, str] = {}

        self.root = "/"
        self.root_path: str = parent.root_path if parent else "/"
        """The root directory as Porto itself sees it."""
        self.root_readonly = False
        self.bind_dns = False
        self.binds: tuple[Bind, ...] = ()
        self.symlinks: dict[str, str] = {}
        self.hostname = ""
        self.resolv_conf = ""
        self.etc_hosts = ""
        self.devices: Devices = DEFAULT_DEVICES if parent is None else ()
        self.devices_explicit = False
        self.device_paths: frozenset[str] = frozenset()
        self.place_policy: list[str] = list(parent.place_policy) if parent else []

        self.net: networks.Lines = networks.INHERITED
        self.net_isolate = False
        self.net_inherit = True
        self.ip: networks.Lines = ()
        self.ip_limit: networks.Lines = (("any",),)
        self.ip_policy = "any"
        self.default_gw: networks.Lines = ()
        self.net_limit: dict[str, int] = {}
        self.net_guarantee: dict[str, int] = {}
        self.net_rx_limit: dict[str, int] = {}
        self.net_limit_soft = 0
        self.net_tos = 0

        self.controllers = controllers
        self.required_controllers: set[str] = set()
        self.cpu_policy: str = parent.cpu_policy if parent else "normal"
        self.cpu_weight = 100
        """In hundredths."""
        self.cpu_limit = 0
        self.cpu_guarantee = 0
        """Both in nanoseconds per second; 0: none."""
        cores = os.cpu_count() or 1
        if parent is None:
            self.cpu_limit = self.cpu_guarantee = cores * limits.NS_PER_S
        self.cpu_limit_bound: int = parent.cpu_limit_bound if parent else self.cpu_limit
        self.cpu_limit_applied = 0
        """The bound as the kernel has it."""
        self.cpu_guarantee_bound: int = parent.cpu_guarantee_bound if parent else self.cpu_guarantee
        self.cpu_period_ns: int = parent.cpu_period_ns if parent else limits.CPU_PERIOD_NS
        self.cpu_set: CpuSet = INHERIT
        self.cpu_jail: frozenset[int] = frozenset()
        self.memory_limit = 0
        self.dirty_limit = 0
        self.squeezed = False
        """True while a soft limit drives its caches out of memory."""
        self.hugetlb_limit = 0
        self.pressurize_on_death = False
        self.link_memory_writeback_blkio = False
        self.thread_limit = limits.THREAD_LIMIT if self.level == 1 else 0
        self.io_policy = ""
        self.io_weight = 1.0
        self.io_limit: dict[str, int] = {}
        self.io_guarantee: dict[str, int] = {}
        self.io_ops_limit: dict[str, int] = {}
        self.io_ops_guarantee: dict[str, int] = {}
        self.oom_is_fatal = True

        self.exit_status = 0
        self.oom_killed = False
        self.oom_events = 0
        self.oom_kills = 0
        self.oom_kills_total = 0

        self.volume_links: list[Link] = []
        self.owned_volumes: list[Volume] = []
        self.required_volumes: list[str] = []
        self.volume_mounts = 0
        self.clients = 0

        # Used by the tree alone.
        self.action_locked = 0
        self.subtree_read = 0
        self.pending_write = False

        assigned = {"creation_time", "porto_namespace", "cpu_policy", "controllers", "enable_porto"}
        self.assigned |= assigned
        if self.level == 1:
            self.assigned.add("thread_limit")
        if parent is None:
            self.assigned |= {"cpu_limit", "memory_limit"}

    def __repr__(self) -> str:
        return f"<Container {self.id}:{self.name} {self.state}>"

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def is_root(self) -> bool:
        return self.parent is None

    @property
    def is_meta(self) -> bool:
        """Without a command: it holds namespaces and limits for its children."""
        return not self.command

    @property
    def os_mode(self) -> bool:
        return self.virt_mode == "os"

    @property
    def job_mode(self) -> bool:
        return self.virt_mode == "job"

    @property
    def host_mode(self) -> bool:
        return self.virt_mode == "host"

    @property
    def exact_status(self) -> bool:
        """Its exit codes above 128 are just that, and no signals."""
        return self.os_mode or self.job_mode

    @property
    def has_resources(self) -> bool:
        """True from start to stop: the time it has cgroups."""
        return self.state not in (states.STOPPED, states.DESTROYED) or self.is_root

    @property
    def running_or_meta(self) -> bool:
        return self.state in states.ALIVE

    @property
    def hollow(self) -> bool:
        """Without a command, and nothing runs below it."""
        return self.state == states.META and not self.running_below

    @property
    def in_userns(self) -> bool:
        return self.userns_cred is not None

    @property
    def absolute_name(self) -> str:
        return limits.ROOT if self.is_root else limits.NAMESPACE + self.name

    @property
    def workdir(self) -> str:
        return paths.join(self.workdirs, self.name)

    # -- its family ------------------------------------------------------------------------------------------------

    def ancestors(self) -> Iterator[Container]:
        """From the parent to the root."""
        ct = self.parent
        while ct is not None:
            yield ct
            ct = ct.parent

    def lineage(self) -> Iterator[Container]:
        """The container itself and its ancestors."""
        yield self
        yield from self.ancestors()

    def subtree(self) -> list[Container]:
        """The container and all below it, children before their parents."""
        result = [ct for child in list(self.children.values()) for ct in child.subtree()]
        result.append(self)
        return result

    def child_of(self, other: Container) -> bool:
        return any(ct is other for ct in self.ancestors())

    # -- what follows from what was set ----------------------------------------------------------------------------

    def working_directory(self) -> str:
        """``cwd`` as it is in effect: absolute, in the container's root."""
        cwd = ""
        for ct in self.lineage():
            if ct.cwd:
                cwd = ct.cwd if not cwd else paths.join(ct.cwd, cwd)
            if cwd.startswith("/"):
                return cwd
            if ct.root != "/":
                return paths.join("/", cwd) if cwd else "/"
        return "/" if self.is_root else self.workdir

    def exit_code(self) -> int:
        """The command's exit code; negative: the signal; -99: out of memory; 256: not dead."""
        if self.state not in (states.DEAD, states.RESPAWNING):
            return 256
        if self.oom_killed:
            return -99
        if os.WIFSIGNALED(self.exit_status):
            return -os.WTERMSIG(self.exit_status)
        return os.WEXITSTATUS(self.exit_status)

    def effective_memory_limit(self, total_bytes: int) -> int:
        """The lowest limit on the way to the root."""
        return min([total_bytes, *(ct.memory_limit for ct in self.lineage() if ct.memory_limit)])

    def explicit_memory_limit(self) -> int:
        """The lowest limit that somebody set; 0: none."""
        return min(
            (ct.memory_limit for ct in self.lineage() if ct.memory_limit and "memory_limit" in ct.assigned), default=0
        )

    def effective_ulimits(self) -> list[Ulimit]:
        """The container's limits, then those it inherits."""
        merged = dict(self.ulimits)
        for ct in self.ancestors():
            for name, limit in ct.ulimits.items():
                merged.setdefault(name, Ulimit(name, limit.soft, limit.hard, inherited=True))
        explicit = self.explicit_memory_limit()
        memlock = max(explicit - min(explicit, limits.MEMLOCK_MARGIN), limits.MEMLOCK_MIN)
        merged.setdefault("memlock", Ulimit("memlock", memlock, ulimits.UNLIMITED, inherited=True))
        return list(merged.values())

    def effective_devices(self) -> Devices:
        if self.parent is None:
            return self.devices
        if self.devices_explicit and "devices" in self.assigned:
            return merge(DEFAULT_DEVICES, self.devices)
        return merge(self.parent.effective_devices(), self.devices)

    def environment(self, host: str) -> Environment:
        """The variables its command gets."""
        env = Environment()
        env.set("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        env.set("HOME", self.working_directory())
        env.set("USER", self.cred.user)
        env.set("container", "lxc")
        env.set("PORTO_NAME", self.name, locked=True)
        env.set("PORTO_HOST", host, locked=True)
        env.set("PORTO_USER", self.owner.user, locked=True)
        overwrite = True
        for ct in self.lineage():
            env.merge(ct.env, overwrite=overwrite)
            env.merge(ct.env_secret, overwrite=overwrite, secret=True)
            overwrite = False
            if ct.isolate:
                break
        return env

    def effective_seccomp(self) -> seccomp_pb2.TProfile | None:
        """The profile of the nearest container that has one."""
        return next((ct.seccomp for ct in self.lineage() if ct.seccomp is not None), None)

    def namespace(self, *, write: bool = False) -> str:
        """What names of the container's own clients are relative to."""
        result = ""
        for ct in self.lineage():
            if ct.is_root:
                break
            isolating = ct.access in (Access.ISOLATE, Access.READ_ISOLATE, Access.SELF_ISOLATE)
            if isolating or (write and ct.access == Access.CHILD_ONLY):
                return f"{ct.name}/{result}"
            result = ct.porto_namespace + result
        return result

    def update_root_path(self) -> None:
        """Recalculate where roots are after ``root`` has changed."""
        for ct in reversed(self.subtree()):
            if ct.parent is not None:
                ct.root_path = paths.join(ct.parent.root_path, paths.normal(ct.root))

    def sanitize_capabilities(self) -> None:
        """Recalculate what the command's capabilities are bounded by, here and below."""
        for ct in self.subtree():
            _bound_capabilities(ct)

    def namespace_holder(self) -> Container | None:
        """The nearest container with a process: its namespaces are those a child begins with."""
        return next((ct for ct in self.lineage() if ct.task.pid), None)


def _userns_cred(parent: Container | None) -> Cred | None:
    ct = parent
    while ct is not None:
        if ct.userns:
            return ct.cred
        ct = ct.parent
    return None


def _bound_capabilities(ct: Container) -> None:
    explicit = "capabilities" in ct.assigned
    ct.cap_bound = ct.cap_limit
    pidns = memcg = netns = found = False
    for other in ct.lineage():
        pidns |= other.isolate
        memcg |= bool(other.memory_limit) and "memory_limit" in other.assigned
        netns |= other.net_isolate
        if "capabilities" in other.assigned or other.level == 1:
            if not found and not explicit:
                ct.cap_limit = ct.cap_bound = other.cap_limit
                found = True
            ct.cap_bound &= other.cap_limit
    if not explicit:
        if ct.host_mode:
            ct.cap_bound = capabilities.every()
            return
        if ct.owner.uid == 0:
            ct.cap_bound = capabilities.ROOT
            return
    remove = 0
    if not pidns:
        remove |= capabilities.PID_NAMESPACE
    if not memcg:
        remove |= capabilities.MEMORY_CGROUP
    if not netns:
        remove |= capabilities.NET_NAMESPACE
    if explicit:
        remove &= ~ct.cap_limit
    if "capabilities_ambient" in ct.assigned:
        remove &= ~ct.cap_ambient
    ct.cap_bound &= ~remove
