"""Following Porto's changes of state: a container's end is recorded when it happens, not when somebody asks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from porto_api import Client, Event, PortoError, Subscription
from shim_core.errors import ShimError

logger = logging.getLogger("shim.porto_runtime.events")

_RETRY_S = (0.1, 0.5, 1.0, 2.0, 5.0)


class Monitor:
    """A thread that hands every event of Porto's to a function, and subscribes anew when portod has been away.

    :param on_event: called in the thread, one event after the other; an exception is logged.
    :param on_connect: called after each subscription, since what happened in between was missed. When it fails, the
        subscription is given up and made again later.
    """

    def __init__(
        self, porto: Client, masks: tuple[str, ...], on_event: Callable[[Event], None], on_connect: Callable[[], None]
    ) -> None:
        self._porto = porto
        self._masks = masks
        self._on_event = on_event
        self._on_connect = on_connect
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._subscription: Subscription | None = None
        self._thread = threading.Thread(target=self._run, name="porto-events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns when it has ended."""
        with self._lock:
            self._stop.set()
            if self._subscription is not None:
                self._subscription.close()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                with self._porto.subscribe(self._masks) as subscription:
                    with self._lock:
                        if self._stop.is_set():
                            return
                        self._subscription = subscription
                    self._on_connect()
                    failures = 0
                    for event in subscription:
                        self._handle(event)
            except (PortoError, ShimError) as err:
                if self._stop.is_set():
                    return  # it was stop() that closed the subscription
                logger.log(
                    logging.WARNING if failures == 0 else logging.DEBUG, "no events from portod: %s; trying again", err
                )
            self._stop.wait(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
            failures += 1

    def _handle(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:
            logger.exception("the event %s %s could not be handled", event.name, event.state)
