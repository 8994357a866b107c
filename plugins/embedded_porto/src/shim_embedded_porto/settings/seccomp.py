"""Seccomp profiles: Porto's text format, checked and applied through libseccomp."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from google.protobuf import text_format

from porto_api import seccomp_pb2 as sp
from shim_embedded_porto.errors import invalid_value, not_supported

# SCMP_ACT_* and scmp_compare of seccomp.h.
_ACTIONS = {
    sp.Allow: 0x7FFF0000,
    sp.Notify: 0x7FC00000,
    sp.Log: 0x7FFC0000,
    sp.Trap: 0x00030000,
    sp.KillProcess: 0x80000000,
    sp.Kill: 0x00000000,
}
_COMPARISONS = {sp.Ne: 1, sp.Lt: 2, sp.Le: 3, sp.Eq: 4, sp.Ge: 5, sp.Gt: 6, sp.MaskedEq: 7}

Plan = dict[str, Any]
"""A profile as numbers: what the process that is to be confined can apply without this module."""


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libseccomp.so.2")
    except OSError as err:
        raise not_supported(f"seccomp: {err}; install libseccomp2") from None


def parse(text: str) -> sp.TProfile:
    """A profile in protobuf's text format.

    :raises Fault: InvalidValue.
    """
    try:
        profile = text_format.Parse(text, sp.TProfile())
    except text_format.ParseError:
        raise invalid_value("invalid seccomp profile") from None
    if not profile.IsInitialized():
        raise invalid_value("invalid seccomp profile")
    check(profile)
    return profile


def check(profile: sp.TProfile) -> None:
    """:raises Fault: InvalidValue: an unknown system call."""
    for rule in profile.rules:
        resolve(rule.syscall)


def resolve(name: str) -> int:
    """A system call's number on this machine."""
    number = int(_library().seccomp_syscall_resolve_name(name.encode()))
    if number < 0:
        raise invalid_value(f"unkonwn syscall {name}")
    return number


def format_profile(profile: sp.TProfile | None) -> str:
    """On one line, as Porto prints it; without a profile everything is allowed."""
    shown = sp.TProfile()
    if profile is not None:
        shown.CopyFrom(profile)
    if not shown.HasField("default_action"):
        shown.default_action.action = sp.Allow
    shown.ClearField("name")
    return text_format.MessageToString(shown, as_one_line=True) + " "


def plan(profile: sp.TProfile) -> Plan:
    """The numbers libseccomp takes."""
    return {
        "default": _action(profile.default_action),
        "rules": [
            {
                "syscall": resolve(rule.syscall),
                "action": _action(rule.action),
                "args": [[arg.index, _COMPARISONS[arg.compare], arg.value] for arg in rule.args],
            }
            for rule in profile.rules
        ],
    }


def _action(action: sp.TAction) -> int:
    if action.action == sp.Errno:
        return 0x00050000 | (action.value & 0xFFFF)
    if action.action == sp.Trace:
        return 0x7FF00000 | (action.value & 0xFFFF)
    return _ACTIONS[action.action]
