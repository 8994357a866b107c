"""The configuration directory as it is now: read again whenever something in it has changed.

It is looked at with every use rather than watched: no event can be missed, and a directory may vanish and come back.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

from shim_cni_net import netconf
from shim_cni_net.netconf import NetworkConfig, NetworkConfigError

_SETTLED_NS = 50_000_000
"""Longer than the steps of a file system's clock: a younger file may change again under the same time stamp."""

_Signature = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    signature: _Signature
    settled: bool
    networks: tuple[NetworkConfig, ...]
    problem: str


class ConfigDirectory:
    """The networks of a directory.

    :param max_networks: see :func:`shim_cni_net.netconf.load_directory`.
    """

    def __init__(self, path: str, max_networks: int) -> None:
        self.path = path
        self._max_networks = max_networks
        self._lock = threading.Lock()
        self._snapshot: _Snapshot | None = None

    def networks(self) -> tuple[NetworkConfig, ...]:
        """The networks as the files say now; the same objects as before if nothing has changed.

        :raises NetworkConfigError: there is none, or one can't be used.
        """
        with self._lock:
            snapshot = self._snapshot
            if snapshot is None or not snapshot.settled or snapshot.signature != self._look(snapshot.networks):
                snapshot = self._snapshot = self._read(snapshot)
        if snapshot.problem:
            raise NetworkConfigError(snapshot.problem)
        return snapshot.networks

    def _read(self, old: _Snapshot | None) -> _Snapshot:
        # Looked at first: what changes while it is read shows the next time.
        networks: tuple[NetworkConfig, ...] = ()
        problem = ""
        before = self._look(())
        now_ns = time.time_ns()
        try:
            networks = netconf.load_directory(self.path, self._max_networks)
        except NetworkConfigError as err:
            problem = str(err)
        signature = before + self._look_beside(networks)
        # What is wrong may be mended anywhere, so a mistake is looked for anew each time.
        settled = not problem and all(now_ns - max(entry[3], entry[4]) > _SETTLED_NS for entry in signature)
        if old is not None and old.networks == networks:
            networks = old.networks
        return _Snapshot(signature, settled, networks, problem)

    def _look(self, networks: tuple[NetworkConfig, ...]) -> _Signature:
        return _signature(self.path) + self._look_beside(networks)

    def _look_beside(self, networks: tuple[NetworkConfig, ...]) -> _Signature:
        """Where further plugin objects may come from. They count although they may not be wanted."""
        return tuple(entry for path in netconf.plugin_directories(self.path, networks) for entry in _signature(path))


def _signature(directory: str) -> _Signature:
    """What tells one state of a directory from another: names, inodes, sizes and times."""
    try:
        with os.scandir(directory) as entries:
            paths = sorted(entry.path for entry in entries if entry.name.endswith(netconf.EXTENSIONS))
    except OSError:
        return ()
    return tuple(_entry(path) for path in (directory, *paths))


def _entry(path: str) -> tuple[str, int, int, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (path, 0, 0, 0, 0)
    return (path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
