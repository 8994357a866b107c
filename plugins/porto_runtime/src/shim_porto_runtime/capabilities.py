"""Linux capabilities: names, masks, and what a container gets by CRI's rules."""

from __future__ import annotations

from collections.abc import Iterable

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument

# By number (capabilities(7)).
NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
_NUMBER = {name: number for number, name in enumerate(NAMES)}

DEFAULT = frozenset(
    {
        "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
        "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
    }
)  # fmt: skip
"""What a container has unless it asks otherwise: the set users know from other runtimes."""

INIT_NEEDS = frozenset({"CHOWN", "DAC_OVERRIDE", "SETGID", "SETPCAP", "SETUID", "SYS_ADMIN"})
"""What portoshim-init needs to set up a process; it drops them before the command runs."""


def mask(names: Iterable[str]) -> int:
    """The bit mask of a set of names."""
    return sum(1 << _NUMBER[name] for name in set(names))


def names(value: int) -> list[str]:
    """The names in a bit mask; numbers without a name are left out."""
    return [name for number, name in enumerate(NAMES) if value >> number & 1]


def wanted(security: pb.LinuxContainerSecurityContext) -> tuple[frozenset[str], frozenset[str]]:
    """The bounding set and the ambient set of a container.

    CRI: ``ALL`` may be added and dropped; explicit names apply after ``ALL``; an ambient capability is added to the
    other sets as well.

    :raises InvalidArgument: a name that Linux doesn't have.
    """
    capability = security.capabilities
    add = _parse(capability.add_capabilities, "add_capabilities")
    drop = _parse(capability.drop_capabilities, "drop_capabilities")
    ambient = _parse(capability.add_ambient_capabilities, "add_ambient_capabilities")
    if security.privileged:
        return frozenset(NAMES), frozenset()
    bounding = set(DEFAULT)
    if "ALL" in add:
        bounding = set(NAMES)
    if "ALL" in drop:
        bounding = set()
    # "ALL" on the other side has been dealt with; a capability both added and dropped by name is dropped.
    bounding |= (add | ambient) - {"ALL"}
    bounding -= drop
    return frozenset(bounding), frozenset(ambient - {"ALL"} if "ALL" not in ambient else bounding) & frozenset(bounding)


def _parse(given: Iterable[str], field: str) -> set[str]:
    found = set()
    for item in given:
        name = item.upper().removeprefix("CAP_")
        if name != "ALL" and name not in _NUMBER:
            raise InvalidArgument(f"linux.security_context.capabilities.{field}: no such capability: {item[:40]!r}")
        found.add(name)
    return found
