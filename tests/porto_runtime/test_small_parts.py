"""Undoing, locks, streaming lists, cancelling: parts that every call stands on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
from shim_porto_runtime.abilities import Abilities
from shim_porto_runtime.cancelling import porto_token
from shim_porto_runtime.lists import MAX_BYTES, MAX_ITEMS, batches
from shim_porto_runtime.locks import NamedLocks
from shim_porto_runtime.undo import Undo

from porto_api import Client, errors, rpc_pb2
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import DeadlineExceeded, Unavailable


class BoomError(Exception):
    pass


def fail() -> None:
    raise BoomError


def run_and_fail(undo: Undo, *steps: Callable[[], object], err: Exception | None = None) -> None:
    """Run a scope that registers these steps, and then fails."""
    with undo:
        for number, step in enumerate(steps):
            undo.add(f"step {number}", step)
        raise err or BoomError


class TestUndo:
    def test_in_reverse_and_only_after_an_error(self) -> None:
        done: list[str] = []
        with pytest.raises(BoomError):
            run_and_fail(Undo("x"), *(partial(done.append, name) for name in "abc"))
        assert done == ["c", "b", "a"]
        with Undo("x") as undo:
            undo.add("d", lambda: done.append("d"))
        assert done == ["c", "b", "a"]

    def test_what_is_kept_stays(self) -> None:
        done: list[str] = []
        undo = Undo("x")
        undo.add("kept", lambda: done.append("a"))
        undo.keep()
        with pytest.raises(BoomError):
            run_and_fail(undo, lambda: done.append("b"))
        assert done == ["b"]

    def test_a_step_that_fails_hides_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        done: list[str] = []
        undo = Undo("Making x")
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="first"):
            run_and_fail(undo, lambda: done.append("a"), fail, err=ValueError("first"))
        assert (done, undo.failed) == (["a"], ["step 1"])
        assert "Making x: undoing failed: step 1" in caplog.text

    def test_a_step_sees_what_failed_before_it(self) -> None:
        seen: list[list[str]] = []
        undo = Undo("x")
        with pytest.raises(BoomError):
            run_and_fail(undo, lambda: seen.append(list(undo.failed)), fail)
        assert seen == [["step 1"]]


class TestLocks:
    def test_one_at_a_time_by_name(self) -> None:
        locks = NamedLocks()
        context = CallContext("x", "1")
        inside, most = 0, 0
        guard = threading.Lock()

        def work() -> None:
            nonlocal inside, most
            for _ in range(50):
                with locks.hold("a", context):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    with guard:
                        inside -= 1

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == 1
        assert locks._entries == {}, "nobody needs it any more"

    def test_other_names_are_free(self) -> None:
        locks = NamedLocks()
        with locks.hold("a", CallContext("x", "1")), locks.hold("b", CallContext("x", "2", time.monotonic() + 1)):
            pass

    def test_who_waits_too_long_is_told_for_what(self) -> None:
        locks = NamedLocks()

        def second() -> None:
            with locks.hold("pod\nshop\nuid", CallContext("StopPodSandbox", "2", time.monotonic() + 0.01)):
                raise AssertionError("held twice")

        told = pytest.raises(DeadlineExceeded, match=r"^StopPodSandbox: another call for pod shop uid is still")
        with locks.hold("pod\nshop\nuid", CallContext("x", "1")), told:
            second()
        assert locks._entries == {}

    def test_an_error_inside_frees_it(self) -> None:
        locks = NamedLocks()
        with pytest.raises(BoomError), locks.hold("a", CallContext("x", "1")):
            raise BoomError
        with locks.hold("a", CallContext("x", "2", time.monotonic() + 1)):
            pass


class TestStreamingLists:
    def streamed(self, sizes: list[int]) -> list[list[str]]:
        items = [pb.Container(id=str(number), image_ref="x" * size) for number, size in enumerate(sizes)]
        messages = batches(items, lambda batch: pb.StreamContainersResponse(containers=batch))
        return [[container.id for container in message.containers] for message in messages]

    def test_nothing_is_no_message(self) -> None:
        assert self.streamed([]) == []

    @pytest.mark.parametrize("count", [1, MAX_ITEMS, MAX_ITEMS + 1, 3 * MAX_ITEMS])
    def test_each_once_and_in_order(self, count: int) -> None:
        found = self.streamed([0] * count)
        assert [item for message in found for item in message] == [str(n) for n in range(count)]
        assert max(len(message) for message in found) <= MAX_ITEMS
        assert len(found) == -(-count // MAX_ITEMS)

    def test_large_ones_are_alone(self) -> None:
        third = MAX_BYTES // 3
        assert self.streamed([third, third, third, 10, 2 * MAX_BYTES, 10]) == [["0", "1"], ["2", "3"], ["4"], ["5"]]

    def test_it_is_lazy(self) -> None:
        made: list[int] = []

        def items() -> object:
            for number in range(10 * MAX_ITEMS):
                made.append(number)
                yield pb.Container(id=str(number))

        stream = batches(items(), lambda batch: pb.StreamContainersResponse(containers=batch))  # type: ignore[arg-type]
        next(stream)
        assert len(made) <= MAX_ITEMS + 1


class TestCancelling:
    def test_with_the_call(self) -> None:
        context = CallContext("x", "1")
        with porto_token(context) as token:
            assert not token.cancelled
            context.cancel()
            assert token.cancelled

    def test_not_after_the_block(self) -> None:
        context = CallContext("x", "1")
        with porto_token(context) as token:
            pass
        context.cancel()
        assert not token.cancelled

    def test_a_call_that_is_cancelled_already(self) -> None:
        context = CallContext("x", "1")
        context.cancel()
        with porto_token(context) as token:
            assert token.cancelled


class Portod(Client):
    """Answers one call."""

    def __init__(self, *, there: bool) -> None:
        super().__init__("/nowhere")
        self.there = there
        self.asked = 0

    def properties(
        self, *, timeout_s: float | None = None
    ) -> list[rpc_pb2.TContainerPropertyListResponse.TContainerPropertyListEntry]:
        self.asked += 1
        if not self.there:
            raise errors.SocketUnavailable("no portod")
        response = rpc_pb2.TContainerPropertyListResponse()
        response.list.add(name="memory_limit", desc="")
        return list(response.list)


class TestAbilities:
    def test_asked_for_once(self) -> None:
        porto = Portod(there=True)
        abilities = Abilities(porto)
        assert [abilities.has(name) for name in ("memory_limit", "hugetlb_limit")] == [True, False]
        assert porto.asked == 1

    def test_and_again_when_portod_was_away(self) -> None:
        porto = Portod(there=False)
        abilities = Abilities(porto)
        with pytest.raises(Unavailable):
            abilities.has("memory_limit")
        porto.there = True
        assert abilities.has("memory_limit")
