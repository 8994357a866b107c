"""Who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
from shim_cni_net.locks import OperationLocks

from shim_core.errors import Unavailable
from tests.cni_net.support import until


def blocked(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_one_operation_for_a_sandbox() -> None:
    locks = OperationLocks()
    order: list[str] = []

    def other() -> None:
        with locks.sandbox("a", 10):
            order.append("second")

    with locks.sandbox("a", 1):
        with locks.sandbox("b", 1):
            pass
        thread = blocked(other)
        with pytest.raises(Unavailable, match=r"still running"), locks.sandbox("a", 0.05):
            pass
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_everything_waits_for_all_and_all_wait_for_it() -> None:
    locks = OperationLocks()
    order: list[str] = []
    collecting = threading.Event()

    def collect() -> None:
        with locks.everything(10):
            order.append("gc")
            collecting.wait(60)

    with locks.sandbox("a", 1):
        thread = blocked(collect)
        assert until(lambda: locks._exclusive)
        with pytest.raises(Unavailable), locks.sandbox("b", 0.05):
            pass
        with pytest.raises(Unavailable, match=r"garbage"), locks.everything(0.05):
            pass
        order.append("a")
    assert until(lambda: "gc" in order)
    collecting.set()
    thread.join()
    with locks.sandbox("b", 1):
        order.append("b")
    assert order == ["a", "gc", "b"]


def test_everything_gives_up_in_time_and_leaves_no_trace() -> None:
    locks = OperationLocks()
    with locks.sandbox("a", 1):
        with pytest.raises(Unavailable, match=r"operations are still running"), locks.everything(0.05):
            pass
        with locks.sandbox("b", 1):
            pass
    with locks.everything(1):
        pass


def test_an_error_inside_frees_the_lock() -> None:
    locks = OperationLocks()
    for take in (partial(locks.sandbox, "a", 0.1), partial(locks.everything, 0.1)):
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), take():
                raise ZeroDivisionError
