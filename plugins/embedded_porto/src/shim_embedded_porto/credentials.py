"""Users and groups, by name and by number."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass, field, replace

from porto_api import rpc_pb2 as pb
from shim_embedded_porto.errors import Fault, invalid_value

NOBODY_KNOWN = 0xFFFFFFFF
"""The id that stands for "unknown"."""


def user_id(name: str) -> int:
    """A user's number; a number is itself.

    :raises Fault: InvalidValue.
    """
    if name[:1].isdigit() and name.isdigit() and int(name) < 1 << 31:
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        raise invalid_value(f"Cannot find user: {name}") from None


def group_id(name: str) -> int:
    if name[:1].isdigit() and name.isdigit() and int(name) < 1 << 31:
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise invalid_value(f"Cannot find group: {name}") from None


def user_name(uid: int) -> str:
    if uid == NOBODY_KNOWN:
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    if gid == NOBODY_KNOWN:
        return ""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


@dataclass(frozen=True, slots=True)
class Cred:
    """Who somebody is."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    given: str = field(default="", compare=False)
    """How the user was called: by number, or by one of several names."""

    @property
    def user(self) -> str:
        return self.given or user_name(self.uid)

    @property
    def group(self) -> str:
        return group_name(self.gid)

    @property
    def unknown(self) -> bool:
        return self.uid == NOBODY_KNOWN and self.gid == NOBODY_KNOWN

    def __str__(self) -> str:
        return f"{self.user}:{self.group}"

    def member_of(self, gid: int) -> bool:
        return gid != NOBODY_KNOWN and (gid == self.gid or gid in self.groups)

    def with_groups(self) -> Cred:
        """With the supplementary groups the user database gives; the own group alone for an unknown user."""
        try:
            entry = pwd.getpwuid(self.uid)
        except KeyError:
            return replace(self, groups=(self.gid,))
        return replace(self, groups=tuple(os.getgrouplist(entry.pw_name, self.gid)))

    def dump(self, out: pb.TCred) -> None:
        out.Clear()
        if self.uid != NOBODY_KNOWN:
            out.uid, out.user = self.uid, self.user
        if self.gid != NOBODY_KNOWN:
            out.gid, out.group = self.gid, self.group
        out.grp.extend(self.groups)

    def format(self) -> str:
        return " ".join(str(number) for number in (self.uid, self.gid, *self.groups))


ROOT = Cred(0, 0, (0,))
UNKNOWN = Cred(NOBODY_KNOWN, NOBODY_KNOWN)


def by_name(name: str) -> Cred:
    """A user of the user database, by name or number, with all groups.

    :raises Fault: InvalidValue: no such user.
    """
    try:
        entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except (KeyError, ValueError, OverflowError):
        raise invalid_value(f"Cannot find user: {name}") from None
    return replace(Cred(entry.pw_uid, entry.pw_gid).with_groups(), given=name)


def from_message(message: pb.TCred, base: Cred = UNKNOWN, *, strict: bool = True) -> Cred:
    """The credentials a message asks for; what it leaves out is the user's, or ``base``'s.

    :param strict: the user must exist and be in the group.
    :raises Fault: InvalidValue.
    """
    cred = base
    if message.HasField("user") or message.HasField("uid"):
        name = message.user if message.HasField("user") else str(message.uid)
        try:
            cred = replace(by_name(name), given="")
        except Fault:
            if strict:
                raise
            cred = replace(base, uid=user_id(name))
    elif not strict and cred.uid == NOBODY_KNOWN:
        raise invalid_value("user is not defined")
    if message.HasField("uid") and message.uid != cred.uid:
        raise invalid_value(f"user {message.user} uid is {cred.uid}, not {message.uid}")
    gid = cred.gid
    if message.HasField("group"):
        gid = group_id(message.group)
        if message.HasField("gid") and message.gid != gid:
            raise invalid_value(f"group {message.group} gid is {gid}, not {message.gid}")
    elif message.HasField("gid"):
        gid = message.gid
    if strict and cred.uid != 0 and not cred.member_of(gid):
        raise invalid_value(f"user {cred.user} not in group {group_name(gid)}")
    return replace(cred, gid=gid)


def parse(text: str) -> Cred:
    """What :meth:`Cred.format` wrote."""
    numbers = [int(word) for word in text.split()]
    return Cred(numbers[0], numbers[1], tuple(numbers[2:]))
