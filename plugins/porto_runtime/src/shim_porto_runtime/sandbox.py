"""RunPodSandbox, StopPodSandbox, RemovePodSandbox."""

from __future__ import annotations

import dataclasses
import logging
import signal
import time
from typing import TYPE_CHECKING, Any

from porto_api import errors as porto
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import AlreadyExists, FailedPrecondition, Unavailable
from shim_core.types import DnsConfig, NetworkAttachment, NetworkSandbox, PortMapping
from shim_porto_runtime import devices, namespaces, pause, pod_network, spec, states
from shim_porto_runtime.names import check_id, new_id
from shim_porto_runtime.porto_errors import is_of_gone_process, porto_errors
from shim_porto_runtime.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState
from shim_porto_runtime.undo import Undo

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

logger = logging.getLogger("shim.porto_runtime.sandbox")


def run(rt: Runtime, request: pb.RunPodSandboxRequest, context: CallContext) -> pb.RunPodSandboxResponse:
    """RunPodSandbox: record, network, Porto container, in this order; undone in reverse if one fails."""
    config = request.config
    spec.check_sandbox(config)
    spec.check_handler(request.runtime_handler, "runtime_handler")
    record = SandboxRecord(
        id=new_id(),
        config=config,
        created_at=time.time_ns(),
        state=SandboxState.CREATING,
        runtime_handler=request.runtime_handler,
    )
    # kubelet repeats the call when it has given up waiting: the second one finds what the first has made.
    with rt.locks.hold(record.key, context):
        existing = rt.records.sandboxes.by_key(record.key)
        if existing is not None:
            return _repeated(rt, existing, config)
        with Undo(f"RunPodSandbox {record.id[:13]}") as undo:
            rt.records.sandboxes.insert(record)
            undo.add("forget the record", lambda: _forget(rt, record.id, undo))
            _start(rt, record, context, undo)
            undo.keep()
    for kind in (pb.CONTAINER_CREATED_EVENT, pb.CONTAINER_STARTED_EVENT):
        rt.events.publish(rt, kind, record.id, record.id)
    return pb.RunPodSandboxResponse(pod_sandbox_id=record.id)


def stop(rt: Runtime, request: pb.StopPodSandboxRequest, context: CallContext) -> pb.StopPodSandboxResponse:
    """StopPodSandbox. CRI: idempotent; success for an unknown id; the addresses are given back."""
    record = rt.records.sandboxes.find(check_id(request.pod_sandbox_id, "pod_sandbox_id"))
    if record is not None:
        with rt.locks.hold(record.id, context):
            # As it is now that the lock is ours: another call may have stopped or removed it.
            record = rt.records.sandboxes.get(record.id)
            if record is not None:
                _stop(rt, record, context)
    return pb.StopPodSandboxResponse()


def remove(rt: Runtime, request: pb.RemovePodSandboxRequest, context: CallContext) -> pb.RemovePodSandboxResponse:
    """RemovePodSandbox. CRI: idempotent; what still runs is killed and removed."""
    record = rt.records.sandboxes.find(check_id(request.pod_sandbox_id, "pod_sandbox_id"))
    if record is not None:
        with rt.locks.hold(record.id, context):
            record = rt.records.sandboxes.get(record.id)
            if record is not None:
                _remove(rt, record, context)
    return pb.RemovePodSandboxResponse()


def _remove(rt: Runtime, record: SandboxRecord, context: CallContext) -> None:
    _stop(rt, record, context)
    for container in list(rt.records.containers_of(record.id)):
        forget(rt, container)
    rt.leftovers.clear(rt)
    remove_files(rt, record.id)
    # The record goes last: whatever failed before is tried again by the next call.
    gone = rt.records.sandboxes.delete(record.id)
    rt.sampler.forget(rt.names.sandbox(record.id))
    rt.events.publish(rt, pb.CONTAINER_DELETED_EVENT, record.id, record.id, gone=gone)


def forget(rt: Runtime, record: ContainerRecord) -> None:
    """Remove all that is left of a container whose Porto container is gone."""
    rt.keeper.close(record.id)
    rt.usage.forget(str(rt.directories.root(record.id)))
    rt.sampler.forget(rt.names.container(record.sandbox_id, record.id))
    rt.directories.remove_files(record.id)
    rt.records.containers.delete(record.id)
    rt.events.publish(rt, pb.CONTAINER_DELETED_EVENT, record.id, record.sandbox_id)


def reclaim(rt: Runtime, record: SandboxRecord, context: CallContext) -> None:
    """Take back what a daemon that died left of a sandbox it was making."""
    with rt.locks.hold(record.id, context):
        _stop(rt, record, context)
        remove_files(rt, record.id)
        rt.records.sandboxes.delete(record.id)


def remove_files(rt: Runtime, sandbox_id: str) -> None:
    """Remove what a sandbox, or a container, has on disk. Its Porto container has to be gone."""
    namespaces.remove(rt.directories.sandbox(sandbox_id))
    rt.directories.remove_files(sandbox_id)


def ready(rt: Runtime, sandbox_id: str) -> SandboxRecord:
    """The record of a sandbox that containers may be put into. Call it with the sandbox's lock held.

    :raises FailedPrecondition: it is not READY.
    """
    record = rt.records.sandboxes.get(sandbox_id)
    if record is None or record.state is not SandboxState.READY:
        why = f" ({record.reason})" if record is not None and record.reason else ""
        raise FailedPrecondition(f"sandbox {sandbox_id[:13]} is not ready{why}")
    return record


def network_sandbox(record: SandboxRecord) -> NetworkSandbox:
    """A sandbox as network plugins see it."""
    config = record.config
    return NetworkSandbox(
        sandbox_id=record.id,
        name=config.metadata.name,
        namespace=config.metadata.namespace,
        uid=config.metadata.uid,
        attempt=config.metadata.attempt,
        labels=dict(config.labels),
        annotations=dict(config.annotations),
        port_mappings=tuple(
            PortMapping(
                protocol=pb.Protocol.Name(mapping.protocol).lower(),
                container_port=mapping.container_port,
                host_port=mapping.host_port,
                host_ip=mapping.host_ip,
            )
            for mapping in config.port_mappings
            if mapping.host_port  # CRI: 0 means that there is none
        ),
        dns=DnsConfig(
            tuple(config.dns_config.servers), tuple(config.dns_config.searches), tuple(config.dns_config.options)
        ),
        cgroup_parent=config.linux.cgroup_parent,
    )


def network_namespace(rt: Runtime, sandbox_id: str, pinned: str) -> str:
    """The path of a running sandbox's own network namespace.

    :param pinned: where the network plugin has pinned it; empty when Porto has made it.
    """
    if pinned:
        return pinned
    with porto_errors("looking for the sandbox's network"):
        return f"/proc/{rt.porto.get_property(rt.names.sandbox(sandbox_id), 'root_pid')}/ns/net"


def on_host_network(config: pb.PodSandboxConfig) -> bool:
    return config.linux.security_context.namespace_options.network == pb.NODE


def _repeated(rt: Runtime, existing: SandboxRecord, config: pb.PodSandboxConfig) -> pb.RunPodSandboxResponse:
    existing = states.refresh_sandbox(rt, existing)
    if existing.state is SandboxState.READY and existing.config == config:
        return pb.RunPodSandboxResponse(pod_sandbox_id=existing.id)
    what = "is stopped" if existing.state is SandboxState.NOTREADY else "has another configuration"
    raise AlreadyExists(
        f"metadata: this attempt of the pod exists as sandbox {existing.id} and {what}; "
        "remove it, or raise metadata.attempt"
    )


def _start(rt: Runtime, record: SandboxRecord, context: CallContext, undo: Undo) -> None:
    image = rt.images.ensure(rt.pause_image, context) if rt.pause_image else None
    directory = rt.directories.sandbox(record.id)
    undo.add("remove the namespaces", lambda: namespaces.remove(directory))
    # Network plugins take their time: what else a pod needs is made meanwhile.
    wait = namespaces.begin(directory, record.config)
    try:
        attachment = None if on_host_network(record.config) else _connect(rt, record, context, undo)
    finally:
        wait()
    context.check()

    name = rt.names.sandbox(record.id)
    nodes = devices.of_host() if record.config.linux.security_context.privileged else []
    rt.records.sandboxes.update(record.id, devices=[dataclasses.astuple(node) for node in nodes])
    undo.add("destroy the Porto container", lambda: destroy(rt, name))
    with porto_errors("starting the sandbox"):
        net = pod_network.option(attachment)
        hugetlb = rt.abilities.has("hugetlb_limit")
        meta = spec.sandbox(name, record.id, rt.shim_id, record.config, net, nodes, hugetlb=hugetlb)
        if attachment is not None:
            pod_network.into_spec(attachment, record.config.annotations, meta)
        rt.porto.create_from_spec(meta, start=True, timeout_s=context.remaining_s(rt.porto.timeout_s))
    if attachment is not None and not attachment.netns_path:
        namespaces.set_network_sysctls(record.config, network_namespace(rt, record.id, attachment.netns_path))
    if image is not None:
        undo.add("remove the files of the pause process", lambda: rt.directories.remove_files(record.id))
        # Destroyed before its mount point is removed: the sandbox's own container would take it along too late.
        undo.add("destroy the pause process", lambda: destroy(rt, rt.names.pause(record.id)))
        with rt.images.lease(image):
            pause.start(rt, record, image, context)
    network: dict[str, Any] | None = dataclasses.asdict(attachment) if attachment else None
    rt.records.sandboxes.update(record.id, state=SandboxState.READY, network=network)


def _connect(rt: Runtime, record: SandboxRecord, context: CallContext, undo: Undo) -> NetworkAttachment:
    # Said before it is done: after a crash in between, the network is detached, which is always safe.
    rt.records.sandboxes.update(record.id, attached=True)
    undo.add("detach the network", lambda: _detach(rt, record, context.for_cleanup()))
    attachment = _attach(rt, record, context)
    if attachment.netns_path:
        namespaces.set_network_sysctls(record.config, attachment.netns_path)
    return attachment


def _attach(rt: Runtime, record: SandboxRecord, context: CallContext) -> NetworkAttachment:
    attachment: NetworkAttachment | None = rt.hooks.network_attach(sandbox=network_sandbox(record), context=context)
    if attachment is None:
        raise Unavailable("no plugin provides pod networks; install shim-cni-net, or put the pod on the host's network")
    return attachment


def _detach(rt: Runtime, record: SandboxRecord, context: CallContext) -> None:
    if rt.hooks.network_detach(sandbox=network_sandbox(record), context=context) is None:
        raise Unavailable("no plugin answers network_detach; is shim-cni-net still in use?")
    rt.records.sandboxes.update(record.id, attached=False)


def _forget(rt: Runtime, sandbox_id: str, undo: Undo) -> None:
    """The last step of undoing: what could not be undone stays listed, so that kubelet's Stop and Remove finish it."""
    if undo.failed:
        reason = f"could not be undone: {', '.join(undo.failed)}"
        rt.records.sandboxes.update(sandbox_id, state=SandboxState.NOTREADY, reason=reason)
    else:
        rt.records.sandboxes.delete(sandbox_id)


def _stop(rt: Runtime, record: SandboxRecord, context: CallContext) -> None:
    """Kill, record how containers ended, destroy, detach. With the sandbox's lock held."""
    # From here on nothing new is put into it.
    was_ready = record.state is SandboxState.READY
    record = rt.records.sandboxes.update(record.id, state=SandboxState.NOTREADY) or record
    running = [r for r in rt.records.containers_of(record.id) if r.state is ContainerState.RUNNING]
    for container in running:
        kill(rt, rt.names.container(record.id, container.id))
    if running:
        _wait_for_all(rt, [rt.names.container(record.id, r.id) for r in running], context)
        states.record_exits(rt, running)
    for container in rt.records.containers_of(record.id):
        if container.state is ContainerState.CREATED:
            # Its Porto container goes with the sandbox: it can never be started any more.
            rt.records.containers.update(
                container.id,
                expect=ContainerState.CREATED,
                state=ContainerState.EXITED,
                exit_code=states.EXIT_UNKNOWN,
                reason="SandboxStopped",
                message="the sandbox was stopped before the container started",
                finished_at=time.time_ns(),
            )
    destroy(rt, rt.names.sandbox(record.id))
    if was_ready:
        rt.events.publish(rt, pb.CONTAINER_STOPPED_EVENT, record.id, record.id)
    if record.attached:
        _detach(rt, record, context)


def kill(rt: Runtime, name: str, number: int = signal.SIGKILL) -> None:
    """Send a signal to a container; one that doesn't run any more is fine."""
    with porto_errors(f"sending signal {number} to the container"):
        try:
            rt.porto.kill(name, number)
        except (porto.InvalidState, porto.ContainerDoesNotExist):
            pass
        except porto.Unknown as err:
            if not is_of_gone_process(err):
                raise


def _wait_for_all(rt: Runtime, names: list[str], context: CallContext) -> None:
    deadline = time.monotonic() + context.remaining_s(60.0)
    for name in names:
        with porto_errors("waiting for the container's death"):
            try:
                result = rt.porto.wait([name], max(deadline - time.monotonic(), 0.0))
            except porto.ContainerDoesNotExist:
                continue
        if result.timed_out:
            raise Unavailable(f"{name.rsplit('/', 1)[-1][:13]} does not die after SIGKILL; try again")


def destroy(rt: Runtime, name: str) -> None:
    """Destroy a Porto container with all below it; one that is gone is fine."""
    with porto_errors("destroying the Porto container"):
        try:
            rt.porto.destroy(name)
        except porto.ContainerDoesNotExist:
            pass
