"""What the streaming server asks of the runtime: attach and port-forward (exec is in ``exec.py``)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from shim_core.context import CallContext
from shim_core.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, Unavailable
from shim_core.types import AttachSession, ExecSession, PortForwardSession
from shim_porto_runtime import exec, linux, sandbox, states
from shim_porto_runtime.names import check_id, no_such
from shim_porto_runtime.records import SandboxRecord, SandboxState

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

_DIAL_TIMEOUT_S = 10.0


def check(rt: Runtime, session: ExecSession | AttachSession | PortForwardSession) -> None:
    """Whether a session could start now.

    :raises NotFound: no such container or sandbox.   :raises FailedPrecondition: it doesn't run.
    """
    if isinstance(session, PortForwardSession):
        _ready(rt, session.sandbox_id)
    else:
        exec.running(rt, session.container_id)


def attach(rt: Runtime, session: AttachSession, context: CallContext) -> None:
    """Connect a session to a container's own streams until it exits or the client leaves."""
    record = exec.running(rt, session.container_id)
    if session.on_resize is not None:
        session.on_resize(lambda columns, rows: rt.keeper.resize(record.id, columns, rows))
    rt.keeper.attach(
        record.id,
        stdin=session.stdin if record.config.stdin else None,
        stdout=session.stdout,
        stderr=None if record.config.tty else session.stderr,
        cancel=context.on_cancel,
    )


def port_forward(rt: Runtime, session: PortForwardSession, context: CallContext) -> socket.socket:
    """Connect to a TCP port of a pod, on its loopback interface.

    :raises Unavailable: nobody listens there.
    """
    record = _ready(rt, session.sandbox_id)
    if not 1 <= session.port <= 65535:
        raise InvalidArgument(f"port: {session.port} is not in 1..65535")
    if not sandbox.on_host_network(record.config):
        # The thread is this call's own, and ends with it.
        pinned = (record.network or {}).get("netns_path", "")
        try:
            linux.setns(sandbox.network_namespace(rt, record.id, pinned), linux.CLONE_NEWNET)
        except OSError as err:
            raise Unavailable(f"the network of sandbox {record.id[:13]} can't be entered: {err.strerror}") from err
    timeout_s = context.remaining_s(_DIAL_TIMEOUT_S)
    for address in ("127.0.0.1", "::1"):
        try:
            return socket.create_connection((address, session.port), timeout=timeout_s)
        except TimeoutError as err:
            raise DeadlineExceeded(f"port {session.port} of sandbox {record.id[:13]} does not answer") from err
        except OSError as err:
            refused = err
    raise Unavailable(f"port {session.port} of sandbox {record.id[:13]}: {refused.strerror}")


def _ready(rt: Runtime, sandbox_id: str) -> SandboxRecord:
    record = rt.records.sandboxes.find(check_id(sandbox_id, "pod_sandbox_id"))
    if record is None or record.state is SandboxState.CREATING:
        raise no_such("sandbox", sandbox_id)
    record = states.refresh_sandbox(rt, record)
    if record.state is not SandboxState.READY:
        raise FailedPrecondition(f"sandbox {record.id[:13]} is not ready")
    return record
