"""The metrics of containers and pods, by the names that cAdvisor gave them, each with where its values come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from shim_core.cri.v1 import api_pb2 as pb
from shim_porto_runtime.details import MAX_OPEN_FILES, Details, Disk, OpenFiles
from shim_porto_runtime.samples import Interface, Sample

SECOND = 10**9


@dataclass(frozen=True, slots=True)
class Filesystem:
    """Where a container's writable layer is."""

    device: str
    limit_bytes: int
    inodes: int
    inodes_free: int
    usage_bytes: int
    """Of the writable layer alone."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A container or pod, and all that is known of it at one moment."""

    sample: Sample
    started_at: int
    """Nanoseconds since the epoch."""
    details: Details | None = None
    open_files: OpenFiles | None = None
    interfaces: Sequence[Interface] = ()
    limits: pb.LinuxContainerResources = field(default_factory=pb.LinuxContainerResources)
    filesystem: Filesystem | None = None


Values = Iterable[tuple[tuple[str, ...], int]]
"""Values, each with those of the labels that the metric has for itself."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, its labels beyond those that all have, and how its values are found."""

    name: str
    help: str
    kind: int
    values: Callable[[Measured], Values]
    labels: tuple[str, ...] = ()


def _sample(read: Callable[[Sample], int]) -> Callable[[Measured], Values]:
    return lambda measured: [((), read(measured.sample))]


def _detail(read: Callable[[Details], int]) -> Callable[[Measured], Values]:
    return lambda measured: [((), read(measured.details))] if measured.details else []


def _open_files(read: Callable[[OpenFiles], int]) -> Callable[[Measured], Values]:
    return lambda measured: [((), read(measured.open_files))] if measured.open_files else []


def _limit(read: Callable[[pb.LinuxContainerResources], int]) -> Callable[[Measured], Values]:
    """A limit in force; 0 where there is none, as cAdvisor has it."""
    return lambda measured: [((), max(read(measured.limits), 0))]


def _disk(read: Callable[[Disk], int]) -> Callable[[Measured], Values]:
    return lambda measured: (
        [((f"/dev/{disk.name}",), read(disk)) for disk in measured.details.disks] if measured.details else []
    )


def _filesystem(read: Callable[[Filesystem], int]) -> Callable[[Measured], Values]:
    return lambda measured: [((found.device,), read(found))] if (found := measured.filesystem) else []


def _interface(read: Callable[[Interface], int]) -> Callable[[Measured], Values]:
    return lambda measured: [((interface.name,), read(interface)) for interface in measured.interfaces]


def _stalled(resource: str, kind: str) -> Callable[[Measured], Values]:
    def values(measured: Measured) -> Values:
        pressure = measured.sample.pressure.get(resource, {}).get(kind)
        return [((), pressure.total // SECOND)] if pressure else []

    return values


def _transfers(measured: Measured) -> Values:
    for disk in measured.details.disks if measured.details else ():
        device = (f"/dev/{disk.name}", disk.major, disk.minor)
        yield (*device, "Read"), disk.read_bytes
        yield (*device, "Write"), disk.written_bytes


def _huge_pages(measured: Measured) -> Values:
    used = measured.details.huge_pages if measured.details else None
    return [] if used is None else [(("2Mi",), used)]


def _open_files_limit(measured: Measured) -> Values:
    limit = measured.open_files.soft_limit if measured.open_files else None
    return [] if limit is None else [(("max_open_files",), limit)]


_CPU = (
    Metric("container_cpu_usage_seconds_total", "CPU time, in seconds", pb.COUNTER, _sample(lambda s: s.cpu // SECOND)),
    Metric(
        "container_cpu_system_seconds_total",
        "CPU time in the kernel, in seconds",
        pb.COUNTER,
        _sample(lambda s: s.cpu_system // SECOND),
    ),
    Metric(
        "container_cpu_user_seconds_total",
        "CPU time outside the kernel, in seconds",
        pb.COUNTER,
        _sample(lambda s: max(s.cpu - s.cpu_system, 0) // SECOND),
    ),
    Metric(
        "container_cpu_cfs_periods_total",
        "Periods in which the CPU quota was in force",
        pb.COUNTER,
        _detail(lambda d: d.cfs_periods),
    ),
    Metric(
        "container_cpu_cfs_throttled_periods_total",
        "Periods in which the CPU quota was used up",
        pb.COUNTER,
        _detail(lambda d: d.cfs_throttled_periods),
    ),
    Metric(
        "container_cpu_cfs_throttled_seconds_total",
        "Time for which tasks had to wait for the next period, in seconds",
        pb.COUNTER,
        _detail(lambda d: d.cfs_throttled // SECOND),
    ),
)
_MEMORY = (
    Metric("container_memory_usage_bytes", "Memory in use, cache included", pb.GAUGE, _sample(lambda s: s.memory)),
    Metric(
        "container_memory_working_set_bytes",
        "Memory that can't be reclaimed easily",
        pb.GAUGE,
        _sample(lambda s: s.working_set),
    ),
    Metric("container_memory_rss", "Anonymous memory", pb.GAUGE, _sample(lambda s: s.rss)),
    Metric("container_memory_cache", "Page cache", pb.GAUGE, _sample(lambda s: s.cache)),
    Metric("container_memory_mapped_file", "Mapped files", pb.GAUGE, _detail(lambda d: d.mapped_files)),
    Metric("container_memory_kernel_usage", "Memory of the kernel", pb.GAUGE, _detail(lambda d: d.kernel_memory)),
    Metric("container_memory_swap", "Swap in use", pb.GAUGE, _sample(lambda s: s.swap)),
    Metric("container_memory_max_usage_bytes", "The most that was in use", pb.GAUGE, _detail(lambda d: d.memory_peak)),
    Metric(
        "container_memory_failcnt",
        "How often the memory limit was hit",
        pb.COUNTER,
        _detail(lambda d: d.memory_failures),
    ),
    Metric(
        "container_memory_failures_total",
        "Page faults",
        pb.COUNTER,
        lambda m: [(("pgfault",), m.sample.page_faults), (("pgmajfault",), m.sample.major_page_faults)],
        ("failure_type",),
    ),
    Metric("container_hugetlb_usage_bytes", "Huge pages in use", pb.GAUGE, _huge_pages, ("pagesize",)),
    Metric(
        "container_oom_events_total", "Processes killed for want of memory", pb.COUNTER, _sample(lambda s: s.oom_kills)
    ),
)
_PROCESSES = (
    Metric("container_processes", "Processes", pb.GAUGE, _sample(lambda s: s.processes)),
    Metric("container_threads", "Threads", pb.GAUGE, _sample(lambda s: s.threads)),
    Metric(
        "container_threads_max",
        "How many threads there may be; 0: any number",
        pb.GAUGE,
        _detail(lambda d: d.thread_limit),
    ),
    Metric(
        "container_start_time_seconds",
        "When it started, in seconds since the epoch",
        pb.GAUGE,
        lambda m: [((), m.started_at // SECOND)],
    ),
    Metric(
        "container_last_seen",
        "When this was measured, in seconds since the epoch",
        pb.GAUGE,
        _sample(lambda s: s.timestamp // SECOND),
    ),
)
_OPEN_FILES = (
    Metric(
        "container_file_descriptors",
        f"Open files; counted up to {MAX_OPEN_FILES}",
        pb.GAUGE,
        _open_files(lambda o: o.files),
    ),
    Metric("container_sockets", "Sockets among the open files", pb.GAUGE, _open_files(lambda o: o.sockets)),
    Metric("container_ulimits_soft", "Soft limits of the first process", pb.GAUGE, _open_files_limit, ("ulimit",)),
)
_PRESSURE = tuple(
    Metric(
        f"container_pressure_{resource}_{word}_seconds_total",
        f"Time {what} for {resource}, in seconds",
        pb.COUNTER,
        _stalled(resource, kind),
    )
    for resource in ("cpu", "memory", "io")
    for kind, word, what in (("some", "waiting", "some task waited"), ("full", "stalled", "all tasks waited"))
)
_DISK = (
    *(
        Metric(f"container_fs_{name}_total", text, pb.COUNTER, _disk(read), ("device",))
        for name, text, read in (
            ("reads", "Reads from the disk", lambda d: d.reads),
            ("reads_bytes", "Bytes read from the disk", lambda d: d.read_bytes),
            ("writes", "Writes to the disk", lambda d: d.writes),
            ("writes_bytes", "Bytes written to the disk", lambda d: d.written_bytes),
        )
    ),
    Metric(
        "container_blkio_device_usage_total",
        "Bytes read from and written to the disk",
        pb.COUNTER,
        _transfers,
        ("device", "major", "minor", "operation"),
    ),
)
_FILESYSTEM = tuple(
    Metric(f"container_fs_{name}", text, pb.GAUGE, _filesystem(read), ("device",))
    for name, text, read in (
        ("usage_bytes", "What the writable layer takes up, as last measured", lambda f: f.usage_bytes),
        ("limit_bytes", "Size of the filesystem that the writable layer is on", lambda f: f.limit_bytes),
        ("inodes_total", "Inodes of that filesystem", lambda f: f.inodes),
        ("inodes_free", "Free inodes of that filesystem", lambda f: f.inodes_free),
    )
)
_LIMITS = tuple(
    Metric(f"container_spec_{name}", text, pb.GAUGE, _limit(read))
    for name, text, read in (
        ("cpu_period", "Period of the CPU quota, in microseconds", lambda r: r.cpu_period),
        ("cpu_quota", "CPU quota in each period, in microseconds; 0: none", lambda r: r.cpu_quota),
        ("cpu_shares", "CPU shares", lambda r: r.cpu_shares),
        ("memory_limit_bytes", "Memory limit; 0: none", lambda r: r.memory_limit_in_bytes),
        ("memory_swap_limit_bytes", "Limit of memory and swap; 0: none", lambda r: r.memory_swap_limit_in_bytes),
    )
)  # fmt: skip
_NETWORK = tuple(
    Metric(f"container_network_{name}_total", text, pb.COUNTER, _interface(read), ("interface",))
    for name, text, read in (
        ("receive_bytes", "Bytes received", lambda i: i.rx_bytes),
        ("receive_packets", "Packets received", lambda i: i.rx_packets),
        ("receive_packets_dropped", "Packets dropped on receipt", lambda i: i.rx_dropped),
        ("receive_errors", "Errors on receipt", lambda i: i.rx_errors),
        ("transmit_bytes", "Bytes sent", lambda i: i.tx_bytes),
        ("transmit_packets", "Packets sent", lambda i: i.tx_packets),
        ("transmit_packets_dropped", "Packets dropped before sending", lambda i: i.tx_dropped),
        ("transmit_errors", "Errors on sending", lambda i: i.tx_errors),
    )
)

POD = (*_CPU, *_MEMORY, *_PROCESSES, *_PRESSURE, *_DISK, *_NETWORK)
"""What a pod as a whole has."""
CONTAINER = (*_CPU, *_MEMORY, *_PROCESSES, *_OPEN_FILES, *_PRESSURE, *_DISK, *_FILESYSTEM, *_LIMITS)
ALL = (*CONTAINER, *_NETWORK)
