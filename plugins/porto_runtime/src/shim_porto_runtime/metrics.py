"""ListMetricDescriptors, ListPodSandboxMetrics: what cAdvisor used to tell, by its names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_porto_runtime import details
from shim_porto_runtime.details import Details
from shim_porto_runtime.metric_catalog import ALL, CONTAINER, POD, Filesystem, Measured, Metric
from shim_porto_runtime.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from shim_porto_runtime.samples import Sample
from shim_porto_runtime.stats import network_interfaces

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

LABELS = ("id", "name", "image")
"""What all metrics have."""


def descriptors(
    rt: Runtime, request: pb.ListMetricDescriptorsRequest, context: CallContext
) -> pb.ListMetricDescriptorsResponse:
    """ListMetricDescriptors."""
    return pb.ListMetricDescriptorsResponse(
        descriptors=[
            pb.MetricDescriptor(name=metric.name, help=metric.help, label_keys=[*LABELS, *metric.labels])
            for metric in ALL
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
    samples, more = rt.sampler.take(rt, names), details.take(rt, names)
    for record in records:
        yield _sandbox(rt, record, members[record.id], samples, more)


def _sandbox(
    rt: Runtime,
    record: SandboxRecord,
    members: Iterable[ContainerRecord],
    samples: Mapping[str, Sample],
    more: Mapping[str, Details],
) -> pb.PodSandboxMetrics:
    made = pb.PodSandboxMetrics(pod_sandbox_id=record.id)
    name = rt.names.sandbox(record.id)
    if (sample := samples.get(name)) is not None:
        labels = (record.id, "POD", rt.pause_image)
        measured = Measured(sample, record.created_at, more.get(name), interfaces=network_interfaces(record, sample))
        made.metrics.extend(_values(POD, labels, measured))
    for member in members:
        name = rt.names.container(member.sandbox_id, member.id)
        if (sample := samples.get(name)) is not None:
            labels = (member.id, member.config.metadata.name, member.config.image.image)
            found = more.get(name)
            measured = Measured(
                sample,
                member.started_at,
                found,
                details.open_files(found) if found else None,
                limits=member.limits,
                filesystem=_filesystem(rt, str(rt.directories.root(member.id))),
            )
            made.container_metrics.add(container_id=member.id, metrics=_values(CONTAINER, labels, measured))
    return made


def _filesystem(rt: Runtime, root: str) -> Filesystem | None:
    """What a container's root volume is on: an overlay gives the figures of its upper filesystem."""
    try:
        status = os.statvfs(root)
    except OSError:
        return None
    usage = rt.usage.get(root)
    return Filesystem(
        device=str(rt.directories.volumes),
        limit_bytes=status.f_blocks * status.f_frsize,
        inodes=status.f_files,
        inodes_free=status.f_ffree,
        usage_bytes=usage.bytes if usage else 0,
    )


def _values(metrics: Iterable[Metric], labels: tuple[str, ...], measured: Measured) -> Iterator[pb.Metric]:
    for metric in metrics:
        for extra, value in metric.values(measured):
            yield pb.Metric(
                name=metric.name,
                timestamp=measured.sample.timestamp,
                metric_type=metric.kind,  # type: ignore[arg-type]
                label_values=[*labels, *extra],
                value=pb.UInt64Value(value=value),
            )
