"""A container as it is remembered: properties as text, and the state of affairs beside them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from shim_embedded_porto import states
from shim_embedded_porto.container import Container, Stream, Task, Times
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.properties.base import Context
from shim_embedded_porto.properties.registry import PROPERTIES

logger = logging.getLogger("shim.embedded_porto.records")

_PLAIN = ("exit_status", "oom_killed", "oom_events", "oom_kills", "oom_kills_total", "userns")
_TIMES = ("created", "started", "died", "changed")
_TASK = ("key", "wait_pid", "pid", "vpid", "wait_start", "start")
_REMEMBERED = tuple(name for name, prop in PROPERTIES.items() if prop.stored and not prop.read_only and prop.supported)
_STREAM = ("path", "outside", "inode", "device", "offset")


def make(ct: Container, ctx: Context) -> dict[str, Any]:
    """The record of a container."""
    fault = ct.start_error
    return {
        "id": ct.id,
        "name": ct.name,
        # The delay of a respawn isn't remembered: it begins anew.
        "state": states.DEAD if ct.state == states.RESPAWNING else ct.state,
        "assigned": sorted(ct.assigned),
        "properties": {name: PROPERTIES[name].save(ct, ctx) for name in _REMEMBERED if name in ct.assigned},
        "times": {name: getattr(ct.times, name) for name in _TIMES},
        "task": {name: getattr(ct.task, name) for name in _TASK},
        "streams": [_stream(stream) for stream in (ct.stdin, ct.stdout, ct.stderr)],
        "start_error": [fault.code, fault.text, fault.errno] if fault is not None else None,
        "cpu_jail": sorted(ct.cpu_jail),
        **{name: getattr(ct, name) for name in _PLAIN},
    }


def _stream(stream: Stream) -> dict[str, Any]:
    return {name: getattr(stream, name) for name in _STREAM}


def load(ct: Container, record: Mapping[str, Any], ctx: Context) -> bool:
    """Give a new container what its record holds, the state excepted.

    :returns: False when a property couldn't be restored: the container isn't what it was.
    """
    complete = True
    for name, value in record["properties"].items():
        prop = PROPERTIES.get(name)
        if prop is None:
            logger.warning("%s: unknown property %s left out", ct.name, name)
            continue
        try:
            prop.restore(ct, value, ctx)
        except Fault as fault:
            logger.error("%s: can't restore %s: %s", ct.name, name, fault)
            complete = False
    ct.assigned = set(record["assigned"])
    ct.times = Times(**record["times"])
    ct.task = Task(**record["task"])
    for stream, saved in zip((ct.stdin, ct.stdout, ct.stderr), record["streams"], strict=True):
        for name in _STREAM:
            setattr(stream, name, saved[name])
    for name in _PLAIN:
        setattr(ct, name, record[name])
    if record["start_error"] is not None:
        ct.start_error = Fault(*record["start_error"])
    ct.cpu_jail = frozenset(record["cpu_jail"])
    ct.device_paths = frozenset(dev.path_inside for dev in ct.effective_devices() if dev.makes_node)
    ct.sanitize_capabilities()
    if record["state"] != states.STOPPED:
        # What a mode fills in at the start belongs to it.
        for prop in PROPERTIES.values():
            try:
                prop.start(ct, ctx)
            except Fault as fault:
                logger.warning("%s: %s: %s", ct.name, prop.name, fault)
    return complete
