"""Clients that aren't root: what the group ``porto`` may do, and to whom."""

from __future__ import annotations

import grp
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from porto_api import Client, errors
from tests.porto.conftest import UnderTest
from tests.porto.support import refused, run, start

NOBODY = 65534

AsUser = Callable[[int], Client]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[int]:
    """The id of the group ``porto``; made for the time of the test where there is none."""
    try:
        yield grp.getgrnam("porto").gr_gid
        return
    except KeyError:
        pass
    (tmp_path / "group").write_text(Path("/etc/group").read_text() + "porto:x:4000:\n")
    subprocess.run(["mount", "--bind", tmp_path / "group", "/etc/group"], check=True)
    try:
        yield 4000
    finally:
        subprocess.run(["umount", "/etc/group"], check=True)


@pytest.fixture
def nobody(porto: Client, under_test: UnderTest) -> Iterator[AsUser]:
    """A client of the user nobody's, in a group."""
    made: list[Client] = []

    def connect(gid: int) -> Client:
        client = Client(under_test.socket, timeout_s=60)
        made.append(client)
        groups = os.getgroups()
        try:
            os.setgroups([])
            os.setegid(gid)
            os.seteuid(NOBODY)
            client.version()  # the connection stays, and whose it is
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(groups)
        return client

    yield connect
    for client in made:
        client.close()


def test_others_only_look(porto: Client, nobody: AsUser) -> None:
    user = nobody(NOBODY)
    start(porto, "a", "")
    assert user.list_containers() == ["a"]
    with refused(errors.Permission, "Write access denied"):
        user.create("b")
    with refused(errors.Permission, "Write access denied"):
        user.destroy("a")


def test_what_the_group_makes_is_its_own(porto: Client, group: int, nobody: AsUser) -> None:
    user = nobody(group)
    found = run(user, "a", ["id", "-u"])
    assert found.stdout == f"{NOBODY}\n"
    start(user, "a")
    assert [user.get_property("a", name) for name in ("user", "owner_user")] == ["nobody", "nobody"]
    with refused(errors.Permission, "Write access denied: root container is read-only"):
        user.set_property("/", "private", "x")
    start(porto, "b")
    with pytest.raises(errors.Permission):
        user.destroy("b")
    with pytest.raises(errors.Permission):
        user.create("b/x")
    user.destroy("a")


class TestBinds:
    @pytest.fixture
    def own(self, tmp_path: Path) -> Path:
        """A directory of the user's, which everybody finds."""
        below = Path(tempfile.gettempdir())
        for path in (tmp_path, *(above for above in tmp_path.parents if below in above.parents)):
            path.chmod(0o755)
        made = tmp_path / "own"
        made.mkdir()
        (made / "file").write_text("hello\n")
        for path in (made, made / "file"):
            os.chown(path, NOBODY, NOBODY)
        return made

    def test_own_files(self, group: int, nobody: AsUser, own: Path) -> None:
        (own / "target").mkdir()
        os.chown(own / "target", NOBODY, NOBODY)
        binds = [f"{own} {own}/target ro", f"{own} {own}/new/place"]
        script = ["cat", f"{own}/target/file", f"{own}/new/place/file"]
        assert run(nobody(group), "a", script, bind=binds).stdout == "hello\nhello\n"

    @pytest.mark.parametrize(("target", "named"), [("/mnt", "/mnt"), ("/not/there", "/")])
    def test_over_the_machines(self, group: int, nobody: AsUser, own: Path, target: str, named: str) -> None:
        who = f"nobody:{grp.getgrgid(group).gr_name}"
        with refused(errors.Permission, f"Bindmount target {target}: {who} has no write access to {named}"):
            start(nobody(group), "a", bind=[f"{own} {target} ro"])

    def test_the_machines(self, group: int, nobody: AsUser, own: Path) -> None:
        who = f"nobody:{grp.getgrgid(group).gr_name}"
        with refused(errors.Permission, f"Bindmount source /root: {who} has no write access to /root"):
            start(nobody(group), "a", bind=[f"/root {own} ro"])
        with refused(errors.Permission, f"Bindmount source /etc/passwd: {who} has no write access to /etc/passwd"):
            start(nobody(group), "a", bind=[f"/etc/passwd {own}/file"])

    def test_over_what_programs_in_a_root_rely_on(self, root: str, group: int, nobody: AsUser, own: Path) -> None:
        user = nobody(group)
        with pytest.raises(errors.Permission, match=r"Bindmount target /bin: nobody:.* has no write access to .*/bin"):
            start(user, "a", root=root, bind=[f"{own} /bin ro"])
        start(user, "a", root=root, bind=[f"{own} /mnt ro", f"{own} /etc/new ro"])
