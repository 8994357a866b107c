"""What a failed call could not take back goes when it can."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from shim_porto_runtime import container, sandbox
from shim_porto_runtime.leftovers import Leftovers
from shim_porto_runtime.records import ContainerRecord, ContainerState, Records
from shim_porto_runtime.runtime import Directories, Runtime
from shim_porto_runtime.undo import Undo

from porto_api import errors
from shim_core.cri.v1 import api_pb2 as pb

OWNER = "a" * 64
SANDBOX = "b" * 64
NAME = f"{SANDBOX}/{OWNER}"


class Porto:
    def __init__(self) -> None:
        self.away = False
        self.containers = {NAME}

    def destroy(self, name: str) -> None:
        if self.away:
            raise errors.SocketUnavailable("can't connect")
        if name not in self.containers:
            raise errors.ContainerDoesNotExist("no such container")
        self.containers.remove(name)


@pytest.fixture
def porto() -> Porto:
    return Porto()


@pytest.fixture
def rt(tmp_path: Path, porto: Porto) -> Runtime:
    directories = Directories(tmp_path / "state", tmp_path / "volumes")
    directories.prepare()
    parts: dict[str, Any] = {
        "porto": porto,
        "directories": directories,
        "leftovers": Leftovers(),
        "records": Records(directories.records),
        "names": SimpleNamespace(container=lambda sandbox_id, container_id: f"{sandbox_id}/{container_id}"),
    }
    return cast("Runtime", SimpleNamespace(**parts))


def test_it_goes_when_porto_is_back(rt: Runtime, porto: Porto) -> None:
    rt.directories.root(OWNER).mkdir()
    rt.leftovers.add(OWNER, NAME)
    porto.away = True
    rt.leftovers.clear(rt)
    assert porto.containers == {NAME}
    assert rt.directories.root(OWNER).exists(), "nothing is removed below a container that may be there"
    porto.away = False
    rt.leftovers.clear(rt)
    assert porto.containers == set()
    assert not rt.directories.root(OWNER).exists()
    porto.away = True
    rt.leftovers.clear(rt)  # nothing to do


def test_what_is_in_use_is_tried_again(rt: Runtime, porto: Porto) -> None:
    busy = rt.directories.root(OWNER) / "mounted"
    busy.mkdir(parents=True)
    rt.leftovers.add(OWNER, NAME)
    rt.leftovers.clear(rt)
    assert porto.containers == set()
    assert busy.exists()
    busy.rmdir()
    rt.leftovers.clear(rt)
    assert not rt.directories.root(OWNER).exists()


@pytest.mark.parametrize("away", [False, True])
def test_a_call_that_fails_can_be_repeated(rt: Runtime, porto: Porto, away: bool) -> None:
    """Whatever could not be undone, it leaves no record that is in the way."""
    config = pb.ContainerConfig()
    record = ContainerRecord(id=OWNER, sandbox_id=SANDBOX, config=config, created_at=1, state=ContainerState.CREATING)
    rt.records.containers.insert(record)
    rt.directories.root(OWNER).mkdir()
    porto.away = away
    with suppress(ZeroDivisionError), Undo("CreateContainer") as undo:
        undo.add("forget the record", lambda: container._forget(rt, record, undo))
        undo.add("remove its directories", lambda: container._remove_files(rt, record.id))
        undo.add("destroy the Porto container", lambda: sandbox.destroy(rt, NAME))
        raise ZeroDivisionError
    assert rt.records.containers.by_key(record.key) is None
    porto.away = False
    rt.leftovers.clear(rt)
    assert porto.containers == set()
    assert not rt.directories.root(OWNER).exists()
