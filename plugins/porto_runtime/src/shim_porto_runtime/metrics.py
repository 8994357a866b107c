"""ListMetricDescriptors, ListPodSandboxMetrics: what cAdvisor used to tell, by its names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_porto_runtime.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from shim_porto_runtime.samples import Interface, Sample, interfaces

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

LABELS = ("id", "name", "image")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A metric with the labels it has beyond :data:`LABELS`, and how its values are found."""

    name: str
    help: str
    kind: int
    values: Callable[[Sample, Iterable[Interface]], Iterable[tuple[tuple[str, ...], int]]]
    labels: tuple[str, ...] = ()


def _one(read: Callable[[Sample], int]) -> Callable[[Sample, Iterable[Interface]], list[tuple[tuple[str, ...], int]]]:
    return lambda sample, _: [((), read(sample))]


def _each(
    read: Callable[[Interface], int],
) -> Callable[[Sample, Iterable[Interface]], list[tuple[tuple[str, ...], int]]]:
    return lambda _, found: [((interface.name,), read(interface)) for interface in found]


def _stalled(resource: str, kind: str) -> Callable[[Sample, Iterable[Interface]], list[tuple[tuple[str, ...], int]]]:
    def values(sample: Sample, _: Iterable[Interface]) -> list[tuple[tuple[str, ...], int]]:
        pressure = sample.pressure.get(resource, {}).get(kind)
        return [((), pressure.total // 10**9)] if pressure else []

    return values


_SECOND = 10**9
CONTAINER = (
    Descriptor(
        "container_cpu_usage_seconds_total", "CPU time, in seconds", pb.COUNTER, _one(lambda s: s.cpu // _SECOND)
    ),
    Descriptor(
        "container_cpu_system_seconds_total",
        "CPU time in the kernel, in seconds",
        pb.COUNTER,
        _one(lambda s: s.cpu_system // _SECOND),
    ),
    Descriptor(
        "container_cpu_user_seconds_total",
        "CPU time outside the kernel, in seconds",
        pb.COUNTER,
        _one(lambda s: max(s.cpu - s.cpu_system, 0) // _SECOND),
    ),
    Descriptor("container_memory_usage_bytes", "Memory in use, cache included", pb.GAUGE, _one(lambda s: s.memory)),
    Descriptor(
        "container_memory_working_set_bytes",
        "Memory that can't be reclaimed easily",
        pb.GAUGE,
        _one(lambda s: s.working_set),
    ),
    Descriptor("container_memory_rss", "Anonymous memory", pb.GAUGE, _one(lambda s: s.rss)),
    Descriptor("container_memory_cache", "Page cache", pb.GAUGE, _one(lambda s: s.cache)),
    Descriptor("container_memory_swap", "Swap in use", pb.GAUGE, _one(lambda s: s.swap)),
    Descriptor(
        "container_memory_failures_total",
        "Page faults",
        pb.COUNTER,
        lambda s, _: [(("pgfault",), s.page_faults), (("pgmajfault",), s.major_page_faults)],
        ("failure_type",),
    ),
    Descriptor(
        "container_oom_events_total", "Processes killed for want of memory", pb.COUNTER, _one(lambda s: s.oom_kills)
    ),
    Descriptor("container_processes", "Processes", pb.GAUGE, _one(lambda s: s.processes)),
    Descriptor("container_threads", "Threads", pb.GAUGE, _one(lambda s: s.threads)),
    Descriptor(
        "container_last_seen", "When this was measured, in seconds", pb.GAUGE, _one(lambda s: s.timestamp // _SECOND)
    ),
    *(
        Descriptor(
            f"container_pressure_{resource}_{word}_seconds_total",
            f"Time {what} for {resource}, in seconds",
            pb.COUNTER,
            _stalled(resource, kind),
        )
        for resource in ("cpu", "memory", "io")
        for kind, word, what in (("some", "waiting", "some task waited"), ("full", "stalled", "all tasks waited"))
    ),
)
NETWORK = tuple(
    Descriptor(f"container_network_{name}_total", text, pb.COUNTER, _each(read), ("interface",))
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


def descriptors(
    rt: Runtime, request: pb.ListMetricDescriptorsRequest, context: CallContext
) -> pb.ListMetricDescriptorsResponse:
    """ListMetricDescriptors."""
    return pb.ListMetricDescriptorsResponse(
        descriptors=[
            pb.MetricDescriptor(name=metric.name, help=metric.help, label_keys=[*LABELS, *metric.labels])
            for metric in (*CONTAINER, *NETWORK)
        ]
    )


def list_sandbox_metrics(
    rt: Runtime, request: pb.ListPodSandboxMetricsRequest, context: CallContext
) -> pb.ListPodSandboxMetricsResponse:
    """ListPodSandboxMetrics."""
    return pb.ListPodSandboxMetricsResponse(pod_metrics=list(of_sandboxes(rt)))


def of_sandboxes(rt: Runtime) -> Iterator[pb.PodSandboxMetrics]:
    """The metrics of all ready sandboxes and their running containers."""
    records = [record for record in rt.records.sandboxes.all() if record.state is SandboxState.READY]
    members: dict[str, list[ContainerRecord]] = {record.id: [] for record in records}
    for found in rt.records.containers.all():
        if found.sandbox_id in members and found.state is ContainerState.RUNNING:
            members[found.sandbox_id].append(found)
    names = [rt.names.sandbox(record.id) for record in records]
    names += [rt.names.container(m.sandbox_id, m.id) for group in members.values() for m in group]
    samples = rt.sampler.take(rt, names)
    for record in records:
        yield _sandbox(rt, record, members[record.id], samples)


def _sandbox(
    rt: Runtime, record: SandboxRecord, members: Iterable[ContainerRecord], samples: dict[str, Sample]
) -> pb.PodSandboxMetrics:
    made = pb.PodSandboxMetrics(pod_sandbox_id=record.id)
    sample = samples.get(rt.names.sandbox(record.id))
    if sample is not None:
        labels = (record.id, "POD", rt.pause_image)
        made.metrics.extend(_values(CONTAINER, labels, sample, ()))
        made.metrics.extend(_values(NETWORK, labels, sample, interfaces(sample.root_pid)))
    for member in members:
        used = samples.get(rt.names.container(member.sandbox_id, member.id))
        if used is not None:
            labels = (member.id, member.config.metadata.name, member.config.image.image)
            made.container_metrics.add(container_id=member.id, metrics=_values(CONTAINER, labels, used, ()))
    return made


def _values(
    metrics: Iterable[Descriptor], labels: tuple[str, ...], sample: Sample, found: Iterable[Interface]
) -> Iterator[pb.Metric]:
    for metric in metrics:
        for extra, value in metric.values(sample, found):
            yield pb.Metric(
                name=metric.name,
                timestamp=sample.timestamp,
                metric_type=metric.kind,  # type: ignore[arg-type]
                label_values=[*labels, *extra],
                value=pb.UInt64Value(value=value),
            )
