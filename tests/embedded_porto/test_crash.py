"""The daemon killed in the middle of an operation, at moments spread over all of it.

Afterwards the operation has either been carried out or not: nothing half made stays, nothing is lost, and it can be
repeated.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from porto_api import Client, errors
from tests.embedded_porto.daemon import Daemon
from tests.embedded_porto.operations import OPERATIONS, check, clear, finish, make_pod, root_of
from tests.porto.support import shell, spec, start

pytestmark = pytest.mark.root

POINTS = 5
"""How many moments of each operation are tried."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_in_the_middle(daemon: Daemon, archive: str, name: str) -> None:
    operation = OPERATIONS[name]
    with Client(daemon.socket, timeout_s=30) as porto:
        porto.import_layer("base", archive)
        daemon.end()
        daemon.start(crashing=True)
        make_pod(porto)
        daemon.arm(0)
        operation.do(porto, archive)
        calls = daemon.disarm()
        clear(porto)
        for point in range(POINTS):
            make_pod(porto)
            # The first call, the last, and some between.
            daemon.arm(1 + (calls - 1) * point // (POINTS - 1))
            _die(daemon, lambda: operation.do(porto, archive), surely=point < POINTS - 1)
            daemon.start(crashing=True)
            finish(daemon, porto, operation, archive)


def _die(daemon: Daemon, action: Callable[[], object], *, surely: bool) -> None:
    """Do something that the daemon doesn't survive.

    :param surely: False at its very end: this time it may take less calls.
    """
    try:
        action()
    except errors.PortoError:
        pass
    assert daemon.process is not None
    if not surely:
        daemon.process.kill()
    daemon.process.wait(timeout=60)
    daemon.disarm()


@pytest.mark.parametrize("seed", range(2))
def test_killed_while_much_is_going_on(daemon: Daemon, archive: str, seed: int) -> None:
    """Clients that make and remove containers all the time, and a daemon that is killed every now and then."""
    chance = random.Random(seed)
    with Client(daemon.socket, timeout_s=30) as porto:
        porto.import_layer("base", archive)
        over = threading.Event()
        clients = [threading.Thread(target=_live, args=(porto, f"pod{number}", over)) for number in range(4)]
        for client in clients:
            client.start()
        for _ in range(3):
            over.wait(chance.uniform(0.05, 0.4))
            daemon.restart()
        over.set()
        for client in clients:
            client.join()
        check(daemon, porto)
        for name in porto.list_containers():
            if "/" not in name:
                porto.destroy(name)
        assert porto.list_volumes() == []
        porto.remove_layer("base")


def _live(porto: Client, pod: str, over: threading.Event) -> None:
    while not over.is_set():
        try:
            start(porto, pod, "", hostname=pod)
            porto.create_from_spec(spec(f"{pod}/a", "sleep 1000"), [root_of(f"{pod}/a")], start=True)
            start(porto, f"{pod}/a/x", shell("exit 3"), isolate=False)
            assert porto.wait([f"{pod}/a/x"], 60).state == "dead"
            porto.destroy(pod)
        except errors.PortoError:
            _destroy_quietly(porto, pod)


def _destroy_quietly(porto: Client, pod: str) -> None:
    try:
        porto.destroy(pod)
    except errors.PortoError:
        pass  # not there, or the daemon isn't
