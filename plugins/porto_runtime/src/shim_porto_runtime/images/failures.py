"""How one endpoint can fail, and what the client of the CRI gets to read about it."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

from shim_core import errors

# kubelet looks for these words at the start of a message (cri-api, pkg/errors).
REGISTRY_UNAVAILABLE = "RegistryUnavailable"
SIGNATURE_VALIDATION_FAILED = "SignatureValidationFailed"

_MAX_SAID_CHARACTERS = 240
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]+")


class Kind(enum.Enum):
    """What a failure means."""

    MISMATCH = "what came is not what its digest says"
    DENIED = "the registry doesn't let us"
    INVALID = "the registry breaks a rule"
    NOT_FOUND = "the registry doesn't have it"
    UNAVAILABLE = "the registry can't be asked"


class Failure(Exception):
    """One endpoint has failed.

    :param tries: how often to try at all. :param retry_after_s: what the server asked for.
    :param progressed: something was gained: patience starts anew.
    """

    def __init__(
        self, kind: Kind, text: str, *, tries: int = 99, retry_after_s: float = 0.0, progressed: bool = False
    ) -> None:
        super().__init__(text)
        self.kind = kind
        self.tries = tries
        self.retry_after_s = retry_after_s
        self.progressed = progressed

    @property
    def again(self) -> bool:
        """True when the same request may succeed later."""
        return self.kind is Kind.UNAVAILABLE


def to_error(what: str, failures: Sequence[tuple[str, Failure]]) -> errors.ShimError:
    """The error for the client: all endpoints have failed.

    :param failures: by endpoint, in the order they were asked; the last one is the registry itself.
    """
    if not failures:
        return errors.UnknownError(f"{what}: no endpoint may be asked for it: check capabilities in hosts.toml")
    # The registry's own word counts; a mirror's only when it met an attack.
    own = failures[-1][1]
    mismatch = next((failure for _, failure in failures if failure.kind is Kind.MISMATCH), None)
    chosen = mismatch or own
    text = f"{what}: {chosen}"
    others = [f"{host}: {failure.kind.value}" for host, failure in failures if failure is not chosen]
    if others:
        text += f" (also asked: {'; '.join(others)})"
    if chosen.kind is Kind.MISMATCH:
        return errors.UnknownError(f"{SIGNATURE_VALIDATION_FAILED}: {text}")
    if chosen.kind is Kind.UNAVAILABLE:
        return errors.UnknownError(f"{REGISTRY_UNAVAILABLE}: {text}")
    return errors.UnknownError(text)


def describe(said: str, secrets: Sequence[str]) -> str:
    """A text from outside, fit for a message: short, printable, without the secrets we know."""
    text = _UNPRINTABLE.sub(" ", said)
    for secret in secrets:
        text = text.replace(secret, "<redacted>")
    return text if len(text) <= _MAX_SAID_CHARACTERS else f"{text[:_MAX_SAID_CHARACTERS]}..."
