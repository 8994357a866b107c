"""Bind mounts: ``<source> <target> [flag,...]; ...``."""

from __future__ import annotations

from dataclasses import dataclass

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import text
from shim_embedded_porto.errors import invalid_value

# In the order Porto prints them.
_FLAGS = text.words(
    "rw ro suid nosuid dev nodev exec noexec sync remount mand dirsync noatime nodiratime bind move rec silent acl "
    "unbindable private slave shared relatime iversion strictatime lazyatime"
)
_ALLOWED = frozenset(
    text.words("rw ro suid nosuid dev nodev exec noexec rec private unbindable noatime nodiratime relatime")
)


@dataclass(frozen=True, slots=True)
class Bind:
    """One bind mount. Paths may be relative: the source to the parent's working directory, the target to the own."""

    source: str
    target: str
    flags: frozenset[str] = frozenset()

    @property
    def read_only(self) -> bool:
        return "ro" in self.flags

    def format_flags(self) -> str:
        return ",".join(flag for flag in _FLAGS if flag in self.flags)

    def dump(self, out: pb.TContainerBindMount) -> None:
        out.source, out.target = self.source, self.target
        out.flag.extend(flag for flag in _FLAGS if flag in self.flags)


def parse_flags(words: str) -> frozenset[str]:
    """``ro,nodev``.

    :raises Fault: InvalidValue: unknown, or not for bind mounts.
    """
    flags = {word for word in (part.strip() for part in words.split(",")) if word}
    for word in flags:
        if word not in _FLAGS:
            raise invalid_value(f'Unknown flag "{word}"')
    if flags - _ALLOWED:
        raise invalid_value("Not allowed flags " + ",".join(flag for flag in _FLAGS if flag in flags - _ALLOWED))
    return frozenset(flags)


def parse(config: str) -> tuple[Bind, ...]:
    binds = []
    for line in text.split_nested(config, " ", ";"):
        if len(line) < 2:
            raise invalid_value(f"Invalid bind mount {config}")
        binds.append(Bind(line[0], line[1], parse_flags(line[2]) if len(line) > 2 else frozenset()))
    return tuple(binds)


def from_message(message: pb.TContainerBindMount) -> Bind:
    flags: frozenset[str] = frozenset()
    for word in message.flag:
        flags |= parse_flags(word)
    return Bind(message.source, message.target, flags)


def format_all(binds: tuple[Bind, ...]) -> str:
    return text.merge_nested(((bind.source, bind.target, bind.format_flags()) for bind in binds), " ", ";")
