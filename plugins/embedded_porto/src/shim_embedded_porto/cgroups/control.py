"""Applying what was set on a container to its cgroups and its processes, as Porto calculates it."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import resource
from collections.abc import Callable, Iterable, Mapping

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import kernel, limits, states
from shim_embedded_porto.cgroups.devices import DeviceControl
from shim_embedded_porto.cgroups.hierarchy import Cgroups, write
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_value
from shim_embedded_porto.settings import cpusets, ulimits

logger = logging.getLogger("shim.embedded_porto.cgroups")

IO_PRIORITIES = {"": 0, "none": 0, "rt": 1 << 13 | 4, "high": 2 << 13, "normal": 2 << 13 | 4}
IO_PRIORITIES |= {"batch": 2 << 13 | 7, "idle": 3 << 13}
_SCHED_OTHER, _SCHED_BATCH, _SCHED_IDLE = 0, 3, 5
_NAMED_DISK = re.compile(r"\d+:\d+")


def scheduling(ct: Container) -> tuple[int, int]:
    """A container's scheduler policy and nice value."""
    policy, nice = _SCHED_OTHER, 0
    if ct.cpu_policy == "rt":
        nice = -20
    elif ct.cpu_policy == "high":
        nice = -10
    elif ct.cpu_policy == "batch":
        policy = _SCHED_BATCH
    elif ct.cpu_policy == "idle":
        policy = _SCHED_IDLE
    nice = int(nice - math.log(ct.cpu_weight / 100) / math.log(1.1))  # -1 nice is +10 % weight
    return policy, min(max(nice, -20), 19)


class Control:
    """Writes limits. Its methods raise ``Fault`` when the kernel refuses."""

    def __init__(self, cgroups: Cgroups, containers: Callable[[], Iterable[Container]]) -> None:
        """:param containers: all there are; CPU jails are spread over the machine."""
        self.cgroups = cgroups
        self._containers = containers
        self._devices = DeviceControl(cgroups)
        self._appliers: dict[str, Callable[[Container], None]] = {
            "cpu_set": self.cpu_set,
            "cpu_guarantee": self.cpu_shares,
            "cpu_weight": self._cpu_weight,
            "cpu_policy": self._cpu_weight,
            "cpu_limit": self.cpu_limit,
            "cpu_period": self.cpu_limit,
            "memory_limit": self.memory_limit,
            "pressurize_on_death": self.soft_limit,
            "io_limit": lambda ct: self._io(ct, ct.io_limit, iops=False),
            "io_ops_limit": lambda ct: self._io(ct, ct.io_ops_limit, iops=True),
            "io_weight": self._io_weight,
            "io_policy": self._io_weight,
            "hugetlb_limit": self._hugetlb,
            "thread_limit": self._threads,
            "devices": self.devices,
            "devices_explicit": self.devices,
            "enable_fuse": self.devices,
            "ulimit": self._ulimits,
        }

    def apply(self, ct: Container, names: Iterable[str] | None = None) -> None:
        """Apply the named properties; all that are set when None."""
        done = set()
        for name in sorted(ct.assigned if names is None else names):
            applier = self._appliers.get(name)
            if applier is not None and applier not in done:
                done.add(applier)
                applier(ct)

    def prepare(self, ct: Container) -> None:
        """What a new cgroup needs besides what was set on the container.

        As with portod all devices are allowed until some are named.
        """
        if "cpuset" in ct.controllers and "cpu_set" not in ct.assigned:
            self.cpu_set(ct)

    # -- CPU -------------------------------------------------------------------------------------------------------

    def cpu_limit(self, ct: Container) -> None:
        """Set a container's share of time, and those of the containers below that follow from it.

        Version 1 has none exceed its parent's: what grows does so from the top, what shrinks from below.
        """
        if ct.is_root:
            return
        before, ct.cpu_limit_applied = ct.cpu_limit_applied, ct.cpu_limit_bound
        if ct.cpu_limit_bound >= before:
            self._cpu_quota(ct)
        if ct.cpu_limit_bound != before:
            for child in list(ct.children.values()):
                if child.has_resources:
                    self.cpu_limit(child)
        if ct.cpu_limit_bound < before:
            self._cpu_quota(ct)

    def _cpu_quota(self, ct: Container) -> None:
        if "cpu" not in ct.controllers:
            return
        path = self.cgroups.path(ct, "cpu")
        period_us = ct.cpu_period_ns // 1000
        quota_us = math.ceil(ct.cpu_limit_bound * period_us / limits.NS_PER_S) if ct.cpu_limit else 0
        quota_us = max(quota_us, 1000) if quota_us else 0
        if self._v2("cpu"):
            write(f"{path}/cpu.max", f"{quota_us} {period_us}" if quota_us else "max")
            return
        quota = str(quota_us or -1)
        try:
            write(f"{path}/cpu.cfs_quota_us", quota)
            write(f"{path}/cpu.cfs_period_us", str(period_us))
        except Fault as fault:
            # Quota and period can't be changed together: each alone may break a bound of a relative's.
            if fault.errno != errno.EINVAL or not quota_us:
                raise
            write(f"{path}/cpu.cfs_quota_us", "-1")
            write(f"{path}/cpu.cfs_period_us", str(period_us))
            write(f"{path}/cpu.cfs_quota_us", quota)

    def cpu_shares(self, ct: Container) -> None:
        if "cpu" not in ct.controllers or ct.is_root:
            return
        v2 = self._v2("cpu")
        base, least, most = (100, 1, 10_000) if v2 else (1024, 2, 1024 * 256)
        shares = max(least, base * ct.cpu_guarantee // limits.NS_PER_S)
        if ct.cpu_policy == "idle":
            shares = least
        else:
            shares = shares * ct.cpu_weight // 100
            shares *= 16 if ct.cpu_policy in ("rt", "high") else 1
        knob = "cpu.weight" if v2 else "cpu.shares"
        write(f"{self.cgroups.path(ct, 'cpu')}/{knob}", str(min(max(shares, least), most)))

    def _cpu_weight(self, ct: Container) -> None:
        self.cpu_shares(ct)
        policy, nice = scheduling(ct)

        def change(pid: int) -> None:
            os.setpriority(os.PRIO_PROCESS, pid, nice)
            os.sched_setscheduler(pid, policy, os.sched_param(0))

        if not ct.job_mode:
            self._for_threads(ct, change, "scheduler policy")

    def cpu_set(self, ct: Container) -> None:
        """Set a container's CPUs, and those of the containers below that inherit them."""
        if "cpuset" not in ct.controllers or ct.is_root or not self.cgroups.has("cpuset"):
            return
        if ct.cpu_set.policy == "jail":
            relatives = [*ct.ancestors(), *(other for other in ct.subtree() if other is not ct)]
            if any(other.cpu_set.policy == "jail" for other in relatives):
                raise Fault(pb.ResourceNotAvailable, f"Nested cpu jails are not supported for CT{ct.id}:{ct.name}")
        cpus = self._cpus(ct)
        text = ",".join(str(cpu) for cpu in sorted(cpus))
        path = self.cgroups.path(ct, "cpuset")
        below = [
            other for other in ct.subtree() if other is not ct and other.has_resources and "cpuset" in other.controllers
        ]
        current = _cpus_of(path)
        if current == cpus:
            return
        # A child's CPUs must always be among its parent's: widen first, narrow last.
        write(f"{path}/cpuset.cpus", ",".join(str(cpu) for cpu in sorted(cpus | current)))
        for other in reversed(below):
            inherited = self._cpus(other)
            write(f"{self.cgroups.path(other, 'cpuset')}/cpuset.cpus", ",".join(map(str, sorted(inherited))))
        write(f"{path}/cpuset.cpus", text)

    def _cpus(self, ct: Container) -> frozenset[int]:
        for other in ct.lineage():
            spec = other.cpu_set
            if spec.policy == "jail":
                taken = [o.cpu_jail for o in self._containers() if o is not other and o.cpu_jail]
                other.cpu_jail = cpusets.choose_jail(spec, taken, other.cpu_jail)
                return other.cpu_jail
            other.cpu_jail = frozenset()
            if spec.policy != "inherit":
                return spec.candidates()
        return cpusets.topology().cpus

    # -- memory ----------------------------------------------------------------------------------------------------

    def memory_limit(self, ct: Container) -> None:
        if "memory" not in ct.controllers or ct.is_root:
            return
        path = self.cgroups.path(ct, "memory")
        v2 = self._v2("memory")
        limit, swap = ("memory.max", "memory.swap.max") if v2 else (
            "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
        )  # fmt: skip
        value = str(ct.memory_limit) if ct.memory_limit else ("max" if v2 else "-1")
        has_swap = os.path.exists(f"{path}/{swap}")
        try:
            if has_swap and not v2 and (not ct.memory_limit or _number(f"{path}/{swap}") < ct.memory_limit):
                write(f"{path}/{swap}", value)
            write(f"{path}/{limit}", value)
            if has_swap:
                write(f"{path}/{swap}", "0" if v2 and ct.memory_limit else value)
        except Fault as fault:
            if fault.errno == errno.EBUSY:
                raise Fault(pb.Busy, "Memory limit is too low for current memory usage") from None
            raise

    def soft_limit(self, ct: Container, *, force: bool = False) -> None:
        """Squeeze the caches out of what is dead, or alive only as a name.

        :param force: though nothing seems to have changed.
        """
        if "memory" not in ct.controllers or ct.is_root or self._v2("memory"):
            return
        idle = ct.state == states.DEAD or (ct.hollow and not ct.starting_below)
        squeezed = ct.pressurize_on_death and idle
        if squeezed == ct.squeezed and not force:
            return
        ct.squeezed = squeezed
        value = str(limits.DEAD_SOFT_LIMIT) if squeezed else "-1"
        try:
            write(f"{self.cgroups.path(ct, 'memory')}/memory.soft_limit_in_bytes", value)
        except Fault as fault:
            if fault.errno != errno.ENOENT:
                raise

    # -- the rest --------------------------------------------------------------------------------------------------

    def _hugetlb(self, ct: Container) -> None:
        if "hugetlb" not in ct.controllers or not self.cgroups.has("hugetlb"):
            return
        knob = "hugetlb.2MB.max" if self._v2("hugetlb") else "hugetlb.2MB.limit_in_bytes"
        unlimited = "max" if self._v2("hugetlb") else "-1"
        write(f"{self.cgroups.path(ct, 'hugetlb')}/{knob}", str(ct.hugetlb_limit) if ct.hugetlb_limit else unlimited)

    def _threads(self, ct: Container) -> None:
        if "pids" in ct.controllers and self.cgroups.has("pids") and not ct.is_root:
            write(f"{self.cgroups.path(ct, 'pids')}/pids.max", str(ct.thread_limit or "max"))

    def devices(self, ct: Container) -> None:
        """Allow the container's devices and no others, here and in what runs below it."""
        if ct.is_root or ct.host_mode:
            return
        if "devices" in ct.controllers:
            self._devices.apply(ct)
        for child in list(ct.children.values()):
            if child.task.pid:
                self.devices(child)

    def _ulimits(self, ct: Container) -> None:
        for other in ct.subtree():
            if other.state in (states.STOPPED, states.DEAD):
                continue
            wanted = other.effective_ulimits()

            def change(pid: int, wanted: list[ulimits.Ulimit] = wanted) -> None:
                for limit in wanted:
                    set_ulimit(pid, limit)

            self._for_threads(other, change, "ulimit")

    def _io(self, ct: Container, wanted: Mapping[str, int], *, iops: bool) -> None:
        if "blkio" not in ct.controllers or not self.cgroups.has("blkio"):
            return
        path = self.cgroups.path(ct, "blkio")
        plan: dict[str, list[int | None]] = {}
        for key, value in wanted.items():
            disk, direction = _split_key(key)
            if disk == "fs":
                continue
            entry = plan.setdefault(resolve_disk(disk, ct.root_path), [None, None])
            for index, letter in enumerate("rw"):
                if direction in ("", letter):
                    entry[index] = value
        if self._v2("blkio"):
            names = ("riops", "wiops") if iops else ("rbps", "wbps")
            for disk in {*plan, *_limited_disks(f"{path}/io.max")}:
                values = plan.get(disk, [None, None])
                words = " ".join(f"{name}={value or 'max'}" for name, value in zip(names, values, strict=True))
                write(f"{path}/io.max", f"{disk} {words}")
            return
        unit = "iops" if iops else "bps"
        for index, direction in enumerate(("read", "write")):
            knob = f"{path}/blkio.throttle.{direction}_{unit}_device"
            for disk in {*plan, *_limited_disks(knob)}:
                write(knob, f"{disk} {plan.get(disk, [None, None])[index] or 0}")

    def _io_weight(self, ct: Container) -> None:
        if "blkio" in ct.controllers and self.cgroups.has("blkio"):
            weight = ct.io_weight * {"rt": 1000, "high": 1000, "batch": 10, "idle": 10}.get(ct.io_policy, 500)
            bfq = ct.io_weight * {"rt": 1000, "high": 1000, "batch": 1, "idle": 1}.get(ct.io_policy, 100)
            prefix = self.cgroups.path(ct, "blkio") + ("/io" if self._v2("blkio") else "/blkio")
            for knob, value, least in ((f"{prefix}.weight", weight, 10), (f"{prefix}.bfq.weight", bfq, 1)):
                if os.path.exists(knob):
                    write(knob, str(int(min(max(value, least), 1000))))
        self._for_threads(ct, lambda pid: kernel.set_io_priority(pid, IO_PRIORITIES[ct.io_policy]), "io policy")

    def _for_threads(self, ct: Container, change: Callable[[int], None], what: str) -> None:
        """Do something to every thread of a container, those included that start meanwhile."""
        if not self.cgroups.exists(ct):
            return
        seen: set[int] = set()
        while fresh := [pid for pid in self.cgroups.threads(ct) if pid not in seen]:
            for pid in fresh:
                try:
                    change(pid)
                except ProcessLookupError:
                    pass
                except PermissionError as err:
                    # portod tolerates it too, when it runs without CAP_SYS_RESOURCE or CAP_SYS_NICE.
                    logger.warning("can't set %s of process %d: %s", what, pid, err)
            seen.update(fresh)

    def _v2(self, controller: str) -> bool:
        hierarchy = self.cgroups.hierarchy(controller)
        return hierarchy is not None and hierarchy.v2


# -- single processes and disks ----------------------------------------------------------------------------------------


def set_ulimit(pid: int, limit: ulimits.Ulimit) -> None:
    """Set a limit of a process; a hard limit above the present one is lowered to it where raising isn't allowed."""
    if limit.soft > limit.hard:
        raise Fault(pb.Unknown, f"prlimit {pid} {limit.name} {limit.soft} {limit.hard}", errno.EINVAL)
    soft, hard = (resource.RLIM_INFINITY if value >= 1 << 63 else value for value in (limit.soft, limit.hard))
    try:
        resource.prlimit(pid, limit.number, (soft, hard))
    except (PermissionError, ValueError):
        _, highest = resource.prlimit(pid, limit.number)
        if highest != resource.RLIM_INFINITY:
            hard = highest if hard == resource.RLIM_INFINITY else min(hard, highest)
            soft = hard if soft == resource.RLIM_INFINITY else min(soft, hard)
        resource.prlimit(pid, limit.number, (soft, hard))


def _split_key(key: str) -> tuple[str, str]:
    disk, separator, direction = key.rpartition(" ")
    if not separator:
        return key, ""
    if direction not in ("r", "w"):
        raise invalid_value(f"Invalid io limit key: {key}")
    return disk, direction


def resolve_disk(key: str, root: str) -> str:
    """Major and minor number of a disk, named by them, by device name, or by a path that lies on it.

    :raises Fault: InvalidValue.
    """
    if _NAMED_DISK.fullmatch(key):
        disk = key
    else:
        try:
            if key.startswith("/"):
                number = os.stat(key).st_dev
            elif key.startswith("."):
                number = os.stat(os.path.join(root, key[1:].lstrip("/"))).st_dev
            else:
                number = os.stat(f"/dev/{key}").st_rdev
        except OSError:
            number = 0
        if not number:
            raise invalid_value(f"Disk not found: {key}")
        disk = f"{os.major(number)}:{os.minor(number)}"
    if not os.path.exists(f"/sys/dev/block/{disk}"):
        raise invalid_value(f"Disk not found:  {disk}")
    if os.path.exists(f"/sys/dev/block/{disk}/partition"):
        with open(f"/sys/dev/block/{disk}/../dev") as file:
            disk = file.read().strip()
    return disk


def _limited_disks(knob: str) -> list[str]:
    try:
        with open(knob) as file:
            return [line.split()[0] for line in file if line.strip()]
    except OSError:
        return []


def _cpus_of(path: str) -> frozenset[int]:
    from shim_embedded_porto.text import parse_bitmap

    with open(f"{path}/cpuset.cpus") as file:
        return parse_bitmap(file.read().strip())


def _number(path: str) -> int:
    with open(path) as file:
        return int(file.read())
