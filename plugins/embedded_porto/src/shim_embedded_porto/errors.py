"""What a request can fail with: a code of Porto's protocol, a text, and the errno behind it if there was one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOENT

from porto_api import rpc_pb2 as pb


class Fault(Exception):
    """An error as Porto answers it.

    :param code: one of ``rpc.EError``.
    :param errno: of the system call that failed, 0 when none did.
    """

    def __init__(self, code: int, text: str = "", errno: int = 0) -> None:
        super().__init__(code, text, errno)
        self.code = code
        self.text = text
        self.errno = errno

    @property
    def message(self) -> str:
        """What goes over the wire beside the code."""
        return f"{os.strerror(self.errno)}: {self.text}" if self.errno else self.text

    def __str__(self) -> str:
        name = pb.EError.Name(self.code)
        if self.errno:
            return f"{name}:({os.strerror(self.errno)}: {self.text})"
        return f"{name}:({self.text})" if self.text else name

    def within(self, where: str) -> Fault:
        """The same fault, with a text that says where it happened."""
        return Fault(self.code, f"{where}: {self.text}", self.errno)


def invalid_value(text: str) -> Fault:
    return Fault(pb.InvalidValue, text)


def invalid_state(text: str) -> Fault:
    return Fault(pb.InvalidState, text)


def permission(text: str) -> Fault:
    return Fault(pb.Permission, text)


def not_supported(text: str) -> Fault:
    return Fault(pb.NotSupported, text)


def invalid_path(text: str) -> Fault:
    return Fault(pb.InvalidPath, text)


def system(err: OSError, what: str) -> Fault:
    """The fault for a system call that failed, as Porto codes it."""
    code = {28: pb.NoSpace, 122: pb.NoSpace}.get(err.errno or 0, pb.Unknown)
    return Fault(code, what, err.errno or 0)


@contextmanager
def system_call(what: str) -> Iterator[None]:
    """Turn an ``OSError`` into the fault that names what was attempted."""
    try:
        yield
    except OSError as err:
        raise system(err, what) from err


def is_missing(fault: Fault) -> bool:
    """True when the fault is "no such file"."""
    return fault.errno == ENOENT
