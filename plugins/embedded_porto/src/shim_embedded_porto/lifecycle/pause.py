"""Pausing and resuming containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim_embedded_porto import states
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_state
from shim_embedded_porto.lifecycle.state import save_quietly, set_state

if TYPE_CHECKING:
    from shim_embedded_porto.porto import Porto


def pause(porto: Porto, ct: Container) -> None:
    """Freeze a container and those below it. Call it with its action lock held.

    :raises Fault: InvalidState.
    """
    if not ct.running_or_meta:
        raise invalid_state("Contaner not running")
    porto.freezer.freeze(ct)
    for other in ct.subtree():
        if other.running_or_meta:
            set_state(porto, other, states.PAUSED)
            save_quietly(porto, other)


def resume(porto: Porto, ct: Container) -> None:
    """Let a paused container go on, with those below it. Call it with its action lock held.

    :raises Fault: InvalidState.
    """
    if porto.freezer.parent_freezing(ct):
        raise invalid_state("Parent container is paused")
    if not porto.freezer.self_freezing(ct):
        raise invalid_state("Container not paused")
    porto.freezer.thaw(ct)
    for other in ct.subtree():
        if porto.freezer.self_freezing(other):
            try:
                porto.freezer.thaw(other, wait=False)
            except Fault:
                continue
        if other.state == states.PAUSED:
            set_state(porto, other, states.META if other.is_meta else states.RUNNING)
        save_quietly(porto, other)
