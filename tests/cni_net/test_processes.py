"""Plugin processes that nobody waits for any more."""

from __future__ import annotations

import builtins
import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

import pytest
from shim_cni_net import processes

ID = "d" * 64


@contextmanager
def plugin(shell: str, container_id: str = ID) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **processes.environment(container_id)}
    with subprocess.Popen(["sh", "-c", f"echo; {shell}"], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_it_is_left_to_finish() -> None:
    since = processes.now_ticks()
    with plugin("sleep 0.3") as process:
        processes.end_leftovers(ID, since, grace_s=10)
        assert process.poll() == 0


def test_it_is_killed_when_it_does_not() -> None:
    since = processes.now_ticks()
    with plugin("trap '' TERM; setsid sleep 1000 & sleep 1000; sleep 1000") as process:
        started = time.monotonic()
        processes.end_leftovers(ID, since, grace_s=0.2)
        assert time.monotonic() - started < 3
        assert process.wait() == -9
        assert processes._find(ID, 0) == {}


def test_others_are_left_alone() -> None:
    with plugin("exec sleep 1000", container_id="e" * 64) as other, plugin("exec sleep 1000") as older:
        deadline = time.monotonic() + 1
        while processes.now_ticks() <= _started(older.pid) and time.monotonic() < deadline:
            pass
        processes.end_leftovers(ID, processes.now_ticks(), grace_s=0)
        assert other.poll() is None
        assert older.poll() is None, "it was there before the operation"


def test_one_between_fork_and_exec_is_known_by_its_configuration() -> None:
    """It has the environment of the daemon that has forked it."""
    since = processes.now_ticks()
    script = "import os, sys, time; os.memfd_create(sys.argv[1]); print(flush=True); time.sleep(1000)"
    for container_id, ended in ((ID, True), ("e" * 64, False)):
        argv = [sys.executable, "-c", script, processes.configuration_name(container_id)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            processes.end_leftovers(ID, since, grace_s=0.1)
            assert (process.poll() is not None) is ended
            process.kill()


@pytest.mark.parametrize(("module", "function"), [(os, "listdir"), (os, "pidfd_open"), (builtins, "open")])
def test_without_the_means_to_look_it_looks_again(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    since = processes.now_ticks()
    refusals = iter([errno.EMFILE, errno.ENFILE, errno.ENOMEM])
    real = getattr(module, function)

    def refuse_at_first(*arguments: Any) -> Any:
        for code in refusals:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with plugin("exec sleep 1000") as process:
        with monkeypatch.context() as patch:
            patch.setattr(module, function, refuse_at_first)
            processes.end_leftovers(ID, since, grace_s=0)
        assert process.poll() == -9
    assert len(os.listdir("/proc/self/fd")) == before


def test_looking_in_vain_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(processes, "_KILL_WAIT_S", 0.2)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    processes.end_leftovers(ID, 0, grace_s=0)
    assert "can't be looked for: Too many open files" in caplog.text


def test_nothing_to_wait_for() -> None:
    processes.end_leftovers(ID, 0, grace_s=10)


def _started(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])
