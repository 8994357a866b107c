"""A client of one image's registry: the distribution API, by way of mirrors, with authentication and patience.

Which endpoints there are and who we are there is for plugins to say (hooks ``registry_endpoints``,
``registry_credentials``, ``registry_authorization``); this module does the asking.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shim_core import errors
from shim_core.context import CallContext
from shim_core.types import (
    ImageReference,
    RegistryAuth,
    RegistryAuthorization,
    RegistryChallenge,
    RegistryEndpoint,
)
from shim_porto_runtime.images import answers, digests, documents
from shim_porto_runtime.images.assembly import Resolved
from shim_porto_runtime.images.documents import Descriptor
from shim_porto_runtime.images.endpoint import Endpoint, default_endpoint
from shim_porto_runtime.images.failures import Failure, Kind, to_error
from shim_porto_runtime.images.model import Document
from shim_porto_runtime.images.transport import CertificateError, Response, Transport, TransportError

T = TypeVar("T")

logger = logging.getLogger("shim.porto_runtime.images")

MAX_REDIRECTS = 10
MAX_TRIES = 5
MAX_RETRY_AFTER_S = 30.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on with an endpoint that fails."""

    tries: int = MAX_TRIES
    first_delay_s: float = 0.25
    """Doubled after each try."""


class Registry:
    """Where one image comes from. Safe to use from many threads.

    :param auth: the credentials that came with the pull.
    """

    def __init__(
        self,
        image: ImageReference,
        hooks: Any,
        auth: RegistryAuth | None,
        transport: Transport,
        context: CallContext,
        patience: Patience,
    ) -> None:
        self.image = image
        self._hooks = hooks
        self._auth = auth
        self._transport = transport
        self._patience = patience
        answer: Sequence[RegistryEndpoint] | None = hooks.registry_endpoints(image=image, context=context)
        self._endpoints = [Endpoint(endpoint) for endpoint in answer or [default_endpoint(image)]]

    def resolve(self, context: CallContext) -> Resolved:
        """The manifest or index that the reference stands for, verified if it names a digest.

        :raises errors.ShimError: none of the endpoints has it.
        """
        if self.image.digest:
            return self.document(Descriptor("", self.image.digest, -1), context)
        return self.ask("manifest", lambda endpoint: self._resolve_tag(endpoint, context), context, by_tag=True)

    def document(self, descriptor: Descriptor, context: CallContext) -> Resolved:
        """A manifest or index by its digest.

        :param descriptor: size -1: not known. :raises errors.ShimError: none of the endpoints has it, or it is wrong.
        """

        def fetch(endpoint: Endpoint) -> Resolved:
            data, media_type = self._fetch(
                endpoint, f"manifests/{descriptor.digest}", documents.ACCEPT, answers.limit_of(descriptor), context
            )
            answers.verify(descriptor, data, endpoint)
            return answers.parse(Document(descriptor.digest, descriptor.media_type or media_type, data), endpoint)

        return self.ask("manifest", fetch, context)

    def blob(self, descriptor: Descriptor, context: CallContext) -> bytes:
        """A small blob, such as a config, in memory.

        :raises errors.ShimError: none of the endpoints has it, or it is wrong.
        """

        def fetch(endpoint: Endpoint) -> bytes:
            data, _ = self._fetch(endpoint, f"blobs/{descriptor.digest}", "", answers.limit_of(descriptor), context)
            answers.verify(descriptor, data, endpoint)
            return data

        return self.ask("config", fetch, context)

    def open_blob(self, endpoint: Endpoint, digest: str, offset: int, context: CallContext) -> tuple[Response, int]:
        """A blob's bytes, from ``offset`` if the server can do that.

        :returns: the answer, and the offset it starts at. :raises Failure: this endpoint can't.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        response = self._get(endpoint, f"blobs/{digest}", headers, context)
        if offset and response.status == 206:
            start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
            if start == str(offset):
                return response, offset
            response.close()
            raise Failure(Kind.UNAVAILABLE, f"{endpoint.host} sent another part of the blob than it was asked for")
        return response, 0

    def ask(self, what: str, work: Callable[[Endpoint], T], context: CallContext, *, by_tag: bool = False) -> T:
        """Have each endpoint try in turn, with patience.

        :param what: for messages. :param work: raises :class:`Failure`.
        """
        failures: list[tuple[str, Failure]] = []
        for endpoint in self._endpoints:
            if not (endpoint.spec.can_resolve if by_tag else endpoint.spec.can_pull):
                continue
            is_last = endpoint is self._endpoints[-1]
            if endpoint.down is not None and not is_last:
                failures.append((endpoint.host, endpoint.down))
                continue
            try:
                return self._try(endpoint, work, context, self._patience.tries if is_last else 2)
            except Failure as failure:
                logger.info("[%s] %s: %s from %s: %s", context.request_id, self.image, what, endpoint.host, failure)
                failures.append((endpoint.host, failure))
                if failure.kind is Kind.UNAVAILABLE:
                    endpoint.down = failure
        raise to_error(f"{self.image}: {what}", failures)

    def _try(self, endpoint: Endpoint, work: Callable[[Endpoint], T], context: CallContext, tries: int) -> T:
        tried = 0
        while True:
            context.check()
            try:
                return work(endpoint)
            except Failure as failure:
                tried = 1 if failure.progressed else tried + 1
                if not failure.again or tried >= min(tries, failure.tries):
                    raise
                # Half of the delay is random: nodes that failed together don't come back together.
                delay_s = self._patience.first_delay_s * 2 ** (tried - 1) * (0.5 + random.random() / 2)  # noqa: S311
                if failure.retry_after_s > MAX_RETRY_AFTER_S:
                    raise
                context.wait(context.remaining_s(max(delay_s, failure.retry_after_s)))

    # -- one request -----------------------------------------------------------------------------------------------

    def _resolve_tag(self, endpoint: Endpoint, context: CallContext) -> Resolved:
        path = f"manifests/{self.image.tag}"
        headers = {"Accept": documents.ACCEPT}
        with self._get(endpoint, path, headers, context) as response:
            data = answers.read_document(response, documents.MAX_DOCUMENT_BYTES, endpoint)
            claimed = response.headers.get("Docker-Content-Digest", "")
            media_type = response.headers.get("Content-Type", "")
        digest = digests.of(data)
        if digests.is_digest(claimed) and claimed != digest:
            raise Failure(Kind.MISMATCH, f"{endpoint.host} calls its manifest {claimed}, and it is {digest}")
        return answers.parse(Document(digest, media_type, data), endpoint)

    def _fetch(
        self, endpoint: Endpoint, path: str, accept: str, limit_bytes: int, context: CallContext
    ) -> tuple[bytes, str]:
        with self._get(endpoint, path, {"Accept": accept} if accept else {}, context) as response:
            return answers.read_document(response, limit_bytes, endpoint), response.headers.get("Content-Type", "")

    def _get(self, endpoint: Endpoint, path: str, headers: Mapping[str, str], context: CallContext) -> Response:
        """A good answer (2xx) to a GET below the repository.

        :raises Failure: there is none.
        """
        url = f"{endpoint.spec.url}/{self.image.repository}/{path}"
        if endpoint.spec.registry != self.image.registry:
            # Mirrors of several registries have to know whose image is meant (containerd's `ns`).
            url += f"?ns={urllib.parse.quote(self.image.registry)}"
        asked_again = False
        while True:
            sent = endpoint.authorization
            response = self._follow(endpoint, url, headers, sent, context)
            if response.status != 401:
                break
            challenge = response.headers.get("WWW-Authenticate", "")
            error = answers.error_of(response, endpoint.secrets)
            response.close()
            if asked_again or not self._authorize(endpoint, url, challenge, sent, context):
                raise Failure(Kind.DENIED, f"{endpoint.host} refuses: {error or 'authentication is needed'}")
            # The second refusal of a header is final; but the first one may have come from a cache.
            asked_again = sent != ""
        if 200 <= response.status < 300:
            return response
        failure = answers.failure_of(response, endpoint)
        response.close()
        raise failure

    def _follow(
        self, endpoint: Endpoint, url: str, headers: Mapping[str, str], authorization: str, context: CallContext
    ) -> Response:
        """The answer after redirects. What is for the endpoint's own host alone goes to no other."""
        own = {**endpoint.spec.headers, **headers}
        if authorization:
            own["Authorization"] = authorization
        home = answers.origin(url)
        for _ in range(MAX_REDIRECTS + 1):
            at_home = answers.origin(url) == home
            try:
                response = self._transport.get(
                    url,
                    own if at_home else headers,
                    endpoint.tls if at_home else endpoint.tls.without_client_certs(),
                    context,
                    connect_timeout_s=endpoint.spec.connect_timeout_s,
                )
            except CertificateError as err:
                raise Failure(Kind.UNAVAILABLE, str(err), tries=1) from err
            except TransportError as err:
                raise Failure(Kind.UNAVAILABLE, str(err), tries=3) from err
            if response.status not in _REDIRECTS:
                if response.status == 401 and not at_home:
                    response.close()
                    host = urllib.parse.urlsplit(url).netloc
                    raise Failure(Kind.DENIED, f"{endpoint.host} redirects to {host}, which asks for credentials")
                return response
            location = response.headers.get("Location", "")
            response.close()
            url = answers.redirected(url, location, endpoint)
        raise Failure(Kind.INVALID, f"{endpoint.host} redirects more than {MAX_REDIRECTS} times")

    def _authorize(self, endpoint: Endpoint, url: str, challenge: str, refused: str, context: CallContext) -> bool:
        """Get a header that answers a challenge; False when none can be had."""
        with endpoint.lock:
            if endpoint.authorization != refused:
                return True  # another thread has been here
            image, auth = self.image, self._auth
            if endpoint.spec.registry != image.registry:
                # What kubelet sent is for the image's own registry, unless it says otherwise.
                image = dataclasses.replace(image, registry=endpoint.spec.registry)
                auth = auth if auth is not None and auth.server_address else None
            try:
                if not endpoint.asked:
                    endpoint.identify(self._hooks.registry_credentials(image=image, auth=auth, context=context))
                answer: RegistryAuthorization | None = self._hooks.registry_authorization(
                    image=image,
                    credentials=endpoint.credentials,
                    challenge=RegistryChallenge(
                        url=url,
                        header=challenge,
                        scope=f"repository:{image.repository}:pull",
                        retry=refused != "",
                        endpoint=endpoint.spec,
                    ),
                    context=context,
                )
            except errors.Unauthenticated as err:
                raise Failure(Kind.DENIED, err.message) from err
            except errors.Unavailable as err:
                raise Failure(Kind.UNAVAILABLE, err.message, tries=3) from err
            if answer is None or answer.header == refused:
                return False
            endpoint.authorize(answer.header)
            return True
