"""More processes in a container that runs: children without namespaces of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from porto_api import Client, errors
from tests.porto.support import (
    eventually,
    namespace,
    refused,
    result,
    root_pid,
    run,
    shell,
    start,
    state,
)

KINDS = ("pid", "mnt", "ipc", "uts", "net", "cgroup", "user")


@pytest.fixture
def parent(porto: Client, root: str) -> str:
    start(porto, "p", root=root, hostname="inside", env={"A": "parent"}, memory_limit=1 << 28)
    return "p"


@pytest.mark.parametrize("virt_mode", ["app", "job"])
def test_everything_is_the_parents(porto: Client, parent: str, virt_mode: str) -> None:
    start(porto, "p/x", isolate=False, virt_mode=virt_mode)
    assert {kind: namespace(root_pid(porto, "p/x"), kind) for kind in KINDS} == {
        kind: namespace(root_pid(porto, parent), kind) for kind in KINDS
    }
    assert run(porto, "p/y", shell("hostname; echo $A; pwd"), isolate=False).lines == ["inside", "parent", "/"]


def test_processes_of_the_parent_are_seen(porto: Client, parent: str) -> None:
    found = run(porto, "p/x", ["ps", "-o", "args"], isolate=False)
    assert "sleep 1000" in found.lines


def test_memory_is_the_parents_unless_it_has_a_limit(porto: Client, parent: str) -> None:
    start(porto, "p/x", isolate=False)
    start(porto, "p/y", isolate=False, memory_limit=1 << 26)
    groups = {name: porto.get_property(name, "cgroups[memory]") for name in (parent, "p/x", "p/y")}
    assert groups["p/x"] == groups[parent]
    assert groups["p/y"].startswith(groups[parent] + "/")
    assert porto.get_property("p/x", "memory_limit_total") == str(1 << 28)


def test_another_user_and_directory(porto: Client, parent: str) -> None:
    found = run(porto, "p/x", shell("id -u; id -g; pwd"), isolate=False, user="1234", group="99", cwd="/tmp")
    assert found.lines == ["1234", "99", "/tmp"]


def test_exit_code(porto: Client, parent: str) -> None:
    assert run(porto, "p/x", shell("exit 42"), isolate=False).exit_code == 42


@pytest.mark.parametrize(
    ("command", "cwd", "kind", "message"),
    [
        ("nope", "/", errors.InvalidCommand, "No such file or directory: cannot exec nope"),
        ("/tmp", "/", errors.InvalidCommand, "Permission denied: cannot exec /tmp"),
        ("true", "/none", errors.InvalidPath, "No such file or directory: Cannot chdir /none"),
    ],
)
def test_what_fails_leaves_nothing(
    porto: Client, parent: str, command: str, cwd: str, kind: type[errors.PortoError], message: str
) -> None:
    with refused(kind, message):
        start(porto, "p/x", [command], isolate=False, cwd=cwd)
    assert porto.list_containers() == ["p"]
    assert state(porto, parent) == "running"


def test_destroying_it_kills_all_of_its_processes(porto: Client, parent: str) -> None:
    start(porto, "p/x", shell("sleep 2000 & sleep 2000 & sleep 2000"), isolate=False)
    eventually(lambda: int(porto.get_property("p/x", "process_count")) >= 3)
    porto.destroy("p/x")
    assert sleeping(2000) == 0
    assert state(porto, parent) == "running"


def test_the_end_of_the_command_is_the_end_of_all(porto: Client, parent: str) -> None:
    start(porto, "p/x", shell("sleep 2001 & exit 0"), isolate=False)
    assert result(porto, "p/x").exit_code == 0
    eventually(lambda: sleeping(2001) == 0)


def test_it_ends_with_its_parent(porto: Client, parent: str) -> None:
    start(porto, "p/x", isolate=False)
    porto.kill(parent, 9)
    eventually(lambda: {state(porto, name) for name in ("p", "p/x")} == {"dead"})
    with refused(errors.InvalidState, "Cannot start container p in state dead"):
        start(porto, "p/y", "true", isolate=False)
    assert porto.list_containers() == ["p", "p/x"]


def test_a_job_takes_a_parent_and_a_command(porto: Client, parent: str) -> None:
    where = "Cannot prepare start for container"
    with refused(errors.InvalidValue, f"{where} a: Container in virt_mode=job without parent"):
        start(porto, "a", "true", virt_mode="job", isolate=False)
    with refused(errors.InvalidValue, f"{where} p/x: Job container without command considered useless"):
        start(porto, "p/x", "", virt_mode="job", isolate=False)


def sleeping(seconds: int) -> int:
    """How many processes sleep for so long."""
    wanted = f"sleep\0{seconds}\0".encode()
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += path.read_bytes() == wanted
        except OSError:
            pass
    return count
