"""Being told that a container has run out of memory."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

from shim_embedded_porto.cgroups.hierarchy import Cgroups, write
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault

logger = logging.getLogger("shim.embedded_porto.oom")


class OomWatch:
    """Waits for the kernel's events: an eventfd of version 1, ``memory.events`` of version 2.

    :param on_event: called with the container and the number of events, from one thread.
    """

    def __init__(self, cgroups: Cgroups, on_event: Callable[[Container, int], None]) -> None:
        self._cgroups = cgroups
        self._on_event = on_event
        self._lock = threading.Lock()
        self._poll = select.epoll()
        self._watched: dict[int, tuple[Container, int]] = {}
        """By descriptor: the container, and how many events it had."""
        self._thread: threading.Thread | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.EPOLLIN)

    def add(self, ct: Container) -> None:
        """Begin with a container; fine for one without a memory cgroup of its own."""
        hierarchy = self._cgroups.hierarchy("memory")
        if hierarchy is None or "memory" not in ct.controllers or ct.is_root:
            return
        path = self._cgroups.path(ct, "memory")
        try:
            if hierarchy.v2:
                fd = os.open(f"{path}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
                count = _count(fd)
                mask = select.EPOLLPRI
            else:
                fd, count, mask = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), 0, select.EPOLLIN
                control = os.open(f"{path}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    write(f"{path}/cgroup.event_control", f"{fd} {control}")
                finally:
                    os.close(control)
        except (OSError, Fault) as err:
            logger.warning("%s: out of memory will be noticed at its end only: %s", ct.name, err)
            return
        with self._lock:
            self._watched[fd] = (ct, count)
            self._poll.register(fd, mask | select.EPOLLET)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="oom", daemon=True)
                self._thread.start()

    def remove(self, ct: Container) -> None:
        with self._lock:
            for fd in [fd for fd, (watched, _) in self._watched.items() if watched is ct]:
                del self._watched[fd]
                self._poll.unregister(fd)
                os.close(fd)

    def stop(self) -> None:
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._wake:
                    return
                with self._lock:
                    watched = self._watched.get(fd)
                    if watched is None:
                        continue
                    ct, before = watched
                    try:
                        # Removing a cgroup of version 1 counts as an event too.
                        events = os.eventfd_read(fd) if self._is_eventfd(ct) else _count(fd) - before
                    except (OSError, ValueError):
                        continue
                    self._watched[fd] = (ct, before + events)
                if events > 0:
                    self._on_event(ct, events)

    def _is_eventfd(self, ct: Container) -> bool:
        hierarchy = self._cgroups.hierarchy("memory")
        return hierarchy is not None and not hierarchy.v2


def _count(fd: int) -> int:
    for line in os.pread(fd, 4096, 0).decode().splitlines():
        name, _, value = line.partition(" ")
        if name == "oom":
            return int(value)
    return 0
