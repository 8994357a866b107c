"""A stage: network, mount and PID namespaces in which a command can make pods and leave nothing behind.

::

    python -m tools.stage [--host-network] COMMAND [ARG ...]

When the command ends, or anything kills the stage (SIGKILL too), the kernel ends every process in it and with them
go its mounts and network namespaces. cgroups alone outlive their processes, so a stage has a cgroup of its own
(``$SHIM_STAGE_CGROUP``, a name below every hierarchy) and each new stage removes those that dead ones left.

With ``--host-network`` the machine's own network namespace is kept: what a pod's network leaves in there stays.

Inside, ``/run/netns``, ``/tmp/stage`` (``$SHIM_STAGE_DIR``) and CNI's state directories are fresh and private.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_REC, MS_PRIVATE, MS_SHARED, MS_NOSUID, MS_NODEV = 0x4000, 0x40000, 0x100000, 0x2, 0x4
PR_SET_PDEATHSIG = 1

HOST_NETWORK = "--host-network"
DIRECTORY = "/tmp/stage"
CGROUP_PREFIX = "portoshim-stage-"
LOCK_DIRECTORY = Path("/run/portoshim-stages")
_PRIVATE_DIRECTORIES = ("/run/netns", "/var/lib/cni", DIRECTORY)

_libc = ctypes.CDLL(None, use_errno=True)


def main(argv: list[str]) -> int:
    """Run a command on a stage; its exit status."""
    own_network = argv[0] != HOST_NETWORK
    if not own_network:
        del argv[0]
    remove_stale_cgroups()
    name, _lock = _claim_name()
    _check(_libc.unshare(CLONE_NEWNS | CLONE_NEWPID | (CLONE_NEWNET if own_network else 0)), "unshare")
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() not in (parent, 0):  # 0: our parent is outside this PID namespace
            os._exit(1)
        os._exit(_init(argv, name))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: os.kill(child, number))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    remove_cgroup(name)
    (LOCK_DIRECTORY / name).unlink(missing_ok=True)
    return 128 - status if status < 0 else status


def on_stage() -> bool:
    """True inside a stage."""
    return "SHIM_STAGE_CGROUP" in os.environ


def remove_stale_cgroups() -> None:
    """Remove the cgroups of stages that are no more."""
    names = {path.name for path in (*_cgroup_roots(CGROUP_PREFIX + "*"), *LOCK_DIRECTORY.glob(CGROUP_PREFIX + "*"))}
    for name in names:
        lock = LOCK_DIRECTORY / name
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            remove_cgroup(name)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_cgroup(name)
            lock.unlink(missing_ok=True)
        except BlockingIOError:
            pass  # that stage is alive
        finally:
            os.close(fd)


def remove_cgroup(name: str) -> None:
    """Remove a cgroup below every hierarchy, children first. Its processes have ended with their PID namespace."""
    for root in _cgroup_roots(name):
        for directory, _, _ in os.walk(root, topdown=False):
            try:
                os.rmdir(directory)
            except OSError as err:
                print(f"stage: {directory}: {err.strerror}", file=sys.stderr)


def _cgroup_roots(pattern: str) -> list[Path]:
    base = Path("/sys/fs/cgroup")
    return [*base.glob(pattern), *base.glob(f"*/{pattern}")]


def _claim_name() -> tuple[str, int]:
    """A name nobody uses, and the lock that says so for as long as this process lives."""
    LOCK_DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    while True:
        name = f"{CGROUP_PREFIX}{os.getpid()}-{os.urandom(3).hex()}"
        lock = LOCK_DIRECTORY / name
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        # Another stage that starts at this moment takes a file that isn't locked yet for a dead stage's.
        if lock.exists():
            return name, fd
        os.close(fd)


def _init(argv: list[str], name: str) -> int:
    """PID 1 of the stage: prepares it, runs the command, reaps what is orphaned."""
    # Cut off from the host, then shared among the namespaces of the stage, as `/` is on a host with systemd.
    _check(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount --make-rprivate /")
    _check(_libc.mount(b"none", b"/", None, MS_REC | MS_SHARED, None), "mount --make-rshared /")
    _check(_libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV, None), "mount /proc")
    for directory in _PRIVATE_DIRECTORIES:
        os.makedirs(directory, exist_ok=True)
        _check(_libc.mount(b"stage", directory.encode(), b"tmpfs", MS_NOSUID, b"mode=755"), f"mount {directory}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    environment = {**os.environ, "SHIM_STAGE_CGROUP": name, "SHIM_STAGE_DIR": DIRECTORY}
    try:
        command = subprocess.Popen(argv, env=environment)
    except OSError as err:
        print(f"stage: {argv[0]}: {err.strerror}", file=sys.stderr)
        return 127
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: command.send_signal(number))
    while True:
        try:
            pid, status = os.wait()
        except InterruptedError:
            continue
        if pid == command.pid:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


def _check(result: int, what: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        sys.exit(f"stage: {what}: {os.strerror(errno)} (root is needed)")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
