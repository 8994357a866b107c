"""Hooks that decide where an image is fetched, and who the puller is there.

::

    registry_endpoints (where?)
    request -> 401 -> registry_credentials (who am I?) -> registry_authorization (which header?) -> request
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shim_core.hookspecs import hookspec

if TYPE_CHECKING:
    from shim_core.context import CallContext
    from shim_core.types import (
        ImageReference,
        RegistryAuth,
        RegistryAuthorization,
        RegistryChallenge,
        RegistryCredentials,
        RegistryEndpoint,
    )


class RegistrySpec:
    """Hooks of a registry plugin."""

    @hookspec(firstresult=True)
    def registry_endpoints(self, image: ImageReference, context: CallContext) -> Sequence[RegistryEndpoint] | None:
        """Where to look for ``image``, in this order: mirrors first, the registry itself last. Asked for each pull.

        The next one is asked when one can't be reached, doesn't have the image, refuses, or sends what doesn't match
        its digest.

        :returns: None: not my registry. When nobody answers, the image's own registry is asked over HTTPS.
        :raises InvalidArgument: it is configured, and wrongly; the message names file and key.
        """

    @hookspec(firstresult=True)
    def registry_credentials(
        self, image: ImageReference, auth: RegistryAuth | None, context: CallContext
    ) -> RegistryCredentials | None:
        """Credentials for the registry of ``image``. Plugins are asked before what is configured or came with the pull.

        Asked when a registry answers 401. When that was a mirror, ``image`` bears the mirror's name.

        :param auth: the credentials kubelet sent with this pull, if any; a plugin that should not override a pod's own
            pull secret returns None when they are there.
        :returns: None: not my registry. When nobody answers, the pull is anonymous.
        :raises Unauthenticated: mine, and no credentials can be had; the message never holds a secret.

        ::

            class Vault:
                @hookimpl
                def registry_credentials(self, image):
                    if image.registry == "registry.example.org":
                        return RegistryCredentials(username="node", password=Path("/run/vault/token").read_text())
        """

    @hookspec(firstresult=True)
    def registry_authorization(
        self,
        image: ImageReference,
        credentials: RegistryCredentials | None,
        challenge: RegistryChallenge,
        context: CallContext,
    ) -> RegistryAuthorization | None:
        """Turn credentials into the header that answers a registry's challenge: Basic, or a token fetched for it.

        :param credentials: None for an anonymous pull.
        :returns: None: nothing can be done about this challenge; the pull ends as unauthorized.
        :raises Unauthenticated: the token server refuses.   :raises Unavailable: it can't be reached.
        """
