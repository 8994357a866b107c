"""From a container to a plan: what its properties mean for a start, with all descriptors opened."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import capabilities, kernel, limits, oci, paths, rights, streams
from shim_embedded_porto.access import Access
from shim_embedded_porto.cgroups.control import IO_PRIORITIES, scheduling
from shim_embedded_porto.cgroups.hierarchy import Cgroups
from shim_embedded_porto.cgroups.usage import total_memory
from shim_embedded_porto.client import Client, process_start
from shim_embedded_porto.container import Container, Stream
from shim_embedded_porto.credentials import ROOT
from shim_embedded_porto.errors import Fault, invalid_value, not_supported, permission, system
from shim_embedded_porto.plan import BindPlan, CommandPlan, Directory, MountPlan, NodePlan, Plan, StreamPlan
from shim_embedded_porto.settings import networks, seccomp
from shim_embedded_porto.settings import sysctls as kernel_settings
from shim_embedded_porto.settings.binds import Bind
from shim_embedded_porto.settings.devices import DEFAULT

_RLIMIT_MAX = (1 << 63) - 1
_BIND_FLAGS = {
    "ro": kernel.MS_RDONLY,
    "nosuid": kernel.MS_NOSUID,
    "noexec": kernel.MS_NOEXEC,
    "noatime": kernel.MS_NOATIME,
    "nodiratime": kernel.MS_NODIRATIME,
    "relatime": kernel.MS_RELATIME,
    "rec": kernel.MS_REC,
    "private": kernel.MS_PRIVATE,
    "unbindable": kernel.MS_UNBINDABLE,
}


@dataclass(slots=True)
class Prepared:
    """A plan and what it needs open. Close it after the start."""

    plan: Plan
    fds: list[int] = field(default_factory=list)

    def add(self, fd: int) -> int:
        """The index of a descriptor that goes along."""
        self.fds.append(fd)
        return len(self.fds) - 1

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


@dataclass(frozen=True, slots=True)
class Host:
    """What plans need to know of the daemon."""

    cgroups: Cgroups
    socket: str
    """Where clients connect."""
    bundles: Path
    """Where crun works."""
    root: Container
    """Holds the machine's resolv.conf."""
    origin: rights.Origin


def new_mount_namespace(ct: Container) -> bool:
    """True when a container needs mounts of its own.

    :raises Fault: InvalidValue: its mode forbids them.
    """
    needed = (
        ct.isolate
        or (ct.level == 1 and not ct.host_mode)
        or bool(ct.binds or ct.hostname or ct.resolv_conf or ct.etc_hosts)
        or ct.root != "/"
        or ct.root_readonly
        or ct.fuse
    )
    if needed and (ct.host_mode or ct.job_mode):
        raise invalid_value("Cannot change mount-namespace in this virt_mode")
    return needed


def needs_task(ct: Container) -> bool:
    """False for a meta container that has no namespace of its own to hold."""
    return not ct.is_meta or ct.isolate or not ct.net_inherit or new_mount_namespace(ct)


def prepare(ct: Container, client: Client, host: Host, key: str, exit_fd: int) -> Prepared:
    """The plan for a start.

    :param exit_fd: becomes the plan's.
    :raises Fault: what makes the start impossible.
    """
    try:
        prepared = Prepared(_basic_plan(ct, host, key))
    except BaseException:
        os.close(exit_fd)
        raise
    plan = prepared.plan
    plan["exit_fd"] = prepared.add(exit_fd)
    try:
        _join(prepared, ct, client)
        if not ct.is_meta:
            plan["command"] = _command(ct)
        # Without a command nothing is written to them, but they are there to be read.
        plan["streams"] = [_stream(prepared, stream, ct, client) for stream in (ct.stdin, ct.stdout, ct.stderr)]
        if new_mount_namespace(ct):
            _mounts(prepared, ct, client, host)
    except BaseException:
        prepared.close()
        raise
    return prepared


def _basic_plan(ct: Container, host: Host, key: str) -> Plan:
    return {
        "key": key,
        "title": ct.name,
        "cgroups": host.cgroups.entry_files(ct),
        "oom_score_adj": ct.oom_score_adj,
        "nice": scheduling(ct)[1],
        "policy": scheduling(ct)[0],
        "io_priority": IO_PRIORITIES[ct.io_policy],
        "rlimits": [
            (limit.name, limit.number, _rlimit(limit.soft), _rlimit(limit.hard)) for limit in ct.effective_ulimits()
        ],
        "join": {},
        "unshare": (kernel.NEWIPC if ct.isolate else 0) | (kernel.NEWUTS if ct.isolate or ct.hostname else 0),
        "isolate": ct.isolate,
        "bare_init": ct.isolate and ct.os_mode,
        "exact_status": ct.exact_status,
        "hostname": ct.hostname,
        "sysctls": sysctls(ct),
        "loopback": False,
        "mounts": None,
        "crun": [],
        "bundle": "",
        "symlinks": [
            {"path": paths.normal(os.path.join(ct.working_directory(), path)), "target": _absolute(ct, target)}
            for path, target in ct.symlinks.items()
        ],
        "streams": [],
        "command": None,
        "exit_fd": 0,
    }


# -- namespaces --------------------------------------------------------------------------------------------------------


def _join(prepared: Prepared, ct: Container, client: Client) -> None:
    plan = prepared.plan
    holder = ct.parent.namespace_holder() if ct.parent else None
    if holder is not None:
        with _namespaces_of(holder) as open_one:
            for kind in ("ipc", "uts", "mnt", "cgroup"):
                plan["join"][kind] = prepared.add(open_one(kind))
            index = prepared.add(open_one("pid"))
            if os.fstat(prepared.fds[index]).st_ino != os.stat("/proc/self/ns/pid").st_ino:
                plan["join"]["pid"] = index
            if ct.net_inherit:
                plan["join"]["net"] = prepared.add(open_one("net"))
    if not ct.net_inherit:
        _network(prepared, ct, client)
    if ct.cgroupfs != "none":
        plan["unshare"] |= kernel.NEWCGROUP


@contextmanager
def _namespaces_of(holder: Container) -> Iterator[_Opener]:
    """Open namespaces of a container's process; the check at the end makes sure it was that process all along."""
    pid, start = holder.task.pid, holder.task.start
    yield _Opener(pid)
    try:
        same = process_start(pid) == start
    except Fault:
        same = False
    if not same:
        raise Fault(pb.InvalidState, f"container {holder.name} has just ended")


class _Opener:
    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __call__(self, kind: str) -> int:
        try:
            return os.open(f"/proc/{self._pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise system(err, f"open /proc/{self._pid}/ns/{kind}") from err


def _network(prepared: Prepared, ct: Container, client: Client) -> None:
    net = networks.parse(ct.net)
    plan = prepared.plan
    if net.devices:
        kinds = ", ".join(sorted(set(net.devices)))
        raise not_supported(f"net: {kinds}: the embedded Porto makes no interfaces; use none, inherited or netns")
    if net.none:
        plan["unshare"] |= kernel.NEWNET
        plan["loopback"] = True
    elif net.netns:
        path = netns_path(net.netns, client.pid)
        try:
            plan["join"]["net"] = prepared.add(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as err:
            raise system(err, f"Cannot open network namespace {net.netns}") from err
    elif net.container:
        target = client.find(net.container)
        try:
            client.check_control(target)
        except Fault as fault:
            raise fault.within(f"net container {net.container}") from None
        if not target.running_or_meta:
            raise invalid_value(f"Cannot open network of container {target.name}")
        holder = target.namespace_holder()
        if holder is not None:
            with _namespaces_of(holder) as open_one:
                plan["join"]["net"] = prepared.add(open_one("net"))


def netns_path(name: str, client_pid: int) -> str:
    """Where a named network namespace is: here, or as the client sees it.

    :raises Fault: InvalidValue: nowhere.
    """
    for base in ("/run/netns", f"/proc/{client_pid}/root/run/netns"):
        if os.path.exists(f"{base}/{name}"):
            return f"{base}/{name}"
    raise invalid_value(f"net namespace not found in mnt namespace: {name}")


def sysctls(ct: Container) -> dict[str, str]:
    """What is written to /proc/sys: the machine's IPC limits for a new IPC namespace, and what was set.

    :raises Fault: Permission: not one of the container's namespaces.
    """
    values = dict(kernel_settings.ipc_defaults()) if ct.isolate else {}
    for name, value in ct.sysctl.items():
        if name.startswith("net."):
            if not ct.net_isolate:
                raise permission(f"Sysctl {name} requires net isolation")
            if not kernel_settings.of_network(name):
                raise permission(f"Sysctl {name} is not allowed")
        elif name in kernel_settings.IPC:
            if not ct.isolate:
                raise permission(f"Sysctl {name} requires ipc isolation")
        else:
            raise permission(f"Sysctl {name} is not allowed")
        values[name] = value
    return values


# -- the command -------------------------------------------------------------------------------------------------------


def _command(ct: Container) -> CommandPlan:
    profile = ct.effective_seccomp()
    return {
        "argv": list(ct.command_argv),
        "line": "" if ct.command_argv else ct.command,
        "env": ct.environment(os.uname().nodename).values(),
        "cwd": ct.working_directory(),
        "umask": ct.umask,
        "uid": ct.cred.uid,
        "gid": ct.cred.gid,
        "groups": list(ct.cred.groups),
        "bounding": ct.cap_bound,
        "ambient": ct.cap_ambient,
        "last_cap": capabilities.every().bit_length() - 1,
        "loginuid": 0xFFFFFFFF if ct.os_mode else ct.owner.uid,
        "seccomp": seccomp.plan(profile) if profile is not None else None,
        "userns": _user_namespace(ct) if ct.userns else 0,
        "unshare_mounts": ct.unshare_on_exec,
    }


def _user_namespace(ct: Container) -> int:
    """As with portod its own networks and cgroups go along: without them nothing in there could be mounted."""
    network = 0 if ct.fuse and ct.net_inherit else kernel.NEWNET
    return kernel.NEWUSER | kernel.NEWCGROUP | network


def _stream(prepared: Prepared, stream: Stream, ct: Container, client: Client) -> StreamPlan:
    fd = streams.open_outside(stream, ct, client)
    if fd is None:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        return {"fd": prepared.add(null), "path": stream.path}
    return {"fd": prepared.add(fd)}


def _rlimit(value: int) -> int:
    return -1 if value > _RLIMIT_MAX else value


def _absolute(ct: Container, target: str) -> str:
    return paths.normal(os.path.join(ct.working_directory(), target)) if target else ""


# -- mounts ------------------------------------------------------------------------------------------------------------


def private_files(ct: Container, root: Container) -> dict[str, str]:
    """Files that replace those of the container's root."""
    files = {}
    resolv = ct.resolv_conf if "resolv_conf" in ct.assigned or ct.root == "/" else root.resolv_conf
    if resolv:
        files["/etc/resolv.conf"] = resolv
    if ct.etc_hosts:
        files["/etc/hosts"] = ct.etc_hosts
    if ct.hostname:
        files["/etc/hostname"] = ct.hostname + "\n"
    return files


def _mounts(prepared: Prepared, ct: Container, client: Client, host: Host) -> None:
    assert ct.parent is not None
    plan = prepared.plan
    bundle = str(host.bundles / plan["key"])
    builds = paths.normal(ct.root) != "/"
    binds = _binds(ct)
    for bind in binds:
        _check_bind(bind, ct, client, host)
    run: list[Directory] = []
    if builds:
        _check_root(ct)
        run = _run_directories(ct.root_path)
        if "mnt" in plan["join"] and _plain(ct.parent):
            # The parent has no mounts to hide or to add: what Porto itself sees is the same.
            del plan["join"]["mnt"]
    files = private_files(ct, host.root)
    if builds and (ct.root_readonly or os.statvfs(ct.root_path).f_flag & os.ST_RDONLY):
        _check_places(ct.root_path, files, [bind.target for bind in binds])
    mounts: MountPlan = {
        "parent_root": "/" if "mnt" in plan["join"] else ct.parent.root_path,
        "root": paths.normal(ct.root),
        "proc": ct.isolate or "pid" not in plan["join"],
        "readonly": ct.root_readonly,
        "files": files,
        "binds": [_bind_plan(bind, ct) for bind in binds],
        "run": run,
        "run_bytes": ct.effective_memory_limit(total_memory()) // 2,
        "socket": host.socket if ct.access != Access.NONE else "",
        "work": f"{bundle}-files",
        "unmount": [entry.mount for entry in host.cgroups.hierarchies if entry.v2 and not host.cgroups.pure_v2],
        "unwanted": [],
        "nodes": [],
    }
    if builds and not any(paths.inside("/dev", bind.target) for bind in binds):
        mounts["unwanted"], mounts["nodes"] = _nodes(ct)
    plan["mounts"] = mounts
    if not builds:
        if ct.cgroupfs != "none":
            raise not_supported("cgroupfs: the embedded Porto mounts it in roots of a container's own alone")
        return
    os.makedirs(bundle, mode=0o700)
    plan["bundle"] = bundle
    plan["crun"] = oci.command(bundle, plan["key"])
    config = oci.config(
        ct,
        bundle,
        binds=binds,
        files=list(files),
        joins_pid_namespace=ct.isolate or "pid" in plan["join"],
        hugetlb=host.cgroups.has("hugetlb"),
    )
    with open(f"{bundle}/config.json", "w") as file:
        json.dump(config, file)


def _plain(parent: Container) -> bool:
    """True when the nearest mount namespace above shows what Porto itself sees."""
    holder = parent.namespace_holder()
    return holder is None or (holder.root_path == "/" and not (holder.binds or holder.resolv_conf or holder.etc_hosts))


def _binds(ct: Container) -> list[Bind]:
    """Bind mounts with absolute paths."""
    assert ct.parent is not None
    binds = list(ct.binds)
    if ct.bind_dns and ct.root != "/":
        binds.append(Bind("/etc/hosts", "/etc/hosts", frozenset({"ro"})))
    return [
        replace(
            bind,
            source=paths.normal(os.path.join(ct.parent.working_directory(), bind.source)),
            target=paths.normal(os.path.join(ct.working_directory(), bind.target)),
        )
        for bind in binds
    ]


def _bind_plan(bind: Bind, ct: Container) -> BindPlan:
    flags = sum(number for name, number in _BIND_FLAGS.items() if name in bind.flags)
    if "dev" not in bind.flags:
        flags |= kernel.MS_NODEV
    assert ct.parent is not None
    owner = ct.owner if ct.parent.root_path == "/" else ROOT
    return {"source": bind.source, "target": bind.target, "flags": flags, "uid": owner.uid, "gid": owner.gid}


def _check_bind(bind: Bind, ct: Container, client: Client, host: Host) -> None:
    assert ct.parent is not None
    if "dev" in bind.flags and ct.owner.uid != 0:
        raise permission("Not enough permissions to allow devices at bind mount")
    if any(paths.inside(bind.source, system) for system in ("/proc", "/sys")):
        where = f"Bindmount source {bind.source}: " if bind.read_only else ""
        raise permission(f"{where}filesystem type is not allowed for write access")
    if ct.parent.root_path != "/" or client.task_cred.uid == 0:
        return
    with _opened("/", bind.source) as fd:
        directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        writes = not bind.read_only or (directory and paths.is_system(bind.source))
        check = rights.check_write if writes else rights.check_read
        try:
            check(fd, client, host.origin)
        except Fault as fault:
            raise fault.within(f"Bindmount source {bind.source}") from None
    _check_bind_target(bind.target, ct, client, host)


def _check_bind_target(target: str, ct: Container, client: Client, host: Host) -> None:
    """Nobody covers what isn't theirs: of the machine's files nothing, of a root's those that programs rely on."""
    if ct.root_path != "/" and not paths.is_system(target):
        return
    path = target
    while True:
        try:
            with _opened(ct.root_path, path) as fd:
                rights.check_write(fd, client, host.origin)
            return
        except Fault as fault:
            if fault.errno != errno.ENOENT:
                raise fault.within(f"Bindmount target {target}") from None
        if ct.root_path != "/":
            return  # what isn't there yet is made, and hides nothing
        path = os.path.dirname(path)


@contextmanager
def _opened(root: str, path: str) -> Iterator[int]:
    """What a path in a root leads to, as a descriptor that only names it."""
    try:
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = kernel.open_in(root_fd, path, kernel.O_PATH)
        finally:
            os.close(root_fd)
    except OSError as err:
        raise system(err, f"Cannot open {path}") from err
    try:
        yield fd
    finally:
        os.close(fd)


def _check_root(ct: Container) -> None:
    try:
        if not ct.root.startswith("/"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if not stat.S_ISDIR(os.stat(ct.root_path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as err:
        raise system(err, f"Cannot open {ct.root}") from err


def _nodes(ct: Container) -> tuple[list[str], list[NodePlan]]:
    """What of crun's own device nodes has to go, and what comes in its place."""
    wanted = {dev.path_inside: dev for dev in ct.effective_devices() if dev.makes_node}
    unwanted, nodes = ["/dev/core"], []
    for made in DEFAULT:
        if made.path_inside not in oci.MADE_BY_CRUN:
            continue
        dev = wanted.get(made.path_inside)
        if dev is not None and replace(dev, access=made.access) == made:
            continue
        unwanted.append(made.path_inside)
        if dev is not None:
            kind = stat.S_IFBLK if dev.kind == "b" else stat.S_IFCHR
            nodes.append(
                NodePlan(
                    path=dev.path_inside,
                    mode=kind | dev.mode,
                    device=os.makedev(dev.major, dev.minor),
                    uid=dev.uid,
                    gid=dev.gid,
                )
            )
    return unwanted, nodes


def _check_places(root: str, files: Iterable[str], targets: Iterable[str]) -> None:
    """In a root that is read-only there must be something to bind files over: portod is too late to make it.

    :param targets: where binds go; what is below them isn't the root's.
    :raises Fault: Unknown, with EROFS.
    """
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in files:
            if any(paths.inside(path, target) for target in targets):
                continue
            try:
                os.close(kernel.open_in(root_fd, path, kernel.O_PATH))
            except FileNotFoundError:
                raise Fault(pb.Unknown, f"mknod({path}, 0100644, 0)", errno.EROFS) from None
    finally:
        os.close(root_fd)


def _run_directories(root: str) -> list[Directory]:
    """The directories of the root's /run, which a new file system will hide."""
    found: list[Directory] = []
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        queue = [""]
        while queue:
            parent = queue.pop(0)
            try:
                fd = kernel.open_in(root_fd, f"run/{parent}", os.O_RDONLY | os.O_DIRECTORY, symlinks=False)
            except OSError:
                continue
            try:
                for name in sorted(os.listdir(fd)):
                    entry = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if not stat.S_ISDIR(entry.st_mode) or (not parent and name in ("shm", "lock")):
                        continue
                    mode = stat.S_IMODE(entry.st_mode)
                    if mode & 0o1002 == 0o002:
                        mode &= ~0o002  # writable for all and without the sticky bit
                    path = f"{parent}/{name}" if parent else name
                    found.append({"path": path, "mode": mode, "uid": entry.st_uid, "gid": entry.st_gid})
                    queue.append(path)
                    if len(found) >= limits.RUN_DIRECTORIES_MAX:
                        raise Fault(pb.Unknown, "Too many subdirectories in /run!")
            finally:
                os.close(fd)
    finally:
        os.close(root_fd)
    for name in ("lock", "shm"):
        found.append({"path": name, "mode": 0o1777, "uid": 0, "gid": 0})
    return found
