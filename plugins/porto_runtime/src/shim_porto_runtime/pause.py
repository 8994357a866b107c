"""The pause process of a pod: the process of the pause image, as the pod's security context wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porto_api import rpc_pb2
from shim_core.context import CallContext
from shim_core.errors import DeadlineExceeded, FailedPrecondition
from shim_porto_runtime import process, security, spec, users
from shim_porto_runtime.porto_errors import porto_errors
from shim_porto_runtime.process import DEFAULT_PATH, Process
from shim_porto_runtime.records import SandboxRecord
from shim_porto_runtime.seccomp import compile_profile
from shim_porto_runtime.starting import Report

if TYPE_CHECKING:
    from shim_porto_runtime.images import Image
    from shim_porto_runtime.runtime import Runtime

_REPORT_TIMEOUT_S = 10.0


def start(rt: Runtime, record: SandboxRecord, image: Image, context: CallContext) -> None:
    """Start it in its sandbox, whose Porto container runs. What it makes is the caller's to undo.

    :raises FailedPrecondition: the image can't be run.
    """
    argv = (*image.config.entrypoint, *image.config.cmd)
    if not argv:
        raise FailedPrecondition(f"Images.PauseImage: {rt.pause_image} has no command; choose another, or none")
    rt.records.sandboxes.update(record.id, layers=image.layers)
    root = rt.directories.root(record.id)
    root.mkdir(mode=0o755, exist_ok=True)
    helper = rt.directories.make_helper(record.id, rt.init, {})
    wanted = record.config.linux.security_context
    profile = security.seccomp(wanted, ())
    filter_ = compile_profile(profile) if profile else b""
    if filter_:
        (helper / process.SECCOMP).write_bytes(filter_)
    variables = {name: value.encode() for name, _, value in (item.partition("=") for item in image.config.env) if name}
    environment = process.environment_file({"PATH": DEFAULT_PATH.encode(), **variables})
    process.write_private(helper / process.ENVIRONMENT, environment)
    name = rt.names.pause(record.id)
    made = spec.pause(name, record.id, rt.shim_id, str(root), str(helper))
    volume = spec.root_volume(str(root), name, image.layers, rt.place)
    with Report(helper) as report, porto_errors("starting the pause process"):
        rt.porto.create_from_spec(made, [volume], timeout_s=context.remaining_s(rt.porto.timeout_s))
        # The image's users are known now that its root filesystem is mounted.
        user = users.resolve(wanted, image.config.user, str(root))
        update = rpc_pb2.TContainerSpec(name=name)
        paused = Process(
            argv=argv,
            cwd="",
            uid=user.uid,
            gid=user.gid,
            groups=user.groups,
            bounding=0,
            join=process.join_options((), has_filter=bool(filter_), flags=profile.flags if profile else 0),
            setup=("-O",) if wanted.readonly_rootfs else (),
        )
        process.into_spec(paused, update, report.name)
        rt.porto.update_from_spec(update, start=True, timeout_s=context.remaining_s(rt.porto.timeout_s))
        if not report.wait(context.remaining_s(_REPORT_TIMEOUT_S)):
            raise DeadlineExceeded(f"the pause image {rt.pause_image} did not start in time")
        if problem := report.text():
            raise FailedPrecondition(f"Images.PauseImage: {rt.pause_image}: {problem}")
