"""Process limits: ``nofile: 8K 1M; core: 0 unlimited``."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shim_embedded_porto import text
from shim_embedded_porto.errors import Fault, invalid_value

UNLIMITED = (1 << 64) - 1
_UNLIMITED_WORDS = ("unlimited", "unlim", "inf", "-1")
_NUMBERS = {
    "as": resource.RLIMIT_AS,
    "core": resource.RLIMIT_CORE,
    "cpu": resource.RLIMIT_CPU,
    "data": resource.RLIMIT_DATA,
    "fsize": resource.RLIMIT_FSIZE,
    "locks": 10,
    "memlock": resource.RLIMIT_MEMLOCK,
    "msgqueue": resource.RLIMIT_MSGQUEUE,
    "nice": resource.RLIMIT_NICE,
    "nofile": resource.RLIMIT_NOFILE,
    "nproc": resource.RLIMIT_NPROC,
    "rss": resource.RLIMIT_RSS,
    "rtprio": resource.RLIMIT_RTPRIO,
    "rttime": resource.RLIMIT_RTTIME,
    "sigpending": resource.RLIMIT_SIGPENDING,
    "stack": resource.RLIMIT_STACK,
}


@dataclass(frozen=True, slots=True)
class Ulimit:
    """One limit. ``inherited`` tells those of the container itself from those of its ancestors and of Porto."""

    name: str
    soft: int
    hard: int
    inherited: bool = False

    @property
    def number(self) -> int:
        """As setrlimit(2) counts it."""
        return _NUMBERS[self.name]

    def format(self) -> str:
        return f"{self.name}: {_format(self.soft)} {_format(self.hard)}"


def known(name: str) -> bool:
    return name in _NUMBERS


def parse(config: str) -> dict[str, Ulimit]:
    """``name: soft [hard]; ...``; without a hard limit the soft one is both.

    :raises Fault: InvalidValue.
    """
    limits: dict[str, Ulimit] = {}
    for line in (part.strip() for part in config.split(";")):
        if not line:
            continue
        name, separator, values = line.partition(":")
        name = name.strip()
        if not separator or name not in _NUMBERS:
            raise invalid_value(f"Invalid ulimit: {line}")
        soft_text, _, hard_text = values.strip().partition(" ")
        try:
            soft = _parse(soft_text)
            hard = _parse(hard_text.strip()) if hard_text.strip() else soft
        except Fault as fault:
            raise fault.within(f"Invalid ulimit: {line}") from None
        limits[name] = Ulimit(name, soft, hard)
    return limits


def format_all(limits: Iterable[Ulimit]) -> str:
    return "".join(f"{limit.format()}; " for limit in limits)


def _parse(word: str) -> int:
    return UNLIMITED if word in _UNLIMITED_WORDS else text.parse_size(word)


def _format(value: int) -> str:
    return "unlimited" if value >= UNLIMITED else str(value)


def defaults() -> dict[str, Ulimit]:
    """The root container's limits, which all others inherit."""
    limits = parse("core: 0 unlimited; nofile: 8K 1M")
    try:
        numbers = [int(Path("/proc/sys/kernel", name).read_text()) for name in ("pid_max", "threads-max")]
    except (OSError, ValueError):
        return limits
    limits["nproc"] = Ulimit("nproc", min(numbers) // 2, min(numbers) // 2)
    return limits
