"""Which namespaces a container shares with its parent, and which are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from porto_api import Client, errors
from tests.porto.support import eventually, namespace, refused, root_pid, run, shell, start

KINDS = ("pid", "ipc", "uts", "mnt", "net", "user", "cgroup")
ISOLATED = {"pid", "ipc", "uts", "mnt"}


def own(porto: Client, name: str, parent: int | str) -> set[str]:
    """The namespaces that aren't the parent's."""
    pid = root_pid(porto, name)
    return {kind for kind in KINDS if namespace(pid, kind) != namespace(parent, kind)}


def _in_words(value: object) -> str:
    """The same in every process: a set has no order of its own."""
    return str(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.parametrize(
    ("properties", "isolated", "shared"),
    [
        ({}, ISOLATED, {"mnt"}),
        ({"hostname": "h"}, ISOLATED, {"mnt", "uts"}),
        ({"net": "none"}, {*ISOLATED, "net"}, {"mnt", "net"}),
        ({"virt_mode": "host"}, set(), set()),
        ({"virt_mode": "os"}, {*ISOLATED, "net"}, {"mnt", "net"}),
        ({"userns": True}, set(KINDS), {"mnt", "net", "user", "cgroup"}),
    ],
    ids=_in_words,
)
def test_on_the_first_level(porto: Client, properties: dict[str, Any], isolated: set[str], shared: set[str]) -> None:
    for isolate, expected in ((True, isolated), (False, shared)):
        start(porto, "a", isolate=isolate, **properties)
        assert own(porto, "a", "self") == expected
        porto.destroy("a")


@pytest.mark.parametrize("parent_isolate", [True, False])
@pytest.mark.parametrize(
    ("properties", "isolated", "shared"),
    [
        ({}, ISOLATED, set()),
        ({"hostname": "h"}, ISOLATED, {"mnt", "uts"}),
        ({"net": "none"}, {*ISOLATED, "net"}, {"net"}),
        ({"bind": ["/etc /mnt"]}, ISOLATED, {"mnt"}),
        ({"resolv_conf": "nameserver 1.1.1.1"}, ISOLATED, {"mnt"}),
        ({"root_readonly": True}, ISOLATED, {"mnt"}),
        ({"unshare_on_exec": True}, ISOLATED, {"mnt"}),
        ({"virt_mode": "job"}, set(), set()),
    ],
    ids=_in_words,
)
def test_below_another(
    porto: Client, properties: dict[str, Any], isolated: set[str], shared: set[str], parent_isolate: bool
) -> None:
    start(porto, "p", isolate=parent_isolate)
    for isolate, expected in ((True, isolated), (False, shared)):
        start(porto, "p/a", isolate=isolate, **properties)
        assert own(porto, "p/a", root_pid(porto, "p")) == expected
        porto.destroy("p/a")


def test_a_root_takes_mounts_of_its_own(porto: Client, root: str) -> None:
    start(porto, "p", "")
    start(porto, "p/a", isolate=False, root=root)
    assert own(porto, "p/a", root_pid(porto, "p")) == {"mnt"}


@pytest.mark.parametrize("isolate", [True, False])
def test_a_meta_container_holds_them_for_its_children(porto: Client, isolate: bool) -> None:
    start(porto, "m", "", isolate=isolate, hostname="pod", net="none")
    start(porto, "m/a", isolate=False)
    start(porto, "m/b", isolate=True)
    assert own(porto, "m/a", root_pid(porto, "m")) == set()
    assert own(porto, "m/b", root_pid(porto, "m")) == ISOLATED
    assert run(porto, "m/c", ["hostname"]).stdout == "pod\n"


def test_the_host_is_not_for_everybody(porto: Client) -> None:
    start(porto, "p")
    where = "Cannot prepare start for container p/a"
    with refused(errors.Permission, f"{where}: For virt_mode=host parent must be in the same mode"):
        start(porto, "p/a", virt_mode="host", isolate=False)


class TestProcessIds:
    def test_isolated_there_is_an_init(self, porto: Client) -> None:
        start(porto, "a", shell("echo $$; tr '\\0' ' ' < /proc/1/cmdline; sleep 1000"))
        eventually(lambda: "portoinit" in porto.get_property("a", "stdout"))
        pid, init = porto.get_property("a", "stdout").split("\n")
        assert int(pid) > 1
        assert init.startswith("portoinit --container a")

    def test_it_reaps(self, porto: Client) -> None:
        script = shell("sh -c 'sleep 0.01 & exit'; sleep 0.2; ls -d /proc/[0-9]* | wc -l; grep -l Z /proc/*/stat; true")
        found = run(porto, "a", script)
        assert found.stdout.split() == [found.stdout.split()[0]]

    def test_in_os_mode_the_command_is_the_init(self, porto: Client, root: str) -> None:
        start(porto, "a", shell("echo $$ > /pid; sleep 1000"), virt_mode="os", root=root)
        eventually(lambda: Path(root, "pid").exists() and Path(root, "pid").read_text() == "1\n")

    def test_a_child_that_shares_sees_its_parents_processes(self, porto: Client) -> None:
        start(porto, "p", ["sleep", "4321"])
        assert "sleep 4321" in run(porto, "p/a", ["ps", "ax", "-o", "args"], isolate=False).lines
        assert "sleep 4321" not in run(porto, "p/b", ["ps", "ax", "-o", "args"], isolate=True).lines
