"""Users of an image, and images that are out to harm whoever looks them up."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from shim_porto_runtime import users
from shim_porto_runtime.users import User

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument

PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:100:Web:/srv:/bin/sh\n#x:x:5:5\nbad line\nnine:x:99999999999:0::/:\n"
)
GROUP = "root:x:0:\nusers:x:100:\nlogs:x:200:web,other\naudio:x:300:web\nweb2:x:400:webb\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    return tmp_path


def security(**fields: Any) -> pb.LinuxContainerSecurityContext:
    for name in ("run_as_user", "run_as_group"):
        if name in fields:
            fields[name] = pb.Int64Value(value=fields[name])
    return pb.LinuxContainerSecurityContext(**fields)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("", User(0, 0, (0,), "/root")),
        ("web", User(1000, 100, (100, 200, 300), "/srv")),
        ("1000", User(1000, 100, (100, 200, 300), "/srv")),
        ("1000:200", User(1000, 200, (200, 300), "/srv")),
        ("web:logs", User(1000, 200, (200, 300), "/srv")),
        ("4242", User(4242, 0, (0,), "/")),
        ("4242:4343", User(4242, 4343, (4343,), "/")),
    ],
)
def test_the_images_user(root: Path, image: str, expected: User) -> None:
    assert users.resolve(security(), image, str(root)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"run_as_user": 1000}, User(1000, 100, (100, 200, 300), "/srv")),
        ({"run_as_user": 0}, User(0, 0, (0,), "/root")),
        ({"run_as_user": 5, "run_as_group": 6}, User(5, 6, (6,), "/")),
        ({"run_as_username": "web"}, User(1000, 100, (100, 200, 300), "/srv")),
        ({"run_as_username": "web", "run_as_group": 7}, User(1000, 7, (7, 200, 300), "/srv")),
        ({"run_as_user": 1000, "supplemental_groups": [7, 200]}, User(1000, 100, (7, 100, 200, 300), "/srv")),
        (
            {"run_as_user": 1000, "supplemental_groups": [7], "supplemental_groups_policy": pb.Strict},
            User(1000, 100, (7, 100), "/srv"),
        ),
    ],
)
def test_the_pods_user_wins(root: Path, fields: dict[str, object], expected: User) -> None:
    assert users.resolve(security(**fields), "root", str(root)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"run_as_group": 5}, "run_as_group: needs run_as_user"),
        ({"run_as_user": -1}, "run_as_user: -1 is out of range"),
        ({"run_as_user": 2**31}, "run_as_user: 2147483648 is out of range"),
        ({"run_as_user": 0, "run_as_username": "web"}, "run_as_username: can't be given together with run_as_user"),
        ({"run_as_user": 0, "run_as_group": 2**63 - 1}, "run_as_group: 9223372036854775807 is out of range"),
        ({"supplemental_groups": [2**32]}, "supplemental_groups: 4294967296 is out of range"),
        ({"supplemental_groups": range(70000)}, "supplemental_groups: more than 65535"),
        ({"supplemental_groups_policy": 7}, "supplemental_groups_policy: 7 is none"),
    ],
)
def test_what_no_image_could_have_is_named(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(InvalidArgument, match=expected):
        users.check(security(**fields))


@pytest.mark.parametrize(
    ("fields", "image", "expected"),
    [
        ({}, "4294967296", "out of range"),
        ({}, "2147483648", "out of range"),
        ({}, "1000:4294967296", "out of range"),
        ({}, "-1", "not in the image's /etc/passwd"),
        ({}, "nobody-there", "not in the image's /etc/passwd"),
        ({}, "nine", "not in the image's /etc/passwd"),
        ({}, "web:no-group", "not in the image's /etc/group"),
        ({"run_as_username": "²"}, "", "not in the image's /etc/passwd"),
    ],
)
def test_what_cant_be_honoured_is_named(root: Path, fields: dict[str, object], image: str, expected: str) -> None:
    with pytest.raises(InvalidArgument, match=expected):
        users.resolve(security(**fields), image, str(root))


def test_a_number_is_never_looked_up_as_a_name(root: Path) -> None:
    (root / "etc/passwd").write_text("4294967296:x:0:0::/:\n1234:x:0:0::/:\n")
    assert users.resolve(security(), "1234", str(root)).uid == 1234
    with pytest.raises(InvalidArgument, match="out of range"):
        users.resolve(security(), "4294967296", str(root))


def test_no_passwd_at_all(tmp_path: Path) -> None:
    assert users.resolve(security(), "", str(tmp_path)) == User(0, 0, (0,), "/")
    with pytest.raises(InvalidArgument, match="not in the image's /etc/passwd"):
        users.resolve(security(), "web", str(tmp_path))


def test_symlinks_stay_inside_the_root(root: Path) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("/elsewhere/passwd")
    (root / "elsewhere").mkdir()
    (root / "elsewhere/passwd").write_text("inside:x:77:77::/:\n")
    assert users.resolve(security(), "inside", str(root)).uid == 77
    (root / "elsewhere/passwd").unlink()
    (root / "elsewhere").rmdir()
    (root / "elsewhere").symlink_to("../../../../../../../../etc")
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("../elsewhere/passwd")
    with pytest.raises(InvalidArgument):  # a loop inside the root, and not the host's /etc/passwd
        users.resolve(security(), "daemon", str(root))


@pytest.mark.parametrize("kind", ["huge", "fifo", "directory", "device", "loop", "magic link"])
def test_a_hostile_file_is_refused_at_once(root: Path, kind: str) -> None:
    path = root / "etc/passwd"
    path.unlink()
    if kind == "huge":
        with path.open("wb") as file:
            file.truncate(2 * 1024**3)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        if os.geteuid() != 0:
            pytest.skip("making a device needs root")
        os.mknod(path, 0o020666, os.makedev(1, 5))  # /dev/zero
    elif kind == "loop":
        path.symlink_to("passwd")
    else:
        path.symlink_to("/proc/self/fd/0")
        (root / "proc").mkdir()
    started = time.monotonic()
    with pytest.raises(InvalidArgument):
        users.resolve(security(), "web", str(root))
    assert time.monotonic() - started < 30
