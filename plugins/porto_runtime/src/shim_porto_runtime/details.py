"""What metrics tell of a container beyond a sample: throttling, disks, peaks, open files. Nothing else asks for it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from porto_api import PortoError
from shim_porto_runtime.porto_errors import porto_errors
from shim_porto_runtime.samples import pairs

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

# Cgroup files as both versions of cgroups name them: Porto gives the text of those that are there.
VARIABLES = (
    "cgroups", "cpu.stat", "hugetlb_usage", "io_read", "io_read_ops", "io_write", "io_write_ops", "memory.events",
    "memory.failcnt", "memory.kmem.usage_in_bytes", "memory.max_usage_in_bytes", "memory.peak", "memory.stat",
    "root_pid", "thread_limit",
)  # fmt: skip
MAX_OPEN_FILES = 20_000
"""No more are looked at: a container may have millions of them."""

_OPEN_FILES_LIMIT = re.compile(r"^Max open files\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Disk:
    """What went to and came from one block device."""

    name: str
    major: str
    minor: str
    read_bytes: int
    reads: int
    written_bytes: int
    writes: int


@dataclass(frozen=True, slots=True)
class Details:
    """One container. Bytes, nanoseconds and counts; None for what this node doesn't measure."""

    cfs_periods: int
    cfs_throttled_periods: int
    cfs_throttled: int
    memory_failures: int
    """How often the memory limit was hit."""
    memory_peak: int
    kernel_memory: int
    mapped_files: int
    huge_pages: int | None
    disks: tuple[Disk, ...]
    thread_limit: int
    root_pid: int
    cgroup: str
    """The directory that lists its processes; empty when Porto doesn't tell it."""


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """What the processes of one container have open."""

    files: int
    """No more than :data:`MAX_OPEN_FILES`. Sockets as well."""
    sockets: int
    soft_limit: int | None
    """Of the container's first process; None when it has none."""


def take(rt: Runtime, names: Sequence[str]) -> dict[str, Details]:
    """Details by Porto name, of those that are there.

    :raises Unavailable: Porto can't be asked.
    """
    if not names:
        return {}
    with porto_errors("asking what containers use"):
        answer = rt.porto.get(names, VARIABLES)
    return {
        name: parse(texts)
        for name, values in answer.items()
        if "root_pid" in (texts := {key: value for key, value in values.items() if not isinstance(value, PortoError)})
    }


def parse(values: Mapping[str, str]) -> Details:
    """Details from the texts of Porto's variables."""

    def number(*keys: str) -> int | None:
        return next((int(text) for key in keys if (text := values.get(key, "").strip()).isdecimal()), None)

    cpu, memory = pairs(values.get("cpu.stat")), pairs(values.get("memory.stat"))
    failures = number("memory.failcnt")
    kernel = number("memory.kmem.usage_in_bytes")
    mapped = memory.get("total_mapped_file", memory.get("file_mapped", 0))
    cgroups = dict(item.strip().split(": ", 1) for item in values.get("cgroups", "").split(";") if ": " in item)
    return Details(
        cfs_periods=cpu.get("nr_periods", 0),
        cfs_throttled_periods=cpu.get("nr_throttled", 0),
        cfs_throttled=cpu.get("throttled_time", cpu.get("throttled_usec", 0) * 1000),
        memory_failures=pairs(values.get("memory.events")).get("max", 0) if failures is None else failures,
        memory_peak=number("memory.max_usage_in_bytes", "memory.peak") or 0,
        kernel_memory=memory.get("kernel", 0) if kernel is None else kernel,
        mapped_files=mapped,
        huge_pages=number("hugetlb_usage"),
        disks=tuple(_disks(values)),
        thread_limit=number("thread_limit") or 0,
        root_pid=number("root_pid") or 0,
        cgroup=cgroups.get("freezer") or cgroups.get("unified", ""),
    )


def open_files(found: Details) -> OpenFiles:
    """Count what the processes of a container, and of those below it, have open."""
    return OpenFiles(*_count(_processes(found.cgroup)), _soft_limit(found.root_pid))


def _count(pids: Iterable[int]) -> tuple[int, int]:
    files = sockets = 0
    for pid in pids:
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:
                for entry in entries:
                    if files == MAX_OPEN_FILES:
                        return files, sockets
                    files += 1
                    sockets += _is_socket(entry.path)
        except OSError:
            continue  # it has ended
    return files, sockets


def _soft_limit(pid: int) -> int | None:
    try:
        found = _OPEN_FILES_LIMIT.search(Path(f"/proc/{pid}/limits").read_text()) if pid > 0 else None
    except OSError:
        return None
    return int(found[1]) if found else None


def _is_socket(link: str) -> bool:
    try:
        return os.readlink(link).startswith("socket:")
    except OSError:
        return False


def _processes(cgroup: str) -> list[int]:
    found: list[int] = []
    if cgroup:
        for directory, _, _ in os.walk(cgroup):
            try:
                found += map(int, Path(directory, "cgroup.procs").read_text().split())
            except OSError:
                continue
    return found


def _disks(values: Mapping[str, str]) -> Iterable[Disk]:
    """Porto's maps (``hw: 3145728; total_writeback: 0; vda: 3145728``) by disk: what is none has no number."""
    maps = [_map(values.get(name, "")) for name in ("io_read", "io_read_ops", "io_write", "io_write_ops")]
    for name in sorted({name for each in maps for name in each}):
        try:
            major, _, minor = Path("/sys/class/block", name, "dev").read_text().strip().partition(":")
        except OSError:
            continue
        yield Disk(name, major, minor, *(each.get(name, 0) for each in maps))


def _map(text: str) -> dict[str, int]:
    items = (item.rpartition(":") for item in text.split(";"))
    return {name.strip(): int(value) for name, _, value in items if value.strip().isdecimal()}
