"""Containers made, changed and read in one call."""

from __future__ import annotations

from typing import Any

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.porto.support import refused, result, spec, start, state


class TestCreate:
    def test_what_was_asked_for_is_set(self, porto: Client) -> None:
        porto.create_from_spec(
            spec(
                "a",
                ["sleep", "1000"],
                memory_limit=1 << 28,
                cpu_limit=0.5,
                env={"A": "1"},
                labels={"TEST.x": "y"},
                private="own",
                hostname="host",
                bind=["/etc /mnt ro"],
                aging_time=5,
                respawn_delay=7,
                cpu_weight=2.5,
                enable_porto="none",
            )
        )
        names = "state memory_limit cpu_limit env labels private hostname bind aging_time respawn_delay cpu_weight"
        assert porto.get(["a"], [*names.split(), "enable_porto"])["a"] == {
            "state": "stopped",
            "memory_limit": str(1 << 28),
            "cpu_limit": "0.5c",
            "env": "A=1",
            "labels": "TEST.x: y",
            "private": "own",
            "hostname": "host",
            "bind": "/etc /mnt ro",
            "aging_time": "5",
            "respawn_delay": "7ns",
            "cpu_weight": "2.5",
            "enable_porto": "false",
        }

    def test_it_can_be_started_at_once(self, porto: Client) -> None:
        start(porto, "a", ["echo", "hello"])
        assert result(porto, "a").stdout == "hello\n"

    @pytest.mark.parametrize(
        ("properties", "kind", "message"),
        [
            ({"command": "nonexistent"}, errors.InvalidCommand, "No such file or directory: cannot exec nonexistent"),
            ({"user": "nosuchuser"}, errors.InvalidValue, "Cannot find user: nosuchuser"),
            ({"virt_mode": "x"}, errors.InvalidValue, "Unknown: x"),
            ({"memory_limit": 100}, errors.InvalidValue, "Should be at least 1048576"),
            ({"hostname": "x" * 65}, errors.InvalidValue, f"hostname '{'x' * 65}' is too long"),
            ({"root": "/not/there"}, errors.Unknown, "No such file or directory: Cannot open /not/there"),
            ({"stdout_path": "/not/there/x"}, errors.InvalidValue, "No such file or directory: open /not/there/x"),
            ({"thread_limit": 1}, errors.Unknown, "Resource temporarily unavailable: clone()"),
            ({"enable_porto": "x"}, errors.InvalidValue, "Unknown access level: x"),
            ({"task_cred": (12345, 1)}, errors.InvalidValue, "Cannot find user: 12345"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_fails_leaves_nothing(
        self, porto: Client, properties: dict[str, Any], kind: type[errors.PortoError], message: str
    ) -> None:
        with refused(kind, message):
            porto.create_from_spec(spec("a", **{"command": "sleep 1000", **properties}), start=True)
        assert porto.list_containers() == []

    def test_a_name_is_taken_once(self, porto: Client) -> None:
        porto.create("a")
        with refused(errors.ContainerAlreadyExists, "container a already exists"):
            porto.create_from_spec(spec("a"))
        assert porto.list_containers() == ["a"]


class TestUpdate:
    def test_what_is_named_changes(self, porto: Client) -> None:
        porto.create_from_spec(spec("a", private="x", memory_limit=1 << 28))
        porto.update_from_spec(spec("a", memory_limit=1 << 29))
        assert porto.get(["a"], ["memory_limit", "private"])["a"] == {"memory_limit": str(1 << 29), "private": "x"}

    def test_it_can_start(self, porto: Client) -> None:
        porto.create("a")
        porto.update_from_spec(spec("a", ["echo", "hello"]), start=True)
        assert result(porto, "a").stdout == "hello\n"

    def test_what_is_dynamic_can_be_changed_while_it_runs(self, porto: Client) -> None:
        start(porto, "a")
        porto.update_from_spec(spec("a", memory_limit=1 << 28, labels={"TEST.x": "1"}))
        assert porto.get_property("a", "memory_limit") == str(1 << 28)
        with refused(errors.InvalidState, "command could be set only in stopped state"):
            porto.update_from_spec(spec("a", "true"))

    def test_all_or_nothing(self, porto: Client) -> None:
        porto.create_from_spec(spec("a", private="before"))
        with refused(errors.InvalidValue, "Cannot find user: nosuchuser"):
            porto.update_from_spec(spec("a", private="after", user="nosuchuser"))
        assert porto.get_property("a", "private") == "before"

    def test_a_start_that_fails_leaves_it_stopped(self, porto: Client) -> None:
        porto.create("a")
        with refused(errors.InvalidCommand):
            porto.update_from_spec(spec("a", ["nonexistent"]), start=True)
        assert state(porto, "a") == "stopped"

    def test_a_container_that_is_not_there(self, porto: Client) -> None:
        with refused(errors.ContainerDoesNotExist, "container a not found"):
            porto.update_from_spec(spec("a"))


class TestList:
    def test_all_there_is_to_know(self, porto: Client) -> None:
        start(porto, "a", ["sh", "-c", "echo out; exit 3"], memory_limit=1 << 28, labels={"TEST.x": "1"})
        porto.wait(["a"], 60)
        (found,) = porto.list_containers_by(["a"])
        assert found.spec.name == "a"
        assert list(found.spec.command_argv.argv) == ["sh", "-c", "echo out; exit 3"]
        assert found.spec.memory_limit == 1 << 28
        assert found.spec.labels.map[0].key == "TEST.x"
        assert found.status.state == "dead"
        assert found.status.exit_status == 3 << 8
        assert found.status.exit_code == 3
        assert found.status.absolute_name == "/porto/a"
        assert not found.status.HasField("root_pid")

    def test_only_what_is_wanted(self, porto: Client) -> None:
        start(porto, "a", memory_limit=1 << 28)
        (found,) = porto.list_containers_by(["a"], properties=["state", "memory_limit"])
        assert found == rpc_pb2.TContainer(
            spec=rpc_pb2.TContainerSpec(name="a", memory_limit=1 << 28),
            status=rpc_pb2.TContainerStatus(state="running"),
        )

    def test_masks_and_labels(self, porto: Client) -> None:
        porto.create_from_spec(spec("a", labels={"TEST.x": "1"}))
        porto.create_from_spec(spec("b", labels={"TEST.x": "2"}))
        porto.create_from_spec(spec("b/c", labels={"TEST.x": "1"}))

        def names(*masks: str, **options: object) -> list[str]:
            found = porto.list_containers_by(masks, properties=["state"], **options)  # type: ignore[arg-type]
            return sorted(entry.spec.name for entry in found if not entry.HasField("error"))

        assert names("*") == ["a", "b"]
        assert names("b***") == ["b", "b/c"]
        assert names("***", labels={"TEST.x": "1"}) == ["a", "b/c"]
        assert names("*", labels={"TEST.x": "3"}) == []

    def test_what_is_not_there(self, porto: Client) -> None:
        (found,) = porto.list_containers_by(["nope"], properties=["state"])
        assert found.error.error == rpc_pb2.ContainerDoesNotExist
        assert found.error.msg == "container nope not found"

    def test_a_property_that_is_none(self, porto: Client) -> None:
        porto.create("a")
        (found,) = porto.list_containers_by(["a"], properties=["nope", "state"])
        assert found.status.state == "stopped"
        assert [error.msg for error in found.status.error] == ["Unknown property nope"]

    def test_a_part_of_the_output(self, porto: Client) -> None:
        start(porto, "a", ["echo", "0123456789"])
        porto.wait(["a"], 60)
        request = rpc_pb2.TContainerRequest()
        request.ListContainersBy.filters.add().name = "a"
        options = request.ListContainersBy.field_options
        options.properties.append("stdout")
        options.stdout_options.stdstream_offset, options.stdout_options.stdstream_limit = 2, 3
        (found,) = porto.call(request).ListContainersBy.containers
        assert found.status.stdout == "234"
