"""Requests about processes: which container one is in, and moving it into another."""

from __future__ import annotations

import logging
import os

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import limits
from shim_embedded_porto.cgroups.hierarchy import write
from shim_embedded_porto.client import Client
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_state, invalid_value, permission
from shim_embedded_porto.rpc.call import Call, Kind, method

logger = logging.getLogger("shim.embedded_porto.processes")


@method("locateProcess", kind=Kind.READ)
def locate_process(call: Call, request: pb.TLocateProcessRequest) -> None:
    pid = _translate(request.pid, call.client) if request.pid > 0 else 0
    if not pid:
        raise invalid_value("wrong pid")
    if request.comm and request.comm != _comm(pid):
        raise invalid_value("wrong comm")
    try:
        ct = _container(call, pid)
    except Fault as fault:
        raise invalid_value(f"task not found: {fault}") from None
    if ct.is_root:
        name = limits.ROOT
    elif ct is call.client.container:
        name = limits.SELF
    else:
        name = call.client.relative_name(ct.name)
    call.response.locateProcess.name = name


@method("attachProcess")
def attach_process(call: Call, request: pb.TAttachProcessRequest) -> None:
    _attach(call, request, thread=False)


@method("AttachThread")
def attach_thread(call: Call, request: pb.TAttachProcessRequest) -> None:
    _attach(call, request, thread=True)


def _attach(call: Call, request: pb.TAttachProcessRequest, *, thread: bool) -> None:
    """Move a process from the container it is in to one below."""
    pid = _translate(request.pid, call.client) if request.pid > 0 else 0
    if not pid:
        raise invalid_value("invalid pid")
    if request.comm and request.comm != _comm(pid):
        raise invalid_value("wrong task comm for pid")
    present = _container(call, pid)
    own = present is call.client.container
    with call.locked(limits.SELF if own else present.absolute_name, child=own):
        if pid in (present.task.pid, present.task.wait_pid):
            raise Fault(pb.Busy, "cannot move main process")
        wanted = call.client.find(request.name)
        if not wanted.child_of(present):
            raise permission("new container must be child of current")
        if not wanted.running_or_meta:
            raise invalid_state("new container is not running")
        for ct in wanted.lineage():
            if ct is present:
                break
            if ct.isolate:
                raise invalid_state("new container must be not isolated from current")
        _move(call, pid, present, wanted, thread=thread)


def _move(call: Call, pid: int, present: Container, wanted: Container, *, thread: bool) -> None:
    cgroups = call.porto.cgroups
    try:
        for path in cgroups.process_files(wanted, threads=thread):
            write(path, str(pid))
    except Fault:
        for path in cgroups.process_files(present, threads=thread):
            try:
                write(path, str(pid))
            except Fault as fault:
                logger.warning("%s", fault)
        raise


def _container(call: Call, pid: int) -> Container:
    """:raises Fault: ContainerDoesNotExist."""
    name = call.porto.cgroups.locate(pid)
    if name is None:
        raise Fault(pb.Unknown, f"Cannot find process {pid}", 3)
    return call.porto.tree.find(name or limits.ROOT)


def _translate(pid: int, client: Client) -> int:
    """Our number for a process the client knows by its own; 0: there is none.

    :raises Fault: InvalidValue.
    """
    try:
        own = os.stat("/proc/self/ns/pid").st_ino
        namespace = os.stat(f"/proc/{client.pid}/ns/pid").st_ino
        if own == namespace:
            return pid if os.path.exists(f"/proc/{pid}") else 0
        for name in os.listdir("/proc"):
            if name.isdigit() and _is_same(name, namespace, pid):
                return int(name)
    except OSError:
        pass
    return 0


def _is_same(name: str, namespace: int, pid: int) -> bool:
    try:
        if os.stat(f"/proc/{name}/ns/pid").st_ino != namespace:
            return False
        with open(f"/proc/{name}/status") as file:
            for line in file:
                if line.startswith("NSpid:"):
                    return int(line.split()[-1]) == pid
    except OSError:
        pass
    return False


def _comm(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""
