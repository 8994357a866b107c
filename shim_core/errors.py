"""The errors that plugins raise and clients see.

::

    ShimError                code       when
    ├── InvalidArgument      3          a field of the request can't be honoured as it stands; name it and the fix
    ├── DeadlineExceeded     4          the time is up (ExecSync's timeout: kubelet's probes tell it from failure)
    ├── NotFound             5          no such sandbox, container, image
    ├── AlreadyExists        6          a name is taken by something that is not the caller's
    ├── PermissionDenied     7
    ├── ResourceExhausted    8          a limit, a full disk
    ├── FailedPrecondition   9          the object is in a state that forbids the call
    ├── Aborted              10         lost a race; try again
    ├── OutOfRange           11
    ├── Unimplemented        12         Porto, or this version, can't do it; say which
    ├── Internal             13         a bug, ours or Porto's
    ├── Unavailable          14         the runtime is away, starting or stopping; try again
    ├── DataLoss             15
    ├── Unauthenticated      16
    ├── Cancelled            1          the client left
    └── UnknownError         2          PullImage: kubelet reads the text only under this code

Messages reach clients and pod events: they name the thing and the way out, and never hold a secret.
The numbers are gRPC's; only ``shim_core.server`` knows gRPC itself.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Code(enum.IntEnum):
    """Status codes by gRPC's numbers."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class ShimError(Exception):
    """Base of all errors with a status code. Raise a subclass."""

    code: ClassVar[Code] = Code.UNKNOWN

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Cancelled(ShimError):
    code = Code.CANCELLED


class UnknownError(ShimError):
    """For PullImage: kubelet looks for ``RegistryUnavailable`` and its like only in errors of this code."""

    code = Code.UNKNOWN


class InvalidArgument(ShimError):
    code = Code.INVALID_ARGUMENT


class DeadlineExceeded(ShimError):
    code = Code.DEADLINE_EXCEEDED


class NotFound(ShimError):
    code = Code.NOT_FOUND


class AlreadyExists(ShimError):
    code = Code.ALREADY_EXISTS


class PermissionDenied(ShimError):
    code = Code.PERMISSION_DENIED


class ResourceExhausted(ShimError):
    code = Code.RESOURCE_EXHAUSTED


class FailedPrecondition(ShimError):
    code = Code.FAILED_PRECONDITION


class Aborted(ShimError):
    code = Code.ABORTED


class OutOfRange(ShimError):
    code = Code.OUT_OF_RANGE


class Unimplemented(ShimError):
    code = Code.UNIMPLEMENTED


class Internal(ShimError):
    code = Code.INTERNAL


class Unavailable(ShimError):
    code = Code.UNAVAILABLE


class DataLoss(ShimError):
    code = Code.DATA_LOSS


class Unauthenticated(ShimError):
    code = Code.UNAUTHENTICATED


class StartupError(Exception):
    """The daemon can't start, and the operator has to mend something. Printed as it stands, exit status 2."""


class ConfigError(StartupError):
    """A mistake in the configuration: names file, key and fix."""


class PluginError(StartupError):
    """A plugin that can't be loaded: names its distribution."""
