"""Signals by the names that CRI and images use."""

from __future__ import annotations

import re
import signal
from typing import cast

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument

_ALIASES = {"IOT": "ABRT", "CLD": "CHLD", "POLL": "IO"}
_REALTIME = re.compile(r"RTM(IN|AX)(?:(PLUS|MINUS|\+|-)(\d{1,2}))?")


def stop_signal(wanted: pb.Signal, image: str) -> int:
    """The signal that stops a container: CRI's over the image's over SIGTERM.

    :raises InvalidArgument: a signal Linux doesn't have.
    """
    if wanted != pb.SIGNAL_RUNTIME_DEFAULT:
        try:
            name = pb.Signal.Name(wanted)
        except ValueError as err:
            raise InvalidArgument(f"stop_signal: {wanted} is no signal") from err
        return number(name.removeprefix("SIGNAL_"), "stop_signal")
    return number(image, "StopSignal of the image") if image else signal.SIGTERM


def number(text: str, field: str) -> int:
    """``SIGTERM``, ``TERM``, ``15``, ``SIGRTMIN+3``, ``SIGRTMINPLUS3`` → 15 and so on.

    :raises InvalidArgument: none of these.
    """
    name = text.strip().upper().removeprefix("SIG")
    if name.isdecimal() and name.isascii() and 1 <= int(name) <= signal.SIGRTMAX:
        return int(name)
    if match := _REALTIME.fullmatch(name):
        base = signal.SIGRTMIN if match[1] == "IN" else signal.SIGRTMAX
        offset = int(match[3] or 0) * (1 if match[2] in (None, "PLUS", "+") else -1)
        if signal.SIGRTMIN <= base + offset <= signal.SIGRTMAX:
            return base + offset
    else:
        found = getattr(signal, f"SIG{_ALIASES.get(name, name)}", None)
        if isinstance(found, signal.Signals):
            return int(found)
    raise InvalidArgument(f"{field}: {text[:40]!r} is no signal")


def cri(value: int) -> pb.Signal:
    """The CRI's name for a signal number; the default for one it has no name for."""
    if signal.SIGRTMIN <= value <= signal.SIGRTMAX:
        offset = value - signal.SIGRTMIN
        # CRI counts up from RTMIN to +15, then down from RTMAX.
        if offset <= 15:
            return _named(f"SIGNAL_SIGRTMIN{f'PLUS{offset}' if offset else ''}")
        down = signal.SIGRTMAX - value
        return _named(f"SIGNAL_SIGRTMAX{f'MINUS{down}' if down else ''}")
    try:
        return _named(f"SIGNAL_{signal.Signals(value).name}")
    except ValueError:
        return pb.SIGNAL_RUNTIME_DEFAULT


def _named(name: str) -> pb.Signal:
    return cast("pb.Signal", pb.Signal.Value(name))
