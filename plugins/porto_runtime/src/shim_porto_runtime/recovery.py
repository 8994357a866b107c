"""After a restart of the daemon, of portod, or of the machine: records and Porto brought back into agreement."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from shim_core.context import CallContext
from shim_core.errors import ShimError, Unavailable
from shim_porto_runtime import container, sandbox, spec, states
from shim_porto_runtime.porto_errors import porto_errors
from shim_porto_runtime.records import ContainerState, SandboxState

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

logger = logging.getLogger("shim.porto_runtime.recovery")

_TIMEOUT_S = 120.0


def recover(rt: Runtime) -> None:
    """Undo what was half done, find out what has ended, remove what nobody knows any more.

    :raises Unavailable: portod is away; call it again when it is back.
    """
    context = CallContext("Recovery", "recovery", time.monotonic() + _TIMEOUT_S)
    with porto_errors("asking for all containers"):
        answer = rt.porto.get(rt.names.masks, ["state", f"labels[{spec.LABEL_SHIM}]"])
    for record in rt.records.sandboxes.all():
        if record.state is SandboxState.CREATING:
            _try(f"reclaiming sandbox {record.id}", partial(sandbox.reclaim, rt, record, context))
    for found in rt.records.containers.all():
        name = rt.names.container(found.sandbox_id, found.id)
        state = answer.get(name, {}).get("state")
        if found.state is ContainerState.CREATING:
            _try(f"reclaiming container {found.id}", partial(container.discard, rt, found, context))
        elif found.state is ContainerState.CREATED and state != "stopped":
            # It was being started when the daemon died, or Porto has lost it: either way it is no longer "created".
            started_at = time.time_ns() if isinstance(state, str) else 0
            rt.records.containers.update(found.id, state=ContainerState.RUNNING, started_at=started_at)
    states.refresh(rt)
    _streams(rt)
    for name, values in answer.items():
        ours = values.get(f"labels[{spec.LABEL_SHIM}]") == rt.shim_id
        if ours and not _known(rt, name):
            _try(f"destroying the orphan {name}", partial(sandbox.destroy, rt, name))
    known = {record.id for record in rt.records.sandboxes.all()} | {record.id for record in rt.records.containers.all()}
    for owner_id in sorted(rt.directories.owners() - known):
        _try(f"removing what {owner_id} has left on disk", partial(sandbox.remove_files, rt, owner_id))


def _streams(rt: Runtime) -> None:
    """Bring the stream keeper to this version's code, and have it forget containers that nobody knows."""
    try:
        rt.keeper.upgrade()
        for held in rt.keeper.list():
            if rt.records.containers.get(held.id) is None:
                rt.keeper.close(held.id)
    except Unavailable as err:
        # The old one goes on, or the next container starts a new one.
        logger.warning("the stream keeper: %s", err.message)


def _known(rt: Runtime, name: str) -> bool:
    parsed = rt.names.parse(name)
    if parsed is None:
        return True
    sandbox_id, rest = parsed
    if rt.records.sandboxes.get(sandbox_id) is None:
        return False
    return not rest or rest == "pause" or rt.records.containers.get(rest) is not None


def _try(what: str, step: Callable[[], None]) -> None:
    logger.warning("after a restart: %s", what)
    try:
        step()
    except ShimError as err:
        logger.error("%s failed, and is tried again at the next start: %s", what, err)
