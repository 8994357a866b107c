"""Properties that count what a container has used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import text
from shim_embedded_porto.cgroups.control import resolve_disk
from shim_embedded_porto.cgroups.usage import Usage
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.properties.base import Computed, Context, Property, Unsupported


def _number(name: str, description: str, read: Callable[[Usage], int], *controllers: str) -> Computed:
    return Computed(name, description, lambda ct, ctx: read(ctx.usage(ct)), runtime_only=True, controllers=controllers)


def _pressure(name: str, kind: str, controller: str) -> Computed:
    return Computed(
        name,
        f"{kind if kind != 'cpu' else 'CPU'} pressure metrics",
        lambda ct, ctx: ctx.usage(ct).pressure(kind),
        show=text.format_map,
        runtime_only=True,
        controllers=(controller, "cgroup2"),
    )


def _io(name: str, description: str, what: str, *operations: str) -> Computed:
    def compute(ct: Container, ctx: Context) -> dict[str, int]:
        usage = ctx.usage(ct)
        values = usage.io(what, operations)
        if name == "io_write":
            try:
                values["total_writeback"] = usage.writeback()
            except Fault:
                pass
        return values

    def part(ct: Container, index: str, ctx: Context) -> str:
        import os

        values = compute(ct, ctx)
        if index not in values:
            disk = resolve_disk(index, ctx.client.container.root_path)
            index = os.path.basename(os.path.realpath(f"/sys/dev/block/{disk}"))
        return str(values.get(index, 0))

    return Computed(
        name,
        description,
        compute,
        show=text.format_map,
        indexed=part,
        runtime_only=True,
        controllers=("memory", "blkio"),
    )


def _oom_kills(ct: Container, ctx: Context) -> int:
    ctx.porto.collect_oom_kills(ct)
    return ct.oom_kills


def _oom_kills_total(ct: Container, ctx: Context) -> int:
    for other in ct.subtree():
        ctx.porto.collect_oom_kills(other)
    return ct.oom_kills_total


def _virtual(ct: Container, index: str, ctx: Context) -> str:
    values = ctx.usage(ct).virtual_memory()
    if index not in values:
        raise Fault(pb.InvalidProperty, f"Unknown {index}")
    return str(values[index])


def _put_virtual(values: dict[str, int], out: pb.TContainerStatus) -> None:
    out.virtual_memory.SetInParent()
    for name, value in values.items():
        setattr(out.virtual_memory, name, value)


def _statistics(_ct: Container, ctx: Context) -> dict[str, int]:
    values: dict[str, int] = ctx.porto.statistics.values(ctx.porto)
    return values


def _statistic(ct: Container, index: str, ctx: Context) -> str:
    values = _statistics(ct, ctx)
    if index not in values:
        from shim_embedded_porto.errors import invalid_value

        raise invalid_value("Invalid subscript for property")
    return str(values[index])


_STORED: dict[str, Any] = {"stored": True}

PROPERTIES: list[Property] = [
    _number("memory_usage", "Memory usage [bytes]", Usage.memory, "memory"),
    _number("memory_reclaimed", "Memory reclaimed from container [bytes]", Usage.reclaimed, "memory"),
    _number("anon_usage", "Anonymous memory usage [bytes]", Usage.anon, "memory"),
    _number("cache_usage", "File cache usage [bytes]", Usage.cache, "memory"),
    _number("shmem_usage", "Shmem and tmpfs usage [bytes]", Usage.shmem, "memory"),
    _number("mlock_usage", "Locked memory [bytes]", Usage.mlocked, "memory"),
    _number("minor_faults", "Minor page faults", Usage.minor_faults, "memory"),
    _number("major_faults", "Major page faults", Usage.major_faults, "memory"),
    Computed(
        "hugetlb_usage",
        "HugeTLB memory usage [bytes]",
        lambda ct, ctx: ctx.usage(ct).hugetlb(),
        runtime_only=True,
        controllers=("hugetlb",),
        machine="hugetlb",
    ),
    Computed(
        "virtual_memory",
        "Virtual memory size: <type>: <bytes>;...",
        lambda ct, ctx: ctx.usage(ct).virtual_memory(),
        show=text.format_map,
        indexed=_virtual,
        put=_put_virtual,
        runtime_only=True,
    ),
    _number("cpu_usage", "Consumed CPU time [nanoseconds]", Usage.cpu, "cpuacct"),
    _number("cpu_usage_system", "Consumed system CPU time [nanoseconds]", Usage.cpu_system, "cpuacct"),
    _number("cpu_throttled", "CPU throttled time [nanoseconds]", Usage.cpu_throttled, "cpu"),
    _pressure("cpu_pressure", "cpu", "cpu"),
    _pressure("memory_pressure", "memory", "memory"),
    _pressure("io_pressure", "io", "blkio"),
    _number("process_count", "Process count", Usage.processes, "freezer"),
    _number("thread_count", "Thread count", Usage.threads, "freezer", "pids"),
    _io("io_read", "Bytes read from disk: fs|hw|<disk>|<path>: <bytes>;...", "bytes", "Read"),
    _io("io_write", "Bytes written to disk: fs|hw|<disk>|<path>: <bytes>;...", "bytes", "Write"),
    _io("io_ops", "IO operations: fs|hw|<disk>|<path>: <ops>;...", "ops"),
    _io("io_read_ops", "IO read operations: hw|<disk>|<path>: <ops>;...", "ops", "Read"),
    _io("io_write_ops", "IO write operations: hw|<disk>|<path>: <ops>;...", "ops", "Write"),
    _io("io_time", "IO time: hw|<disk>|<path>: <nanoseconds>;...", "time"),
    Computed(
        "oom_kills",
        "Count of tasks killed in container since start",
        _oom_kills,
        controllers=("memory",),
    ),
    Computed("oom_kills_total", "Count of tasks killed in hierarchy since creation", _oom_kills_total),
    Computed(
        "porto_stat",
        "Porto statistics",
        _statistics,
        show=text.format_map,
        indexed=_statistic,
        hidden=True,
        field="",
    ),
    Unsupported("anon_max_usage", "Peak anonymous memory usage [bytes]"),
    Unsupported("max_rss", "Peak anonymous memory usage [bytes] (legacy, use anon_max_usage)"),
    Unsupported("cpu_wait", "CPU time waited for execution [nanoseconds]"),
    Unsupported("cpu_burst_usage", "CPU burst usage time [nanoseconds]"),
    Unsupported("cpu_unconstrained_wait", "CPU unconstrained wait time [nanoseconds]"),
]
