"""Hooks between the runtime and the plugin that owns the pods' network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim_core.hookspecs import hookspec

if TYPE_CHECKING:
    from shim_core.context import CallContext
    from shim_core.types import NetworkAttachment, NetworkSandbox


class NetworkSpec:
    """Hooks of a network plugin. Sandboxes on the host's network never reach them."""

    @hookspec(firstresult=True)
    def network_attach(self, sandbox: NetworkSandbox, context: CallContext) -> NetworkAttachment | None:
        """Make a network namespace for the sandbox and connect it. The runtime starts the sandbox in it afterwards.

        Idempotent: a sandbox that is attached already keeps what it has. After an error ``network_detach`` is called
        for the same sandbox, so what a half-done attach has left is reclaimed there.

        :raises Unavailable: the network isn't ready, or a plugin of its own failed; the message names it.
        """

    @hookspec(firstresult=True)
    def network_detach(self, sandbox: NetworkSandbox, context: CallContext) -> bool | None:
        """Disconnect the sandbox, give its addresses back, remove its network namespace.

        Idempotent; an unknown sandbox is success. It never forgets an address: what can't be reclaimed now is an
        error, and the next call tries again.

        :returns: True once nothing is left to reclaim.   :raises Unavailable: try again later.
        """

    @hookspec(firstresult=True)
    def network_status(self, sandbox: NetworkSandbox, context: CallContext) -> NetworkAttachment | None:
        """What ``network_attach`` returned for the sandbox; None for one that isn't attached. Cheap."""
