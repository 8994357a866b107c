"""What the kernel holds a container to, in either version of cgroups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from porto_api import Client

_NO_LIMIT = 2**62


@dataclass(frozen=True)
class InForce:
    """Limits; None where there is none, or no such hierarchy."""

    memory: int | None
    memory_and_swap: int | None
    """None also where the kernel doesn't count swap."""
    quota_us: int | None
    period_us: int
    shares: int
    cpus: str
    processes: int | None
    huge_pages: int | None


def in_force(porto: Client, name: str) -> InForce:
    """The limits of a Porto container's own cgroups."""
    text = porto.get_property(name, "cgroups")
    paths = dict(item.strip().split(": ", 1) for item in text.split(";") if ": " in item)
    unified = Path(next((paths[key] for key in ("cgroup2", "unified") if key in paths), "/nowhere"))

    def read(controller: str, first: str, second: str) -> str:
        """The file of version 1, or of version 2 where the controller isn't in version 1."""
        path = Path(paths[controller], first) if controller in paths else unified / second
        return path.read_text().strip() if path.exists() else "max"

    if "cpu" in paths:
        quota, period = read("cpu", "cpu.cfs_quota_us", ""), read("cpu", "cpu.cfs_period_us", "")
        shares = int(read("cpu", "cpu.shares", ""))
    else:
        quota, period = read("cpu", "", "cpu.max").split()
        shares = int(read("cpu", "", "cpu.weight")) * 1024 // 100
    memory_and_swap = _limit(read("memory", "memory.memsw.limit_in_bytes", ""))
    if "memory" not in paths:
        parts = [_limit(read("memory", "", name)) for name in ("memory.max", "memory.swap.max")]
        memory_and_swap = None if None in parts else sum(part for part in parts if part is not None)
    return InForce(
        memory_and_swap=memory_and_swap,
        memory=_limit(read("memory", "memory.limit_in_bytes", "memory.max")),
        quota_us=_limit(quota),
        period_us=int(period),
        shares=shares,
        cpus=read("cpuset", "cpuset.cpus", "cpuset.cpus.effective"),
        processes=_limit(read("pids", "pids.max", "pids.max")),
        huge_pages=_limit(read("hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max")),
    )


def _limit(text: str) -> int | None:
    return None if text in ("max", "-1") or int(text) >= _NO_LIMIT else int(text)
