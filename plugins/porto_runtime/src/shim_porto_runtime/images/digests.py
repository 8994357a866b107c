"""Digests: the only names of content that are trusted, and only after a look at their grammar.

SHA-256 alone, as in every registry and runtime: a second algorithm would be a second way to be wrong.
"""

from __future__ import annotations

import hashlib
import re

_DIGEST = re.compile(r"sha256:[a-f0-9]{64}")
PREFIX = "sha256:"


class BadDigest(ValueError):
    """A text that is no digest."""


def is_digest(text: str) -> bool:
    """True for ``sha256:`` and 64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def check(text: object) -> str:
    """A digest as it came from outside.

    :raises BadDigest: it is none.
    """
    if not isinstance(text, str) or not is_digest(text):
        raise BadDigest("the digest must be sha256: and 64 lower-case hex digits")
    return text


def of(data: bytes) -> str:
    """The digest of some bytes."""
    return PREFIX + hashlib.sha256(data).hexdigest()


def hex_of(digest: str) -> str:
    """A digest's hex digits."""
    return digest.removeprefix(PREFIX)
