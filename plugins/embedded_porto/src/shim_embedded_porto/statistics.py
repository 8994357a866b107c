"""Porto's counters of itself: property ``porto_stat``, and what GetSystem answers."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits
from shim_embedded_porto.errors import invalid_value
from shim_embedded_porto.text import words

if TYPE_CHECKING:
    from shim_embedded_porto.porto import Porto

_COUNTED = words(
    "spawned errors cgerrors warnings fatals taints postfork_issues remove_dead restore_failed start_timeouts "
    "l3stat_lost log_lines_lost log_bytes_lost log_open log_rotate_bytes log_rotate_errors containers_created "
    "containers_started containers_failed_start containers_oom containers_tainted layer_import layer_export "
    "layer_remove volumes_created volumes_failed volume_links_mounted volume_lost networks_created network_problems "
    "network_repairs clients_connected requests_completed requests_failed fail_system fail_invalid_value "
    "fail_invalid_command fail_memory_guarantee fail_invalid_netaddr wait_time exec_time lock_time requests_longer_1s "
    "requests_longer_3s requests_longer_30s requests_longer_5m longest_read_request spec_requests_completed "
    "spec_requests_longer_1s spec_requests_longer_3s spec_requests_longer_30s spec_requests_longer_5m "
    "spec_requests_failed spec_fail_invalid_value spec_fail_unknown spec_fail_no_container lock_operations_count "
    "lock_operations_longer_1s lock_operations_longer_3s lock_operations_longer_30s lock_operations_longer_5m"
)
"""What counts up from zero, and may be cleared. Some of it can't happen here and stays zero."""

_MEASURED = words(
    "master_uptime porto_uptime queued_statuses queued_events epoll_sources log_lines log_bytes containers volumes "
    "volume_links networks clients requests_queued"
)
_SLOW_S = ((300.0, "5m"), (30.0, "30s"), (3.0, "3s"), (1.0, "1s"))
_FAILURES: dict[int, str] = {
    pb.Unknown: "fail_system",
    pb.InvalidValue: "fail_invalid_value",
    pb.InvalidCommand: "fail_invalid_command",
    pb.InvalidNetworkAddress: "fail_invalid_netaddr",
}
_SPEC_FAILURES: dict[int, str] = {
    pb.Unknown: "spec_fail_unknown",
    pb.InvalidValue: "spec_fail_invalid_value",
    pb.ContainerDoesNotExist: "spec_fail_no_container",
}


class Statistics:
    """Counters by Porto's names."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter(spawned=1)
        self._started = time.monotonic()
        self._running: dict[int, float] = {}
        self.clients = 0
        self.requests_queued = 0

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counters[name] += count

    def begin(self, request: int, began: float) -> None:
        """A request is being worked on, since ``began`` (monotonic)."""
        self._running[request] = began

    def end(self, request: int, duration_s: float, error: int, *, spec: bool) -> None:
        """Count a request that has been answered.

        :param spec: it works with a container's whole specification: those are counted apart.
        """
        self._running.pop(request, None)
        prefix = "spec_" if spec else ""
        with self._lock:
            self._counters[f"{prefix}requests_completed"] += 1
            for least, name in _SLOW_S:
                if duration_s > least:
                    self._counters[f"{prefix}requests_longer_{name}"] += 1
            self._counters["exec_time"] += int(duration_s * 1000)
            if error:
                self._counters[f"{prefix}requests_failed"] += 1
                if error in _FAILURES:
                    self._counters[_FAILURES[error]] += 1
                if spec and error in _SPEC_FAILURES:
                    self._counters[_SPEC_FAILURES[error]] += 1

    def values(self, porto: Porto) -> dict[str, int]:
        """All of them."""
        uptime = int(time.monotonic() - self._started)
        found = dict.fromkeys((*_COUNTED, *_MEASURED), 0)
        with self._lock:
            found |= {name: count for name, count in self._counters.items() if name in found}
        found |= {
            "master_uptime": uptime,
            "porto_uptime": uptime,
            "containers": len(porto.tree),
            "volumes": len(porto.volumes.registry.volumes),
            "volume_links": len(porto.volumes.registry.links),
            "layer_import": porto.storages.imported,
            "layer_export": porto.storages.exported,
            "layer_remove": porto.storages.removed,
            "clients": self.clients,
            "requests_queued": self.requests_queued,
        }
        return found

    def clear(self, name: str = "") -> None:
        """Begin to count from zero again: one, or all that may.

        :raises Fault: InvalidValue.
        """
        if name in _MEASURED:
            raise invalid_value("Field cannot be cleared")
        if name and name not in _COUNTED:
            raise invalid_value("Unknown statistic")
        with self._lock:
            if name:
                self._counters[name] = 0
            else:
                self._counters.clear()

    def describe(self, porto: Porto, out: pb.TGetSystemResponse) -> None:
        """What GetSystem answers."""
        values = self.values(porto)
        out.porto_version, out.porto_revision = limits.VERSION, limits.REVISION
        out.kernel_version = os.uname().release
        for field, name in _SYSTEM_FIELDS.items():
            setattr(out, field, values[name])
        out.verbose = logging.getLogger("shim").isEnabledFor(logging.INFO)
        out.debug = logging.getLogger("shim").isEnabledFor(logging.DEBUG)
        out.container_limit, out.volume_limit = limits.CONTAINERS_MAX, limits.VOLUMES_MAX
        now = time.monotonic()
        out.request_top_running_time = int(max(now - began for began in list(self._running.values()) or [now]))
        out.container_running = porto.tree.root.running_below
        out.client_max, out.request_threads = limits.CLIENTS_MAX, limits.WRITE_THREADS


_SYSTEM_FIELDS = {
    "porto_starts": "spawned",
    "porto_uptime": "porto_uptime",
    "master_uptime": "master_uptime",
    "errors": "errors",
    "warnings": "warnings",
    "fatals": "fatals",
    "taints": "taints",
    "log_lines": "log_lines",
    "log_bytes": "log_bytes",
    "log_lines_lost": "log_lines_lost",
    "log_bytes_lost": "log_bytes_lost",
    "log_open": "log_open",
    "container_count": "containers",
    "container_created": "containers_created",
    "container_started": "containers_started",
    "container_start_failed": "containers_failed_start",
    "container_oom": "containers_oom",
    "container_buried": "remove_dead",
    "container_lost": "restore_failed",
    "container_tainted": "containers_tainted",
    "postfork_issues": "postfork_issues",
    "stream_rotate_bytes": "log_rotate_bytes",
    "stream_rotate_errors": "log_rotate_errors",
    "volume_count": "volumes",
    "volume_created": "volumes_created",
    "volume_failed": "volumes_failed",
    "volume_links": "volume_links",
    "volume_links_mounted": "volume_links_mounted",
    "volume_lost": "volume_lost",
    "layer_import": "layer_import",
    "layer_export": "layer_export",
    "layer_remove": "layer_remove",
    "client_count": "clients",
    "client_connected": "clients_connected",
    "request_queued": "requests_queued",
    "request_completed": "requests_completed",
    "request_failed": "requests_failed",
    "request_longer_1s": "requests_longer_1s",
    "request_longer_3s": "requests_longer_3s",
    "request_longer_30s": "requests_longer_30s",
    "request_longer_5m": "requests_longer_5m",
    "fail_system": "fail_system",
    "fail_invalid_value": "fail_invalid_value",
    "fail_invalid_command": "fail_invalid_command",
    "fail_memory_guarantee": "fail_memory_guarantee",
    "fail_invalid_netaddr": "fail_invalid_netaddr",
    "network_count": "networks",
    "network_created": "networks_created",
    "network_problems": "network_problems",
    "network_repairs": "network_repairs",
}


class CountingHandler(logging.Handler):
    """Counts what is logged as a warning or an error."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__(logging.WARNING)
        self._statistics = statistics

    def emit(self, record: logging.LogRecord) -> None:
        self._statistics.add("errors" if record.levelno >= logging.ERROR else "warnings")
