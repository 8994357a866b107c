"""Changing a container's state: who has to hear of it, and remembering it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits, states
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_state
from shim_embedded_porto.lifecycle import records

if TYPE_CHECKING:
    from shim_embedded_porto.porto import Porto

logger = logging.getLogger("shim.embedded_porto.state")

_RESPAWN_DELAY_MIN_S = 0.05


def set_state(porto: Porto, ct: Container, state: str) -> None:
    """Change a container's state and tell those who wait for it.

    Call it with the container's action lock held.
    """
    with porto.tree.lock:
        before = ct.state
        if before == state:
            return
        ct.state = state
        for other in ct.ancestors():
            other.starting_below += (state == states.STARTING) - (before == states.STARTING)
            other.running_below += (state == states.RUNNING) - (before == states.RUNNING)
    logger.debug("%s: %s, was %s", ct.name, state, before)
    if state == states.DEAD and ct.respawn:
        schedule_respawn(porto, ct)
    if states.RUNNING in (before, state):
        for other in ct.ancestors():
            if other.hollow:
                porto.waiters.tell(other)
    label = value = ""
    if ct.start_error is not None and ct.state in states.REPORTED:
        label, value = "start_error", str(ct.start_error)
    elif ct.state in (states.DEAD, states.RESPAWNING):
        label, value = "exit_code", str(ct.exit_code())
    porto.waiters.tell(ct, label, value)


def save(porto: Porto, ct: Container) -> None:
    """Remember the container as it is now.

    :raises Fault: the record can't be written.
    """
    if ct.is_root:
        return
    ct.times.changed = time.time()
    porto.store.save_container(ct.id, records.make(ct, porto.context))


def save_quietly(porto: Porto, ct: Container) -> None:
    """As :func:`save`, where there is no way back."""
    try:
        save(porto, ct)
    except Fault as fault:
        logger.error("can't save the state of %s: %s", ct.name, fault)


def update_soft_limits(porto: Porto, ct: Container) -> None:
    """A container has come to life or died: squeeze it and its ancestors, or let go.

    :raises Fault: the kernel refuses.
    """
    for other in ct.lineage():
        porto.control.soft_limit(other)


# -- respawning --------------------------------------------------------------------------------------------------------


def check_respawn(ct: Container) -> None:
    """:raises Fault: InvalidState, ResourceNotAvailable: it can't be started again by itself."""
    if ct.state not in (states.DEAD, states.RESPAWNING):
        raise invalid_state(f"Cannot respawn: container in state={ct.state}")
    assert ct.parent is not None
    if ct.parent.state not in (*states.ALIVE, states.RESPAWNING):
        raise invalid_state(f"Cannot respawn: parent container in state={ct.parent.state}")
    if 0 <= ct.respawn_limit <= ct.respawn_count:
        raise Fault(pb.ResourceNotAvailable, f"Cannot respawn: reached max_respawns={ct.respawn_limit}")


def schedule_respawn(porto: Porto, ct: Container) -> None:
    """Start a dead container again after its delay, if that is allowed; with its parent when that respawns too."""
    try:
        check_respawn(ct)
    except Fault:
        return
    ct.state = states.RESPAWNING
    assert ct.parent is not None
    if ct.parent.state != states.RESPAWNING:
        porto.timers.later(max(ct.respawn_delay_ns / limits.NS_PER_S, _RESPAWN_DELAY_MIN_S), lambda: porto.respawn(ct))
