"""Profiles as the OCI runtime specification has them (config-linux, Seccomp)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shim_core.errors import InvalidArgument

MAX_PROFILE_BYTES = 4 * 1024 * 1024
EPERM = 1
_MAX_ERRNO = 4095

# linux/seccomp.h
_ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
    "SCMP_ACT_LOG": 0x7FFC0000,
}
ALLOW = _ACTIONS["SCMP_ACT_ALLOW"]
KILL_PROCESS = _ACTIONS["SCMP_ACT_KILL_PROCESS"]
_OPERATORS = (
    "SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ",
)  # fmt: skip

# SECCOMP_FILTER_FLAG_*
_FLAGS = {"SECCOMP_FILTER_FLAG_TSYNC": 1, "SECCOMP_FILTER_FLAG_LOG": 2, "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4}


def errno_action(number: int) -> int:
    """The action that fails a call with ``number``."""
    return _ACTIONS["SCMP_ACT_ERRNO"] | number


@dataclass(frozen=True, slots=True)
class Condition:
    """What one argument of a call has to be."""

    index: int
    operator: str
    """``SCMP_CMP_...``"""
    value: int
    value_two: int = 0
    """For ``SCMP_CMP_MASKED_EQ``: what has to be left after masking with ``value``."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of calls of these names, when all conditions hold."""

    names: tuple[str, ...]
    action: int
    """As the kernel has it: SECCOMP_RET_* with its data."""
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """A filter. Of several rules for one call the first that matches decides."""

    default_action: int
    rules: tuple[Rule, ...]
    architectures: tuple[str, ...] = ()
    """``SCMP_ARCH_...`` besides the machine's own; none: all the machine can run."""
    flags: int = 0
    unknown_action: int | None = None
    """For calls newer than the table of names; None: the default action."""


def parse(data: bytes, field: str) -> Profile:
    """A profile from its JSON text.

    :param field: what errors are about: ``seccomp.localhost_ref profiles/web.json``.
    :raises InvalidArgument: it is malformed, or asks for what can't be done.
    """
    if len(data) > MAX_PROFILE_BYTES:
        raise InvalidArgument(f"{field}: larger than {MAX_PROFILE_BYTES} bytes")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise InvalidArgument(f"{field}: not valid JSON: {str(err)[:200]}") from err
    if not isinstance(tree, dict):
        raise InvalidArgument(f"{field}: must be a JSON object")
    if tree.get("listenerPath"):
        raise InvalidArgument(f"{field}: listenerPath: notifications to a listener are not supported")
    return Profile(
        default_action=_action(tree, "defaultAction", "defaultErrnoRet", field),
        rules=tuple(
            rule
            for n, item in enumerate(_items(tree, "syscalls", field))
            for rule in _rules(item, f"{field}: syscalls[{n}]")
        ),
        architectures=tuple(_text(a, f"{field}: architectures") for a in _items(tree, "architectures", field)),
        flags=sum(_flag(flag, field) for flag in set(map(str, _items(tree, "flags", field)))),
    )


def _rules(tree: Any, field: str) -> Sequence[Rule]:
    if not isinstance(tree, dict):
        raise InvalidArgument(f"{field}: must be a JSON object")
    # "name" is of the specification's first days, and profiles that have it are still around.
    names = tuple(_text(name, f"{field}.names") for name in _items(tree, "names", field) or [tree.get("name")])
    action = _action(tree, "action", "errnoRet", field)
    conditions = tuple(_condition(item, f"{field}.args[{n}]") for n, item in enumerate(_items(tree, "args", field)))
    indexes = [condition.index for condition in conditions]
    if len(set(indexes)) < len(indexes):
        # As other runtimes have it: conditions on the same argument are alternatives.
        return [Rule(names, action, (condition,)) for condition in conditions]
    return [Rule(names, action, conditions)]


def _condition(tree: Any, field: str) -> Condition:
    if not isinstance(tree, dict):
        raise InvalidArgument(f"{field}: must be a JSON object")
    index, operator = tree.get("index"), tree.get("op")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= 5:
        raise InvalidArgument(f"{field}.index: must be 0 to 5")
    if operator not in _OPERATORS:
        raise InvalidArgument(f"{field}.op: must be one of {', '.join(_OPERATORS)}")
    return Condition(index, operator, _uint64(tree, "value", field), _uint64(tree, "valueTwo", field))


def _uint64(tree: Mapping[str, Any], key: str, field: str) -> int:
    value = tree.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**64:
        raise InvalidArgument(f"{field}.{key}: must be an unsigned 64-bit number")
    return value


def _action(tree: Mapping[str, Any], key: str, errno_key: str, field: str) -> int:
    name = tree.get(key)
    action = _ACTIONS.get(name) if isinstance(name, str) else None
    if action is None:
        known = ", ".join(sorted(_ACTIONS))
        raise InvalidArgument(f"{field}: {key}: {str(name)[:40]!r} is not supported; it may be {known}")
    if name in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        number = tree.get(errno_key)
        number = EPERM if number is None else number
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= _MAX_ERRNO:
            raise InvalidArgument(f"{field}: {errno_key}: must be 0 to {_MAX_ERRNO}")
        action |= number
    return action


def _items(tree: Mapping[str, Any], key: str, field: str) -> list[Any]:
    value = tree.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidArgument(f"{field}: {key}: must be a list")
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidArgument(f"{field}: must be text")
    return value


def _flag(name: str, field: str) -> int:
    if name not in _FLAGS:
        raise InvalidArgument(f"{field}: flags: {name[:60]!r} is not supported; known are {', '.join(_FLAGS)}")
    return _FLAGS[name]
