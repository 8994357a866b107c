"""Porto's errors as the CRI's: one table, used around every call to Porto whose failure a client sees."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from porto_api import PortoError, rpc_pb2
from porto_api import errors as porto
from shim_core import errors

_TABLE: dict[type[errors.ShimError], tuple[str, ...]] = {
    errors.NotFound: (
        "ContainerDoesNotExist", "VolumeNotFound", "LayerNotFound", "DockerImageNotFound", "NotFound", "LabelNotFound",
    ),
    errors.InvalidArgument: (
        "InvalidProperty", "InvalidData", "InvalidValue", "InvalidCommand", "InvalidPath", "InvalidNetworkAddress",
        "InvalidLabel", "InvalidFilesystem", "DeviceNotFound",
    ),
    errors.FailedPrecondition: ("InvalidState", "VolumeNotReady", "VolumeAlreadyLinked", "VolumeNotLinked", "NoValue"),
    errors.AlreadyExists: ("ContainerAlreadyExists", "VolumeAlreadyExists", "LayerAlreadyExists"),
    errors.ResourceExhausted: ("NoSpace", "ResourceNotAvailable"),
    errors.PermissionDenied: ("Permission",),
    errors.Unimplemented: ("NotSupported", "InvalidMethod"),
    errors.Unavailable: (
        "Busy", "PortoFrozen", "SocketError", "SocketUnavailable", "PortodReloaded",
        "NbdSocketTimeout", "NbdSocketUnavaliable", "NbdSocketError",
    ),
    errors.DeadlineExceeded: ("SocketTimeout",),
}  # fmt: skip
_REFUSED_BY_KERNEL = "Cannot set cgroup"
_BY_CODE = {rpc_pb2.EError.Value(name): kind for kind, names in _TABLE.items() for name in names}


def translate(err: PortoError, doing: str) -> errors.ShimError:
    """The CRI error for a Porto error; what isn't in the table is INTERNAL.

    :param doing: what was tried: ``starting the container``.
    """
    if isinstance(err, porto.Cancelled):
        return errors.Cancelled(f"{doing}: the client has cancelled the call")
    kind = _BY_CODE.get(err.code, errors.Internal)
    if _REFUSED_BY_KERNEL in err.message:
        # Porto knows no code for it: a limit that the kernel doesn't take.
        kind = errors.InvalidArgument
    return kind(f"{doing}: Porto: {err}")


def is_of_gone_process(err: PortoError) -> bool:
    """Whether this came of a process that has ended: Porto has not yet noticed, or is just about to say so."""
    if not isinstance(err, porto.Unknown):
        return False
    no_file = os.strerror(errno.ENOENT) in err.message and "/proc/" in err.message
    return no_file or os.strerror(errno.ESRCH) in err.message or "Task is not running" in err.message


@contextmanager
def porto_errors(doing: str) -> Iterator[None]:
    """Raise Porto's errors as the CRI's."""
    try:
        yield
    except PortoError as err:
        raise translate(err, doing) from err
