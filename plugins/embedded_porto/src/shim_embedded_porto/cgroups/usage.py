"""What a container has used: read from its cgroups, each file once per reading."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache

from porto_api import rpc_pb2 as pb
from shim_embedded_porto.cgroups.hierarchy import Cgroups
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, system

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_PAGE = 4096
_PHYSICAL_DISKS = ("sd", "nvme", "vd")
_VM_FIELDS = {
    "size": "VmSize",
    "max_size": "VmPeak",
    "used": "VmRSS",
    "max_used": "VmHWM",
    "anon": "RssAnon",
    "file": "RssFile",
    "shmem": "RssShmem",
    "huge": "HugetlbPages",
    "swap": "VmSwap",
    "data": "VmData",
    "stack": "VmStk",
    "code": "",
    "locked": "VmLck",
    "table": "VmPTE",
}


class Usage:
    """A container's counters at one moment."""

    def __init__(self, cgroups: Cgroups, ct: Container) -> None:
        self._cgroups = cgroups
        self._ct = ct
        self._texts: dict[str, str] = {}
        self._tables: dict[str, dict[str, int]] = {}

    # -- files -----------------------------------------------------------------------------------------------------

    def read(self, controller: str, knob: str) -> str:
        """The content of a file of the container's cgroup.

        :raises Fault: with the errno.
        """
        path = f"{self._cgroups.path(self._ct, controller)}/{knob}"
        found = self._texts.get(path)
        if found is None:
            try:
                with open(path) as file:
                    found = self._texts[path] = file.read()
            except OSError as err:
                raise system(err, f"Cannot read {path}") from err
        return found

    def number(self, controller: str, knob: str) -> int:
        return int(self.read(controller, knob))

    def table(self, controller: str, knob: str) -> dict[str, int]:
        """A file of names and numbers."""
        key = f"{controller}/{knob}"
        table = self._tables.get(key)
        if table is None:
            pairs = (line.rsplit(None, 1) for line in self.read(controller, knob).splitlines())
            table = self._tables[key] = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
        return table

    def _v2(self, controller: str) -> bool:
        hierarchy = self._cgroups.hierarchy(controller)
        if hierarchy is None:
            raise Fault(pb.NotSupported, f"no cgroup controller {controller} on this machine")
        return hierarchy.v2

    # -- memory ----------------------------------------------------------------------------------------------------

    def _memory(self, name: str) -> int:
        table = self.table("memory", "memory.stat")
        return table.get(name if self._v2("memory") else f"total_{name}", 0)

    def memory(self) -> int:
        return self.number("memory", "memory.current" if self._v2("memory") else "memory.usage_in_bytes")

    def anon(self) -> int:
        if self._v2("memory"):
            return self._memory("anon")
        return sum(self._memory(name) for name in ("inactive_anon", "active_anon", "unevictable", "swap"))

    def cache(self) -> int:
        return self._memory("inactive_file") + self._memory("active_file")

    def shmem(self) -> int:
        return self._memory("shmem")

    def mlocked(self) -> int:
        return self._memory("unevictable")

    def reclaimed(self) -> int:
        if self._v2("memory"):
            return self._memory("pgsteal") * _PAGE
        return self._memory("pgpgout") * _PAGE

    def minor_faults(self) -> int:
        return self._memory("pgfault") - self._memory("pgmajfault")

    def major_faults(self) -> int:
        return self._memory("pgmajfault")

    def writeback(self) -> int:
        return self._memory("file_writeback" if self._v2("memory") else "writeback")

    def hugetlb(self) -> int:
        return self.number("hugetlb", "hugetlb.2MB.current" if self._v2("hugetlb") else "hugetlb.2MB.usage_in_bytes")

    def oom_kills(self) -> int:
        """Processes the kernel has killed in the container's own cgroup for want of memory."""
        knob = "memory.events" if self._v2("memory") else "memory.oom_control"
        return self.table("memory", knob).get("oom_kill", 0)

    def virtual_memory(self) -> dict[str, int]:
        """Sums over the container's processes, in bytes."""
        sums = dict.fromkeys(_VM_FIELDS, 0)
        for pid in self._cgroups.pids(self._ct):
            try:
                with open(f"/proc/{pid}/status") as file:
                    status = {name: value for name, _, value in (line.partition(":") for line in file)}
            except OSError:
                continue
            if "VmSize" not in status:
                continue
            for name, field in _VM_FIELDS.items():
                if field:
                    sums[name] += _kilobytes(status.get(field))
            sums["code"] += _kilobytes(status.get("VmExe")) + _kilobytes(status.get("VmLib"))
            sums["count"] = sums.get("count", 0) + 1
        return sums

    # -- CPU -------------------------------------------------------------------------------------------------------

    def cpu(self) -> int:
        """Nanoseconds."""
        if self._v2("cpuacct"):
            return self.table("cpuacct", "cpu.stat").get("usage_usec", 0) * 1000
        return self.number("cpuacct", "cpuacct.usage")

    def cpu_system(self) -> int:
        if self._v2("cpuacct"):
            return self.table("cpuacct", "cpu.stat").get("system_usec", 0) * 1000
        return self.table("cpuacct", "cpuacct.stat").get("system", 0) * _TICK_NS

    def cpu_throttled(self) -> int:
        table = self.table("cpu", "cpu.stat")
        return table.get("throttled_usec", 0) * 1000 if self._v2("cpu") else table.get("throttled_time", 0)

    def pressure(self, kind: str) -> dict[str, int]:
        """Microseconds for which tasks were held up: ``some`` of them, or ``full``."""
        result = {}
        for line in self.read("cgroup2", f"{kind}.pressure").splitlines():
            words = line.split()
            result[words[0]] = int(words[-1].partition("=")[2])
        return result

    # -- processes -------------------------------------------------------------------------------------------------

    def processes(self) -> int:
        if self._ct.is_root:
            return sum(name.isdigit() for name in os.listdir("/proc"))
        return sum(1 for _ in self._cgroups.subtree_pids(self._ct))

    def threads(self) -> int:
        if self._ct.is_root:
            with open("/proc/loadavg") as file:
                return int(file.read().split()[3].partition("/")[2])
        if "pids" in self._ct.controllers and self._cgroups.has("pids"):
            return self.number("pids", "pids.current")
        return sum(len(self._cgroups.threads(ct)) for ct in self._ct.subtree() if self._cgroups.exists(ct))

    # -- disks -----------------------------------------------------------------------------------------------------

    def io(self, what: str, operations: tuple[str, ...]) -> dict[str, int]:
        """Counters by disk, and their sum ``hw``.

        :param what: ``bytes``, ``ops`` or ``time`` (nanoseconds; version 1 alone counts it).
        :param operations: of ``Read`` and ``Write``; empty for both.
        """
        result: dict[str, int] = {}
        if self._v2("blkio"):
            if what == "time":
                return result
            letters = [operation[0].lower() for operation in operations or ("Read", "Write")]
            kind = "bytes" if what == "bytes" else "ios"
            for line in self.read("blkio", "io.stat").splitlines():
                disk, *words = line.split()
                counters = {name: int(value) for name, _, value in (word.partition("=") for word in words)}
                _add(result, disk, sum(counters.get(letter + kind, 0) for letter in letters))
        else:
            try:
                lines = self.read("blkio", self._io_knob(what)).splitlines()
            except Fault:
                lines = []
            for line in lines:
                words = line.split()
                if len(words) == 3 and words[1] in (operations or ("Read", "Write")):
                    _add(result, words[0], int(words[2]))
        if what != "time" or result:
            result.setdefault("hw", 0)
        return result

    def _io_knob(self, what: str) -> str:
        stem = {"bytes": "io_service_bytes", "ops": "io_serviced", "time": "io_service_time"}[what]
        knob = f"blkio.throttle.{stem}"
        recursive = f"{self._cgroups.path(self._ct, 'blkio')}/{knob}_recursive"
        return f"{knob}_recursive" if os.path.exists(recursive) else knob


def _add(result: dict[str, int], disk: str, value: int) -> None:
    name = _disk_name(disk)
    if not name or name.startswith("ram") or not value:
        return
    result[name] = result.get(name, 0) + value
    if name.startswith(_PHYSICAL_DISKS):
        result["hw"] = result.get("hw", 0) + value


@lru_cache(maxsize=256)
def _disk_name(disk: str) -> str:
    try:
        return os.path.basename(os.readlink(f"/sys/dev/block/{disk}"))
    except OSError:
        return ""


def _kilobytes(value: str | None) -> int:
    return int(value.split()[0]) * 1024 if value else 0


def total_memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def hugetlb_memory() -> int:
    """Memory set aside for huge pages, in bytes."""
    try:
        with open("/proc/meminfo") as file:
            values = {name: value.split() for name, _, value in (line.partition(":") for line in file)}
        return int(values["HugePages_Total"][0]) * int(values["Hugepagesize"][0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def interface_counters(pid: int, names: Callable[[str], bool]) -> dict[str, tuple[int, ...]]:
    """The columns of /proc/PID/net/dev by interface."""
    result = {}
    with open(f"/proc/{pid}/net/dev") as file:
        for line in file.readlines()[2:]:
            name, _, columns = line.partition(":")
            if names(name.strip()):
                result[name.strip()] = tuple(int(column) for column in columns.split())
    return result
