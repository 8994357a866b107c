"""Containers that start again, that go with their client, and that are removed when they are long dead."""

from __future__ import annotations

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.porto.support import eventually, refused, spec, start, state


class TestRespawn:
    def test_as_often_as_allowed(self, porto: Client) -> None:
        start(porto, "a", "false", respawn=True, max_respawns=2, respawn_delay=1)
        eventually(lambda: porto.get_property("a", "respawn_count") == "2" and state(porto, "a") == "dead")
        assert porto.get_property("a", "exit_code") == "1"
        with refused(errors.ResourceNotAvailable, "Cannot respawn: reached max_respawns=2"):
            porto.respawn("a")
        porto.set_property("a", "max_respawns", "3")
        porto.respawn("a")
        eventually(lambda: porto.get_property("a", "respawn_count") == "3" and state(porto, "a") == "dead")

    def test_until_then_it_is_respawning(self, porto: Client) -> None:
        start(porto, "a", "false", respawn=True, respawn_delay=3600 * 10**9)
        eventually(lambda: state(porto, "a") == "respawning")
        assert porto.wait(["a"], 5).state == "respawning"
        with refused(errors.InvalidState, "exit_code available only in dead state"):
            porto.get_property("a", "exit_code")
        with refused(errors.InvalidState, "Cannot start container a in state respawning"):
            porto.start("a")
        porto.stop("a")
        assert state(porto, "a") == "stopped"

    def test_children_come_along(self, porto: Client) -> None:
        start(porto, "p", respawn=True, respawn_delay=1)
        start(porto, "p/a", respawn=True, respawn_delay=1)
        porto.kill("p", 9)
        eventually(lambda: porto.get_property("p", "respawn_count") == "1" and state(porto, "p/a") == "running")
        assert porto.get_property("p/a", "respawn_count") == "1"

    def test_at_will(self, porto: Client) -> None:
        start(porto, "a", "true")
        porto.wait(["a"], 60)
        porto.respawn("a")
        eventually(lambda: state(porto, "a") == "dead")
        assert porto.get_property("a", "respawn_count") == "1"

    def test_the_count_can_be_set(self, porto: Client) -> None:
        start(porto, "a", "true")
        porto.wait(["a"], 60)
        porto.set_property("a", "respawn_count", "7")
        porto.respawn("a")
        assert porto.get_property("a", "respawn_count") == "8"

    def test_its_files_stay(self, porto: Client) -> None:
        start(porto, "a", ["sh", "-c", "echo x >> kept; cat kept"], respawn=True, max_respawns=1, respawn_delay=1)
        eventually(lambda: porto.get_property("a", "respawn_count") == "1" and state(porto, "a") == "dead")
        assert porto.get_property("a", "stdout").endswith("x\nx\n")


class TestWeak:
    def test_it_goes_with_its_client(self, porto: Client) -> None:
        with porto.session() as connection:
            porto.create("made", weak=True, connection=connection)
            porto.set_property("made", "command", "sleep 1000")
            porto.start("made")
            porto.create_from_spec(spec("spec", "sleep 1000", weak=True), start=True, connection=connection)
            porto.create("kept", weak=True, connection=connection)
            porto.set_property("kept", "weak", "false")
            assert porto.get_property("made", "weak") == "true"
        eventually(lambda: porto.list_containers() == ["kept"])

    def test_volumes_go_too(self, porto: Client, base_layer: str) -> None:
        volume = rpc_pb2.TVolumeSpec(backend="overlay", layers=[base_layer])
        volume.links.add(container="a", container_root=True)
        with porto.session() as connection:
            porto.create_from_spec(spec("a", "sleep 1000", weak=True), [volume], start=True, connection=connection)
            assert len(porto.list_volumes()) == 1
        eventually(lambda: porto.list_volumes() == [])


@pytest.mark.parametrize("command", ["true", "sleep 1000", None])
def test_the_dead_are_removed_when_they_are_old(porto: Client, command: str | None) -> None:
    porto.create_from_spec(spec("a", command or "", aging_time=0))
    if command:
        porto.start("a")
    porto.create_from_spec(spec("b", "true", aging_time=0), start=True)
    eventually(lambda: "b" not in porto.list_containers(), 10)
    if command == "true":
        eventually(lambda: porto.list_containers() == [], 10)
    else:
        assert porto.list_containers() == ["a"]
