"""Devices a container may use: ``<device> [r][w][m][-][?] [path] [mode] [user] [group]; ...``."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import credentials, text
from shim_embedded_porto.credentials import Cred
from shim_embedded_porto.errors import Fault, invalid_value, permission, system


@dataclass(frozen=True, slots=True)
class Device:
    """One device node and what may be done with it."""

    path: str
    path_inside: str
    kind: str
    """``c`` or ``b``."""
    major: int
    minor: int
    access: frozenset[str]
    """Of ``r``, ``w``, ``m``; ``*`` is every minor number; ``?`` marks an optional one."""
    mode: int
    uid: int = 0
    gid: int = 0

    @property
    def node(self) -> str:
        return f"{self.major}:{'*' if '*' in self.access else self.minor}"

    @property
    def allowed(self) -> bool:
        return bool(self.access & {"r", "w", "m"})

    @property
    def makes_node(self) -> bool:
        """True when the node is created in the container."""
        return "m" in self.access and "*" not in self.access

    def format_access(self) -> str:
        words = "".join(letter for letter in "rwm*" if letter in self.access) or "-"
        return words + ("?" if "?" in self.access else "")

    def format(self) -> str:
        user, group = credentials.user_name(self.uid), credentials.group_name(self.gid)
        return f"{self.path} {self.format_access()} {self.path_inside} {text.format_octal(self.mode)} {user} {group}"

    def dump(self, out: pb.TContainerDevice) -> None:
        out.device, out.access, out.path = self.path, self.format_access(), self.path_inside
        out.mode = text.format_octal(self.mode)
        out.user, out.group = credentials.user_name(self.uid), credentials.group_name(self.gid)


Devices = tuple[Device, ...]


def _default(path: str, major: int, minor: int, access: str = "rwm") -> Device:
    return Device(path, path, "c", major, minor, frozenset(access), 0o666)


DEFAULT: Devices = (
    _default("/dev/null", 1, 3),
    _default("/dev/zero", 1, 5),
    _default("/dev/full", 1, 7),
    _default("/dev/random", 1, 8),
    _default("/dev/urandom", 1, 9),
    _default("/dev/tty", 5, 0),
    replace(_default("/dev/console", 1, 3), path="/dev/null"),
    _default("/dev/ptmx", 5, 2, "rw"),
    _default("/dev/pts/*", 136, 0, "rw*"),
)
"""What every container may use: the root container's devices."""


def parse(config: str, client: Cred) -> Devices:
    """Check a configuration against the machine's device nodes and the client's rights.

    :raises Fault: InvalidValue, Permission, DeviceNotFound.
    """
    devices = []
    for line in text.split_nested(config, " ", ";"):
        if line[0] == "preset" and len(line) == 2:
            raise invalid_value(f"Undefined device preset {line[1]}")
        device = parse_one(line, client)
        if device is not None:
            devices.append(device)
    return tuple(devices)


def from_messages(messages: Iterable[pb.TContainerDevice], client: Cred) -> Devices:
    devices = []
    for message in messages:
        words = [message.device, message.access]
        for field in ("path", "mode", "user", "group"):
            if not message.HasField(field):
                break
            words.append(getattr(message, field))
        device = parse_one(words, client)
        if device is not None:
            devices.append(device)
    return tuple(devices)


def parse_one(words: list[str], client: Cred) -> Device | None:
    """One device; None when it is optional and not there."""
    if len(words) < 2:
        raise invalid_value("Invalid device config: " + text.merge(words, " "))
    path = words[0]
    _check_path(path)
    access = {{"-": "?"}.get(letter, letter) for letter in words[1]}
    if access - set("rwm*?"):
        raise invalid_value(f"Invalid access: {words[1]}")
    if "*" in access and client.uid != 0:
        raise permission(f"{client} cannot setup wildcard {path}")
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if "?" in access:
            return None
        raise Fault(pb.DeviceNotFound, f"Device {path} does not exists") from None
    except OSError as err:
        raise system(err, f"stat {path}") from err
    if not stat.S_ISCHR(found.st_mode) and not stat.S_ISBLK(found.st_mode):
        if "?" in access:
            return None
        raise Fault(pb.DeviceNotFound, f"Not a device node: {path}")
    if access & {"r", "w"} and "*" not in access:
        access.add("m")  # the node is made in the container
    for letter, bit, verb in (("r", 4, "read"), ("w", 2, "write")):
        if letter in access and not _may(found, client, bit):
            raise permission(f"{client} cannot {verb} device {path}")
    device = Device(
        path,
        words[2] if len(words) > 2 else path,
        "b" if stat.S_ISBLK(found.st_mode) else "c",
        os.major(found.st_rdev),
        os.minor(found.st_rdev),
        frozenset(access),
        found.st_mode & 0o777,
        found.st_uid,
        found.st_gid,
    )
    _check_path(device.path_inside)
    return _with_owner(device, words[3:], client)


def _with_owner(device: Device, words: list[str], client: Cred) -> Device:
    owns = client.uid in (0, device.uid)
    if words:
        mode = text.parse_octal(words[0])
        if mode & ~0o777:
            raise invalid_value(f"invalid device mode: {words[0]}")
        if mode & ~device.mode and not owns:
            old, new = text.format_octal(device.mode), text.format_octal(mode)
            raise permission(f"{client} cannot change device {device.path} permissions {old} to {new}")
        device = replace(device, mode=mode)
    uid = credentials.user_id(words[1]) if len(words) > 1 else device.uid
    gid = credentials.group_id(words[2]) if len(words) > 2 else device.gid
    if (uid, gid) != (device.uid, device.gid) and not owns:
        raise permission(f"{client} cannot change the owner of device {device.path}")
    return replace(device, uid=uid, gid=gid)


def merge(base: Devices, other: Devices) -> Devices:
    """``base`` with ``other``'s devices in the place of those with the same path inside."""
    merged = {device.path_inside: device for device in base}
    merged.update({device.path_inside: device for device in other})
    return tuple(merged.values())


def covered(devices: Devices, by: Devices) -> bool:
    """True when ``by`` allows all that ``devices`` does."""
    known = {(device.kind, device.major, device.minor): device for device in reversed(by)}
    for device in devices:
        other = known.get((device.kind, device.major, device.minor))
        if device.allowed and (other is None or (device.access & set("rwm")) - other.access):
            return False
    return True


def rules(devices: Devices) -> frozenset[tuple[str, str, str]]:
    """Kind, node and one letter of access each: what the devices cgroup is told."""
    return frozenset(
        (device.kind, device.node, letter) for device in devices for letter in "rwm" if letter in device.access
    )


def format_all(devices: Devices) -> str:
    return "".join(f"{device.format()}; " for device in devices)


def _check_path(path: str) -> None:
    if os.path.normpath(path) != path:
        raise invalid_value(f"Non-normalized device path: {path}")
    if not path.startswith("/dev/"):
        raise invalid_value(f"Device path not in /dev: {path}")


def _may(found: os.stat_result, client: Cred, bit: int) -> bool:
    if client.uid == 0:
        return True
    if client.uid == found.st_uid:
        bit <<= 6
    elif client.member_of(found.st_gid):
        bit <<= 3
    return bool(found.st_mode & bit)
