"""Plugins that break in every way there is: the error names them, time is bounded, and everything comes back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim_core import testing
from shim_core.errors import Cancelled, Unavailable
from shim_core.types import PortMapping
from tests.cni_net.support import REAL_PLUGINS, FakePlugin, Node, clean_stage, footprint, sandbox, settles, until
from tests.cni_net.test_real_plugins import FIREWALL, IPV4_BRIDGE, PORTMAP, leases

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not Path(REAL_PLUGINS, "bridge").exists(), reason="needs containernetworking-plugins"),
]

ADD_TIMEOUT_S = 2.5
DEL_TIMEOUT_S = 4.0
"""For plugins that hang; the others have time."""
HANGS = "trap '' TERM INT HUP; setsid sleep 1000 & while :; do sleep 1000; done"
POD = sandbox(port_mappings=(PortMapping("tcp", 80, 31080),))
PASS_ON = "sed -e 's/.*\"prevResult\": //' -e 's/}$//' $call.stdin; exit 0"

# What the plugin does when it is asked to ADD -> what the error says of it.
BREAKS = {
    "exits": ("echo no route to nowhere >&2; exit 1", "no route to nowhere"),
    "says-why": (
        """printf '{"code": 7, "msg": "bad subnet", "details": "it is too small"}'; exit 1""",
        "bad subnet; it is too small; code 7 (exit status 1)",
    ),
    "garbage": ("echo hello, world; exit 0", "the output is not JSON"),
    "wrong-json": ("echo '[1, 2]'; exit 0", "the output is not a JSON object"),
    "no-address": ("""echo '{"cniVersion": "1.0.0", "ips": [{"address": "here"}]}'; exit 0""", "ips[0].address"),
    "gigabyte": ("head -c 1G /dev/zero; exit 0", "it printed more than 1048576 bytes and was killed"),
    "gigabyte-of-errors": ("{ head -c 1G /dev/zero; echo xxx; } >&2; exit 1", "standard error: xxx"),
    "nothing": ("exit 0", "nothing was printed where a result was expected"),
    "killed": ("kill -9 $$", "it was killed by signal 9"),
}


@pytest.fixture(scope="module", autouse=True)
def _clean_stage() -> Iterator[None]:
    """In place of the one for each test: what is left after a test shows in the next one's comparison."""
    yield
    clean_stage()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the node looks like with no pod on it, after there has been one: plugins keep a few things for ever."""
    with Node(tmp_path_factory.mktemp("before"), bin_dirs=[REAL_PLUGINS]) as node:
        node.network(IPV4_BRIDGE, FIREWALL, PORTMAP)
        node.attach(POD)
        node.detach(POD)
        assert until(lambda: not [name for name in look(node)["interfaces"] if name.startswith("veth")])
        return look(node)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path, bin_dirs=[REAL_PLUGINS]) as node:
        node.network(IPV4_BRIDGE, FIREWALL, "broken", PORTMAP)
        yield node


@pytest.fixture
def broken(node: Node) -> FakePlugin:
    broken = node.fake("broken")
    broken.on("ADD", PASS_ON)
    return broken


def look(node: Node) -> dict[str, Any]:
    return footprint("/var/lib/cni", node.state)


def processes() -> list[str]:
    """Command lines of the pod's plugin processes."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if f"CNI_CONTAINERID={POD.sandbox_id}" in Path("/proc", pid, "environ").read_text():
                found.append(Path("/proc", pid, "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.fixture
def impatient(node: Node) -> Node:
    """The node with little time for its plugins."""
    node.stop()
    node.tree["CNI"].update(AddTimeout=f"{ADD_TIMEOUT_S}s", DelTimeout=f"{DEL_TIMEOUT_S}s")
    return node.start()


@pytest.mark.parametrize("how", BREAKS)
def test_add(node: Node, broken: FakePlugin, before: dict[str, Any], how: str) -> None:
    fails_and_comes_back(node, broken, before, *BREAKS[how])


def test_add_that_hangs(impatient: Node, broken: FakePlugin, before: dict[str, Any]) -> None:
    started = time.monotonic()
    fails_and_comes_back(impatient, broken, before, HANGS, "it took too long and was killed")
    assert time.monotonic() - started < ADD_TIMEOUT_S + 10


def fails_and_comes_back(node: Node, broken: FakePlugin, before: dict[str, Any], shell: str, explanation: str) -> None:
    broken.on("ADD", shell)
    with pytest.raises(Unavailable) as caught:
        node.attach(POD)
    assert caught.value.message.startswith('plugin "broken" of network "net" failed (ADD): ')
    assert explanation in caught.value.message
    assert len(caught.value.message) < 4096
    assert processes() == []
    assert node.status(POD) is None
    assert leases(), "the address of the first plugin is still taken"
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before


@pytest.mark.parametrize("how", ["missing", "not-executable", "a-directory", "no-interpreter", "empty"])
def test_a_plugin_that_cannot_be_run(node: Node, broken: FakePlugin, before: dict[str, Any], how: str) -> None:
    path = broken.path
    path.unlink()
    if how == "a-directory":
        path.mkdir()
    elif how != "missing":
        path.write_text({"no-interpreter": "#!/no/such/shell\n", "empty": ""}.get(how, "#!/bin/sh\n"))
        path.chmod(0o644 if how == "not-executable" else 0o755)
    with pytest.raises(Unavailable, match=r'plugin "broken" of network "net" failed \(ADD\): ') as caught:
        node.attach(POD)
    assert str(node.bin) in caught.value.message
    assert node.detach(POD), "it has never run, so nothing of it is left"
    assert settles(before, "/var/lib/cni", node.state) == before


@pytest.mark.parametrize("type_", ["../broken", "..", "/bin/sh", "", "a/b", "broken:x"])
def test_a_type_that_is_a_path_is_never_run(node: Node, broken: FakePlugin, type_: str) -> None:
    before = look(node)
    node.bin.parent.joinpath("broken").symlink_to(broken.path)
    for plugin in ({"type": type_}, {"type": "broken", "ipam": {"type": type_ or "../x"}}):
        path = node.network(plugin)
        with pytest.raises(Unavailable, match=r"the pod network is not ready") as caught:
            node.attach(POD)
        assert str(path) in caught.value.message
        assert "type" in caught.value.message
        [condition] = node.manager.hook.runtime_conditions(context=testing.context())
        assert not condition.status
        assert str(path) in condition.message
    assert broken.calls() == []
    assert node.detach(POD)
    assert look(node) == before


def test_delete_that_fails_three_times_is_tried_until_it_succeeds(
    node: Node, broken: FakePlugin, before: dict[str, Any]
) -> None:
    node.attach(POD)
    held = leases()
    counter = node.directory / "counter"
    broken.on("DEL", f"echo x >> {counter}; [ $(wc -l < {counter}) -gt 3 ] || {{ echo not now >&2; exit 1; }}")
    for _ in range(3):
        with pytest.raises(Unavailable, match=r'plugin "broken" of network "net" failed \(DEL\).*not now'):
            node.detach(POD)
        assert leases() == held, "the plugins before it wait for it: what it has set up leads to their addresses"
        assert node.status(POD) is None
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before
    # Each time in reverse order, with the result of ADD.
    assert all(call.stdin["prevResult"]["ips"] for call in broken.calls("DEL")[-4:])


@pytest.mark.parametrize("how", ["exits", "says-why", "gigabyte", "killed"])
def test_delete(node: Node, broken: FakePlugin, before: dict[str, Any], how: str) -> None:
    shell, explanation = BREAKS[how]
    node.attach(POD)
    held = leases()
    broken.on("DEL", shell)
    for _ in range(3):
        with pytest.raises(Unavailable) as caught:
            node.detach(POD)
        assert caught.value.message.startswith('plugin "broken" of network "net" failed (DEL): ')
        assert explanation in caught.value.message
        assert processes() == []
        assert leases() == held
    broken.on("DEL", None)
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before


@pytest.mark.parametrize("how", ["garbage", "nothing"])
def test_what_delete_prints_is_nothing_to_us(node: Node, broken: FakePlugin, before: dict[str, Any], how: str) -> None:
    """CNI: on success nothing has to be printed, and whatever is has no meaning."""
    node.attach(POD)
    broken.on("DEL", BREAKS[how][0])
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before


def test_delete_that_hangs(impatient: Node, broken: FakePlugin, before: dict[str, Any]) -> None:
    node = impatient
    node.attach(POD)
    held = leases()
    broken.on("DEL", HANGS)
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r'"broken" of network "net" failed \(DEL\): it took too long and was killed'):
        node.detach(POD)
    assert time.monotonic() - started < DEL_TIMEOUT_S + 10
    assert processes() == []
    assert leases() == held
    broken.on("DEL", None)
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before


def test_retries_survive_restarts(node: Node, broken: FakePlugin, before: dict[str, Any]) -> None:
    node.attach(POD)
    broken.on("DEL", "exit 1")
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"broken"):
            node.detach(POD)
        node.stop()
        node.start()
    broken.on("DEL", None)
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before


@pytest.mark.parametrize("shell", ["exit 1", HANGS], ids=["exits", "hangs"])
def test_a_plugin_that_always_breaks_holds_no_address_of_others(
    impatient: Node, broken: FakePlugin, before: dict[str, Any], shell: str
) -> None:
    node = impatient
    for command in ("ADD", "DEL"):
        broken.on(command, shell)
    with pytest.raises(Unavailable, match=r"ADD"):
        node.attach(POD)
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"DEL"):
        node.detach(POD)
    assert time.monotonic() - started < DEL_TIMEOUT_S + 10
    assert leases() == []
    broken.on("DEL", None)
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before


def test_a_plugin_that_has_vanished_since_add_is_waited_for(
    node: Node, broken: FakePlugin, before: dict[str, Any]
) -> None:
    node.attach(POD)
    held = leases()
    away = broken.path.with_name("away")
    broken.path.rename(away)
    with pytest.raises(Unavailable, match=f'the plugin "broken" is not in {node.bin}'):
        node.detach(POD)
    assert leases() == held
    away.rename(broken.path)
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before


def test_a_plugin_that_knows_no_such_container_has_nothing_left(
    node: Node, broken: FakePlugin, before: dict[str, Any]
) -> None:
    node.attach(POD)
    broken.on("DEL", """echo '{"code": 3, "msg": "no such container"}'; exit 1""")
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before


def test_a_cancelled_call_ends_the_plugin(node: Node, broken: FakePlugin, before: dict[str, Any]) -> None:
    broken.on("ADD", "touch $0.running; sleep 1000")
    context = testing.context()
    started = broken.path.with_name("broken.running")

    def cancel() -> None:
        if until(started.exists):
            context.cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(Cancelled, match=r"broken"):
        node.attach(POD, context)
    canceller.join()
    assert processes() == []
    # The client's context is cancelled, and yet DEL has its own time.
    assert node.detach(POD, context)
    assert settles(before, "/var/lib/cni", node.state) == before


def test_the_time_the_client_has_left_bounds_add(node: Node, broken: FakePlugin, before: dict[str, Any]) -> None:
    broken.on("ADD", "sleep 1000")
    context = testing.context().for_cleanup(timeout_s=0.5)
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"too long"):
        node.attach(POD, context)
    assert time.monotonic() - started < 2
    assert node.detach(POD, context), "although no time is left"
    assert settles(before, "/var/lib/cni", node.state) == before


def test_it_works_once_the_plugin_does(node: Node, broken: FakePlugin, before: dict[str, Any]) -> None:
    broken.on("ADD", "exit 1")
    with pytest.raises(Unavailable, match=r"broken"):
        node.attach(POD)
    assert node.detach(POD)
    broken.on("ADD", PASS_ON)
    assert node.attach(POD).addresses
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before


def test_attach_after_a_failed_attach_deletes_first(node: Node, broken: FakePlugin, before: dict[str, Any]) -> None:
    broken.on("ADD", "exit 1")
    with pytest.raises(Unavailable, match=r"broken"):
        node.attach(POD)
    broken.on("ADD", PASS_ON)
    attachment = node.attach(POD)
    assert [call.command for call in broken.calls()][-3:] == ["ADD", "DEL", "ADD"]
    assert len(leases()) == len(attachment.addresses)
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before


def test_a_result_without_addresses_is_an_error(node: Node, broken: FakePlugin, before: dict[str, Any]) -> None:
    node.network(IPV4_BRIDGE, "broken")
    broken.on("ADD", None)
    broken.returns({"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "x"}]})
    with pytest.raises(Unavailable, match=r'network "net" \(bridge, broken\) gave eth0 no address'):
        node.attach(POD)
    assert node.detach(POD)
    assert settles(before, "/var/lib/cni", node.state) == before


@pytest.mark.parametrize("how", ["unpinned", "plain file", "nothing"])
def test_a_namespace_that_has_vanished_is_no_obstacle(
    node: Node, broken: FakePlugin, before: dict[str, Any], how: str
) -> None:
    # Without ipMasq: its rules can't be found without the interface, whoever asks the plugin.
    node.network({**IPV4_BRIDGE, "ipMasq": False}, FIREWALL, "broken", PORTMAP)
    attachment = node.attach(POD)
    path = attachment.netns_path
    node.networking.namespaces.remove(path)
    if how == "plain file":
        Path(path).touch()
    elif how == "unpinned":
        node.networking.namespaces.create(path)
        os.system(f"umount {path}")  # noqa: S605
    assert node.detach(POD)
    assert broken.calls("DEL")[-1].netns == ""
    assert settles(before, "/var/lib/cni", node.state) == before
