"""What can be done to a container in each of its states, and what comes of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from porto_api import Client, errors
from tests.porto.support import eventually, refused, result, shell, start, state, states

OPERATIONS: dict[str, Callable[[Client], object]] = {
    "start": lambda porto: porto.start("a"),
    "stop": lambda porto: porto.stop("a", kill_after_s=0.2),
    "pause": lambda porto: porto.pause("a"),
    "resume": lambda porto: porto.resume("a"),
    "kill": lambda porto: porto.kill("a", 0),
    "respawn": lambda porto: porto.respawn("a"),
    "destroy": lambda porto: porto.destroy("a"),
}

ALLOWED = {
    "stopped": {"start": "meta", "stop": "stopped", "destroy": ""},
    "running": {"stop": "stopped", "pause": "paused", "kill": "running", "destroy": ""},
    "dead": {"stop": "stopped", "respawn": "dead", "destroy": ""},
    "meta": {"stop": "stopped", "pause": "paused", "destroy": ""},
    "paused": {"stop": "stopped", "resume": "running", "destroy": ""},
}
"""By the state before: what is carried out, and the state after it."""

REFUSALS = {
    "start": "Cannot start container a in state {state}",
    "pause": "Contaner not running",
    "resume": "Container not paused",
    "kill": "invalid container state={state}",
    "respawn": "Cannot respawn: container in state={state}",
}


def bring_to(porto: Client, wanted: str) -> None:
    porto.create("a")
    if wanted == "stopped":
        return
    if wanted != "meta":
        porto.set_property("a", "command", "true" if wanted == "dead" else "sleep 1000")
    porto.start("a")
    if wanted == "dead":
        porto.wait(["a"], 60)
    if wanted == "paused":
        porto.pause("a")
    assert state(porto, "a") == wanted


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("before", ALLOWED)
def test_each_operation_in_each_state(porto: Client, before: str, operation: str) -> None:
    bring_to(porto, before)
    after = ALLOWED[before].get(operation)
    if after is None:
        with refused(errors.InvalidState, REFUSALS[operation].format(state=before)):
            OPERATIONS[operation](porto)
        assert state(porto, "a") == before
        return
    OPERATIONS[operation](porto)
    if not after:
        assert porto.list_containers() == []
    elif operation == "respawn":
        porto.wait(["a"], 60)
        assert porto.get_property("a", "respawn_count") == "1"
    else:
        assert state(porto, "a") == after


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_container_that_is_not_there(porto: Client, operation: str) -> None:
    with refused(errors.ContainerDoesNotExist, "container a not found"):
        OPERATIONS[operation](porto)


@pytest.mark.parametrize("call", ["destroy", "stop", "start", "pause"])
def test_the_root_container_is_nobodys_to_change(porto: Client, call: str) -> None:
    with refused(errors.Permission, "Write access denied: root container is read-only"):
        getattr(porto, call)("/")


def test_a_name_is_taken_once(porto: Client) -> None:
    porto.create("a")
    with refused(errors.ContainerAlreadyExists, "container a already exists"):
        porto.create("a")


def test_stopping_forgets_how_it_ended(porto: Client) -> None:
    start(porto, "a", "false")
    porto.wait(["a"], 60)
    assert porto.get_property("a", "exit_code") == "1"
    porto.stop("a")
    with refused(errors.InvalidState, "exit_code available only in dead state"):
        porto.get_property("a", "exit_code")
    assert porto.get_property("a", "time") == "0"
    porto.start("a")
    assert result(porto, "a").exit_code == 1


class TestStopping:
    def test_sigterm_comes_first(self, porto: Client) -> None:
        self._start(porto, "echo bye; exit 3")
        before = time.monotonic()
        porto.stop("a", kill_after_s=20)
        assert time.monotonic() - before < 5
        assert state(porto, "a") == "stopped"

    def test_what_ignores_it_is_killed_when_the_time_is_up(self, porto: Client) -> None:
        self._start(porto, "")
        before = time.monotonic()
        porto.stop("a", kill_after_s=0.5)
        assert 0.4 < time.monotonic() - before < 5
        assert state(porto, "a") == "stopped"

    def test_without_any_time_it_is_killed_at_once(self, porto: Client) -> None:
        self._start(porto, "")
        before = time.monotonic()
        porto.stop("a", kill_after_s=0)
        assert time.monotonic() - before < 0.4

    @staticmethod
    def _start(porto: Client, on_term: str) -> None:
        script = f"trap '{on_term}' TERM; echo ready; while :; do sleep 0.02; done"
        start(porto, "a", shell(script))
        eventually(lambda: "ready" in porto.get_property("a", "stdout"))


class TestSignals:
    def test_they_reach_the_command(self, porto: Client) -> None:
        start(porto, "a", shell("trap 'exit 7' USR1; echo ready; while :; do sleep 0.02; done"))
        eventually(lambda: "ready" in porto.get_property("a", "stdout"))
        porto.kill("a", signal.SIGUSR1)
        assert result(porto, "a").exit_code == 7

    @pytest.mark.parametrize("number", [-1, 99])
    def test_one_that_is_none(self, porto: Client, number: int) -> None:
        start(porto, "a")
        with pytest.raises(errors.Unknown, match=r"^Unknown: Invalid argument: kill\(\d+\)$"):
            porto.kill("a", number)
        assert state(porto, "a") == "running"


class TestFamilies:
    """What happens to a container happens to those below it."""

    def test_starting_a_child_starts_its_parents(self, porto: Client) -> None:
        self._create(porto)
        porto.start("a/b/c")
        assert states(porto) == {"a": "running", "a/b": "running", "a/b/c": "running", "a/d": "stopped"}

    def test_stopping_a_parent_stops_its_children(self, porto: Client) -> None:
        self._create(porto)
        porto.start("a/b/c")
        porto.start("a/d")
        porto.stop("a/b")
        assert states(porto) == {"a": "running", "a/b": "stopped", "a/b/c": "stopped", "a/d": "running"}
        porto.stop("a")
        assert set(states(porto).values()) == {"stopped"}

    def test_the_end_of_a_parent_is_that_of_its_children(self, porto: Client) -> None:
        self._create(porto)
        porto.start("a/b/c")
        porto.kill("a/b", signal.SIGKILL)
        eventually(lambda: states(porto) == {"a": "running", "a/b": "dead", "a/b/c": "dead", "a/d": "stopped"})

    def test_a_dead_parent_has_to_be_stopped_first(self, porto: Client) -> None:
        self._create(porto)
        porto.start("a")
        porto.kill("a", signal.SIGKILL)
        porto.wait(["a"], 60)
        with refused(errors.InvalidState, "Cannot start container a in state dead"):
            porto.start("a/b")

    def test_pausing_a_parent_pauses_its_children(self, porto: Client) -> None:
        self._create(porto)
        porto.start("a/b/c")
        porto.pause("a/b")
        assert states(porto) == {"a": "running", "a/b": "paused", "a/b/c": "paused", "a/d": "stopped"}
        for call in (porto.resume, porto.stop):
            with refused(errors.InvalidState, "Parent container is paused"):
                call("a/b/c")
        porto.create("a/b/e")
        with refused(errors.InvalidState, "Parent container is frozen"):
            porto.start("a/b/e")
        porto.resume("a/b")
        assert states(porto)["a/b/c"] == "running"

    def test_a_paused_container_can_be_stopped_and_destroyed(self, porto: Client) -> None:
        self._create(porto)
        porto.start("a/b/c")
        porto.pause("a/b")
        porto.stop("a/b", kill_after_s=0)
        assert states(porto)["a/b/c"] == "stopped"
        porto.start("a/b/c")
        porto.pause("a")
        porto.destroy("a")
        assert porto.list_containers() == []

    def test_destroying_a_parent_destroys_its_children(self, porto: Client) -> None:
        self._create(porto)
        porto.start("a/b/c")
        porto.destroy("a/b")
        assert porto.list_containers() == ["a", "a/d"]

    @staticmethod
    def _create(porto: Client) -> None:
        for name in ("a", "a/b", "a/b/c", "a/d"):
            porto.create(name)
            porto.set_property(name, "command", "sleep 1000")


def test_what_is_paused_does_nothing(porto: Client) -> None:
    start(porto, "a", shell("while :; do echo x; sleep 0.01; done"))
    eventually(lambda: porto.get_property("a", "stdout"))
    porto.pause("a")
    before = porto.get_property("a", "stdout")
    time.sleep(0.1)  # the time it would take to write more
    assert porto.get_property("a", "stdout") == before
    porto.resume("a")
    eventually(lambda: porto.get_property("a", "stdout") != before)
