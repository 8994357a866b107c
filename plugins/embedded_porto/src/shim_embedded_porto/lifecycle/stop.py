"""Stopping, destroying and burying containers."""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import time
from typing import TYPE_CHECKING

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import states, streams
from shim_embedded_porto.cgroups.usage import Usage
from shim_embedded_porto.client import process_start
from shim_embedded_porto.container import Container, Task
from shim_embedded_porto.errors import Fault, invalid_state, permission, system
from shim_embedded_porto.lifecycle.state import save, save_quietly, set_state, update_soft_limits
from shim_embedded_porto.removal import try_remove_tree

if TYPE_CHECKING:
    from shim_embedded_porto.porto import Porto
    from shim_embedded_porto.volumes.volume import Volume

logger = logging.getLogger("shim.embedded_porto.stop")


def stop(porto: Porto, ct: Container, timeout_ms: int) -> None:
    """Stop a container and those below it. Call it with its action lock held.

    :param timeout_ms: how long to wait after SIGTERM before all is killed; 0: kill at once.
    :raises Fault: InvalidState, or something can't be killed or removed: that container is dead then.
    """
    if ct.is_root:
        raise permission("Cannot terminate root container")
    if ct.state == states.STOPPED:
        return
    if not ct.job_mode and porto.freezer.parent_freezing(ct):
        raise invalid_state("Parent container is paused")
    subtree = ct.subtree()
    if timeout_ms:
        with porto.tree.downgraded(ct):
            _terminate_all(porto, ct, subtree, time.monotonic() + timeout_ms / 1000)
    else:
        for other in reversed(subtree):
            if other.isolate and other.task.wait_pid:
                _signal(other.task.wait_pid, other.task.wait_start, signal.SIGKILL)
        _terminate_all(porto, ct, subtree, None)
    for other in subtree:
        if other.state != states.STOPPED:
            _bury(porto, other)


def _terminate_all(porto: Porto, stopped: Container, subtree: list[Container], deadline: float | None) -> None:
    for ct in subtree:
        if ct.state == states.STOPPED:
            continue
        was_dead = ct.state == states.DEAD
        set_state(porto, ct, states.STOPPING)
        if stopped.job_mode and was_dead:
            continue
        terminate_quietly(porto, ct, deadline)
        if not ct.job_mode and porto.freezer.self_freezing(ct):
            try:
                porto.freezer.thaw(ct, wait=False)
            except Fault as fault:
                logger.error("cannot thaw %s: %s", ct.name, fault)


def _bury(porto: Porto, ct: Container) -> None:
    """Everything has been killed: free what it had, forget how it ended."""
    free_runtime(porto, ct)
    fault: Fault | None = None
    try:
        free_resources(porto, ct)
    except Fault as err:
        fault = err
    key = ct.task.key
    forget_task(ct)
    if fault is not None:
        ct.times.started, ct.times.died = ct.times.died, time.time()  # it doesn't age
        set_state(porto, ct, states.DEAD)
        save_quietly(porto, ct)
        raise fault
    ct.times.started = ct.times.died = 0.0
    ct.exit_status = ct.oom_events = 0
    ct.oom_killed = False
    ct.assigned -= {"start_time", "death_time", "exit_status", "oom_killed"}
    set_state(porto, ct, states.STOPPED)
    save(porto, ct)
    if key:
        porto.tasks.forget(key)


# -- killing -----------------------------------------------------------------------------------------------------------


def terminate_quietly(porto: Porto, ct: Container, deadline: float | None = None) -> None:
    """As :func:`terminate`; what can't be killed is found when its cgroups can't be removed."""
    try:
        terminate(porto, ct, deadline)
    except Fault as fault:
        logger.error("cannot terminate %s: %s", ct.name, fault)


def terminate(porto: Porto, ct: Container, deadline: float | None = None) -> None:
    """Kill a container's processes.

    :param deadline: monotonic; until then the command may end by itself after SIGTERM. None: kill at once.
    :raises Fault: a process can't be signalled.
    """
    task = ct.task
    if not ct.job_mode and not porto.cgroups.pids(ct):
        return
    if task.pid and deadline is not None and not ct.is_meta:
        number = _gentle_signal(ct)
        sent = number and _signal(task.pid, task.start, number, group=ct.job_mode)
        if sent:
            wait_end(task.pid, deadline)
    if ct.job_mode:
        _signal(task.wait_pid, task.wait_start, signal.SIGKILL, group=True)
        return
    if task.wait_pid and ct.isolate:
        # With its first process the whole PID namespace ends.
        _signal(task.wait_pid, task.wait_start, signal.SIGKILL)
    porto.cgroups.kill(ct)


def _gentle_signal(ct: Container) -> int:
    """SIGTERM; for an init what it understands, if anything."""
    if not (ct.os_mode and ct.isolate):
        return signal.SIGTERM
    handled = 0
    try:
        with open(f"/proc/{ct.task.pid}/status") as file:
            handled = next(int(line.split()[1], 16) for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        pass
    for number in (signal.SIGPWR, signal.SIGTERM):
        if handled >> (number - 1) & 1:
            return number
    return 0


def _signal(pid: int, start: int, number: int, *, group: bool = False) -> bool:
    """Signal the process that had this pid then; False when it has ended."""
    if not pid:
        return False
    try:
        if start and process_start(pid) != start:
            return False
        if group:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except (Fault, ProcessLookupError):
        return False
    except OSError as err:
        raise system(err, f"kill({pid})") from err
    return True


def kill(ct: Container, number: int) -> None:
    """Send a signal to the command.

    :raises Fault: InvalidState; or there is no such signal.
    """
    if ct.state != states.RUNNING:
        raise invalid_state(f"invalid container state={ct.state}")
    if not _signal(ct.task.pid, ct.task.start, number):
        raise Fault(pb.Unknown, f"kill({ct.task.pid})", errno.ESRCH)


def wait_end(pid: int, deadline: float) -> bool:
    """Wait until a process has ended; False when the time is up."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(fd)


# -- freeing -----------------------------------------------------------------------------------------------------------


def forget_task(ct: Container) -> None:
    ct.task = Task()
    ct.assigned.discard("root_pid")


def free_runtime(porto: Porto, ct: Container) -> None:
    """What a container needs while it runs."""
    collect_oom(porto, ct)
    porto.oom.remove(ct)
    try:
        update_soft_limits(porto, ct)
    except Fault as fault:
        logger.error("cannot update the soft limit of %s: %s", ct.name, fault)


def free_resources(porto: Porto, ct: Container, *, quietly: bool = False) -> None:
    """What a container has until it is stopped: cgroups, working directory, stored output.

    :raises Fault: unless ``quietly``.
    """
    ct.oom_kills = 0
    ct.squeezed = False
    try:
        porto.cgroups.remove(ct)
    except Fault as fault:
        if not quietly:
            raise
        logger.error("cannot remove the cgroups of %s: %s", ct.name, fault)
    ct.cpu_jail = frozenset()
    for stream in (ct.stdout, ct.stderr):
        streams.remove(stream, ct)
    try_remove_tree(ct.workdir)


def collect_oom(porto: Porto, ct: Container) -> int:
    """Count what the kernel has killed for want of memory since the last time; the new kills."""
    if not ct.has_resources or ct.is_root or "memory" not in ct.controllers:
        return 0
    try:
        kills = Usage(porto.cgroups, ct).oom_kills()
    except Fault:
        return 0
    with porto.tree.lock:
        fresh = kills - ct.oom_kills
        if fresh <= 0:
            return 0
        ct.oom_kills = kills
        ct.assigned.add("oom_kills")
        for other in ct.lineage():
            other.oom_kills_total += fresh
            other.assigned.add("oom_kills_total")
    for other in ct.lineage():
        save_quietly(porto, other)
    return fresh


# -- ends --------------------------------------------------------------------------------------------------------------


def exited(porto: Porto, ct: Container, status: int, *, out_of_memory: bool = False) -> None:
    """The container's process has ended: so do those below it. Call it with its action lock held.

    :param status: as of wait(2).
    """
    if ct.state == states.STOPPED:
        return
    # The kernel's SIGKILL may be noticed before the event that tells why.
    collect_oom(porto, ct)
    if status and ct.oom_is_fatal and (ct.oom_events or ct.oom_kills):
        out_of_memory = True
    ct.exit_status = status
    ct.assigned.add("exit_status")
    for other in ct.subtree():
        if other.state not in (states.STOPPED, states.DEAD):
            reap(porto, other, out_of_memory=out_of_memory)


def reap(porto: Porto, ct: Container, *, out_of_memory: bool = False, died: float = 0.0) -> None:
    """Make a container a dead one."""
    terminate_quietly(porto, ct)
    if "death_time" not in ct.assigned:
        ct.times.died = died or time.time()
        ct.assigned.add("death_time")
    if out_of_memory:
        ct.oom_killed = True
        ct.assigned.add("oom_killed")
    key = ct.task.key
    forget_task(ct)
    for stream in (ct.stdout, ct.stderr):
        porto.rotate(stream, ct)
    set_state(porto, ct, states.DEAD)
    free_runtime(porto, ct)
    save_quietly(porto, ct)
    if key:
        porto.tasks.forget(key)


def destroy(porto: Porto, ct: Container) -> list[Volume]:
    """Stop and remove a container and those below it. Call it with its action lock held.

    :returns: the volumes nobody is linked to any more, to be destroyed once the lock is released.
    :raises Fault: it can't be stopped.
    """
    if ct.is_root:
        raise permission("Write access denied: root container is read-only")
    if ct.state == states.DESTROYED:
        raise Fault(pb.ContainerDoesNotExist, "Container was destroyed")
    stop(porto, ct, 0)
    unlinked: list[Volume] = []
    for other in ct.subtree():
        unlinked += porto.volumes.unlink_all(other)
        porto.store.remove_container(other.id)
        porto.tree.remove(other)
        porto.waiters.tell(other)
    return unlinked
