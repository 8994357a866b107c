"""The errors Porto answers with, one class per code of ``rpc.EError``.

::

    PortoError                       everything this library raises on purpose
    ├── ContainerDoesNotExist, InvalidValue, Busy, ...    one class per EError
    │   └── (SocketError, SocketTimeout, SocketUnavailable are such codes too:
    │        portod uses them, and so does this library for its own end)
    ├── Cancelled                    the caller withdrew the call
    └── ProtocolError                bytes that are not Porto's protocol

``error_for(code, message)`` turns an answer into its exception; a code this library has no class for
(a newer portod) becomes a plain :class:`PortoError` that keeps the number.
"""

from __future__ import annotations

from porto_api import rpc_pb2


class PortoError(Exception):
    """An error answered by Porto, or met on the way to it.

    ``code`` is the number of ``rpc.EError``; ``message`` is Porto's own text.
    """

    code: int = rpc_pb2.Unknown

    def __init__(self, message: str = "", code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{_name_of(self.code)}: {self.message}" if self.message else _name_of(self.code)


class ProtocolError(PortoError):
    """The peer sent bytes that are no frame, or a frame that is no message."""

    code = rpc_pb2.SocketError


class Cancelled(PortoError):
    """The caller cancelled the call. Whether Porto carried it out is not known."""

    code = rpc_pb2.SocketError


def _name_of(code: int) -> str:
    try:
        return rpc_pb2.EError.Name(code)
    except ValueError:
        return f"EError {code}"


def _define(name: str) -> type[PortoError]:
    code = rpc_pb2.EError.Value(name)
    return type(name, (PortoError,), {"code": code, "__doc__": f"``EError.{name}`` ({code}).", "__module__": __name__})


Unknown = _define("Unknown")
InvalidMethod = _define("InvalidMethod")
ContainerAlreadyExists = _define("ContainerAlreadyExists")
ContainerDoesNotExist = _define("ContainerDoesNotExist")
InvalidProperty = _define("InvalidProperty")
InvalidData = _define("InvalidData")
InvalidValue = _define("InvalidValue")
InvalidState = _define("InvalidState")
NotSupported = _define("NotSupported")
ResourceNotAvailable = _define("ResourceNotAvailable")
Permission = _define("Permission")
VolumeAlreadyExists = _define("VolumeAlreadyExists")
VolumeNotFound = _define("VolumeNotFound")
NoSpace = _define("NoSpace")
Busy = _define("Busy")
VolumeAlreadyLinked = _define("VolumeAlreadyLinked")
VolumeNotLinked = _define("VolumeNotLinked")
LayerAlreadyExists = _define("LayerAlreadyExists")
LayerNotFound = _define("LayerNotFound")
NoValue = _define("NoValue")
VolumeNotReady = _define("VolumeNotReady")
InvalidCommand = _define("InvalidCommand")
LostError = _define("LostError")
DeviceNotFound = _define("DeviceNotFound")
InvalidPath = _define("InvalidPath")
InvalidNetworkAddress = _define("InvalidNetworkAddress")
PortoFrozen = _define("PortoFrozen")
LabelNotFound = _define("LabelNotFound")
InvalidLabel = _define("InvalidLabel")
HelperError = _define("HelperError")
HelperFatalError = _define("HelperFatalError")
InvalidFilesystem = _define("InvalidFilesystem")
NbdSocketTimeout = _define("NbdSocketTimeout")
NbdSocketUnavaliable = _define("NbdSocketUnavaliable")
NbdSocketError = _define("NbdSocketError")
NbdUnkownExport = _define("NbdUnkownExport")
NbdProtoError = _define("NbdProtoError")
NotFound = _define("NotFound")
SocketError = _define("SocketError")
SocketUnavailable = _define("SocketUnavailable")
SocketTimeout = _define("SocketTimeout")
PortodReloaded = _define("PortodReloaded")
Taint = _define("Taint")
Docker = _define("Docker")
DockerImageNotFound = _define("DockerImageNotFound")
Queued = _define("Queued")

BY_CODE: dict[int, type[PortoError]] = {
    value.number: globals()[value.name] for value in rpc_pb2.EError.DESCRIPTOR.values if value.name != "Success"
}


def error_for(code: int, message: str) -> PortoError:
    """The exception for an answer whose ``error`` is ``code``."""
    return BY_CODE.get(code, PortoError)(message, code)
