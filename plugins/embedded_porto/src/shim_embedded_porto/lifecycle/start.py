"""Creating and starting containers."""

from __future__ import annotations

import logging
import os
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import names, plans, states
from shim_embedded_porto.client import Client
from shim_embedded_porto.container import Container
from shim_embedded_porto.credentials import Cred
from shim_embedded_porto.errors import Fault, invalid_state, system
from shim_embedded_porto.lifecycle import stop
from shim_embedded_porto.lifecycle.checks import prepare_start
from shim_embedded_porto.lifecycle.state import (
    check_respawn,
    save,
    save_quietly,
    schedule_respawn,
    set_state,
    update_soft_limits,
)
from shim_embedded_porto.removal import remove_tree, try_remove_tree

if TYPE_CHECKING:
    from shim_embedded_porto.porto import Porto

logger = logging.getLogger("shim.embedded_porto.start")


def create(porto: Porto, name: str, client: Client, *, weak: bool = False) -> Container:
    """Make a container, stopped and with defaults.

    :param name: its full name. :param weak: from the first moment on; the caller sees to what comes of it.
    :raises Fault: InvalidValue, ContainerAlreadyExists, ContainerDoesNotExist (the parent), Permission, ...
    """
    tree = porto.tree
    names.check(name, superuser=client.superuser)
    parent = tree.get(names.parent_of(name))
    if parent is None:
        raise Fault(pb.ContainerDoesNotExist, f"parent container not found for {name}")
    with tree.locked(parent, shared=True):
        client.check_control(parent, child=True)
        with tree.lock:
            ct = tree.add(name, superuser=client.superuser)
            ct.weak = weak
            ct.owner = client.cred
            ct.cred = _task_cred(ct, client)
            ct.assigned |= {"owner_user", "owner_group", "user", "group", "state", "respawn_count"}
            ct.sanitize_capabilities()
        try:
            save(porto, ct)
        except BaseException:
            tree.remove(ct)
            raise
    porto.statistics.add("containers_created")
    porto.waiters.tell(ct)
    return ct


def _task_cred(ct: Container, client: Client) -> Cred:
    """Whoever is in a container already may be it in the containers below as well; elsewhere owners count."""
    own = ct.child_of(client.container)
    cred = client.task_cred if own else client.cred
    if ct.userns_cred is not None and cred.uid == 0:
        cred = ct.userns_cred
    return cred.with_groups() if own else cred


def start(porto: Porto, ct: Container, client: Client) -> None:
    """Start a container, and those above it that don't run.

    Call it without any action lock: it takes them one by one, from the top.

    :raises Fault: InvalidState, and whatever makes the start fail; the container is stopped then.
    """
    waited = False
    while True:
        with porto.tree.locked(ct):
            if waited and ct.running_or_meta:
                return  # somebody else was faster
            if ct.state != states.STOPPED:
                raise invalid_state(f"Cannot start container {ct.name} in state {ct.state}")
            assert ct.parent is not None
            if porto.freezer.frozen(ct.parent):
                raise invalid_state("Parent container is frozen")
            if ct.parent.running_or_meta:
                _start(porto, ct, client)
                return
        waited = True
        stopped = [other for other in ct.ancestors() if not other.running_or_meta]
        if not stopped:
            continue
        with porto.tree.locked(stopped[-1]):
            if stopped[-1].state != states.STOPPED:
                if stopped[-1].running_or_meta:
                    continue
                raise invalid_state(f"Cannot start container {stopped[-1].name} in state {stopped[-1].state}")
            _start(porto, stopped[-1], client)


def _start(porto: Porto, ct: Container, client: Client) -> None:
    ct.start_error = None
    try:
        try:
            prepare_start(porto, ct, client)
        except Fault as fault:
            raise fault.within(f"Cannot prepare start for container {ct.name}") from None
        set_state(porto, ct, states.STARTING)
        ct.times.started = time.time()
        ct.assigned.add("start_time")
        _prepare_resources(porto, ct)
        try:
            porto.oom.add(ct)
            update_soft_limits(porto, ct)
            with porto.tree.downgraded(ct):
                _start_task(porto, ct, client)
            set_state(porto, ct, states.META if ct.is_meta else states.RUNNING)
            save(porto, ct)
        except BaseException:
            set_state(porto, ct, states.STOPPING)
            stop.terminate_quietly(porto, ct)
            stop.free_runtime(porto, ct)
            stop.free_resources(porto, ct, quietly=True)
            raise
    except Fault as fault:
        _failed(porto, ct, fault)
        raise
    except Exception as err:
        _failed(porto, ct, Fault(pb.Unknown, f"{type(err).__name__}: {err}"))
        raise
    porto.statistics.add("containers_started")


def _failed(porto: Porto, ct: Container, fault: Fault) -> None:
    ct.start_error = fault
    stop.forget_task(ct)
    ct.times.started = 0.0
    set_state(porto, ct, states.STOPPED)
    save_quietly(porto, ct)
    porto.statistics.add("containers_failed_start")


def _prepare_resources(porto: Porto, ct: Container) -> None:
    _make_workdir(ct)
    try:
        porto.cgroups.create(ct)
        porto.control.prepare(ct)
        if ct.required_volumes:
            porto.volumes.check_required(ct)
    except BaseException:
        stop.free_resources(porto, ct, quietly=True)
        raise


def _make_workdir(ct: Container) -> None:
    path = ct.workdir
    try:
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        try:
            os.mkdir(path)
        except FileExistsError:
            remove_tree(path)
            os.mkdir(path)
        os.chown(path, ct.cred.uid, ct.cred.gid)
        os.chmod(path, 0o775)  # noqa: S103  as portod's; the group is the container's own
    except OSError as err:
        raise system(err, f"mkdir({path})") from err


def _start_task(porto: Porto, ct: Container, client: Client) -> None:
    """Apply what was set and start the container's process, if it needs one."""
    porto.control.apply(ct)
    ct.device_paths = frozenset(dev.path_inside for dev in ct.effective_devices() if dev.makes_node)
    if not plans.needs_task(ct):
        return
    # Never the same again: a number comes back after a restart, and the end of whoever had it may yet be reported.
    key = f"{ct.id}-{secrets.token_hex(8)}"
    # Should the daemon die from here on, the record tells whose process it is.
    ct.task = replace(ct.task, key=key)
    save(porto, ct)
    exit_fd = porto.tasks.exit_file(key)
    prepared = plans.prepare(ct, client, porto.host, key, exit_fd)
    try:
        ct.task = porto.tasks.start(prepared.plan, prepared.fds)
    except Fault as fault:
        if porto.collect_oom_kills(ct) or ct.oom_events:
            raise Fault(pb.ResourceNotAvailable, f"OOM at container {ct.name} start: {fault}") from None
        raise
    finally:
        prepared.close()
        if prepared.plan["mounts"] is not None:
            for name in (key, f"{key}-files"):
                try_remove_tree(porto.host.bundles / name)
    ct.assigned.add("root_pid")


# -- again and again ---------------------------------------------------------------------------------------------------


def respawn(porto: Porto, ct: Container, client: Client) -> None:
    """Start a dead container once more, in the cgroups it has. Call it with its action lock held.

    :raises Fault: InvalidState, ResourceNotAvailable: it mayn't; or the start fails.
    """
    try:
        check_respawn(ct)
    except Fault:
        if ct.state == states.RESPAWNING:
            set_state(porto, ct, states.DEAD)
        raise
    assert ct.parent is not None
    if ct.parent.state == states.RESPAWNING:
        set_state(porto, ct, states.RESPAWNING)
        return  # the parent takes it along
    ct.respawn_count += 1
    ct.assigned.add("respawn_count")
    ct.start_error = None
    try:
        try:
            prepare_start(porto, ct, client)
        except Fault as fault:
            raise fault.within(f"Cannot prepare respawn for container {ct.name}") from None
        ct.times.started = time.time()
        ct.assigned.add("start_time")
        try:
            porto.oom.add(ct)
            update_soft_limits(porto, ct)
            with porto.tree.downgraded(ct):
                _start_task(porto, ct, client)
            set_state(porto, ct, states.META if ct.is_meta else states.RUNNING)
            save(porto, ct)
        except BaseException:
            stop.terminate_quietly(porto, ct)
            stop.free_runtime(porto, ct)
            raise
    except Fault as fault:
        ct.start_error = fault
        ct.times.died = time.time()
        ct.assigned.add("death_time")
        stop.forget_task(ct)
        porto.statistics.add("containers_failed_start")
        set_state(porto, ct, states.DEAD)
        save(porto, ct)
        raise
    porto.statistics.add("containers_started")
    with porto.tree.lock:
        for child in list(ct.children.values()):
            if child.state == states.RESPAWNING or (child.respawn and child.state == states.DEAD):
                schedule_respawn(porto, child)
