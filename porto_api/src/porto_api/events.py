"""Changes of state as they happen: Porto's AsyncWait on a connection of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from porto_api import errors, rpc_pb2
from porto_api.cancel import CancelToken
from porto_api.connection import Connection


@dataclass(frozen=True, slots=True)
class Event:
    """A container entered a state, or had a label set."""

    name: str
    state: str
    when: int
    """Seconds since the epoch, by portod's clock."""
    label: str = ""
    value: str = ""


class Subscription:
    """An open AsyncWait. Iterate over it; close it from any thread to end the iteration.

    Porto first reports every matching container in its present state, then each change.
    The iteration ends with ``SocketError`` when portod goes away, and quietly after :meth:`close`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._token = CancelToken()

    @classmethod
    def open(
        cls,
        connection: Connection,
        names: Iterable[str],
        labels: Iterable[str],
        target_state: str | None,
        deadline: float,
    ) -> Subscription:
        """Subscribe over a connection nobody else uses."""
        request = rpc_pb2.TContainerRequest()
        request.AsyncWait.name.extend(names)
        request.AsyncWait.label.extend(labels)
        if target_state is not None:
            request.AsyncWait.target_state = target_state
        connection.send(request, deadline)
        return cls(connection)

    def __iter__(self) -> Iterator[Event]:
        while True:
            try:
                response = self._connection.receive(cancel=self._token)
            except errors.Cancelled:
                return
            if response.error != rpc_pb2.Success:
                self.close()
                raise errors.error_for(response.error, response.errorMsg)
            if response.HasField("AsyncWait"):
                event = response.AsyncWait
                yield Event(event.name, event.state, event.when, event.label, event.value)

    def close(self) -> None:
        self._token.cancel()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        self._connection.close()
