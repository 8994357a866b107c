"""What happens by itself: processes end, memory runs out, the dead grow old, clients go."""

from __future__ import annotations

import logging
import signal
import time
from functools import partial
from typing import TYPE_CHECKING

from shim_embedded_porto import limits, states
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.lifecycle import start, stop
from shim_embedded_porto.tasks import End

if TYPE_CHECKING:
    from shim_embedded_porto.porto import Porto

logger = logging.getLogger("shim.embedded_porto.events")

_RECOUNT_S = 3.0
_SLOW_S = 5.0


class Events:
    """Turns events into changes of containers; each runs in a thread of the timers'."""

    def __init__(self, porto: Porto) -> None:
        self._porto = porto
        self._ticks = 0

    def run(self) -> None:
        """Begin with what has to be done again and again."""
        self._porto.timers.later(limits.ROTATE_INTERVAL_S, self._tick)

    # -- processes -------------------------------------------------------------------------------------------------

    def ended(self, end: End) -> None:
        """A container's process has ended."""
        self._porto.timers.soon(lambda: self._ended(end))

    def _ended(self, end: End) -> None:
        number = int(end.key.partition("-")[0])
        tree = self._porto.tree
        ct = tree.by_id(number)
        # Whoever stops a container knows that its process ends: don't wait until that is through.
        if ct is not None and ct.state != states.STOPPING:
            try:
                with tree.locked(ct):
                    if ct.task.key == end.key:
                        logger.info("%s has ended, status %#x", ct.name, end.status)
                        stop.exited(self._porto, ct, end.status)
            except Fault as fault:
                logger.debug("%s: %s", ct.name, fault)
        self._porto.tasks.forget(end.key)

    def keeper_lost(self) -> None:
        """Nobody waits for our processes any more: watch them ourselves."""
        for ct in self._porto.tree.all():
            if ct.task.wait_pid:
                self._porto.tasks.watch(ct.task, exact_status=ct.exact_status)

    # -- memory ----------------------------------------------------------------------------------------------------

    def out_of_memory(self, ct: Container, count: int) -> None:
        """The kernel has found no memory for a container, so many times."""
        ct.oom_events += count
        self._porto.statistics.add("containers_oom", count)
        logger.info("out of memory in %s", ct.name)
        # The counter of killed processes may be a moment behind.
        self._porto.timers.later(_RECOUNT_S, lambda: stop.collect_oom(self._porto, ct))
        self._porto.timers.soon(lambda: self._out_of_memory(ct))

    def _out_of_memory(self, ct: Container) -> None:
        if ct.state == states.STOPPING:
            return
        with self._porto.tree.locked(ct):
            if ct.oom_is_fatal and ct.state != states.DEAD:
                stop.exited(self._porto, ct, signal.SIGKILL, out_of_memory=True)

    # -- time ------------------------------------------------------------------------------------------------------

    def respawn(self, ct: Container) -> None:
        """A respawn is due."""
        with self._porto.tree.locked(ct):
            if ct.state == states.RESPAWNING:
                try:
                    start.respawn(self._porto, ct, self._porto.client)
                except Fault as fault:
                    logger.warning("cannot respawn %s: %s", ct.name, fault)

    def _tick(self) -> None:
        try:
            now = time.time()
            for ct in self._porto.tree.all():
                if ct.state == states.RUNNING:
                    for stream in (ct.stdout, ct.stderr):
                        self._porto.rotate(stream, ct)
                elif ct.state == states.DEAD and ct.times.died and now >= ct.times.died + ct.aging_time_s:
                    self._porto.timers.soon(partial(self._bury_aged, ct))
            self._ticks += 1
            if self._ticks % int(_SLOW_S / limits.ROTATE_INTERVAL_S) == 0:
                self._porto.follow_resolv_conf()
        finally:
            self._porto.timers.later(limits.ROTATE_INTERVAL_S, self._tick)

    def _bury_aged(self, ct: Container) -> None:
        if ct.state != states.DEAD or time.time() < ct.times.died + ct.aging_time_s:
            return
        logger.info("%s is dead for %d s: it is removed", ct.name, ct.aging_time_s)
        self._porto.statistics.add("remove_dead")
        self._porto.destroy(ct)

    # -- clients ---------------------------------------------------------------------------------------------------

    def client_gone(self, weak: list[Container]) -> None:
        """A connection has ended, and with it the weak containers made by it."""
        for ct in weak:
            self._porto.timers.soon(partial(self._destroy_weak, ct))

    def _destroy_weak(self, ct: Container) -> None:
        if ct.weak and ct.state != states.DESTROYED:
            self._porto.destroy(ct, weak=True)
