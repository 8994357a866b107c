"""Records brought up to date with what Porto says, while others change them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from shim_porto_runtime import states
from shim_porto_runtime.names import Names
from shim_porto_runtime.records import Records, SandboxState
from shim_porto_runtime.runtime import Runtime

from tests.porto_runtime.test_records import sandbox


@dataclass
class SlowPorto:
    """Answers with what there was when it was asked; something happens before the answer arrives."""

    there: dict[str, str] = field(default_factory=dict)
    meanwhile: Callable[[], object] = lambda: None
    asked: list[str] = field(default_factory=list)

    def get(self, names: Sequence[str], _variables: Sequence[str]) -> dict[str, dict[str, str]]:
        self.asked += names
        answer = {name: {"state": state} for name, state in self.there.items()}
        self.meanwhile()
        return answer


@dataclass
class Parts:
    """Of a Runtime what this needs."""

    records: Records
    porto: SlowPorto = field(default_factory=SlowPorto)
    names: Names = field(default_factory=lambda: Names(""))
    pause_image: str = "pause"


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    made = Parts(Records(tmp_path / "records.db"))
    yield made
    made.records.close()


@pytest.mark.parametrize("refresh", [states.refresh, states.refresh_sandboxes])
class TestRefresh:
    def test_a_sandbox_that_comes_up_meanwhile_is_ready(self, parts: Parts, refresh: Callable[[Runtime], Any]) -> None:
        record = sandbox(state=SandboxState.CREATING)
        parts.records.sandboxes.insert(record)
        parts.porto.meanwhile = lambda: parts.records.sandboxes.update(record.id, state=SandboxState.READY)
        refresh(cast("Runtime", parts))
        after = parts.records.sandboxes.get(record.id)
        assert after is not None
        assert (after.state, after.reason) == (SandboxState.READY, "")

    @pytest.mark.parametrize("down", ["", "/pause"])
    def test_one_that_is_down_is_not(self, parts: Parts, refresh: Callable[[Runtime], Any], down: str) -> None:
        record = sandbox()
        parts.records.sandboxes.insert(record)
        parts.porto.there = {record.id: "meta", f"{record.id}/pause": "running"}
        refresh(cast("Runtime", parts))
        assert parts.records.sandboxes.get(record.id) == record
        parts.porto.there[record.id + down] = "dead"
        refresh(cast("Runtime", parts))
        after = parts.records.sandboxes.get(record.id)
        assert after is not None
        assert after.state is SandboxState.NOTREADY
        assert after.reason == f"{'pause' if down else record.id} is dead"


def test_who_lists_sandboxes_asks_for_nothing_else(parts: Parts) -> None:
    states.refresh_sandboxes(cast("Runtime", parts))
    assert parts.porto.asked == ["*", "*/pause"]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (0, 0),
        (7 << 8, 7),
        (255 << 8, 255),
        (signal.SIGKILL, 137),
        (signal.SIGTERM, 143),
        (signal.SIGSEGV, 139),
        (signal.SIGSEGV | 0x80, 139),
        (signal.SIGABRT | 0x80, 134),
        # What portod makes of a command that has exited with such a code.
        (163 - 34, 163),
        (171 - 34, 171),
        (177 - 34, 177),
        (195 - 34, 195),
    ],
)
def test_exit_codes(status: int, code: int) -> None:
    assert states.exit_code(status) == code
