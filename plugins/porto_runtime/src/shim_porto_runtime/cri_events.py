"""GetContainerEvents: what happens to containers, to whoever wants to know.

A subscriber has a queue of its own with an end: one that doesn't keep up loses the oldest events (which are counted),
and holds up nobody.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_porto_runtime import container_status, sandbox_status

if TYPE_CHECKING:
    from shim_porto_runtime.records import SandboxRecord
    from shim_porto_runtime.runtime import Runtime

logger = logging.getLogger("shim.porto_runtime.cri_events")

MAX_WAITING = 1000
_BEAT_S = 1.0


class _Subscriber:
    def __init__(self) -> None:
        self.ready = threading.Condition()
        self.waiting: deque[pb.ContainerEventResponse] = deque(maxlen=MAX_WAITING)
        self.dropped = 0

    def put(self, event: pb.ContainerEventResponse) -> None:
        with self.ready:
            if len(self.waiting) == MAX_WAITING:
                self.dropped += 1
            self.waiting.append(event)
            self.ready.notify()


class EventHub:
    """Hands events to all subscribers there are; without any, an event costs nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscribers: list[_Subscriber] = []

    def publish(
        self, rt: Runtime, kind: int, container_id: str, sandbox_id: str, gone: SandboxRecord | None = None
    ) -> None:
        """Tell that something happened to a container, or to a sandbox (whose id is then the container's).

        :param gone: a sandbox that has just been deleted. kubelet passes over events without the pod's status.
        """
        with self._lock:
            subscribers = list(self._subscribers)
        if not subscribers:
            return
        event = pb.ContainerEventResponse(
            container_id=container_id,
            container_event_type=kind,  # type: ignore[arg-type]
            created_at=time.time_ns(),
        )
        # A deleted container has no status any more; its pod has.
        owner = rt.records.sandboxes.get(sandbox_id) or gone
        if owner is not None:
            event.pod_sandbox_status.CopyFrom(sandbox_status.status_of(owner))
            event.containers_statuses.extend(
                container_status.status_of(record) for record in rt.records.containers_of(sandbox_id) if record.visible
            )
        for subscriber in subscribers:
            subscriber.put(event)

    def subscribe(self, context: CallContext) -> Iterator[pb.ContainerEventResponse]:
        """Events from now on, until the client leaves."""
        subscriber = _Subscriber()
        with self._lock:
            self._subscribers.append(subscriber)

        def wake() -> None:
            with subscriber.ready:
                subscriber.ready.notify()

        forget = context.on_cancel(wake)
        try:
            while not context.cancelled:
                with subscriber.ready:
                    subscriber.ready.wait_for(lambda: subscriber.waiting or context.cancelled, _BEAT_S)
                    events = list(subscriber.waiting)
                    subscriber.waiting.clear()
                    dropped, subscriber.dropped = subscriber.dropped, 0
                if dropped:
                    logger.warning("a slow client of GetContainerEvents has lost %d events", dropped)
                yield from events
        finally:
            forget()
            with self._lock:
                self._subscribers.remove(subscriber)
