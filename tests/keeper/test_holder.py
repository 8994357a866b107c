"""The holder, where the tests with real keepers can't get it to."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator

import pytest
from shim_porto_runtime.keeper import process
from shim_porto_runtime.keeper.container import Container
from shim_porto_runtime.keeper.holder import Become, Holder, HolderLink, Keep
from shim_porto_runtime.keeper.loop import Loop


@pytest.fixture
def keep() -> Keep:
    return Keep("/", listening=-1, lock=-1, state=-1, staging=-1, transit=(-1, -1), idle_exit_s=1.0, build="")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(process, "log", lines.append)
    return lines


def test_a_holder_that_cannot_fork_holds_on(keep: Keep, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: Iterator[OSError | int] = iter(
        [OSError(errno.ENOMEM, "Cannot allocate memory"), OSError(errno.EAGAIN, "Try again"), 4711]
    )

    def fork() -> int:
        result = next(attempts)
        if isinstance(result, OSError):
            raise result
        return result

    waits: list[float] = []
    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(time, "sleep", waits.append)
    holder = Holder(keep, {})
    assert holder._start_worker() is None
    assert holder._worker is not None
    holder._worker.close()
    assert len(waits) == 2
    assert "Cannot allocate memory" in said[0]


class Linked:
    """A worker's link to a holder that is only a socket."""

    def __init__(self, keep: Keep) -> None:
        self.loop = Loop()
        ours, self.holder = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link = HolderLink(self.loop, keep, ours, 4711, entries=dict, on_end=lambda: None)

    def close(self) -> None:
        if self.link._connection is not None:
            self.link._connection.close()
        self.holder.close()
        self.loop.close()


@pytest.fixture
def linked(keep: Keep) -> Iterator[Linked]:
    linked = Linked(keep)
    yield linked
    linked.close()


def container(container_id: str) -> Container:
    return Container(container_id, "/", "", [], log=None, stdin=None, stdin_once=False, tty=False)


def test_a_worker_that_cannot_fork_works_on_and_tries_again(
    linked: Linked, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_fork() -> int:
        raise OSError(errno.EAGAIN, "Try again")

    link = linked.link
    monkeypatch.setattr(os, "fork", no_fork)
    linked.holder.close()
    linked.loop.run_once(0.0)
    link.hold(container("c"))
    link.drop("c")
    assert 0 < link.look_after() <= 1.0
    assert len([line for line in said if "no new holder" in line]) == 1, "not at every turn of the loop"
    monkeypatch.setattr(time, "monotonic", lambda before=time.monotonic: before() + 2)
    monkeypatch.setattr(os, "fork", lambda: 4712)
    link.look_after()
    assert link.pid == 4712


def test_a_holder_that_does_not_read_is_replaced(
    linked: Linked, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr("shim_porto_runtime.keeper.holder._TIMEOUT_S", 0.01)
    monkeypatch.setattr(os, "kill", lambda pid, _number: killed.append(pid))
    monkeypatch.setattr(os, "fork", lambda: 4712)
    link = linked.link
    for number in range(5000):
        link.hold(container(f"c{number}"))
        if killed:
            break
    assert killed == [4711]
    assert link.pid == 4712


def test_a_spurious_event_is_no_end(linked: Linked, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor's number may be another's by the time its event is handled."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("the holder is alive"))
    link = linked.link
    started = time.monotonic()
    link._hear(1)
    assert time.monotonic() - started < 1.0


def test_in_the_child_everything_of_the_worker_is_left(
    linked: Linked, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fork", lambda: 0)
    link = linked.link
    linked.holder.close()
    with pytest.raises(Become) as caught:
        linked.loop.run_once(0.0)
    connection = caught.value.role._worker
    assert connection is not None
    connection.close()
    assert link.pid == 4711
