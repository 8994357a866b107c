"""Records: what is written is read, whatever happens to process, file or disk."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from shim_porto_runtime.names import new_id
from shim_porto_runtime.records import ContainerRecord, ContainerState, Records, SandboxRecord, SandboxState

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import AlreadyExists, InvalidArgument, ResourceExhausted


def sandbox(name: str = "web", **fields: Any) -> SandboxRecord:
    config = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name=name, namespace="shop", uid="u"))
    values: dict[str, Any] = {"id": new_id(), "config": config, "created_at": 5, "state": SandboxState.READY, **fields}
    return SandboxRecord(**values)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "records.db"


def test_records_outlive_the_process(path: Path) -> None:
    record = sandbox(network={"addresses": ["10.0.0.1"]})
    record.config.annotations["a\nü"] = "x" * 200_000
    other = ContainerRecord(new_id(), record.id, pb.ContainerConfig(), 7, ContainerState.CREATED)
    records = Records(path)
    records.sandboxes.insert(record)
    records.containers.insert(other)
    records.containers.update(other.id, state=ContainerState.EXITED, exit_code=3)
    records.close()
    again = Records(path)
    assert again.sandboxes.all() == [record]
    loaded = again.containers.get(other.id)
    assert loaded is not None
    assert (loaded.state, loaded.exit_code, loaded.created_at) == (ContainerState.EXITED, 3, 7)
    again.close()


def test_the_file_is_closed_to_others(path: Path) -> None:
    before = os.umask(0)
    try:
        Records(path).close()
    finally:
        os.umask(before)
    assert oct(path.stat().st_mode)[-3:] == "600"
    assert oct(path.parent.stat().st_mode)[-3:] == "700"


def test_one_key_one_record(path: Path) -> None:
    records = Records(path)
    first = sandbox()
    records.sandboxes.insert(first)
    with pytest.raises(AlreadyExists, match=first.id):
        records.sandboxes.insert(sandbox())
    assert records.sandboxes.by_key(first.key) is first
    records.sandboxes.delete(first.id)
    records.sandboxes.insert(sandbox())
    records.close()


def test_an_update_expects_a_state(path: Path) -> None:
    records = Records(path)
    record = sandbox()
    records.sandboxes.insert(record)
    assert records.sandboxes.update(record.id, expect=SandboxState.NOTREADY, reason="x") is None
    assert records.sandboxes.update(new_id(), reason="x") is None
    updated = records.sandboxes.update(record.id, expect=SandboxState.READY, reason="y")
    assert updated is not None
    assert updated.reason == "y"
    records.close()


def test_short_ids(path: Path) -> None:
    records = Records(path)
    one, two = sandbox("one", id="ab" + "0" * 62), sandbox("two", id="ac" + "0" * 62)
    records.sandboxes.insert(one)
    records.sandboxes.insert(two)
    assert records.sandboxes.find("ab") is one
    assert records.sandboxes.find("ff") is None
    for text in ("", "*", "self", "a" * 65, str(uuid.uuid4())):
        assert records.sandboxes.find(text) is None
    with pytest.raises(InvalidArgument, match="2 ids begin with this"):
        records.sandboxes.find("a")
    records.close()


def test_a_damaged_record_costs_only_itself(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = Records(path)
    made = [sandbox(str(n)) for n in range(5)]
    for record in made:
        records.sandboxes.insert(record)
    records.close()
    damage = ["{", '{"state": "no such state"}', "null", '{"state": "ready", "surprise": 1}']
    with sqlite3.connect(path) as connection:
        for record, text in zip(made, damage, strict=False):
            connection.execute("UPDATE sandboxes SET status = ? WHERE id = ?", (text, record.id))
    connection.close()
    again = Records(path)
    assert again.sandboxes.all() == [made[4]]
    assert all(record.id in caplog.text for record in made[:4])
    again.close()


@pytest.mark.parametrize("damage", ["truncated", "zeros", "noise", "text"])
def test_a_damaged_file_is_put_aside(path: Path, damage: str) -> None:
    records = Records(path)
    for n in range(50):
        records.sandboxes.insert(sandbox(str(n)))
    records.close()
    size = path.stat().st_size
    noise = random.Random(1).randbytes(size)
    path.write_bytes(
        {"truncated": path.read_bytes()[: size // 2], "zeros": b"\0" * size, "noise": noise, "text": b"hi"}[damage]
    )
    again = Records(path)
    again.sandboxes.insert(sandbox("new"))
    again.close()
    assert list(path.parent.glob("records.db.corrupt-*"))


def test_kill_9_loses_nothing_that_was_said_to_be_written(path: Path) -> None:
    script = """
import sys
from contextlib import suppress
from pathlib import Path
from tests.porto_runtime.test_records import sandbox
from shim_porto_runtime.records import Records
records = Records(Path(sys.argv[1]))
for n in range(100000):
    record = sandbox(str(n))
    records.sandboxes.insert(record)
    print(record.id, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline().strip() for _ in range(200)]
        process.send_signal(signal.SIGKILL)
        said += [line.strip() for line in process.stdout if line.endswith("\n")]
    records = Records(path)
    assert {record.id for record in records.sandboxes.all()} >= set(said)
    records.close()


@pytest.mark.root
def test_a_full_disk_leaves_the_old_record(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], check=True)
    records = Records(mount / "records.db")
    kept = sandbox("kept")
    records.sandboxes.insert(kept)
    filler = mount / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    big = sandbox("big")
    big.config.annotations["a"] = "x" * 2_000_000
    with pytest.raises(ResourceExhausted, match="can't be written"):
        records.sandboxes.insert(big)
    assert records.sandboxes.all() == [kept]
    filler.unlink()
    records.sandboxes.insert(big)
    records.close()
    again = Records(mount / "records.db")
    assert [r.id for r in again.sandboxes.all()] == [kept.id, big.id]
    again.close()
    subprocess.run(["umount", str(mount)], check=True)
