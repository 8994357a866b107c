"""From a CRI call to a hook and back: the table of calls, one log line in and one out, errors made presentable."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pluggy
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from shim_core import errors
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2

logger = logging.getLogger("shim.core.cri")

# Calls of one kind share a bound, so that many slow ones never keep a List or a Status waiting for a thread.
POOL_SIZES = {"quick": 64, "run": 64, "exec": 256, "stop": 128, "pull": 64, "stream": 32}
_POOLS = {
    "RunPodSandbox": "run", "CreateContainer": "run", "StartContainer": "run",
    "UpdateContainerResources": "run", "UpdatePodSandboxResources": "run",
    "CheckpointContainer": "run", "CheckpointPod": "run", "RestorePod": "run",
    "StopPodSandbox": "stop", "RemovePodSandbox": "stop", "StopContainer": "stop", "RemoveContainer": "stop",
    "ExecSync": "exec",
    "PullImage": "pull", "RemoveImage": "pull",
}  # fmt: skip

# kubelet makes these all the time; they are logged at debug level unless they fail.
_PERIODIC = re.compile(r"^(Version|Status|List|Stream|PodSandboxSta|ContainerSta|Image(Status|FsInfo)|RuntimeConfig)")


@dataclass(frozen=True, slots=True)
class Method:
    """One CRI call."""

    service: str
    """``RuntimeService`` or ``ImageService``."""
    rpc: str
    hook: str
    request: type[Message]
    response: type[Message]
    streaming: bool
    pool: str


def methods() -> tuple[Method, ...]:
    """Every call of CRI v1, from the service descriptors."""
    return tuple(
        Method(
            service=service.name,
            rpc=method.name,
            hook="cri_" + re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower(),
            request=getattr(api_pb2, method.input_type.name),
            response=getattr(api_pb2, method.output_type.name),
            streaming=method.server_streaming,
            pool="stream" if method.server_streaming else _POOLS.get(method.name, "quick"),
        )
        for service in api_pb2.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    )


class Dispatcher:
    """Calls hooks on behalf of the server. Everything it raises is a :class:`~shim_core.errors.ShimError`."""

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self._manager = manager

    def call(self, method: Method, request: Message, context: CallContext) -> Message:
        """Carry out a call with one answer."""
        started = self._log_in(method, request, context)
        try:
            context.check()
            response: Message = self._ask(method, request, context)
        except Exception as err:
            raise self._log_error(method, context, started, err) from err
        self._log_out(method, context, started)
        return response

    def stream(self, method: Method, request: Message, context: CallContext) -> Iterator[Message]:
        """Carry out a call with a stream of answers."""
        started = self._log_in(method, request, context)
        try:
            context.check()
            for response in self._ask(method, request, context):
                yield response
                if context.cancelled:
                    break
        except Exception as err:
            raise self._log_error(method, context, started, err) from err
        self._log_out(method, context, started)

    def _ask(self, method: Method, request: Message, context: CallContext) -> Any:
        caller: Callable[..., Any] = getattr(self._manager.hook, method.hook)
        answer = caller(request=request, context=context)
        if answer is None:
            raise errors.Unimplemented(f"{method.rpc}: no plugin answers this call")
        return answer

    def _log_in(self, method: Method, request: Message, context: CallContext) -> float:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("[%s] %s %s", context.request_id, method.rpc, redacted(request))
        elif not _PERIODIC.match(method.rpc):
            logger.info("[%s] %s %s", context.request_id, method.rpc, summary(request))
        return time.monotonic()

    def _log_out(self, method: Method, context: CallContext, started: float) -> None:
        level = logging.DEBUG if _PERIODIC.match(method.rpc) else logging.INFO
        logger.log(level, "[%s] %s OK %s", context.request_id, method.rpc, _took(started))

    def _log_error(self, method: Method, context: CallContext, started: float, err: Exception) -> errors.ShimError:
        """Log a failed call and return the error that the client gets."""
        where = (context.request_id, method.rpc)
        if isinstance(err, errors.ShimError):
            usual = err.code in (errors.Code.NOT_FOUND, errors.Code.UNIMPLEMENTED, errors.Code.CANCELLED)
            level = logging.DEBUG if usual and _PERIODIC.match(method.rpc) else logging.WARNING
            logger.log(level, "[%s] %s %s %s: %s", *where, err.code.name, _took(started), err.message)
            return err
        # A bug. Its text may hold anything, secrets too: it goes to the log, and never to a client.
        logger.error("[%s] %s INTERNAL %s", *where, _took(started), exc_info=err)
        return errors.Internal(
            f"{method.rpc}: internal error; the log of portoshim has it under [{context.request_id}]"
        )


def summary(request: Message) -> str:
    """What a call is about, in a few words: ids, names, the image. Never a secret."""
    words = []
    for name in ("pod_sandbox_id", "container_id"):
        if value := getattr(request, name, ""):
            words.append(f"{name}={value[:13]}")
    config = getattr(request, "config", None)
    if config is not None and config.HasField("metadata"):
        metadata = config.metadata
        pod = [getattr(metadata, field) for field in ("namespace", "name") if hasattr(metadata, field)]
        words.append(f"name={'/'.join(pod)} attempt={metadata.attempt}")
    image = getattr(request, "image", None) or getattr(config, "image", None)
    if image is not None:
        words.append(f"image={image.image}")
    if timeout := getattr(request, "timeout", 0):
        words.append(f"timeout={timeout}s")
    return " ".join(words)


def redacted(request: Message) -> str:
    """The whole request on one line, without what the CRI marks as secret, environment values, or long texts."""
    return " ".join(f"{name}={_value(field, value)}" for field, name, value in _fields(request))


def _fields(message: Message) -> Iterator[tuple[FieldDescriptor, str, Any]]:
    for field, value in message.ListFields():
        yield field, field.name, value


def _value(field: FieldDescriptor, value: Any) -> str:
    if field.GetOptions().debug_redact or field.full_name == "runtime.v1.KeyValue.value":
        return "<redacted>"
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return "{" + ", ".join(f"{key}: {_short(val)}" for key, val in value.items()) + "}"
    if field.message_type is not None:
        items = value if repeated(field) else [value]
        text = ", ".join("{" + redacted(item) + "}" for item in items)
        return f"[{text}]" if repeated(field) else text
    if field.enum_type is not None and not repeated(field):
        known = field.enum_type.values_by_number.get(value)
        return known.name if known else str(value)
    return _short(list(value) if repeated(field) else value)


def repeated(field: FieldDescriptor) -> bool:
    """Whether a field is a list, whatever protobuf's version."""
    # protobuf 7 has is_repeated and warns about label; older ones have label alone.
    known: bool | None = getattr(field, "is_repeated", None)
    return field.label == FieldDescriptor.LABEL_REPEATED if known is None else known  # type: ignore[attr-defined]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 256 else f"{text[:64]}...<{len(text)} characters>"


def _took(started: float) -> str:
    return f"{(time.monotonic() - started) * 1000:.1f} ms"
