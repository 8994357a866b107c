"""For those who test a plugin: a manager with nothing in it, a context, and a client of the CRI socket."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import grpc
import pluggy

from shim_core import plugins
from shim_core.context import CallContext
from shim_core.dispatch import methods

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""What kubelet and crictl receive."""


def manager(**instances: object) -> pluggy.PluginManager:
    """A plugin manager with these plugins, the first one asked first."""
    made = plugins.new_manager()
    plugins.register(made, [plugins.Plugin(name, "test", "0", instance) for name, instance in instances.items()])
    return made


def context(rpc: str = "Test") -> CallContext:
    """A context without a deadline."""
    return CallContext(rpc, "test")


class CriClient:
    """Every CRI call as a method: ``client.ListContainers(request)``; snake_case works as well.

    :param target: a Unix socket's path.
    :param package: ``runtime.v1``, or ``runtime.v1alpha2`` to be an older client.
    """

    def __init__(self, target: str, package: str = "runtime.v1") -> None:
        self._channel = grpc.insecure_channel(
            f"unix:{target}",
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                # A server that is just starting is found soon, and not after gRPC's second.
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 500),
            ],
        )
        self._calls: dict[str, Any] = {}
        for method in methods():
            make = self._channel.unary_stream if method.streaming else self._channel.unary_unary
            call = make(
                f"/{package}.{method.service}/{method.rpc}",
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
            self._calls[method.rpc] = self._calls[method.hook.removeprefix("cri_")] = call

    def __getattr__(self, name: str) -> Any:
        try:
            return self._calls[name]
        except KeyError:
            raise AttributeError(f"CRI has no call {name}") from None

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Return once the server accepts connections.

        :raises TimeoutError: it doesn't, in time.
        """
        # Not grpc.channel_ready_future: its thread goes on for a while and stumbles over a channel closed meanwhile.
        probe = self._channel.unary_unary("/probe/Probe")
        try:
            probe(b"", timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as err:
            if err.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise TimeoutError(f"no answer within {timeout_s} s") from err

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> CriClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
