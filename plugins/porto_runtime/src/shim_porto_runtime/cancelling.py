"""A CRI call's cancellation, as Porto's client takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from porto_api import CancelToken
from shim_core.context import CallContext


@contextmanager
def porto_token(context: CallContext) -> Iterator[CancelToken]:
    """A token that is cancelled when the call is, for the length of the block."""
    token = CancelToken()
    forget = context.on_cancel(token.cancel)
    try:
        yield token
    finally:
        forget()
