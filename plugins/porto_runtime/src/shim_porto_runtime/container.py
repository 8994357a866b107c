"""CreateContainer, StartContainer, StopContainer, RemoveContainer, ReopenContainerLog."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from porto_api import errors as porto
from porto_api import rpc_pb2
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ShimError,
    Unavailable,
    Unimplemented,
)
from shim_porto_runtime import capabilities, cdi, devices, late, mounts, process, sandbox, spec, states, targets, users
from shim_porto_runtime import security as checks
from shim_porto_runtime.cancelling import porto_token
from shim_porto_runtime.names import check_id, new_id, no_such
from shim_porto_runtime.porto_errors import porto_errors
from shim_porto_runtime.records import ContainerRecord, ContainerState, SandboxRecord
from shim_porto_runtime.seccomp import compile_profile
from shim_porto_runtime.signals import stop_signal
from shim_porto_runtime.starting import Gate, Report
from shim_porto_runtime.undo import Undo

if TYPE_CHECKING:
    from shim_porto_runtime.images import Image
    from shim_porto_runtime.runtime import Runtime

_REPORT_TIMEOUT_S = 10.0
_KILL_TIMEOUT_S = 60.0
_FINAL = (FailedPrecondition, Internal, InvalidArgument, PermissionDenied, Unimplemented)
"""A start that Porto answers like this wouldn't succeed the next time either."""
START_FAILED = 128
"""Exit code of a container whose command could not be run, as other runtimes have it."""


def create(rt: Runtime, request: pb.CreateContainerRequest, context: CallContext) -> pb.CreateContainerResponse:
    """CreateContainer: record, root volume and Porto container, undone in reverse if one fails."""
    config = request.config
    owner = rt.records.sandboxes.find(check_id(request.pod_sandbox_id, "pod_sandbox_id"))
    if owner is None:
        raise no_such("sandbox", request.pod_sandbox_id)
    spec.check_container(config)
    if config.linux.security_context.privileged and not owner.config.linux.security_context.privileged:
        raise InvalidArgument("linux.security_context.privileged: needs a sandbox that is privileged too")
    image = rt.images.resolve(config.image.image)
    if image is None:
        raise NotFound(f"image.image: {config.image.image!r} is not in the store; pull it first")
    record = ContainerRecord(
        id=new_id(),
        sandbox_id=owner.id,
        config=config,
        created_at=time.time_ns(),
        state=ContainerState.CREATING,
        image_id=image.id,
        layers=tuple(image.layers),
        image_ref=image.repo_digests[0] if image.repo_digests else image.id,
        log_path=os.path.join(owner.config.log_directory, config.log_path)
        if owner.config.log_directory and config.log_path
        else "",
        stop_signal=stop_signal(config.stop_signal, image.config.stop_signal),
    )
    with rt.locks.hold(owner.id, context):
        owner = sandbox.ready(rt, owner.id)
        existing = rt.records.containers.by_key(record.key)
        if existing is not None:
            return _repeated(existing, config)
        with rt.images.lease(image), Undo(f"CreateContainer {record.id[:13]}") as undo:
            rt.records.containers.insert(record)
            undo.add("forget the record", lambda: _forget(rt, record, undo))
            _create(rt, owner, record, image, context, undo)
            undo.keep()
        rt.events.publish(rt, pb.CONTAINER_CREATED_EVENT, record.id, owner.id)
    return pb.CreateContainerResponse(container_id=record.id)


def start(rt: Runtime, request: pb.StartContainerRequest, context: CallContext) -> pb.StartContainerResponse:
    """StartContainer: returns when the command runs, or raises with the reason why it can't."""
    record = get(rt, request.container_id)
    with rt.locks.hold(record.sandbox_id, context):
        owner = sandbox.ready(rt, record.sandbox_id)
        record = get(rt, record.id)
        if record.state is not ContainerState.CREATED:
            raise FailedPrecondition(
                f"container {record.id[:13]} is {record.state.value}; only a created one can start"
            )
        with rt.starts.under_way(record.id):
            _start(rt, owner, record, context)
            if rt.starts.finish(record.id):
                states.refresh_container(rt, rt.records.containers.get(record.id) or record)
    return pb.StartContainerResponse()


def stop(rt: Runtime, request: pb.StopContainerRequest, context: CallContext) -> pb.StopContainerResponse:
    """StopContainer: the stop signal, the grace period, SIGKILL. CRI: idempotent; success for an unknown id.

    Porto's own Stop would forget the exit status, so it is Kill, Wait, Kill, Wait.
    """
    record = rt.records.containers.find(check_id(request.container_id, "container_id"))
    if record is None or record.state is not ContainerState.RUNNING:
        return pb.StopContainerResponse()
    name = rt.names.container(record.sandbox_id, record.id)
    if request.timeout > 0:
        sandbox.kill(rt, name, record.stop_signal)
        _wait(rt, name, float(request.timeout), context)
    _kill(rt, name, context)
    states.record_exits(rt, [record])
    return pb.StopContainerResponse()


def remove(rt: Runtime, request: pb.RemoveContainerRequest, context: CallContext) -> pb.RemoveContainerResponse:
    """RemoveContainer. CRI: idempotent; a running container is killed first."""
    record = rt.records.containers.find(check_id(request.container_id, "container_id"))
    if record is not None:
        with rt.locks.hold(record.sandbox_id, context):
            # As it is now that the lock is ours: another call may have started or removed it.
            record = rt.records.containers.get(record.id)
            if record is not None:
                discard(rt, record, context)
    return pb.RemoveContainerResponse()


def discard(rt: Runtime, record: ContainerRecord, context: CallContext) -> None:
    """Remove a container with everything that is its own. With its sandbox's lock held."""
    name = rt.names.container(record.sandbox_id, record.id)
    if record.state is ContainerState.RUNNING:
        _kill(rt, name, context)
        states.record_exits(rt, [record])
    sandbox.destroy(rt, name)
    sandbox.forget(rt, record)


def reopen_log(
    rt: Runtime, request: pb.ReopenContainerLogRequest, context: CallContext
) -> pb.ReopenContainerLogResponse:
    """ReopenContainerLog. CRI: after an error there is no new file."""
    record = states.refresh_container(rt, get(rt, request.container_id))
    if record.state is not ContainerState.RUNNING:
        raise FailedPrecondition(f"container {record.id[:13]} is {record.state.value}: it writes no log")
    rt.keeper.reopen(record.id)
    return pb.ReopenContainerLogResponse()


def get(rt: Runtime, container_id: str) -> ContainerRecord:
    """The record of a container.

    :raises NotFound: there is none.   :raises InvalidArgument: the id is empty, or that of several.
    """
    record = rt.records.containers.find(check_id(container_id, "container_id"))
    if record is None or record.state is ContainerState.CREATING:
        raise no_such("container", container_id)
    return record


def _repeated(existing: ContainerRecord, config: pb.ContainerConfig) -> pb.CreateContainerResponse:
    if existing.state is ContainerState.CREATED and existing.config == config:
        return pb.CreateContainerResponse(container_id=existing.id)
    raise AlreadyExists(
        f"metadata: this attempt of the container exists as {existing.id} ({existing.state.value}); "
        "remove it, or raise metadata.attempt"
    )


def _forget(rt: Runtime, record: ContainerRecord, undo: Undo) -> None:
    """The last step of undoing: kubelet repeats the call, and must not meet what could not be undone."""
    if undo.failed:
        rt.leftovers.add(record.id, rt.names.container(record.sandbox_id, record.id))
    rt.records.containers.delete(record.id)


def _remove_files(rt: Runtime, container_id: str) -> None:
    if not rt.directories.remove_files(container_id):
        raise Unavailable("they are in use")


def _create(
    rt: Runtime, owner: SandboxRecord, record: ContainerRecord, image: Image, context: CallContext, undo: Undo
) -> None:
    name = rt.names.container(owner.id, record.id)
    config, security = record.config, record.config.linux.security_context
    profile = checks.seccomp(security, capabilities.wanted(security)[0])
    filter_ = compile_profile(profile) if profile else b""
    protected = checks.path_options(security)
    edits = rt.cdi.edits(config)
    nodes = _nodes(config, edits)
    undo.add("remove its directories", lambda: _remove_files(rt, record.id))
    joined = _namespace_files(rt, owner, security)
    helper = rt.directories.make_helper(record.id, rt.init, joined)
    if filter_:
        (helper / process.SECCOMP).write_bytes(filter_)
    volumes_directory = rt.directories.owned_volumes(record.id)
    plan = mounts.plan(
        mounts.named(config.mounts, edits.mounts),
        readonly_root=security.readonly_rootfs,
        helper_directory=helper,
        sandbox_directory=rt.directories.sandbox(owner.id),
        volumes_directory=volumes_directory,
        image_volumes=image.config.volumes,
        resolve_image=lambda wanted, field: _image(rt, wanted, field).id,
        host_ipc=owner.config.linux.security_context.namespace_options.ipc == pb.NODE,
    )
    root = rt.directories.root(record.id)
    for path in (root, *(Path(mount.path) for mount in plan.images), *(Path(copy) for _, copy in plan.copies)):
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    volumes = [spec.root_volume(str(root), name, image.layers, rt.place)]
    for mount in plan.images:
        volumes.append(spec.image_volume(mount.path, name, _image(rt, mount.image).layers, rt.place))
    if nodes:
        _allow_devices(rt, owner, nodes)
    undo.add("destroy the Porto container", lambda: sandbox.destroy(rt, name))
    hugetlb = rt.abilities.has("hugetlb_limit")
    made = spec.container(name, record.id, rt.shim_id, config, str(root), plan, hugetlb=hugetlb)
    with porto_errors("creating the container"):
        rt.porto.create_from_spec(made, volumes, timeout_s=context.remaining_s(rt.porto.timeout_s))
        # What can be known only now that the root filesystem is mounted.
        mounts.find_images(plan)
        made_nodes = {*devices.OWN, *(node.container_path for node in nodes)}
        targets.settle(plan, str(root), made_nodes, joins_processes="pid" in joined)
        targets.check_protected(plan, str(root), security)
        user = users.resolve(security, image.config.user, str(root))
        update = rpc_pb2.TContainerSpec(name=name)
        if plan.binds != list(made.bind.bind):
            update.bind.bind.extend(plan.binds)
        if nodes:
            devices.into_spec(devices.owned(nodes, edits.nodes, user.uid, user.gid), update)
        if update.HasField("bind") or nodes:
            rt.porto.update_from_spec(update)
    mounts.copy_volumes(plan, str(root))
    user = dataclasses.replace(user, groups=tuple(sorted({*user.groups, *edits.groups})))
    variables = process.environment(config, image.config, user, rt.hostname_of(owner.config)) | edits.variables
    process.write_private(helper / process.ENVIRONMENT, process.environment_file(variables))
    made_process = dataclasses.replace(
        process.build(config, image.config, user),
        has_term="TERM" in variables,
        join=process.join_options(joined, has_filter=bool(filter_), flags=profile.flags if profile else 0),
        setup=(
            *(["-p"] if "pid" in joined else []),
            *protected,
            *(["-O"] if security.readonly_rootfs else []),
        ),
    )
    rt.records.containers.update(
        record.id,
        state=ContainerState.CREATED,
        process=made_process.as_json(),
        mount_images={
            mount.image.image: _image(rt, mount.image.image).id for mount in config.mounts if mount.HasField("image")
        },
        late_mounts=[dataclasses.asdict(mount) for mount in plan.late],
    )


def _nodes(config: pb.ContainerConfig, edits: cdi.Edits) -> list[devices.Node]:
    """The device nodes of a container, those that are named going before those that it gets anyway."""
    privileged = config.linux.security_context.privileged
    nodes = {node.container_path: node for node in (devices.of_host() if privileged else ())}
    nodes |= {node.container_path: node for node in devices.of_container(config.devices)}
    return list((nodes | edits.nodes).values())


def _image(rt: Runtime, name: str, field: str = "mounts") -> Image:
    image = rt.images.resolve(name)
    if image is None:
        raise NotFound(f"{field}: {name!r} is not in the store; pull it first")
    return image


def _namespace_files(rt: Runtime, owner: SandboxRecord, security: pb.LinuxContainerSecurityContext) -> dict[str, str]:
    """Namespaces that init joins: the pod's, and that of another container for a debugging one."""
    directory = rt.directories.sandbox(owner.id)
    files = {"ipc": f"{directory}/ipc", "uts": f"{directory}/uts"}
    options, of_pod = security.namespace_options, owner.config.linux.security_context.namespace_options
    for field in ("network", "pid", "ipc"):
        if getattr(options, field) == pb.NODE and getattr(of_pod, field) != pb.NODE:
            name = f"linux.security_context.namespace_options.{field}"
            raise InvalidArgument(f"{name}: NODE needs a sandbox that is in the node's namespace too")
    if options.pid == pb.TARGET:
        target = states.refresh_container(rt, get(rt, options.target_id))
        if target.sandbox_id != owner.id:
            raise InvalidArgument("linux.security_context.namespace_options.target_id: is in another sandbox")
        if target.state is not ContainerState.RUNNING:
            raise FailedPrecondition(
                f"linux.security_context.namespace_options.target_id: {target.id[:13]} does not run"
            )
        with porto_errors("looking for the target container's process"):
            pid = rt.porto.get_property(rt.names.container(owner.id, target.id), "root_pid")
        files["pid"] = f"/proc/{pid}/ns/pid"
    return files


def _allow_devices(rt: Runtime, owner: SandboxRecord, nodes: Sequence[devices.Node]) -> None:
    """Give the sandbox the devices of a container: to Porto a child can't have more than its parent."""
    known = [devices.Node(*node) for node in owner.devices]
    wanted = devices.allowed(known, nodes)
    if set(wanted) <= set(known):
        return
    update = rpc_pb2.TContainerSpec(name=rt.names.sandbox(owner.id), devices_explicit=True)
    devices.into_spec(wanted, update)
    with porto_errors("devices: allowing them to the sandbox"):
        rt.porto.update_from_spec(update)
    rt.records.sandboxes.update(owner.id, devices=[dataclasses.astuple(node) for node in wanted])


def _start(rt: Runtime, owner: SandboxRecord, record: ContainerRecord, context: CallContext) -> None:
    name = rt.names.container(owner.id, record.id)
    waiting = [late.LateMount(**mount) for mount in record.late_mounts]
    with ExitStack() as stack:
        report = stack.enter_context(Report(rt.directories.helper(record.id)))
        gate = stack.enter_context(Gate(rt.directories.helper(record.id))) if waiting else None
        update = rpc_pb2.TContainerSpec(name=name)
        process.into_spec(process.Process.from_json(record.process), update, report.name, gate.name if gate else "")
        try:
            _start_with_streams(rt, owner, record, update, context)
        except _FINAL as err:
            _start_failed(rt, record, name, err.message, time.time_ns(), context)
            raise
        started_at = time.time_ns()
        problem = ""
        if gate is not None:
            problem = _attach(rt, name, waiting)
            # Opened even if it failed: init must not wait for ever.
            gate.open()
        reported = report.wait(_REPORT_TIMEOUT_S)
        problem = problem or report.text()
    if problem or not reported:
        problem = problem or "the command did not start in time"
        _start_failed(rt, record, name, problem, started_at, context)
        raise InvalidArgument(f"container {record.id[:13]} can't start: {problem}")
    rt.records.containers.update(record.id, state=ContainerState.RUNNING, started_at=started_at)
    rt.events.publish(rt, pb.CONTAINER_STARTED_EVENT, record.id, owner.id)


def _start_with_streams(
    rt: Runtime, owner: SandboxRecord, record: ContainerRecord, update: rpc_pb2.TContainerSpec, context: CallContext
) -> None:
    config = record.config
    streams = rt.keeper.open(
        record.id,
        log_directory=owner.config.log_directory if record.log_path else "",
        log_path=config.log_path if record.log_path else "",
        tty=config.tty,
        stdin=config.stdin,
        stdin_once=config.stdin_once,
    )
    try:
        # Porto opens them by way of our own descriptors.
        update.stdin_path = stream_path(streams.stdin)
        update.stdout_path = stream_path(streams.stdout)
        update.stderr_path = stream_path(streams.stderr)
        with porto_errors("starting the container"):
            rt.porto.update_from_spec(update, start=True, timeout_s=context.remaining_s(rt.porto.timeout_s))
    except BaseException:
        rt.keeper.close(record.id)
        raise
    finally:
        streams.close()


def _attach(rt: Runtime, name: str, waiting: Sequence[late.LateMount]) -> str:
    """What went wrong, if anything."""
    try:
        with porto_errors("looking for the container's process"):
            pid = int(rt.porto.get_property(name, "root_pid"))
        late.attach(pid, waiting)
    except ShimError as err:
        return err.message
    return ""


def _start_failed(
    rt: Runtime, record: ContainerRecord, name: str, problem: str, started_at: int, context: CallContext
) -> None:
    _kill(rt, name, context)
    rt.keeper.close(record.id)
    rt.records.containers.update(
        record.id,
        state=ContainerState.EXITED,
        exit_code=START_FAILED,
        reason="StartError",
        message=problem,
        started_at=started_at,
        finished_at=max(time.time_ns(), started_at + 1),
    )


def _kill(rt: Runtime, name: str, context: CallContext) -> None:
    sandbox.kill(rt, name)
    if not _wait(rt, name, _KILL_TIMEOUT_S, context):
        raise Unavailable(f"the container does not die after SIGKILL within {_KILL_TIMEOUT_S:.0f} s; try again")


def _wait(rt: Runtime, name: str, wait_s: float, context: CallContext) -> bool:
    """Wait for a container's death; False when it lives on.

    :raises DeadlineExceeded, Cancelled: the call has ended before.
    """
    remaining_s = context.remaining_s(wait_s)
    with porto_errors("waiting for the container's death"), porto_token(context) as cancel:
        try:
            result = rt.porto.wait([name], remaining_s, cancel=cancel)
        except porto.ContainerDoesNotExist:
            return True
    if result.timed_out and remaining_s < wait_s:
        raise DeadlineExceeded("the call's deadline has passed before the grace period was over; repeat it")
    return not result.timed_out


def stream_path(fd: int | None) -> str:
    """A standard stream as Porto takes it: a descriptor of ours, or nothing."""
    return "/dev/null" if fd is None else f"/dev/fd/{fd}"
