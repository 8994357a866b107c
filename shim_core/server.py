"""The gRPC server on its Unix socket. The only module that knows gRPC's codes, contexts and options."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
from google.protobuf.message import Message

from shim_core import errors
from shim_core.context import CallContext
from shim_core.dispatch import POOL_SIZES, Dispatcher, Method, methods

logger = logging.getLogger("shim.core.server")

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Both ways. Requests with large annotations and lists of thousands of containers pass; portod takes 32 MiB itself."""

MAX_CONCURRENT_CALLS = 8192
STOP_GRACE_S = 10.0
SOCKET_MODE = 0o660
_MAX_DETAILS_BYTES = 2048  # gRPC carries them in a trailer, of which clients take 8 KiB with everything in it
_PACKAGES = ("runtime.v1", "runtime.v1alpha2")  # the same messages by number; older clients know only the second

_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class Server:
    """Serves the CRI on a Unix socket.

    :param path: where; a stale socket file there is replaced, a live one is not.
    """

    def __init__(self, dispatcher: Dispatcher, path: str) -> None:
        self._dispatcher = dispatcher
        self.path = path
        self._lock_fd: int | None = None
        self._pools = {
            name: futures.ThreadPoolExecutor(size, thread_name_prefix=f"cri-{name}")
            for name, size in POOL_SIZES.items()
        }
        self._server = grpc.server(
            self._pools["quick"],
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ],
        )
        for package in _PACKAGES:
            by_service: dict[str, dict[str, Any]] = {}
            for method in methods():
                by_service.setdefault(method.service, {})[method.rpc] = self._handler(method)
            for service, handlers in by_service.items():
                handler = grpc.method_handlers_generic_handler(f"{package}.{service}", handlers)
                self._server.add_generic_rpc_handlers((handler,))

    def start(self) -> None:
        """Bind the socket and serve.

        :raises StartupError: another instance is listening there, or the path can't be used.
        """
        self._lock_fd = _lock(self.path)
        try:
            _clear_stale(self.path)
            # gRPC makes the socket with the process's umask: no moment at which others could connect.
            umask = os.umask(0o777 & ~SOCKET_MODE)
            try:
                self._server.add_insecure_port(f"unix:{self.path}")
            except RuntimeError as err:
                raise errors.StartupError(f"{self.path}: can't listen there: {err}") from err
            finally:
                os.umask(umask)
            self._server.start()
        except BaseException:
            self._unlock()
            raise
        logger.info("serving CRI on %s", self.path)

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Take no more calls, let those under way finish within ``grace_s`` seconds, cancel the rest."""
        self._server.stop(grace_s).wait()
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock_fd is not None:
            # Removed while still locked: who waits for the lock finds the file gone and makes its own.
            try:
                os.unlink(_lock_path(self.path))
            except FileNotFoundError:
                pass
            os.close(self._lock_fd)
            self._lock_fd = None

    def _handler(self, method: Method) -> Any:
        behaviour: Any
        if method.streaming:

            def stream(request: Message, servicer: grpc.ServicerContext) -> Iterator[Message]:
                context = _context(method, servicer)
                try:
                    yield from self._dispatcher.stream(method, request, context)
                except errors.ShimError as err:
                    _abort(servicer, err)

            behaviour = stream
            make = grpc.unary_stream_rpc_method_handler
        else:

            def unary(request: Message, servicer: grpc.ServicerContext) -> Message:
                context = _context(method, servicer)
                try:
                    return self._dispatcher.call(method, request, context)
                except errors.ShimError as err:
                    _abort(servicer, err)
                    raise

            behaviour = unary
            make = grpc.unary_unary_rpc_method_handler
        # gRPC runs a behaviour on the executor it names, and on the server's own otherwise.
        behaviour.experimental_thread_pool = self._pools[method.pool]
        return make(
            behaviour,
            request_deserializer=method.request.FromString,
            response_serializer=method.response.SerializeToString,
        )


def _context(method: Method, servicer: grpc.ServicerContext) -> CallContext:
    remaining = servicer.time_remaining()
    # Without a deadline gRPC reports one centuries away.
    deadline = time.monotonic() + remaining if remaining is not None and remaining < threading.TIMEOUT_MAX else None
    context = CallContext(method.rpc, uuid.uuid4().hex[:12], deadline)
    if not servicer.add_callback(context.cancel):
        context.cancel()
    return context


def _abort(servicer: grpc.ServicerContext, err: errors.ShimError) -> None:
    details = err.message.encode("utf-8", "replace")
    if len(details) > _MAX_DETAILS_BYTES:
        details = details[: _MAX_DETAILS_BYTES - 3] + b"..."
    servicer.abort(_STATUS[int(err.code)], details.decode("utf-8", "ignore"))


def _lock_path(path: str) -> str:
    return f"{path}.lock"


def _lock(path: str) -> int:
    """Hold ``path``.lock for the life of the process, so that of two instances starting at once one yields."""
    lock_path = _lock_path(path)
    while True:
        try:
            os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
            fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as err:
            raise errors.StartupError(f"{lock_path}: {err.strerror}") from err
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_ino == os.stat(lock_path).st_ino:
                return fd
        except BlockingIOError:
            os.close(fd)
            raise errors.StartupError(f"{path}: another portoshim is serving there; stop it first") from None
        except FileNotFoundError:
            pass
        os.close(fd)


def _clear_stale(path: str) -> None:
    """Remove the socket of a dead process; refuse to touch anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise errors.StartupError(f"{path}: exists and is no socket; remove it, or choose another Portoshim.Socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as err:
            raise errors.StartupError(f"{path}: can't tell whether it is in use: {err.strerror or err}") from err
    raise errors.StartupError(f"{path}: another process is serving there; stop it first")
