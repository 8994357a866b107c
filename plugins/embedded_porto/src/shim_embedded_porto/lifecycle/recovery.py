"""Taking up again what ran when the daemon ended, however it ended."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shim_embedded_porto import states
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.lifecycle import records, stop
from shim_embedded_porto.lifecycle.state import save_quietly, set_state
from shim_embedded_porto.removal import try_remove_tree
from shim_embedded_porto.tasks import alive
from shim_embedded_porto.volumes.storage import LAYER, STORAGE

if TYPE_CHECKING:
    from shim_embedded_porto.porto import Porto

logger = logging.getLogger("shim.embedded_porto.recovery")


def recover(porto: Porto) -> None:
    """Restore containers and volumes, and remove what belongs to none."""
    _restore_containers(porto)
    porto.volumes.restore()
    for ct in reversed(porto.tree.all()):
        if ct.weak:
            try:
                porto.destroy(ct)
            except Fault as fault:
                logger.error("cannot destroy the weak container %s: %s", ct.name, fault)
    _clean_up(porto)


def _restore_containers(porto: Porto) -> None:
    found = sorted(porto.store.containers(), key=lambda record: (record["name"].count("/"), record["name"]))
    for record in found:
        try:
            _restore(porto, record)
        except Exception:
            logger.exception("cannot restore the container %s", record["name"])
            porto.statistics.add("restore_failed")
            porto.store.remove_container(record["id"])


def _restore(porto: Porto, record: Mapping[str, Any]) -> None:
    with porto.tree.lock:
        ct = porto.tree.add(record["name"], superuser=True, number=record["id"])
    try:
        complete = records.load(ct, record, porto.context)
        state = record["state"] if complete else states.DEAD
        with porto.tree.locked(ct):
            _sync(porto, ct, state)
            _follow_parent(porto, ct)
    except BaseException:
        porto.tree.remove(ct)
        raise
    save_quietly(porto, ct)


def _sync(porto: Porto, ct: Container, state: str) -> None:
    """Find out what became of a container.

    :param state: the one it was in.
    """
    key = ct.task.key
    if not ct.job_mode and not porto.cgroups.exists(ct):
        stop.forget_task(ct)
        ct.times.started = ct.times.died = 0.0
        ct.assigned -= {"start_time", "death_time", "exit_status", "oom_killed"}
        set_state(porto, ct, states.STOPPED)
        return
    lives = states.META if ct.is_meta else states.RUNNING
    if state in (states.STARTING, states.RESPAWNING):
        state = lives
    if key in porto.tasks.running:
        ct.task = porto.tasks.running[key]  # also when we ended before we could write it down
    if state == states.PAUSED and not porto.freezer.frozen(ct):
        state = lives
    elif state != states.PAUSED and porto.freezer.self_freezing(ct):
        porto.freezer.thaw(ct, wait=False)
    if state in (states.STOPPED, states.STOPPING):
        set_state(porto, ct, states.STOPPING)
        stop.stop(porto, ct, 0)
        return
    set_state(porto, ct, state)
    if state == states.DEAD or (not key and state in (states.META, states.PAUSED) and ct.is_meta):
        pass  # nothing of its own runs
    elif alive(ct.task):
        if key not in porto.tasks.running:
            porto.tasks.watch(ct.task, exact_status=ct.exact_status)
    else:
        _bury_dead(porto, ct)
        return
    _take_up(porto, ct)


def _bury_dead(porto: Porto, ct: Container) -> None:
    """Its process has ended while nobody looked; perhaps it has left word."""
    key = ct.task.key
    end = next((end for end in porto.tasks.ends if end.key == key), None) or (
        porto.tasks.recorded_end(key) if key else None
    )
    if end is not None:
        stop.collect_oom(porto, ct)
        ct.exit_status = end.status
        ct.assigned.add("exit_status")
    killed = end is not None and bool(end.status) and ct.oom_is_fatal and bool(ct.oom_events or ct.oom_kills)
    logger.info("%s has ended meanwhile, status %s", ct.name, "unknown" if end is None else hex(end.status))
    stop.reap(porto, ct, out_of_memory=killed, died=end.time if end is not None else 0.0)


def _take_up(porto: Porto, ct: Container) -> None:
    ct.cpu_limit_applied = ct.cpu_limit_bound
    if ct.state == states.DEAD:
        return
    try:
        porto.cgroups.create(ct)
        porto.oom.add(ct)
        porto.control.soft_limit(ct, force=True)
    except Fault as fault:
        logger.warning("%s: %s", ct.name, fault)


def _follow_parent(porto: Porto, ct: Container) -> None:
    assert ct.parent is not None
    above = ct.parent.state
    if above == states.STOPPED and ct.state != states.STOPPED:
        stop.stop(porto, ct, 0)
    elif above == states.DEAD and ct.state not in (states.DEAD, states.STOPPED):
        stop.reap(porto, ct)
    elif above == states.PAUSED and ct.running_or_meta:
        set_state(porto, ct, states.PAUSED)


# -- leftovers ---------------------------------------------------------------------------------------------------------


def _clean_up(porto: Porto) -> None:
    containers = porto.tree.all()
    keys = {ct.task.key for ct in containers}
    for key, task in porto.tasks.running.items():
        if key not in keys and alive(task):
            logger.warning("the process %d belongs to no container", task.wait_pid)
            os.kill(task.wait_pid, signal.SIGKILL)
    for key in {end.key for end in porto.tasks.ends} | set(porto.tasks.exit_keys()):
        if key not in keys:
            porto.tasks.forget(key)
    porto.cgroups.remove_stale({ct.name for ct in containers if ct.has_resources})
    place, storages = porto.options.place, porto.storages
    storages.remove_stale_volumes(place, {volume.id for volume in porto.volumes.registry.volumes.values()})
    storages.clean_place(place)
    for kind in (LAYER, STORAGE):
        for item in storages.list(kind, place):
            if item.weak and porto.volumes.registry.in_use(item) is None:
                try:
                    storages.remove(item, porto.client, weak=True)
                except Fault as fault:
                    logger.warning("cannot remove the weak %s %s: %s", kind, item.name, fault)
    try_remove_tree(porto.host.bundles)
    porto.host.bundles.mkdir(mode=0o700, exist_ok=True)
    _clean_workdirs(porto, {ct.workdir for ct in containers if ct.has_resources})


def _clean_workdirs(porto: Porto, keep: set[str]) -> None:
    """Working directories lie in each other as containers do."""
    base = f"{porto.options.place}/porto"
    for name in os.listdir(base):
        path = f"{base}/{name}"
        if path not in keep:
            try_remove_tree(path)
