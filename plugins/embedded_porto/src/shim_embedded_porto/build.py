"""What a process forked by the keeper does to have crun build a container's root.

In a mount namespace of its own it gathers what goes into the root below a work directory, and when the namespaces are
there that the root shows, becomes ``crun create``.
crun makes the container's mount namespace and leaves a process waiting in it; the container's real first process
takes the namespace over, and the waiting one is killed. Nothing has to be unmounted: all of it ends with the process.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, NoReturn

from shim_embedded_porto import kernel, launch

if TYPE_CHECKING:
    from shim_embedded_porto.plan import MountPlan, Plan


def run(plan: Plan, fds: list[int], keeper: socket.socket, program: int) -> NoReturn:
    """Prepare and execute crun. An error goes to the file that is crun's log.

    :param keeper: sends the namespaces crun is to join, of the network and of processes, once they are there.
    :param program: crun, as a descriptor.
    """
    try:
        mounts = plan["mounts"]
        assert mounts is not None
        parent = fds[plan["join"]["mnt"]] if "mnt" in plan["join"] else -1
        _gather(mounts, plan["bundle"], parent)
        message, namespaces = launch.receive(keeper, 16)
        if not message:
            os._exit(1)  # nobody waits for us
        _name_namespaces(plan["bundle"], namespaces)
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        try:
            os.execve(program, plan["crun"], os.environ)
        except PermissionError:
            os.execvp(plan["crun"][0], plan["crun"])  # here nothing in memory may be executed (vm.memfd_noexec)
    except BaseException as err:
        text = err.filename or err.strerror if isinstance(err, OSError) else str(err)
        with open(f"{plan['bundle']}/log", "a") as log:
            log.write(f"{getattr(err, 'errno', 0) or 0}\n{text}\n")
    os._exit(1)


def _gather(mounts: MountPlan, bundle: str, parent_namespace: int) -> None:
    tree = -1
    if parent_namespace >= 0:
        # The parent's mounts are not ours to see: fetch a copy of its tree.
        own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        kernel.setns(parent_namespace, kernel.NEWNS)
        tree = kernel.open_tree("/")
        kernel.setns(own, kernel.NEWNS)
        os.close(own)
    kernel.unshare(kernel.NEWNS)
    kernel.propagate("/", kernel.MS_SLAVE | kernel.MS_REC)
    for path in mounts["unmount"]:
        kernel.umount_all(path)
    parent_root = mounts["parent_root"]
    if tree >= 0:
        parent_root = _directory(f"{bundle}/parent")
        kernel.move_mount(tree, parent_root)
    root = os.open(parent_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _bind_in(root, mounts["root"], f"{bundle}/rootfs")
    for index, bind in enumerate(mounts["binds"]):
        _bind_in(root, bind["source"], f"{bundle}/bind{index}", bind["flags"] & kernel.MS_REC)
    os.close(root)
    _private_files(mounts, bundle)
    _run_directory(mounts, bundle)


def _directory(path: str) -> str:
    os.makedirs(path, 0o700, exist_ok=True)
    return path


def _bind_in(root: int, source: str, target: str, flags: int = kernel.MS_REC) -> None:
    """Bind what a path inside a root leads to. No symbolic link leads out of the root."""
    try:
        fd = kernel.open_in(root, source, kernel.O_PATH)
    except OSError as err:
        raise OSError(err.errno, err.strerror, f"Cannot open {source}") from err
    if os.path.isdir(f"/proc/self/fd/{fd}"):
        _directory(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    kernel.mount(f"/proc/self/fd/{fd}", target, "", kernel.MS_BIND | flags)
    os.close(fd)


def _private_files(mounts: MountPlan, bundle: str) -> None:
    if not mounts["files"]:
        return
    directory = _directory(f"{bundle}/files")
    kernel.mount("tmpfs", directory, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    for index, content in enumerate(mounts["files"].values()):
        fd = os.open(f"{directory}/{index}", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        os.fchmod(fd, 0o644)
        os.write(fd, content.encode())
        os.close(fd)


def _run_directory(mounts: MountPlan, bundle: str) -> None:
    """What will be /run: the directories of the image's, Porto's socket, room for shared memory."""
    directory = _directory(f"{bundle}/run")
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_STRICTATIME
    kernel.mount("tmpfs", directory, "tmpfs", flags, f"mode=755,size={mounts['run_bytes']}")
    for entry in mounts["run"]:
        path = f"{directory}/{entry['path']}"
        os.mkdir(path)
        os.chown(path, entry["uid"], entry["gid"])
        os.chmod(path, entry["mode"])
    if mounts["socket"]:
        target = f"{directory}/portod.socket"
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0))
        kernel.mount(mounts["socket"], target, "", kernel.MS_BIND)


def _name_namespaces(bundle: str, namespaces: list[int]) -> None:
    """Give the namespaces crun is to join names that can't come to mean others: crun takes nothing but paths."""
    for name, fd in zip(("net", "pid"), namespaces, strict=False):
        target = f"{bundle}/ns-{name}"
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        kernel.mount(f"/proc/self/fd/{fd}", target, "", kernel.MS_BIND)
