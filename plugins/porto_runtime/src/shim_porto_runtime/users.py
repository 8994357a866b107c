"""Users and groups of an image, from files that nobody vouches for.

``/etc/passwd`` and ``/etc/group`` are opened inside the root filesystem (no symlink leads out of it), have to be
regular files, and are read up to a limit: an image may hold a FIFO, a device or gigabytes there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument
from shim_porto_runtime import rootfs

MAX_FILE_BYTES = 10 * 1024 * 1024
MAX_ID = 2**31 - 1
"""Greater ones have wrapped to 0 in other runtimes."""
MAX_GROUPS = 65535
"""NGROUPS_MAX, less the primary group."""


@dataclass(frozen=True, slots=True)
class User:
    """Whom a process runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    """Supplementary groups, sorted, the primary one among them, as login has them: a setgid program keeps it."""
    home: str = "/"


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int
    home: str


Security = pb.LinuxContainerSecurityContext | pb.LinuxSandboxSecurityContext
_FIELD = "linux.security_context"


def check(security: Security) -> None:
    """Refuse what is no user, whatever the image says.

    :raises InvalidArgument: a field that can't be honoured.
    """
    name = getattr(security, "run_as_username", "")
    if security.HasField("run_as_user"):
        check_id(security.run_as_user.value, f"{_FIELD}.run_as_user")
        if name:
            raise InvalidArgument(f"{_FIELD}.run_as_username: can't be given together with run_as_user")
    if security.HasField("run_as_group"):
        check_id(security.run_as_group.value, f"{_FIELD}.run_as_group")
        if not security.HasField("run_as_user") and not name:
            raise InvalidArgument(f"{_FIELD}.run_as_group: needs run_as_user beside it")
    for gid in security.supplemental_groups:
        check_id(gid, f"{_FIELD}.supplemental_groups")
    if len(security.supplemental_groups) > MAX_GROUPS:
        raise InvalidArgument(f"{_FIELD}.supplemental_groups: more than {MAX_GROUPS}")
    if security.supplemental_groups_policy not in pb.SupplementalGroupsPolicy.values():
        raise InvalidArgument(f"{_FIELD}.supplemental_groups_policy: {security.supplemental_groups_policy} is none")


def resolve(security: Security, image_user: str, root: str) -> User:
    """The user of a container, or of a sandbox's own process.

    CRI: ``run_as_user`` or else ``run_as_username`` or else the image's USER; ``run_as_group`` or else the user's own;
    the groups the image gives the user (policy Merge) and ``supplemental_groups``.

    :param security: it has been checked. :param root: the path of the container's root filesystem.
    :raises InvalidArgument: a name the image doesn't know; an id of the image out of range.
    """
    has_uid = security.HasField("run_as_user")
    by_name = getattr(security, "run_as_username", "")
    group = ""
    if has_uid:
        name = str(security.run_as_user.value)
    elif by_name:
        name = by_name
    else:
        name, _, group = image_user.partition(":")
    if security.HasField("run_as_group"):
        group = str(security.run_as_group.value)

    field = f"{_FIELD}.run_as_username" if by_name else "USER of the image"
    account = _account(name or "0", root, field, is_number=has_uid)
    gid = account.gid if not group else _group(group, root)
    groups = set(security.supplemental_groups)
    if security.supplemental_groups_policy == pb.Merge and account.name:
        groups |= {found for _, found, members in _groups(root) if account.name in members}
    return User(account.uid, gid, tuple(sorted(groups | {gid})), account.home)


def check_id(value: int, field: str) -> int:
    """An id in range.

    :raises InvalidArgument: it isn't.
    """
    if not 0 <= value <= MAX_ID:
        raise InvalidArgument(f"{field}: {value} is out of range 0..{MAX_ID}")
    return value


def _account(name: str, root: str, field: str, *, is_number: bool) -> _Account:
    """The account of a name or number; a number the image doesn't know belongs to group 0."""
    if _is_number(name):
        uid = check_id(int(name), field)
        for account in _accounts(root):
            if account.uid == uid:
                return account
        return _Account("", uid, 0, "/")
    if not is_number:
        for account in _accounts(root):
            if account.name == name:
                return account
    raise InvalidArgument(f"{field}: {name[:64]!r} is not in the image's /etc/passwd")


def _group(name: str, root: str) -> int:
    if _is_number(name):
        return check_id(int(name), "group of the image's USER")
    for known, gid, _ in _groups(root):
        if known == name:
            return gid
    raise InvalidArgument(f"USER of the image: group {name[:64]!r} is not in the image's /etc/group")


def _is_number(name: str) -> bool:
    # More digits than these are out of range anyway, and slow to convert.
    return name.isdecimal() and name.isascii() and len(name) <= 64


def _accounts(root: str) -> Iterator[_Account]:
    for fields in _lines(root, "/etc/passwd"):
        if len(fields) >= 4 and (uid := _number(fields[2])) is not None and (gid := _number(fields[3])) is not None:
            home = fields[5] if len(fields) > 5 and fields[5] else "/"
            yield _Account(fields[0], uid, gid, home)


def _groups(root: str) -> Iterator[tuple[str, int, frozenset[str]]]:
    for fields in _lines(root, "/etc/group"):
        if len(fields) >= 3 and (gid := _number(fields[2])) is not None:
            yield fields[0], gid, frozenset(fields[3].split(",") if len(fields) > 3 else ())


def _number(text: str) -> int | None:
    """An id of the file; None for what is none, so that such a line is passed over."""
    value = int(text) if text.isdecimal() and text.isascii() and len(text) <= 10 else -1
    return value if 0 <= value <= MAX_ID else None


def _lines(root: str, path: str) -> Iterator[list[str]]:
    try:
        # Without O_NONBLOCK a FIFO would hang us.
        fd = rootfs.open_inside(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return
    except OSError as err:
        raise InvalidArgument(f"{path} of the image can't be read: {err.strerror}") from err
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidArgument(f"{path} of the image is no regular file")
    with os.fdopen(fd, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgument(f"{path} of the image is larger than {MAX_FILE_BYTES} bytes")
    for line in data.decode("utf-8", "surrogateescape").split("\n"):
        if line and not line.startswith("#"):
            yield line.rstrip("\r").split(":")
