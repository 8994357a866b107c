"""Records on disk: whole, private, durable, and never a reason to forget a sandbox."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import stat
from pathlib import Path

import pytest
from shim_cni_net import netconf
from shim_cni_net.chain import Progress
from shim_cni_net.records import Attachment, Operation, Records

from shim_core.errors import InvalidArgument
from tests.cni_net.support import RESULT

NETWORK = netconf.parse_list(
    {
        "name": "net",
        "cniVersion": "1.0.0",
        "cniVersions": ["0.4.0"],
        "disableGC": True,
        "loadOnlyInlinedPlugins": True,
        "plugins": [{"type": "a", "capabilities": {"mac": True}, "deep": {"list": [1, 2.5, None, "ü"]}}, {"type": "b"}],
    },
    "/etc/cni/net.d/10.conflist",
)


def attachment(sandbox_id: str = "a" * 64) -> Attachment:
    return Attachment(
        sandbox_id=sandbox_id,
        pod="default/web",
        boot_id="boot",
        netns_path="/run/netns/x",
        networks=(NETWORK,),
        cni_args="A=1;B=2",
        capability_args={"mac": "02:00:00:00:00:01"},
        progress=(Progress(started=2, succeeded=1, result=RESULT),),
        attached=False,
        operation=Operation("run", 17),
    )


@pytest.fixture
def records(tmp_path: Path) -> Records:
    records = Records(str(tmp_path))
    assert records.open() is False
    return records


def reopened(tmp_path: Path) -> Records:
    records = Records(str(tmp_path))
    assert records.open() is True
    return records


def test_what_was_recorded_is_read_back(records: Records, tmp_path: Path) -> None:
    mine = attachment()
    records.add(mine)
    [found] = reopened(tmp_path).all()
    for name in set(mine.__slots__) - {"networks"}:
        assert getattr(found, name) == getattr(mine, name), name
    [network] = found.networks
    assert network.as_tree() == NETWORK.as_tree()
    assert network.versions == ("1.0.0", "0.4.0")
    assert network.plugins[0].tree == NETWORK.plugins[0].tree


def test_update_and_remove(records: Records, tmp_path: Path) -> None:
    mine = attachment()
    records.add(mine)
    later = dataclasses.replace(mine, attached=True, operation=None)
    records.update(later)
    assert records.get(mine.sandbox_id) == later
    [found] = reopened(tmp_path).all()
    assert found.attached
    assert found.operation is None
    records.remove(mine.sandbox_id)
    records.remove(mine.sandbox_id)
    assert records.get(mine.sandbox_id) is None
    assert reopened(tmp_path).all() == ()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        records = Records(str(tmp_path / "deep" / "state"))
        records.open()
        records.add(attachment())
    finally:
        os.umask(old)
    for path in (tmp_path / "deep", *(tmp_path / "deep").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_networks_of_many_pods_are_kept_once(records: Records, tmp_path: Path) -> None:
    for number in range(3):
        records.add(attachment(f"{number:064x}"))
    assert len({id(found.networks) for found in reopened(tmp_path).all()}) == 1


@pytest.mark.parametrize("directory", ["attachments", "progress"])
@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "random", "other json", "directory"])
def test_a_damaged_file_costs_neither_the_start_nor_the_sandbox(
    records: Records, tmp_path: Path, directory: str, damage: str
) -> None:
    mine, other = attachment("a" * 64), attachment("b" * 64)
    records.add(mine)
    records.add(other)
    [path] = (tmp_path / directory).glob(f"{mine.sandbox_id}.*")
    data = path.read_bytes()
    if damage == "directory":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut": data[: len(data) // 2],
                "zeros": bytes(len(data)),
                "random": random.Random(1).randbytes(len(data)),
                "other json": b'{"format": 1, "networks": [{"started": "x"}], "operation": 3}',
            }[damage]
        )
    found = {item.sandbox_id: item for item in reopened(tmp_path).all()}
    assert found.keys() == {mine.sandbox_id, other.sandbox_id}
    assert found[other.sandbox_id].progress == other.progress
    assert not found[mine.sandbox_id].attached
    if directory == "attachments":
        assert found[mine.sandbox_id].networks == ()
    else:
        assert found[mine.sandbox_id].progress == (Progress(started=2),), "any plugin may have run"


def test_half_written_and_orphaned_files_go(records: Records, tmp_path: Path) -> None:
    records.add(attachment())
    (tmp_path / "attachments" / "x.tmp").write_text("{")
    (tmp_path / "progress" / "x.tmp").write_text("{")
    (tmp_path / "progress" / "orphan.jsonl").write_text("{}")
    for name in ("notes.txt", "-x.json", f"{'a' * 64}.json~"):
        (tmp_path / "attachments" / name).write_text("somebody else's")
    assert [found.sandbox_id for found in reopened(tmp_path).all()] == ["a" * 64]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 5


def test_a_failed_write_leaves_the_old_record(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = attachment()
    records.add(mine)
    before = {path: path.read_bytes() for path in tmp_path.rglob("attachments/*")}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:20]))
        with pytest.raises(OSError, match=r"No space"):
            records.update(dataclasses.replace(mine, attached=True))
        with pytest.raises(OSError, match=r"No space"):
            records.add(attachment("c" * 64))
        patch.undo()
        patch.setattr(os, "rename", full)
        with pytest.raises(OSError, match=r"No space"):
            records.add(attachment("c" * 64))
    assert {path: path.read_bytes() for path in tmp_path.rglob("attachments/*")} == before
    assert records.get("c" * 64) is None
    [found] = reopened(tmp_path).all()
    assert (found.attached, found.progress[0].result, found.progress[0].started) == (False, RESULT, 2)
    # Behind the line that was cut short, the next one is whole.
    records.update(dataclasses.replace(mine, attached=True))
    [found] = reopened(tmp_path).all()
    assert found.attached


def test_the_last_line_counts_and_the_file_stays_small(records: Records, tmp_path: Path) -> None:
    mine = attachment()
    records.add(mine)
    [path] = (tmp_path / "progress").iterdir()
    largest = 0
    for number in range(1000):
        records.update(dataclasses.replace(mine, operation=Operation("run", number)))
        largest = max(largest, path.stat().st_size)
    assert largest < 80 * 1024
    [found] = reopened(tmp_path).all()
    assert found.operation == Operation("run", 999)
    assert found.progress == mine.progress


def test_behind_a_damaged_line_the_result_is_known_and_every_plugin_may_have_run(
    records: Records, tmp_path: Path
) -> None:
    mine = dataclasses.replace(attachment(), progress=(Progress(started=1, succeeded=1, result=RESULT),), attached=True)
    records.add(mine)
    [path] = (tmp_path / "progress").iterdir()
    with path.open("ab") as file:
        file.write(b"\n\0\0\0\0\n")
    [found] = reopened(tmp_path).all()
    assert not found.attached
    assert found.progress == (Progress(started=2, succeeded=1, result=RESULT),)


def test_an_intent_is_on_disk_before_add_returns(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    records.add(attachment())
    assert [Path(path).name for path in synced] == [f"{'a' * 64}.tmp", "attachments"]
    synced.clear()
    records.update(attachment())
    assert synced == [], "steps cost no sync"


@pytest.mark.parametrize("sandbox_id", ["", "../x", "a/b", ".hidden", "x" * 129, "a\n"])
def test_an_id_never_becomes_a_path(records: Records, sandbox_id: str) -> None:
    with pytest.raises(InvalidArgument):
        records.add(attachment(sandbox_id))


def test_a_newer_format_is_not_guessed_at(records: Records, tmp_path: Path) -> None:
    records.add(attachment())
    path = next((tmp_path / "attachments").iterdir())
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    [found] = reopened(tmp_path).all()
    assert found.networks == ()
