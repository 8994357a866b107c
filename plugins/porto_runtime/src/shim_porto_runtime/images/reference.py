"""Image references: the distribution project's grammar, with Docker's defaults filled in.

::

    busybox                       docker.io/library/busybox:latest
    quay.io/a/b@sha256:<hex>      the same, and no tag
    sha256:<hex>                  an image's id, not a reference

Nothing that is not in this grammar gets near a registry, the store or Porto.
"""

from __future__ import annotations

import re

from shim_core.errors import InvalidArgument
from shim_core.types import ImageReference
from shim_porto_runtime.images import digests

DOCKER_HUB = "docker.io"
DEFAULT_TAG = "latest"
MAX_NAME_CHARACTERS = 255
"""Registry and repository together (distribution's ``NameTotalLengthMax``)."""

_DOMAIN_PART = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_PATH_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_PATH_PART}(?:/{_PATH_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_BARE_ID = re.compile(r"[a-f0-9]{64}")
_ID_PREFIX = re.compile(r"(?:sha256:)?([a-f0-9]{12,64})")

# Other names that Docker Hub goes by; images are the same whichever is written.
_DOCKER_HUB_NAMES = frozenset({"index.docker.io", "registry-1.docker.io"})


def parse(text: str) -> ImageReference:
    """A reference as users write it, in full. Without tag and digest it means ``:latest``; a digest outweighs a tag.

    :raises InvalidArgument: it is none; the message says why.
    """
    rest, at, digest = text.partition("@")
    if at:
        try:
            digests.check(digest)
        except digests.BadDigest as err:
            raise _invalid(text, str(err)) from None
    # A colon after the last slash starts a tag; one before it, a port.
    head, slash, tail = rest.rpartition("/")
    tail, colon, tag = tail.partition(":")
    name = f"{head}{slash}{tail}"
    if colon and not _TAG.fullmatch(tag):
        raise _invalid(text, "the tag must be 1 to 128 letters, digits, '_', '.' or '-'")
    registry, repository = _split_name(name)
    if not _DOMAIN.fullmatch(registry) or not _port_fits(registry):
        raise _invalid(text, "the registry must be a host name or address, with a port if any")
    if not _PATH.fullmatch(repository):
        raise _invalid(text, _why_not_path(repository))
    if _BARE_ID.fullmatch(name):
        raise _invalid(text, "64 hex digits are an image id, which can't be a repository")
    if len(registry) + 1 + len(repository) > MAX_NAME_CHARACTERS:
        raise _invalid(text, f"the name is longer than {MAX_NAME_CHARACTERS} characters")
    if not tag and not digest:
        tag = DEFAULT_TAG
    return ImageReference(registry, repository, "" if digest else tag, digest)


def is_image_id(text: str) -> bool:
    """True for a whole image id: ``sha256:`` and 64 hex digits."""
    return digests.is_digest(text)


def id_prefix(text: str) -> str | None:
    """The hex digits of an image id, whole or shortened to no fewer than 12; None when it can't be one."""
    match = _ID_PREFIX.fullmatch(text)
    return match[1] if match else None


def familiar(reference: ImageReference) -> str:
    """The shortest way to write a reference: ``busybox:1.36``."""
    repository = reference.repository
    if reference.registry != DOCKER_HUB:
        name = reference.name
    elif repository.count("/") == 1 and repository.startswith("library/"):
        name = repository.removeprefix("library/")
    else:
        name = repository
    return str(reference).replace(reference.name, name, 1)


def _split_name(name: str) -> tuple[str, str]:
    """Registry and repository, as Docker tells one from the other."""
    first, slash, rest = name.partition("/")
    is_registry = slash and ("." in first or ":" in first or first == "localhost" or first != first.lower())
    registry, repository = (first, rest) if is_registry else (DOCKER_HUB, name)
    if registry in _DOCKER_HUB_NAMES:
        registry = DOCKER_HUB
    if registry == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    return registry, repository


def _port_fits(registry: str) -> bool:
    port = registry.rpartition("]")[2].partition(":")[2]
    return not port or (len(port) <= 5 and 0 < int(port) <= 65535)


def _why_not_path(repository: str) -> str:
    if not repository or repository == "library/":
        return "the repository's name is missing"
    if repository != repository.lower():
        return "the repository must be in lower case"
    return "the repository must be lower-case letters and digits, separated by single '/', '.', '-', '_' or '__'"


def _invalid(text: str, why: str) -> InvalidArgument:
    shown = text if len(text) <= 128 else f"{text[:125]}..."
    return InvalidArgument(f"image: not a valid reference: {shown!r}: {why}")
