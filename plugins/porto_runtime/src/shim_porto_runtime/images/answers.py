"""What registries answer, and what to make of it. No requests are made here."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence

from shim_porto_runtime.images import digests, documents
from shim_porto_runtime.images.assembly import Resolved
from shim_porto_runtime.images.documents import BadDocument, Descriptor
from shim_porto_runtime.images.endpoint import Endpoint
from shim_porto_runtime.images.failures import Failure, Kind, describe
from shim_porto_runtime.images.model import Document
from shim_porto_runtime.images.transport import Response, TransportError

_MAX_ERROR_BODY_BYTES = 64 * 1024
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


def parse(document: Document, endpoint: Endpoint) -> Resolved:
    """What a document says.

    :raises Failure: it is no manifest or index.
    """
    try:
        return Resolved(document, documents.parse_manifest(document.data, document.media_type))
    except BadDocument as err:
        raise Failure(Kind.INVALID, f"the manifest {document.digest} from {endpoint.host} is refused: {err}") from None


def limit_of(descriptor: Descriptor) -> int:
    """How many bytes may be read of a document.

    :raises Failure: it says itself that it is larger than that.
    """
    if descriptor.size_bytes > documents.MAX_DOCUMENT_BYTES:
        limit = documents.MAX_DOCUMENT_BYTES
        raise Failure(Kind.INVALID, f"{descriptor.digest} is larger than the limit of {limit} bytes")
    return documents.MAX_DOCUMENT_BYTES if descriptor.size_bytes < 0 else descriptor.size_bytes


def read_document(response: Response, limit_bytes: int, endpoint: Endpoint) -> bytes:
    """A whole body.

    :raises Failure: it is larger than that, or breaks off.
    """
    try:
        data = response.read_all(limit_bytes)
    except TransportError as err:
        raise Failure(Kind.UNAVAILABLE, str(err), tries=3) from err
    if len(data) > limit_bytes:
        raise Failure(
            Kind.INVALID, f"the document from {endpoint.host} is larger than the limit of {limit_bytes} bytes"
        )
    return data


def verify(descriptor: Descriptor, data: bytes, endpoint: Endpoint) -> None:
    """Hold content against its descriptor.

    :raises Failure: it is something else.
    """
    if 0 <= descriptor.size_bytes != len(data):
        raise Failure(
            Kind.MISMATCH,
            f"{descriptor.digest} from {endpoint.host} has {len(data)} bytes rather than {descriptor.size_bytes}",
        )
    if (digest := digests.of(data)) != descriptor.digest:
        raise Failure(Kind.MISMATCH, f"asked for {descriptor.digest}, {endpoint.host} sent {digest}")


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what has to be the same for credentials to go along."""
    parts = urllib.parse.urlsplit(url)
    try:
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError:
        port = -1
    return parts.scheme, parts.hostname, port


def redirected(url: str, location: str, endpoint: Endpoint) -> str:
    """Where a redirect leads.

    :raises Failure: nowhere we may go.
    """
    try:
        target = urllib.parse.urljoin(url, location)
        parts = urllib.parse.urlsplit(target)
        host, scheme = parts.hostname, parts.scheme
    except ValueError:
        host, scheme = None, ""
    if not location or not host or scheme not in ("http", "https") or parts.username is not None:
        raise Failure(Kind.INVALID, f"{endpoint.host} redirects to something that is no web address")
    if scheme == "http" and not endpoint.spec.insecure:
        raise Failure(Kind.INVALID, f"{endpoint.host} redirects to {host} without TLS, which is refused")
    return urllib.parse.urlunsplit(parts._replace(fragment=""))


def failure_of(response: Response, endpoint: Endpoint) -> Failure:
    """What a status that is neither good nor 401 means."""
    said = error_of(response, endpoint.secrets)
    text = f"{endpoint.host} answers {response.status}" + (f": {said}" if said else "")
    if response.status == 404:
        return Failure(Kind.NOT_FOUND, text)
    if response.status == 403:
        return Failure(Kind.DENIED, text)
    if response.status in _RETRIED:
        return Failure(Kind.UNAVAILABLE, text, retry_after_s=_retry_after_s(response.headers.get("Retry-After", "")))
    return Failure(Kind.UNAVAILABLE if response.status >= 500 else Kind.INVALID, text, tries=1)


def _retry_after_s(text: str) -> float:
    # The other form, a date, would make us depend on two clocks.
    return float(text) if text.isdecimal() and len(text) < 9 else 0.0


def error_of(response: Response, secrets: Sequence[str]) -> str:
    """What a registry says went wrong (distribution-spec, error codes); empty when it says nothing we understand."""
    try:
        items = documents.load(response.read_all(_MAX_ERROR_BODY_BYTES)).get("errors")
        item = items[0] if isinstance(items, list) and items else None
        words = [item.get("code"), item.get("message")] if isinstance(item, dict) else []
    except (TransportError, BadDocument):
        return ""
    return describe(": ".join(word for word in words if isinstance(word, str) and word), secrets)
