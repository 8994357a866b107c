"""The stream keeper beside conmon, doing the same work: memory and processor time for the logs of many containers.

::

    python -m tools.bench_keeper [CONTAINERS [SECONDS]]

Each container is a process that writes ten lines of 100 bytes every 20 ms, each with a ``write`` of its own: 200 of
them make 10 MB/s. For conmon the OCI runtime is a script that starts this process; everything else is as CRI-O and
podman do it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shim_porto_runtime.keeper import KeeperClient

CONTAINERS = 200
SECONDS = 10.0

_LINE_BYTES = 100
_START_S = 60.0
_END_S = 10.0
_WRITER = """
import os, sys, time
open(f"{sys.argv[1]}.{os.getpid()}", "x").close()
open(sys.argv[1]).close()
line = b"x" * 99 + b"\\n"
due = time.monotonic()
end = due + float(sys.argv[2])
while due < end:
    for _ in range(10):
        os.write(1, line)
    due += 0.02
    time.sleep(max(0.0, due - time.monotonic()))
"""
"""Says that it is there, waits until somebody opens the FIFO, then writes at a steady rate for some seconds."""

_RUNTIME = """#!/bin/sh
[ "$1" = create ] || exit 0
while [ $# -gt 0 ]; do [ "$1" = --pid-file ] && file=$2; shift; done
setsid {command} </dev/null 2>/dev/null &
echo $! >"$file"
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the comparison."""

    name: str
    ours: float
    conmon: float | None
    """None where conmon isn't installed."""

    @property
    def ratio(self) -> float | None:
        """Ours in proportion to conmon's: below 1 we need less."""
        return self.ours / self.conmon if self.conmon else None


@dataclass(frozen=True, slots=True)
class _Cost:
    idle_pss_mb: float
    busy_pss_mb: float
    busy_rss_mb: float
    processor_ms_per_10_mb: float
    rate_mb_s: float


def rows(containers: int = CONTAINERS, seconds: float = SECONDS) -> list[Row]:
    """Measure both, one after the other."""
    ours = _measure(_keeper, containers, seconds)
    conmon = _measure(_conmon, containers, seconds) if shutil.which("conmon") else None
    lines = {
        f"memory of {containers} idle containers, MB (PSS)": "idle_pss_mb",
        f"memory of {containers} writing containers, MB (PSS)": "busy_pss_mb",
        f"memory of {containers} writing containers, MB (RSS)": "busy_rss_mb",
        "processor time for 10 MB of logs, ms": "processor_ms_per_10_mb",
        "output logged, MB/s": "rate_mb_s",
    }
    return [Row(name, getattr(ours, key), getattr(conmon, key) if conmon else None) for name, key in lines.items()]


def main(argv: list[str]) -> int:
    """Print the comparison."""
    measured = rows(*(int(argv[0]),) if argv else (), *(float(argv[1]),) if len(argv) > 1 else ())
    width = max(len(row.name) for row in measured)
    print(f"{'':{width}}  {'keeper':>10}  {'conmon':>10}  {'ratio':>6}")
    for row in measured:
        conmon = f"{row.conmon:10.1f}" if row.conmon is not None else f"{'-':>10}"
        ratio = f"{row.ratio:6.2f}" if row.ratio is not None else f"{'-':>6}"
        print(f"{row.name:{width}}  {row.ours:10.1f}  {conmon}  {ratio}")
    return 0


_Start = Callable[[Path, int, list[str]], "contextlib.AbstractContextManager[Callable[[], list[int]]]"]
"""Starts so many containers with a command, logging to ``N.log`` in a directory; gives the processes to be measured."""


def _measure(start: _Start, containers: int, seconds: float) -> _Cost:
    with tempfile.TemporaryDirectory(prefix="bench-keeper-") as name:
        directory = Path(name)
        gate = directory / "gate"
        os.mkfifo(gate)
        command = [sys.executable, "-I", "-S", "-c", _WRITER, str(gate), str(seconds + 2)]
        with start(directory, containers, command) as processes:
            _wait(lambda: processes() and len(list(directory.glob("gate.*"))) >= containers, _START_S)
            idle = sum(_memory_mb(pid, "Pss:") for pid in processes())
            os.close(os.open(gate, os.O_WRONLY))
            time.sleep(1)
            pids = processes()
            before, began, logged = sum(map(_processor_s, pids)), time.monotonic(), _payload_bytes(directory)
            time.sleep(seconds - 1)
            spent, took = sum(map(_processor_s, pids)) - before, time.monotonic() - began
            payload_mb = (_payload_bytes(directory) - logged) / 1e6
            pss, rss = (sum(_memory_mb(pid, key) for pid in pids) for key in ("Pss:", "Rss:"))
        return _Cost(idle, pss, rss, spent * 1000 / payload_mb * 10, payload_mb / took)


@contextlib.contextmanager
def _keeper(directory: Path, count: int, command: list[str]) -> Iterator[Callable[[], list[int]]]:
    client = KeeperClient(directory / "keeper")
    children = []

    def processes() -> list[int]:
        stats = client.stats()
        assert stats is not None
        return [stats.pid, stats.holder_pid]

    try:
        for number in range(count):
            with client.open(str(number), log_directory=str(directory), log_path=f"{number}.log") as streams:
                children.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=streams.stdout, stderr=streams.stderr)
                )
        yield processes
    finally:
        for child in children:
            child.kill()
            child.wait()
        client.stop(force=True)


@contextlib.contextmanager
def _conmon(directory: Path, count: int, command: list[str]) -> Iterator[Callable[[], list[int]]]:
    bundle = directory / "bundle"
    bundle.mkdir()
    (bundle / "config.json").write_text("{}")
    writer = directory / "writer.py"
    writer.write_text(_WRITER)
    runtime = directory / "runtime"
    runtime.write_text(_RUNTIME.format(command=" ".join([*command[:3], str(writer), *command[5:]])))
    runtime.chmod(0o755)
    pid_files = [directory / f"{number}.conmon" for number in range(count)]

    def processes() -> list[int]:
        # One in a thousand ends before its container begins, when the runtime is as quick as this one.
        for number, pid_file in enumerate(pid_files):
            if not pid_file.exists() or _has_ended(int(pid_file.read_text())):
                start(number, pid_file)
        return [int(pid_file.read_text()) for pid_file in pid_files]

    def start(number: int, pid_file: Path) -> None:
        container_id = f"bench{number}"
        options = {
            "--api-version": "1",
            "--cid": container_id,
            "--cuuid": container_id,
            "--name": container_id,
            "--bundle": str(bundle),
            "--runtime": str(runtime),
            "--log-path": f"k8s-file:{directory / f'{number}.log'}",
            "--container-pidfile": str(directory / f"{number}.pid"),
            "--conmon-pidfile": str(pid_file),
            "--exit-dir": str(directory),
            "--socket-dir-path": str(directory),
        }
        words = [word for pair in options.items() for word in pair]
        subprocess.run(["conmon", *words], check=True, stderr=subprocess.DEVNULL)

    try:
        yield processes
    finally:
        for pid_file in (*directory.glob("*.pid"), *pid_files):  # containers first: conmon ends with its own
            with contextlib.suppress(OSError, ValueError):
                pid = int(pid_file.read_text())
                os.kill(pid, signal.SIGKILL)
                _wait(partial(_has_ended, pid), _END_S)


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _wait(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            raise TimeoutError(f"it has not come to that within {timeout_s:g} s")
        time.sleep(0.01)


def _payload_bytes(directory: Path) -> int:
    total = 0
    for log in directory.glob("*.log"):
        with log.open("rb") as file:
            record = len(file.readline())
        if record:
            total += log.stat().st_size * _LINE_BYTES // record
    return total


def _memory_mb(pid: int, key: str) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError(f"{key} isn't in smaps_rollup")


def _processor_s(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
