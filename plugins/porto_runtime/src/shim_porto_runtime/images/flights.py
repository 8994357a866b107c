"""One piece of work for all who ask for the same thing at the same time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Generic, TypeVar

from shim_core import errors
from shim_core.context import CallContext

T = TypeVar("T")

logger = logging.getLogger("shim.porto_runtime.images")

_FOREVER_S = threading.TIMEOUT_MAX


class Flights(Generic[T]):
    """Runs work in threads of its own and lets callers wait for it.

    A caller that leaves doesn't hurt the others: the work is cancelled when the last of them has gone.

    :param linger_s: the last one waits so long for cancelled work to clean up after itself.
    """

    def __init__(self, name: str, linger_s: float = 0.0) -> None:
        self._name = name
        self._linger_s = linger_s
        self._lock = threading.Lock()
        self._flights: dict[Hashable, _Flight[T]] = {}
        self._alive: set[_Flight[T]] = set()
        self._closed = False

    def run(self, key: Hashable, context: CallContext, work: Callable[[CallContext], T]) -> T:
        """The result of ``work``, which is started unless the same key is under way already.

        :param work: gets a context of its own, cancelled when nobody waits any more.
        :raises errors.Cancelled, errors.DeadlineExceeded: this caller has left.
        """
        context.check()
        wake = threading.Event()
        with self._lock:
            if self._closed:
                raise errors.Unavailable("portoshim is stopping")
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = _Flight(key, CallContext(context.rpc, context.request_id))
                self._alive.add(flight)
                threading.Thread(target=self._fly, args=(flight, work), name=self._name, daemon=True).start()
            flight.waiters.add(wake)
        undo = context.on_cancel(wake.set)
        try:
            wake.wait(context.remaining_s(_FOREVER_S))
        finally:
            undo()
            with self._lock:
                flight.waiters.discard(wake)
                abandoned = not flight.waiters and not flight.done
                if abandoned:
                    # Whoever comes now starts afresh rather than join something that is being torn down.
                    self._drop(flight)
        if abandoned:
            flight.context.cancel()
            flight.landed.wait(self._linger_s)
        if abandoned or not flight.done:
            context.check()
            raise errors.DeadlineExceeded(f"{context.rpc}: the deadline has passed")
        if flight.error is not None:
            raise _copy(flight.error) from flight.error
        assert flight.result is not None
        return flight.result[0]

    def close(self, timeout_s: float = 10.0) -> None:
        """Cancel what is under way and wait for it; take nothing new."""
        with self._lock:
            self._closed = True
            alive = list(self._alive)
        for flight in alive:
            flight.context.cancel()
        for flight in alive:
            if not flight.landed.wait(timeout_s):
                logger.warning("%s: %s is still under way", self._name, flight.key)

    def _fly(self, flight: _Flight[T], work: Callable[[CallContext], T]) -> None:
        try:
            result = work(flight.context)
        except BaseException as err:
            flight.error = err
        else:
            flight.result = (result,)
        with self._lock:
            flight.done = True
            self._drop(flight)
            self._alive.discard(flight)
            waiters = list(flight.waiters)
        flight.landed.set()
        for wake in waiters:
            wake.set()

    def _drop(self, flight: _Flight[T]) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]


class Slots:
    """A semaphore that a cancelled caller doesn't wait for.

    ::

        with slots.hold(context):
            ...
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._condition = threading.Condition()

    @contextmanager
    def hold(self, context: CallContext) -> Iterator[None]:
        """One of the slots.

        :raises errors.Cancelled: the caller has left before there was one.
        """
        undo = context.on_cancel(self._wake)
        try:
            with self._condition:
                self._condition.wait_for(lambda: self._free or context.cancelled)
                context.check()
                self._free -= 1
        finally:
            undo()
        try:
            yield
        finally:
            with self._condition:
                self._free += 1
                self._condition.notify()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()


def run_together(workers: int, jobs: Sequence[Callable[[CallContext], object]], context: CallContext) -> None:
    """Do all of some jobs, so many at once. When one fails, the others are cancelled.

    :raises Exception: what the first one to fail has raised.
    """
    if not jobs:
        return
    own = CallContext(context.rpc, context.request_id, context.deadline)
    undo = context.on_cancel(own.cancel)
    try:
        with ThreadPoolExecutor(min(workers, len(jobs)), thread_name_prefix="image-part") as pool:
            running = [pool.submit(job, own) for job in jobs]
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            if any(job.exception() is not None for job in done):
                own.cancel()
    finally:
        undo()
    failed = [err for job in running if (err := job.exception()) is not None]
    # Once one has failed, the others end as cancelled: that is not what went wrong.
    for err in sorted(failed, key=lambda err: isinstance(err, errors.Cancelled)):
        raise err


class _Flight(Generic[T]):
    def __init__(self, key: Hashable, context: CallContext) -> None:
        self.key = key
        self.context = context
        self.waiters: set[threading.Event] = set()
        self.landed = threading.Event()
        self.done = False
        self.result: tuple[T] | None = None
        self.error: BaseException | None = None


def _copy(err: BaseException) -> BaseException:
    """An exception of the same kind: one object must not be raised in several threads."""
    return type(err)(err.message) if isinstance(err, errors.ShimError) else errors.Internal(f"{type(err).__name__}")
