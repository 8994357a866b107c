"""Clients that wait for containers: once (Wait), or for every change (AsyncWait)."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from shim_embedded_porto import states, text
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import invalid_value


@dataclass(frozen=True, slots=True)
class Report:
    """What a waiter is told."""

    name: str
    state: str
    when: int
    """Seconds since the epoch."""
    label: str = ""
    value: str = ""


class Listener(Protocol):
    """The connection behind a waiter."""

    def visible_name(self, name: str) -> str | None: ...

    def report(self, report: Report, *, asynchronous: bool) -> None:
        """Send it, or queue it; must not wait."""


@dataclass(eq=False, slots=True)
class Waiter:
    """What somebody waits for."""

    asynchronous: bool
    target_state: str = ""
    names: list[str] = field(default_factory=list)
    """Full names."""
    masks: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    listener: Listener | None = None

    def same(self, other: Waiter) -> bool:
        return (self.asynchronous, self.target_state, self.names, self.masks, self.labels) == (
            *(other.asynchronous, other.target_state, other.names, other.masks, other.labels),
        )

    def wants(self, ct: Container) -> bool:
        """True when the container is one of those waited for, in a state to be told."""
        if not self.asynchronous:
            if ct.state not in states.REPORTED and not ct.hollow:
                return False
        elif self.target_state and ct.state != self.target_state:
            return False
        return ct.name in self.names or (ct.level > 0 and any(text.matches(ct.name, mask) for mask in self.masks))

    def wants_label(self, label: str) -> bool:
        return any(text.matches(label, mask) for mask in self.labels)


class Waiters:
    """All who wait. A listener has one waiter of each kind at most: the later replaces the earlier."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiters: list[Waiter] = []

    def activate(self, waiter: Waiter, listener: Listener) -> None:
        """Report to a waiter from now on."""
        with self._lock:
            self._waiters = [
                other
                for other in self._waiters
                if other.listener is not listener or other.asynchronous != waiter.asynchronous
            ]
            waiter.listener = listener
            if waiter.names or waiter.masks:
                self._waiters.append(waiter)

    def cancel(self, like: Waiter, listener: Listener) -> None:
        """Remove a listener's waiter that waits for the same.

        :raises Fault: InvalidValue: there is none.
        """
        with self._lock:
            for waiter in self._waiters:
                if waiter.listener is listener and waiter.same(like):
                    self._waiters.remove(waiter)
                    return
        raise invalid_value("Waiter not found")

    def forget(self, listener: Listener) -> None:
        """A listener has gone."""
        with self._lock:
            self._waiters = [waiter for waiter in self._waiters if waiter.listener is not listener]

    def drop(self, waiter: Waiter) -> None:
        """A waiter has got what it waited for."""
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def expire(self, waiter: Waiter) -> None:
        """A waiter's time is up."""
        with self._lock:
            if waiter not in self._waiters:
                return
            self._waiters.remove(waiter)
        assert waiter.listener is not None
        waiter.listener.report(timeout_report(), asynchronous=waiter.asynchronous)

    def tell(self, ct: Container, label: str = "", value: str = "") -> None:
        """A container has changed its state, or a label; lower-case labels are Porto's own and for everybody."""
        with self._lock:
            for waiter in list(self._waiters):
                if not waiter.wants(ct):
                    continue
                if label and not label[0].islower() and not waiter.wants_label(label):
                    continue
                assert waiter.listener is not None
                name = waiter.listener.visible_name(ct.name)
                if name is None:
                    continue
                if not waiter.asynchronous or waiter.target_state:
                    self._waiters.remove(waiter)
                waiter.listener.report(report_of(name, ct, label, value), asynchronous=waiter.asynchronous)


def report_of(name: str, ct: Container, label: str = "", value: str = "") -> Report:
    """A container's present state."""
    return Report(name, ct.state, int(time.time()), label, value)


def timeout_report() -> Report:
    """There is nothing to tell, and the time is up."""
    return Report("", "timeout", int(time.time()))
