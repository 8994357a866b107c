"""Sets of capabilities, as bit masks, and the sets Porto starts from."""

from __future__ import annotations

from pathlib import Path

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import text
from shim_embedded_porto.errors import invalid_value

NAMES = text.words(
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT "
    "SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP "
    "MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
)
_BITS = {name: 1 << number for number, name in enumerate(NAMES)}


def mask(*names: str) -> int:
    return sum(_BITS[name] for name in names)


MEMORY_CGROUP = mask("IPC_LOCK")
"""Meant for containers with a memory limit."""
PID_NAMESPACE = mask("KILL", "SYS_PTRACE")
NET_NAMESPACE = mask("NET_ADMIN")
DEFAULT = (
    MEMORY_CGROUP
    | PID_NAMESPACE
    | NET_NAMESPACE
    | mask("NET_BIND_SERVICE", "NET_RAW", "SETPCAP", "SETFCAP", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID")
    | mask("SETGID", "SETUID", "SYS_CHROOT", "MKNOD", "AUDIT_WRITE")
)
ROOT = DEFAULT | mask("SYS_ADMIN", "SYS_NICE", "LINUX_IMMUTABLE", "SYS_BOOT", "SYS_RESOURCE")
SET_UID_GID = mask("SETUID", "SETGID")


def every() -> int:
    """All that this kernel knows."""
    try:
        last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    except (OSError, ValueError):
        last = len(NAMES) - 1
    return (1 << (last + 1)) - 1


def names(caps: int) -> list[str]:
    return [name for name, bit in _BITS.items() if caps & bit]


def format_set(caps: int) -> str:
    known = names(caps)
    rest = caps & ~mask(*NAMES)
    return ";".join([*known, *([f"{rest:x}"] if rest else [])])


def parse(value: str) -> int:
    """``NET_ADMIN;SYS_PTRACE``.

    :raises Fault: InvalidValue names the word that is none.
    """
    caps = 0
    for word in (part.strip() for part in value.split(";")):
        if word and word not in _BITS:
            raise invalid_value(f'Unknown flag "{word}"')
        caps |= _BITS.get(word, 0)
    return caps


def parse_leniently(value: str) -> int:
    """As :func:`parse`, up to the first unknown word: Porto ignores the error when it sets ``capabilities``."""
    caps = 0
    for word in (part.strip() for part in value.split(";")):
        if word and word not in _BITS:
            break
        caps |= _BITS.get(word, 0)
    return caps


def from_message(message: pb.TCapabilities) -> int:
    for name in message.cap:
        if name not in _BITS:
            raise invalid_value(f"Unknown capability {name}")
    return sum(_BITS[name] for name in set(message.cap))


def dump(caps: int, out: pb.TCapabilities) -> None:
    out.cap.extend(names(caps))
    out.hex = f"{caps:016x}"
