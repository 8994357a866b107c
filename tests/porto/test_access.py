"""Clients in containers: what they see and what they may change, by ``enable_porto``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import google.protobuf
import pytest

import porto_api
from porto_api import Client, errors
from tests.porto import agent
from tests.porto.conftest import UnderTest
from tests.porto.support import refused, run, shell, spec, start

LEVELS = ("true", "isolate", "child-only", "read-only", "read-isolate", "none")


class Inside:
    """Makes calls from inside a container."""

    def __init__(self, porto: Client, socket: str) -> None:
        self._porto = porto
        self._socket = socket

    def __call__(self, name: str, *calls: str, **properties: Any) -> list[Any]:
        """What comes of calls made in a container."""
        packages = {str(Path(porto_api.__file__).parents[1]), str(Path(google.protobuf.__file__).parents[2])}
        command = [sys.executable, "-S", agent.__file__, self._socket, ":".join(sorted(packages)), *calls]
        start(self._porto, name, command, isolate=False, **properties)
        assert self._porto.wait([name], 30).state == "dead"
        output = self._porto.get_property(name, "stdout")
        found = [json.loads(line) for line in output.splitlines()]
        assert len(found) == len(calls), self._porto.get_property(name, "stderr")
        return found


@pytest.fixture
def inside(porto: Client, under_test: UnderTest) -> Inside:
    start(porto, "other")
    return Inside(porto, under_test.socket)


def test_full(porto: Client, inside: Inside) -> None:
    found = inside(
        "a",
        "porto.list_containers()",
        "porto.get_property('self', 'absolute_name')",
        "porto.create('n')",
        "porto.create('self/c')",
        "porto.set_property('other', 'private', 'touched')",
        "porto.list_containers()",
        "porto.destroy('other')",
        enable_porto="true",
    )
    assert found == [
        ["a", "other"],
        "/porto/a",
        None,
        None,
        None,
        ["a", "a/c", "n", "other"],
        None,
    ]


def test_none(porto: Client, inside: Inside) -> None:
    (found,) = inside("a", "porto.version()", enable_porto="none")
    assert found.startswith("Socket")


def test_read_only(porto: Client, inside: Inside) -> None:
    found = inside(
        "a",
        "porto.list_containers()",
        "porto.get_property('other', 'state')",
        "porto.create('n')",
        "porto.set_property('self', 'private', 'x')",
        "porto.destroy('other')",
        "porto.version()[0]",
        enable_porto="read-only",
    )
    denied = "Permission: Write access denied"
    assert found == [["a", "other"], "running", denied, denied, denied, porto.version()[0]]


def test_isolated(porto: Client, inside: Inside) -> None:
    found = inside(
        "a",
        "porto.list_containers()",
        "porto.get_property('self', 'absolute_name')",
        "porto.get_property('self', 'absolute_namespace')",
        "porto.get_property('other', 'state')",
        "porto.create('n')",
        "porto.list_containers()",
        "porto.get_property('n', 'absolute_name')",
        "porto.destroy('n')",
        enable_porto="isolate",
    )
    assert found == [
        [],
        "/porto/a",
        "/porto/a/",
        "ContainerDoesNotExist: container a/other not found",
        None,
        ["n"],
        "/porto/a/n",
        None,
    ]


def test_child_only(porto: Client, inside: Inside) -> None:
    found = inside(
        "a",
        "porto.get_property('other', 'state')",
        "porto.set_property('other', 'private', 'x')",
        "porto.create('self/c')",
        "porto.destroy('self/c')",
        enable_porto="child-only",
    )
    assert found[0] == "running"
    assert found[1].startswith("Permission: ")
    assert found[2:] == [None, None]


def test_the_parents_level_counts_too(porto: Client, inside: Inside) -> None:
    porto.create_from_spec(spec("m", enable_porto="isolate", porto_namespace="ns-"))
    found = inside(
        "m/x",
        "porto.get_property('self', 'absolute_namespace')",
        "porto.create('q')",
        "porto.list_containers()",
    )
    assert found == ["/porto/m/", None, ["q", "x"]]
    assert "m/q" in porto.list_containers()


@pytest.mark.parametrize(
    ("above", "wanted", "got"),
    [
        ("none", "true", "false"),
        ("read-only", "true", "read-only"),
        ("isolate", "child-only", "child-only"),
        ("true", "isolate", "isolate"),
        ("read-isolate", "read-isolate", "read-isolate"),
    ],
)
def test_no_more_than_the_parent(porto: Client, above: str, wanted: str, got: str) -> None:
    start(porto, "m", "", enable_porto=above)
    start(porto, "m/a", enable_porto=wanted)
    assert porto.get_property("m/a", "enable_porto") == got


@pytest.mark.parametrize("level", LEVELS)
def test_the_socket_is_there_when_it_is_of_use(porto: Client, root: str, level: str) -> None:
    found = run(porto, "a", shell("test -S /run/portod.socket && echo there"), root=root, enable_porto=level)
    assert found.stdout == ("" if level == "none" else "there\n")


def test_processes_of_others_cant_be_seen(porto: Client, inside: Inside) -> None:
    (found,) = inside("a", "porto.get_property('other', 'root_pid')", enable_porto="read-only")
    assert found.isdigit()


def test_names_outside(porto: Client) -> None:
    with refused(errors.ContainerDoesNotExist, "container nope not found"):
        porto.get_property("self/nope", "state")
