"""SIGKILL at every step of ADD and DEL: after the next start, Stop and Remove give everything back.

With ``SHIM_TEST_LONG=1`` a hundred times at any moment, any line and any start of a plugin each; otherwise often
enough to notice what is broken.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim_core.errors import ShimError
from tests.cni_net import driver
from tests.cni_net.support import REAL_PLUGINS, Node, footprint, settles, until
from tests.cni_net.test_real_plugins import BANDWIDTH, FIREWALL, IPV4_BRIDGE, PORTMAP, TUNING

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path(REAL_PLUGINS, "bridge").exists(), reason="needs containernetworking-plugins"),
]

LONG = bool(os.environ.get("SHIM_TEST_LONG"))
MOMENTS = 100 if LONG else 15
LINES = 100 if LONG else 15
STARTS = 100 if LONG else 10
PLUGIN_CALLS = 10


@pytest.fixture
def node(tmp_path: Path) -> Node:
    node = driver.node(tmp_path)
    node.network(IPV4_BRIDGE, TUNING, BANDWIDTH, FIREWALL, PORTMAP)
    return node


@pytest.fixture
def before(node: Node) -> dict[str, Any]:
    """What the node looks like with no pod on it, after there has been one: plugins keep a few things for ever."""
    with node:
        node.attach(driver.POD)
        node.detach(driver.POD)
    assert until(lambda: not [name for name in _look(node)["interfaces"] if name.startswith("veth")])
    return _look(node)


@pytest.fixture
def daemons(node: Node) -> Iterator[driver.Driver]:
    made = driver.Driver(node.directory)
    yield made
    made.close()


def stop_and_remove(node: Node) -> None:
    """What kubelet does with a sandbox that isn't ready, after the daemon has started again."""
    with node:
        for _ in range(3):
            try:
                assert node.detach(driver.POD)
                break
            except ShimError as err:
                print(err)
        else:
            pytest.fail("the sandbox can't be stopped")
        assert node.detach(driver.POD), "stopping again is no error"
        assert node.status(driver.POD) is None


def _look(node: Node) -> dict[str, Any]:
    return footprint("/var/lib/cni", node.state)


def test_at_any_moment(node: Node, before: dict[str, Any], daemons: driver.Driver) -> None:
    with daemons.daemon() as daemon:
        assert daemon.hear() == "attach"
        started = time.monotonic()
        assert [daemon.hear(), daemon.hear()] == ["detach", "done"]
        whole_s = time.monotonic() - started
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    for number in range(MOMENTS):
        after_s = moments.uniform(0, whole_s)
        with daemons.daemon() as daemon:
            assert daemon.hear() == "attach"
            time.sleep(after_s)
            daemon.kill()
        stop_and_remove(node)
        after = settles(before, "/var/lib/cni", node.state)
        assert after == before, f"round {number}, seed {seed}: killed after {after_s * 1000:.1f} ms"


def test_at_any_line(node: Node, before: dict[str, Any], daemons: driver.Driver) -> None:
    with daemons.daemon("line 0") as daemon:
        assert [daemon.hear(), daemon.hear(), daemon.hear()] == ["attach", "detach", "done"]
        lines = int(daemon.hear())
    assert lines > 500
    seed = random.randrange(2**32)
    # One at a random place of each of so many equal parts: no stretch of the code is left out.
    part = lines / LINES
    choice = random.Random(seed)
    for number in range(LINES):
        line = max(1, int(number * part + choice.uniform(0, part)))
        with daemons.daemon(f"line {line}") as daemon:
            assert daemon.wait() in (-signal.SIGKILL, 0), "a few lines more or less are executed each time"
        stop_and_remove(node)
        after = settles(before, "/var/lib/cni", node.state)
        assert after == before, f"round {number}, seed {seed}: killed at line {line} of {lines}"


def test_while_a_plugin_is_being_started(node: Node, before: dict[str, Any], daemons: driver.Driver) -> None:
    """Between fork and exec the plugin's process looks like the daemon's, and goes on without it."""
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    for number in range(STARTS):
        call, after_s = number % PLUGIN_CALLS + 1, moments.uniform(0, 0.0015)
        with daemons.daemon(f"start {call}") as daemon:
            while (said := daemon.hear()) != "start":
                assert said in ("attach", "detach")
            # Too short for a timer.
            deadline = time.perf_counter() + after_s
            while time.perf_counter() < deadline:
                pass
            daemon.kill()
        stop_and_remove(node)
        after = settles(before, "/var/lib/cni", node.state)
        assert after == before, f"round {number}, seed {seed}: call {call}, killed after {after_s * 1e6:.0f} us"
