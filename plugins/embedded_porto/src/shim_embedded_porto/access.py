"""Access levels: what a client inside a container may do with Porto (property ``enable_porto``)."""

from __future__ import annotations

import enum

from shim_embedded_porto.errors import invalid_value


class Access(enum.IntEnum):
    """In Porto's order: more is more."""

    NONE = 0
    READ_ISOLATE = 1
    READ_ONLY = 2
    ISOLATE = 3
    SELF_ISOLATE = 4
    CHILD_ONLY = 5
    NORMAL = 6
    SUPERUSER = 7
    INTERNAL = 8


_NAMES = {
    Access.NONE: "false",
    Access.READ_ISOLATE: "read-isolate",
    Access.READ_ONLY: "read-only",
    Access.ISOLATE: "isolate",
    Access.SELF_ISOLATE: "self-isolate",
    Access.CHILD_ONLY: "child-only",
    Access.NORMAL: "true",
}
_LEVELS = {**{name: level for level, name in _NAMES.items()}, "none": Access.NONE, "full": Access.NORMAL}


def parse(value: str) -> Access:
    """:raises Fault: InvalidValue."""
    try:
        return _LEVELS[value]
    except KeyError:
        raise invalid_value(f"Unknown access level: {value}") from None


def format_level(level: Access) -> str:
    return _NAMES.get(level, "true")


def compatible(parent: Access, child: Access) -> bool:
    """True when a child of a container of level ``parent`` may be of level ``child``."""
    if parent == Access.NONE:
        return child == Access.NONE
    if parent in (Access.READ_ISOLATE, Access.READ_ONLY):
        return child <= Access.READ_ONLY
    return True
