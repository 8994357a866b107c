"""What critest runs in: a directory, host names that lead to this machine, and nothing left of any of it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import grpc

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.testing import CriClient
from tools import stage
from tools.critest_suite import SuiteError
from tools.peer import Containerd

HOSTS = Path("/etc/hosts")

_PROGRAMS = ("docker-registry", "gcc", "ipcmk", "ipcrm", "mount", "umount")
_RPC_TIMEOUT_S = 60.0
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # the kernel's PROC_PID_INIT_INO
_SHARED_MEMORY = Path("/proc/sysvipc/shm")
_SEGMENT_BYTES = 1048576  # what the HostIpc specs make


class Side(Protocol):
    """A CRI server under test."""

    @property
    def cri(self) -> CriClient: ...
    @property
    def socket(self) -> str: ...
    @property
    def log_path(self) -> Path: ...

    def exit_status(self) -> int | None: ...


def check(*, peer: bool) -> None:
    """See whether the suite can be run here.

    :param peer: the peer as well. :raises SuiteError: it can't, and what is missing.
    """
    if not stage.on_stage() and "PORTO_SOCKET" not in os.environ:
        raise SuiteError("it runs on a stage: make critest")
    # PORTO_SOCKET alone says nothing of namespaces: this machine's own /etc/hosts must not be hidden.
    if os.readlink("/proc/self/ns/pid") == _INITIAL_PID_NAMESPACE:
        raise SuiteError("it changes mounts and listens on port 443: run it, and portod, in namespaces of their own")
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent:
        raise SuiteError(f"not installed: {', '.join(absent)}")
    if peer and (missing := Containerd.missing()) is not None:
        raise SuiteError(missing)


@contextmanager
def directory_of_run() -> Iterator[Path]:
    """A directory for everything. On a stage it goes with the stage; elsewhere it is removed, unless in use.

    What failed specs and ended nodes leave below it are mounts, of directories of this machine among them: none of
    its files is removed before the last of those is gone.
    """
    directory = Path(tempfile.mkdtemp(prefix="critest-", dir=os.environ.get("SHIM_STAGE_DIR"))).resolve()
    try:
        yield directory
    finally:
        if not stage.on_stage():
            remove_tree(directory)


def remove_tree(directory: Path) -> None:
    """Remove a directory after unmounting what is mounted below; or keep it, when something remains mounted."""
    points = mounts_below(directory)
    # First cut off from its peers: below a bind mount of /sys, unmounting the cgroups would unmount this machine's.
    if all(subprocess.run(["mount", "--make-private", point], check=False).returncode == 0 for point in points):
        for point in reversed(points):
            subprocess.run(["umount", "--lazy", point], check=False)
    if left := mounts_below(directory):
        print(f"critest: {directory} is kept, for what is still mounted there: {', '.join(left)}", file=sys.stderr)
    else:
        shutil.rmtree(directory, ignore_errors=True)


def mounts_below(directory: Path) -> list[str]:
    """Mount points, those below others after them."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    unescaped = [re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point) for point in points]
    return [point for point in unescaped if Path(point).is_relative_to(directory)]


@contextmanager
def hosts_lead_here(names: Sequence[str], directory: Path) -> Iterator[None]:
    """Have names resolve to this machine, for all in this mount namespace.

    :raises SuiteError: they don't, even so.
    """
    file = directory / "hosts"
    file.write_text(f"127.0.0.1 {' '.join(names)}\n{HOSTS.read_text()}")
    subprocess.run(["mount", "--bind", str(file), str(HOSTS)], check=True)
    try:
        for name in names:
            found = {info[4][0] for info in socket.getaddrinfo(name, 443, type=socket.SOCK_STREAM)}
            if found != {"127.0.0.1"}:
                raise SuiteError(f"{name} leads to {found} despite {HOSTS}: see /etc/nsswitch.conf")
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(HOSTS)], check=True)


@contextmanager
def no_shared_memory_left() -> Iterator[None]:
    """Remove the segments that the suite makes on the host and leaves there."""
    before = {row["shmid"] for row in _segments()}
    yield
    for row in _segments():
        # A pid of 0 is one of another PID namespace: not ours to remove.
        made_here = row["cpid"] != 0 and not Path(f"/proc/{row['cpid']}").exists()
        if row["shmid"] not in before and row["size"] == _SEGMENT_BYTES and row["nattch"] == 0 and made_here:
            subprocess.run(["ipcrm", "-m", str(row["shmid"])], check=False)


def _segments() -> list[dict[str, int]]:
    head, *rows = _SHARED_MEMORY.read_text().splitlines()
    names = head.split()
    return [dict(zip(names, map(int, row.split()), strict=True)) for row in rows]


def remove_pods(side: Side) -> tuple[str, ...]:
    """Remove the pods that are there; their names, and what went wrong."""
    try:
        pods = side.cri.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=_RPC_TIMEOUT_S).items
    except grpc.RpcError as err:
        return (f"unknown: ListPodSandbox: {_said(err)}",)
    found = []
    for pod in pods:
        name = pod.metadata.name
        try:
            side.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=_RPC_TIMEOUT_S)
            side.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=_RPC_TIMEOUT_S)
            found.append(name)
        except grpc.RpcError as err:
            found.append(f"{name}, which can't be removed: {_said(err)}")
    return tuple(found)


def _said(err: grpc.RpcError) -> str:
    return f"{err.code().name}: {err.details()}"
