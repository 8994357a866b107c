"""What Porto says of all our containers at once, and the records brought up to date with it.

A list of any length costs two Porto calls at most: one for the states of everything, one for the exit data of what has
died since.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from porto_api.errors import ContainerDoesNotExist

from porto_api import PortoError
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import ShimError
from shim_porto_runtime.porto_errors import porto_errors
from shim_porto_runtime.records import ContainerRecord, ContainerState, SandboxRecord, SandboxState

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

logger = logging.getLogger("shim.porto_runtime.states")

ALIVE = frozenset({"running", "meta", "paused", "starting", "stopping", "respawning"})
EXIT_UNKNOWN = 255
OOM_EXIT = 137
_EXIT_VARIABLES = ("state", "exit_status", "oom_killed", "death_time[raw]")
_FLUSH_TIMEOUT_S = 5.0
_WAITER_DUMPED = 128 + 34
_DUMPING_SIGNALS = frozenset(
    {
        signal.SIGQUIT, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS,
        signal.SIGFPE, signal.SIGSEGV, signal.SIGXCPU, signal.SIGXFSZ, signal.SIGSYS,
    }
)  # fmt: skip
"""Those whose default is to dump core (signal(7))."""


def refresh(rt: Runtime) -> None:
    """Bring all records up to date.

    :raises Unavailable: Porto can't be asked; then nothing is known, which is not the same as nothing being there.
    """
    running = [record for record in rt.records.containers.all() if record.state is ContainerState.RUNNING]
    states = _refresh_sandboxes(rt, rt.names.masks)
    record_exits(rt, [r for r in running if states.get(rt.names.container(r.sandbox_id, r.id)) not in ALIVE])


def refresh_sandboxes(rt: Runtime) -> None:
    """Bring the records of all sandboxes up to date.

    :raises Unavailable: Porto can't be asked.
    """
    _refresh_sandboxes(rt, rt.names.sandbox_masks)


def _refresh_sandboxes(rt: Runtime, masks: Sequence[str]) -> dict[str, str]:
    # Chosen before Porto is asked: its answer doesn't know a sandbox that comes up meanwhile.
    ready = [record for record in rt.records.sandboxes.all() if record.state is SandboxState.READY]
    with porto_errors("asking for the states of all containers"):
        states = _states(rt.porto.get(masks, ["state"]))
    _update_sandboxes(rt, states, ready)
    return states


def refresh_sandbox(rt: Runtime, record: SandboxRecord) -> SandboxRecord:
    """Bring one sandbox and its containers up to date; the record as it is then."""
    names = [rt.names.sandbox(record.id)]
    if rt.pause_image:
        names.append(rt.names.pause(record.id))
    with porto_errors("asking for the state of the sandbox"):
        answer = rt.porto.get(names, ["state"])
    _update_sandboxes(rt, _states(answer), [record])
    return rt.records.sandboxes.get(record.id) or record


def refresh_container(rt: Runtime, record: ContainerRecord) -> ContainerRecord:
    """Bring one container up to date; the record as it is then."""
    if record.state is ContainerState.RUNNING:
        record_exits(rt, [record])
    return rt.records.containers.get(record.id) or record


def record_exits(rt: Runtime, candidates: Iterable[ContainerRecord]) -> None:
    """Record how containers ended, of those that have.

    Their output is in the log before anybody sees them as EXITED.
    """
    by_name = {rt.names.container(record.sandbox_id, record.id): record for record in candidates}
    if not by_name:
        return
    with porto_errors("asking how containers ended"):
        answer = rt.porto.get(by_name, _EXIT_VARIABLES)
    for name, record in by_name.items():
        values = answer.get(name, {})
        state = values.get("state")
        if isinstance(state, str) and state in ALIVE:
            continue
        if isinstance(state, PortoError) and not isinstance(state, ContainerDoesNotExist):
            logger.warning("%s: its state can't be read: %s", name, state)
            continue
        if rt.starts.put_off(record.id):
            continue
        code, reason, message, finished_at = _how_it_ended(record, values)
        _flush(rt, record)
        ended = rt.records.containers.update(
            record.id,
            expect=ContainerState.RUNNING,
            state=ContainerState.EXITED,
            exit_code=code,
            reason=reason,
            message=message,
            finished_at=finished_at,
        )
        if ended is not None:
            rt.events.publish(rt, pb.CONTAINER_STOPPED_EVENT, record.id, record.sandbox_id)


def _how_it_ended(record: ContainerRecord, values: Mapping[str, str | PortoError]) -> tuple[int, str, str, int]:
    """Exit code, reason, message, and the time in nanoseconds."""
    now = time.time_ns()
    if values.get("state") != "dead":
        # Stopped by somebody else, or gone with a reboot or a restart of portod that kept nothing.
        return EXIT_UNKNOWN, "Unknown", "Porto no longer knows how this container ended", max(now, record.started_at)
    died_s = values.get("death_time[raw]")
    died = int(died_s) * 10**9 if isinstance(died_s, str) and died_s.isdecimal() else now
    # Porto counts in seconds: what has just been seen to happen is known better by our own clock.
    finished_at = max(now if now - died < 2 * 10**9 else died, record.started_at + 1)
    if values.get("oom_killed") == "true":
        return OOM_EXIT, "OOMKilled", "", finished_at
    status = values.get("exit_status")
    if not isinstance(status, str) or not status.lstrip("-").isdecimal():
        return EXIT_UNKNOWN, "Unknown", "Porto gave no exit status", finished_at
    code = exit_code(int(status))
    return code, "Completed" if code == 0 else "Error", "", finished_at


def exit_code(status: int) -> int:
    """The exit code of a wait status that Porto gives; 128+n after signal n.

    Beside a command that isn't PID 1 stands Porto's waiter, which ends with 162+n after a core dump by signal n. portod
    takes those codes for core dumps whoever ended with them. So a dump by a signal that dumps nothing is an exit code;
    what the others are can't be told, and crashes are more common.
    """
    if os.WIFSIGNALED(status) and os.WCOREDUMP(status) and os.WTERMSIG(status) not in _DUMPING_SIGNALS:
        return _WAITER_DUMPED + os.WTERMSIG(status)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _update_sandboxes(rt: Runtime, states: Mapping[str, str], records: Iterable[SandboxRecord]) -> None:
    for record in records:
        if record.state is not SandboxState.READY:
            continue
        names = [rt.names.sandbox(record.id)]
        if rt.pause_image:
            names.append(rt.names.pause(record.id))
        down = [name for name in names if states.get(name) not in ALIVE]
        if down:
            logger.warning("sandbox %s is not ready: %s is %s", record.id, down[0], states.get(down[0], "gone"))
            reason = f"{down[0].rsplit('/', 1)[-1]} is {states.get(down[0], 'gone')}"
            rt.records.sandboxes.update(
                record.id, expect=SandboxState.READY, state=SandboxState.NOTREADY, reason=reason
            )


def _states(answer: Mapping[str, Mapping[str, str | PortoError]]) -> dict[str, str]:
    return {name: state for name, values in answer.items() if isinstance(state := values.get("state"), str)}


def _flush(rt: Runtime, record: ContainerRecord) -> None:
    try:
        rt.keeper.flush(record.id, _FLUSH_TIMEOUT_S)
    except ShimError as err:
        logger.debug("container %s: its log could not be flushed: %s", record.id, err)
