"""What Porto and the kernel say a container uses, as numbers."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from porto_api import PortoError
from shim_porto_runtime.porto_errors import porto_errors

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

VARIABLES = (
    "state", "cpu_usage", "cpu_usage_system", "memory_usage", "anon_usage", "minor_faults", "major_faults",
    "process_count", "thread_count", "memory.stat", "oom_kills", "root_pid",
)  # fmt: skip
_ALIVE = ("running", "meta", "paused", "stopping", "respawning")
_RATE_WINDOW_NS = 500_000_000


@dataclass(frozen=True, slots=True)
class Pressure:
    """One line of a pressure file (PSI): share of time in percent, total in nanoseconds."""

    avg10: float
    avg60: float
    avg300: float
    total: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One container at one moment. Bytes, nanoseconds and counts."""

    timestamp: int
    cpu: int
    cpu_system: int
    memory: int
    working_set: int
    rss: int
    cache: int
    swap: int
    page_faults: int
    major_page_faults: int
    processes: int
    threads: int
    oom_kills: int
    root_pid: int
    nano_cores: int | None = None
    pressure: Mapping[str, Mapping[str, Pressure]] = field(default_factory=dict)
    """By resource (cpu, memory, io), by kind (some, full)."""


class Sampler:
    """Takes samples of many containers in one Porto call, and rates from one sample to the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rates: dict[str, tuple[int, int, int | None]] = {}
        self._cgroups: dict[str, str] = {}

    def take(self, rt: Runtime, names: Sequence[str], *, pressure: bool = True) -> dict[str, Sample]:
        """Samples by Porto name, of those that run.

        :raises Unavailable: Porto can't be asked.
        """
        if not names:
            return {}
        with porto_errors("asking what containers use"):
            answer = rt.porto.get(names, VARIABLES, sync=True)
            if pressure:
                self._learn_cgroups(rt, names)
        now = time.time_ns()
        found = {}
        for name in names:
            values = answer.get(name)
            if values and values.get("state") in _ALIVE:
                found[name] = self._sample(name, values, now)
        return found

    def forget(self, name: str) -> None:
        """The container is gone."""
        with self._lock:
            self._rates.pop(name, None)
            self._cgroups.pop(name, None)

    def _sample(self, name: str, values: Mapping[str, str | PortoError], now: int) -> Sample:
        def number(key: str) -> int:
            value = values.get(key)
            return int(value) if isinstance(value, str) and value.lstrip("-").isdecimal() else 0

        stat = pairs(values.get("memory.stat"))
        memory = number("memory_usage")
        # cgroup v1 counts children in total_*, v2 counts them anyway.
        inactive_file = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        cpu = number("cpu_usage")
        return Sample(
            timestamp=now,
            cpu=cpu,
            cpu_system=number("cpu_usage_system"),
            memory=memory,
            working_set=max(memory - inactive_file, 0),
            rss=stat.get("total_rss", stat.get("anon", number("anon_usage"))),
            cache=stat.get("total_cache", stat.get("file", 0)),
            swap=stat.get("total_swap", stat.get("swap", 0)),
            page_faults=stat.get("total_pgfault", stat.get("pgfault", number("minor_faults"))),
            major_page_faults=stat.get("total_pgmajfault", stat.get("pgmajfault", number("major_faults"))),
            processes=number("process_count"),
            threads=number("thread_count"),
            oom_kills=number("oom_kills"),
            root_pid=number("root_pid"),
            nano_cores=self._rate(name, now, cpu),
            pressure=self._pressure(name),
        )

    def _rate(self, name: str, now: int, cpu: int) -> int | None:
        """Processor use since the sample before, in billionths of a core; None with the first one."""
        with self._lock:
            before = self._rates.get(name)
            if before is None or cpu < before[1]:
                self._rates[name] = (now, cpu, None)
                return None
            if now - before[0] < _RATE_WINDOW_NS:
                return before[2]
            rate = (cpu - before[1]) * 10**9 // (now - before[0])
            self._rates[name] = (now, cpu, rate)
            return rate

    def _learn_cgroups(self, rt: Runtime, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._cgroups]
        if not unknown:
            return
        for name, values in rt.porto.get(unknown, ["cgroups"]).items():
            text = values.get("cgroups")
            if isinstance(text, str):
                paths = dict(item.strip().split(": ", 1) for item in text.split(";") if ": " in item)
                self._cgroups[name] = paths.get("unified", "")

    def _pressure(self, name: str) -> Mapping[str, Mapping[str, Pressure]]:
        directory = self._cgroups.get(name)
        if not directory:
            return {}
        found = {}
        for resource in ("cpu", "memory", "io"):
            try:
                found[resource] = parse_pressure(Path(directory, f"{resource}.pressure").read_text())
            except (OSError, ValueError):
                continue
        return found


def parse_pressure(text: str) -> dict[str, Pressure]:
    """A pressure file: ``some avg10=0.00 avg60=0.00 avg300=0.00 total=1815`` (µs) and the like."""
    found = {}
    for line in text.splitlines():
        kind, *items = line.split()
        values = dict(item.split("=", 1) for item in items)
        found[kind] = Pressure(
            float(values["avg10"]), float(values["avg60"]), float(values["avg300"]), int(values["total"]) * 1000
        )
    return found


def pairs(text: str | PortoError | None) -> dict[str, int]:
    """A file of names and numbers, one pair a line; what isn't one is passed over."""
    if not isinstance(text, str):
        return {}
    found = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in found if len(pair) == 2 and pair[1].isdecimal()}


@dataclass(frozen=True, slots=True)
class Interface:
    """Counters of one network interface."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


def interfaces(pid: int) -> list[Interface]:
    """The interfaces of the network namespace that a process is in, but the loopback one."""
    if pid <= 0:
        return []
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    except OSError:
        return []
    found = []
    for line in lines:
        name, _, counters = line.partition(":")
        values = [int(value) for value in counters.split()]
        if name.strip() != "lo" and len(values) >= 12:
            rx, tx = values[0:4], values[8:12]
            found.append(Interface(name.strip(), *rx, *tx))
    return found
