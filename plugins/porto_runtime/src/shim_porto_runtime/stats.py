"""ContainerStats, PodSandboxStats, their lists, and container filesystems for ImageFsInfo."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_porto_runtime import container, resources, states
from shim_porto_runtime.names import check_id, no_such
from shim_porto_runtime.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from shim_porto_runtime.samples import Interface, Pressure, Sample, interfaces
from shim_porto_runtime.sandbox import on_host_network
from shim_porto_runtime.sandbox_status import labels_match

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

DEFAULT_INTERFACE = "eth0"


def container_stats(rt: Runtime, request: pb.ContainerStatsRequest, context: CallContext) -> pb.ContainerStatsResponse:
    """ContainerStats."""
    record = states.refresh_container(rt, container.get(rt, request.container_id))
    samples = rt.sampler.take(rt, [_name(rt, record)]) if record.state is ContainerState.RUNNING else {}
    return pb.ContainerStatsResponse(stats=_container(rt, record, samples.get(_name(rt, record))))


def list_container_stats(
    rt: Runtime, request: pb.ListContainerStatsRequest, context: CallContext
) -> pb.ListContainerStatsResponse:
    """ListContainerStats: of those that run."""
    return pb.ListContainerStatsResponse(stats=list(of_containers(rt, request.filter)))


def of_containers(rt: Runtime, wanted: pb.ContainerStatsFilter) -> Iterator[pb.ContainerStats]:
    """The stats of running containers that match a filter."""
    records = [
        record
        for record in rt.records.containers.all()
        if record.state is ContainerState.RUNNING
        and record.id.startswith(wanted.id)
        and record.sandbox_id.startswith(wanted.pod_sandbox_id)
        and labels_match(wanted.label_selector, record.config.labels)
    ]
    samples = rt.sampler.take(rt, [_name(rt, record) for record in records])
    return (
        _container(rt, record, sample) for record in records if (sample := samples.get(_name(rt, record))) is not None
    )


def sandbox_stats(rt: Runtime, request: pb.PodSandboxStatsRequest, context: CallContext) -> pb.PodSandboxStatsResponse:
    """PodSandboxStats."""
    record = rt.records.sandboxes.find(check_id(request.pod_sandbox_id, "pod_sandbox_id"))
    if record is None or record.state is SandboxState.CREATING:
        raise no_such("sandbox", request.pod_sandbox_id)
    found = list(_of_sandboxes(rt, [record]))
    return pb.PodSandboxStatsResponse(stats=found[0])


def list_sandbox_stats(
    rt: Runtime, request: pb.ListPodSandboxStatsRequest, context: CallContext
) -> pb.ListPodSandboxStatsResponse:
    """ListPodSandboxStats: of those that are ready."""
    return pb.ListPodSandboxStatsResponse(stats=list(of_sandboxes(rt, request.filter)))


def of_sandboxes(rt: Runtime, wanted: pb.PodSandboxStatsFilter) -> Iterator[pb.PodSandboxStats]:
    """The stats of ready sandboxes that match a filter."""
    return _of_sandboxes(
        rt,
        [
            record
            for record in rt.records.sandboxes.all()
            if record.state is SandboxState.READY
            and record.id.startswith(wanted.id)
            and labels_match(wanted.label_selector, record.config.labels)
        ],
    )


def _of_sandboxes(rt: Runtime, records: Sequence[SandboxRecord]) -> Iterator[pb.PodSandboxStats]:
    """Everything of these sandboxes from one look at Porto."""
    members: dict[str, list[ContainerRecord]] = {record.id: [] for record in records}
    for found in rt.records.containers.all():
        if found.sandbox_id in members and found.state is ContainerState.RUNNING:
            members[found.sandbox_id].append(found)
    names = [rt.names.sandbox(record.id) for record in records]
    names += [_name(rt, member) for group in members.values() for member in group]
    samples = rt.sampler.take(rt, names)
    for record in records:
        stats = pb.PodSandboxStats(
            attributes=pb.PodSandboxAttributes(
                id=record.id,
                metadata=record.config.metadata,
                labels=record.config.labels,
                annotations=record.config.annotations,
            )
        )
        linux = stats.linux
        sample = samples.get(rt.names.sandbox(record.id))
        if sample is not None:
            _use(linux, sample, resources.of_pod(record.limits, record.overhead).memory_limit_in_bytes)
            _network(linux, network_interfaces(record, sample), sample.timestamp)
            linux.process.timestamp = sample.timestamp
            linux.process.process_count.value = sample.processes
        for member in members[record.id]:
            if (used := samples.get(_name(rt, member))) is not None:
                linux.containers.append(_container(rt, member, used))
        yield stats


def filesystems(rt: Runtime) -> list[pb.FilesystemUsage]:
    """What all writable layers take up together, as far as it has been measured."""
    roots = [str(rt.directories.root(record.id)) for record in rt.records.containers.all()]
    known = [usage for root in roots if (usage := rt.usage.get(root)) is not None]
    return [
        pb.FilesystemUsage(
            timestamp=min((usage.measured_at for usage in known), default=time.time_ns()),
            fs_id=pb.FilesystemIdentifier(mountpoint=str(rt.directories.volumes)),
            used_bytes=pb.UInt64Value(value=sum(usage.bytes for usage in known)),
            inodes_used=pb.UInt64Value(value=sum(usage.inodes for usage in known)),
        )
    ]


def _container(rt: Runtime, record: ContainerRecord, sample: Sample | None) -> pb.ContainerStats:
    config = record.config
    stats = pb.ContainerStats(
        attributes=pb.ContainerAttributes(
            id=record.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
        )
    )
    if sample is not None:
        _use(stats, sample, record.limits.memory_limit_in_bytes)
        stats.swap.timestamp = sample.timestamp
        stats.swap.swap_usage_bytes.value = sample.swap
        stats.swap.swap_available_bytes.value = 0
    usage = rt.usage.get(str(rt.directories.root(record.id)))
    layer = stats.writable_layer
    layer.fs_id.mountpoint = str(rt.directories.volumes)
    layer.timestamp = usage.measured_at if usage else time.time_ns()
    layer.used_bytes.value = usage.bytes if usage else 0
    layer.inodes_used.value = usage.inodes if usage else 0
    return stats


def _use(stats: pb.ContainerStats | pb.LinuxPodSandboxStats, sample: Sample, memory_limit: int) -> None:
    """CPU, memory and pressure, which containers and pods have alike."""
    stats.cpu.timestamp = stats.memory.timestamp = sample.timestamp
    stats.cpu.usage_core_nano_seconds.value = sample.cpu
    if sample.nano_cores is not None:
        stats.cpu.usage_nano_cores.value = sample.nano_cores
    memory = stats.memory
    memory.usage_bytes.value = sample.memory
    memory.working_set_bytes.value = sample.working_set
    memory.rss_bytes.value = sample.rss
    memory.page_faults.value = sample.page_faults
    memory.major_page_faults.value = sample.major_page_faults
    memory.available_bytes.value = max(memory_limit - sample.working_set, 0) if memory_limit > 0 else 0
    if "cpu" in sample.pressure:
        _psi(stats.cpu.psi, sample.pressure["cpu"])
    if "memory" in sample.pressure:
        _psi(memory.psi, sample.pressure["memory"])
    if "io" in sample.pressure:
        stats.io.timestamp = sample.timestamp
        _psi(stats.io.psi, sample.pressure["io"])


def _psi(target: pb.PsiStats, pressure: Mapping[str, Pressure]) -> None:
    for kind, data in (("some", target.Some), ("full", target.Full)):
        if (found := pressure.get(kind)) is not None:
            data.Total, data.Avg10, data.Avg60, data.Avg300 = found.total, found.avg10, found.avg60, found.avg300


def network_interfaces(record: SandboxRecord, sample: Sample) -> list[Interface]:
    """A pod's own interfaces: on the node's network it has none, and the node's counters aren't its."""
    return [] if on_host_network(record.config) else interfaces(sample.root_pid)


def _network(target: pb.LinuxPodSandboxStats, found: Sequence[Interface], timestamp: int) -> None:
    """kubelet doesn't survive a network without a default interface."""
    if not found:
        return
    default = next((interface for interface in found if interface.name == DEFAULT_INTERFACE), found[0])
    network = target.network
    network.timestamp = timestamp
    for interface in found:
        usage = pb.NetworkInterfaceUsage(
            name=interface.name,
            rx_bytes=pb.UInt64Value(value=interface.rx_bytes),
            rx_errors=pb.UInt64Value(value=interface.rx_errors),
            tx_bytes=pb.UInt64Value(value=interface.tx_bytes),
            tx_errors=pb.UInt64Value(value=interface.tx_errors),
        )
        if interface is default:
            network.default_interface.CopyFrom(usage)
        else:
            network.interfaces.append(usage)


def _name(rt: Runtime, record: ContainerRecord) -> str:
    return rt.names.container(record.sandbox_id, record.id)
