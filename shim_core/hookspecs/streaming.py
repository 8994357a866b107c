"""Hooks by which the streaming server has the runtime do the work.

The streaming plugin answers ``cri_exec``, ``cri_attach`` and ``cri_port_forward`` with a URL; when the client comes to
it, one of these is called in a thread of its own and runs until the session is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim_core.hookspecs import hookspec

if TYPE_CHECKING:
    import socket

    from shim_core.context import CallContext
    from shim_core.types import AttachSession, ExecSession, PortForwardSession


class StreamingSpec:
    """Hooks of a runtime plugin that can stream."""

    @hookspec(firstresult=True)
    def stream_check(
        self, session: ExecSession | AttachSession | PortForwardSession, context: CallContext
    ) -> bool | None:
        """Whether the session could start now: asked before a URL is given out. No descriptors are open yet, and a
        port to be forwarded may be 0: not known yet.

        :returns: True.   :raises NotFound: no such container or sandbox.   :raises FailedPrecondition: it doesn't run.
        """

    @hookspec(firstresult=True)
    def stream_terminal(self, session: ExecSession, context: CallContext) -> tuple[int, int] | None:
        """Open a terminal for a command with ``tty``, in the container, so that programs there find its name.

        :returns: its master and its slave end, which belong to the caller; None: one of the node's has to do.
        """

    @hookspec(firstresult=True)
    def stream_exec(self, session: ExecSession, context: CallContext) -> int | None:
        """Run the command over the session's streams; kill it when the context is cancelled.

        :returns: the exit code; 128+n after signal n.
        :raises FailedPrecondition: the command can't be started; the message goes to the client.
        """

    @hookspec(firstresult=True)
    def stream_attach(self, session: AttachSession, context: CallContext) -> bool | None:
        """Connect the session to the container's own streams until it exits or the context is cancelled.

        A slow client never holds up the container.

        :returns: True at the end.
        """

    @hookspec(firstresult=True)
    def stream_port_forward(self, session: PortForwardSession, context: CallContext) -> socket.socket | None:
        """Connect to a TCP port inside the sandbox's network namespace. The thread it is called in serves nothing else.

        :returns: the connected socket, which belongs to the caller.   :raises Unavailable: nobody listens there.
        """
