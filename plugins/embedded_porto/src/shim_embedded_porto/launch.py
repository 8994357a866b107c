"""What a process forked by the keeper does until it has become a container's.

It enters and makes namespaces, waits for crun to have built the root if there is one to build, drops privileges and
executes the command. Nothing here returns to the keeper's own loop.

With a PID namespace of its own a container has an *init* as process 1, which reaps and passes the command's exit
status on, as portoinit does (exit code 128 + signal). The process that enters an existing PID namespace has dropped
its privileges before: there is somebody in there to see it.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import os
import resource
import signal
import socket
from typing import TYPE_CHECKING, NoReturn

from shim_embedded_porto import inroot, kernel, reroot

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim_embedded_porto.plan import CommandPlan, MountPlan, Plan

EXIT_CORE_OFFSET = 128 + 34
"""Added to the signal's number when there is a core dump: 128 + SIGRTMIN."""

_PROTECTED_PROC = ("sysrq-trigger", "irq", "bus", "sys")
_JOINED_FIRST = (
    *(("ipc", kernel.NEWIPC), ("uts", kernel.NEWUTS)),
    *(("net", kernel.NEWNET), ("cgroup", kernel.NEWCGROUP)),
)
_TIOCSCTTY = 0x540E
MESSAGE_MAX, DESCRIPTORS_MAX = 65536, 32


class Refused(Exception):
    """A step failed: an error code of Porto's, and an errno."""

    def __init__(self, code: str, text: str, number: int = 0) -> None:
        super().__init__(code, text, number)
        self.code, self.text, self.number = code, text, number


def run(plan: Plan, fds: list[int], control: socket.socket) -> NoReturn:
    """Carry out a plan. The process ends here, or becomes the container's."""
    try:
        reset_signals()
        if plan["command"] is not None and plan["command"]["seccomp"] is not None:
            _seccomp_library()  # now: the container's root may have another, or none
        if plan["isolate"]:
            _start_isolated(plan, fds, control)
        else:
            _start_shared(plan, fds, control)
    except Refused as err:
        _report(control, {"error": err.code, "text": err.text, "errno": err.number})
    except OSError as err:
        _report(control, {"error": "Unknown", "text": err.filename or err.strerror, "errno": err.errno or 0})
    except BaseException as err:
        _report(control, {"error": "Unknown", "text": f"{type(err).__name__}: {err}", "errno": 0})
    os._exit(1)


# -- the two kinds of start --------------------------------------------------------------------------------------------


def _start_isolated(plan: Plan, fds: list[int], control: socket.socket) -> NoReturn:
    """With a PID namespace: fork its first process."""
    _enter(plan, fds)
    if "pid" in plan["join"]:
        # Ours is to be a child of the parent's PID namespace: one fork to get into that, one into ours.
        kernel.setns(fds[plan["join"]["pid"]], kernel.NEWPID)
        middle = _fork()
        if middle:
            _, status = os.waitpid(middle, 0)
            os._exit(0 if status == 0 else 1)
        try:
            kernel.unshare(kernel.NEWPID)
            first = kernel.fork_sibling()
        except OSError as err:
            raise Refused("Unknown", "clone()", err.errno or 0) from err
    else:
        kernel.unshare(kernel.NEWPID)
        first = _fork()
    if first:
        os._exit(0)
    _make_namespaces(plan)
    _report(control, {"ready": True})
    _enter_mounts(plan, fds, control)
    command = plan["command"]
    if command is None:
        _become_holder(plan, control)
    _place_streams(plan, fds)
    if plan["bare_init"]:
        _make_symlinks(plan)
        _set_credentials(command)
        _execute(plan, command, control)
    _make_symlinks(plan)
    pid = _fork()
    if pid == 0:
        _set_credentials(command)
        _execute(plan, command, control)
    control.close()
    _become_init(pid, fds[plan["exit_fd"]])


def _start_shared(plan: Plan, fds: list[int], control: socket.socket) -> NoReturn:
    """In the PID namespace of another container, or in Porto's own."""
    _enter(plan, fds)
    _make_namespaces(plan)
    _report(control, {"ready": True})
    _enter_mounts(plan, fds, control)
    command = plan["command"]
    if command is None:
        _become_holder(plan, control)
    _place_streams(plan, fds)
    _make_symlinks(plan)
    if "pid" in plan["join"]:
        kernel.setns(fds[plan["join"]["pid"]], kernel.NEWPID)
    _set_credentials(command)
    if _fork():
        os._exit(0)
    _execute(plan, command, control)


# -- steps -------------------------------------------------------------------------------------------------------------


def receive(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """A message and the descriptors that came along, which no program executed later inherits."""
    fds = array.array("i")
    space = socket.CMSG_LEN(DESCRIPTORS_MAX * fds.itemsize)
    data, ancillary, _, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def _fork() -> int:
    try:
        return os.fork()
    except OSError as err:
        raise Refused("Unknown", "clone()", err.errno or 0) from err


def reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _enter(plan: Plan, fds: list[int]) -> None:
    """Cgroups, priorities and limits, then the namespaces that are there already, the PID namespace excepted."""
    os.setsid()
    for path in plan["cgroups"]:
        _write(path, "0")
    _tolerate(lambda: _write("/proc/self/oom_score_adj", str(plan["oom_score_adj"])))
    _tolerate(lambda: os.sched_setscheduler(0, plan["policy"], os.sched_param(0)))
    _tolerate(lambda: os.setpriority(os.PRIO_PROCESS, 0, plan["nice"]))
    if plan["io_priority"]:
        _tolerate(lambda: kernel.set_io_priority(0, plan["io_priority"]))
    for limit in plan["rlimits"]:
        _set_rlimit(*limit)
    for kind, flag in _JOINED_FIRST:
        if kind in plan["join"]:
            kernel.setns(fds[plan["join"][kind]], flag)


def _make_namespaces(plan: Plan) -> None:
    kernel.unshare(plan["unshare"])
    for name, value in plan["sysctls"].items():
        path = "/proc/sys/" + name.replace(".", "/")
        try:
            _write(path, value)
        except OSError as err:
            raise Refused("Unknown", f"Cannot write {path}: write", err.errno or 0) from err
    if plan["hostname"]:
        try:
            kernel.sethostname(plan["hostname"])
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            raise Refused("InvalidValue", f"hostname '{plan['hostname']}' is too long") from err
    if plan["loopback"]:
        _bring_up_loopback()


def _enter_mounts(plan: Plan, fds: list[int], control: socket.socket) -> None:
    """Get into the mount namespace: the one crun makes, one of our own making, or an existing one."""
    mounts = plan["mounts"]
    if plan["crun"]:
        assert mounts is not None
        process = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if "mnt" in plan["join"]:
            kernel.setns(fds[plan["join"]["mnt"]], kernel.NEWNS)
        tree = reroot.copy_root(mounts)
        message, received = receive(control, MESSAGE_MAX)
        if not message:
            os._exit(1)  # the keeper has told the daemon what went wrong with crun
        kernel.setns(received[0], kernel.NEWNS)
        os.close(received[0])
        _report(control, {"adopted": True})
        reroot.replace_root(tree, process)
        _replace_nodes(mounts, process)
        os.close(process)
        kernel.propagate("/", kernel.MS_SHARED | kernel.MS_REC)
    elif "mnt" in plan["join"]:
        kernel.setns(fds[plan["join"]["mnt"]], kernel.NEWNS)
    if mounts is not None and not plan["crun"]:
        kernel.unshare(kernel.NEWNS)
        _mount_on_host_root(mounts)


def _replace_nodes(mounts: MountPlan, process: int) -> None:
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in mounts["unwanted"]:
            inroot.remove(root, path)
        for node in mounts["nodes"]:
            device = (node["mode"], node["device"], node["uid"], node["gid"])
            inroot.make_node(root, node["path"], *device, process=process)
    finally:
        os.close(root)


def _mount_on_host_root(mounts: MountPlan) -> None:
    """A mount namespace whose root is that of the namespace it starts from."""
    kernel.propagate("/", kernel.MS_SLAVE | kernel.MS_REC)
    if mounts["readonly"]:
        kernel.mount("", "/", "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY)
    quiet = kernel.MS_NOSUID | kernel.MS_NOEXEC | kernel.MS_NODEV
    if mounts["proc"]:
        kernel.umount_all("/proc")
        kernel.mount("proc", "/proc", "proc", quiet)
    kernel.umount_all("/sys")
    kernel.mount("sysfs", "/sys", "sysfs", quiet | kernel.MS_RDONLY)
    if mounts["proc"]:
        for path in (f"/proc/{name}" for name in _PROTECTED_PROC):
            if os.path.exists(path):
                kernel.bind(path, path, quiet | kernel.MS_RDONLY)
        if os.path.exists("/proc/kcore"):
            kernel.bind("/dev/null", "/proc/kcore", kernel.MS_RDONLY)
    for bind in mounts["binds"]:
        _bind_on_host_root(bind["source"], bind["target"], bind["flags"], bind["uid"], bind["gid"])
    if mounts["files"]:
        _bind_files(mounts)
    kernel.propagate("/", kernel.MS_SHARED | kernel.MS_REC)


def _bind_on_host_root(source: str, target: str, flags: int, uid: int, gid: int) -> None:
    try:
        directory = os.path.isdir(source)
        if not os.path.exists(source):
            raise Refused("Unknown", f"Cannot open {source}", errno.ENOENT)
        root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if directory:
                os.close(inroot.make_directories(root, target, 0o775, uid, gid))
            else:
                inroot.make_file(root, target, 0o664, uid, gid)
        finally:
            os.close(root)
        kernel.bind(source, target, flags)
        kernel.propagate(target, _spread(flags))
    except OSError as err:
        raise Refused("Unknown", f"Bindmount target {target}: {err.filename}", err.errno or 0) from err


def _spread(flags: int) -> int:
    own = flags & (kernel.MS_PRIVATE | kernel.MS_UNBINDABLE)
    return (own or kernel.MS_SLAVE) | flags & kernel.MS_REC


def _bind_files(mounts: MountPlan) -> None:
    """Bind files with given contents over those of the root. They lie on a file system of their own, in memory."""
    work = mounts["work"]
    os.makedirs(work, 0o700, exist_ok=True)
    kernel.mount("tmpfs", work, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for index, (path, content) in enumerate(mounts["files"].items()):
            _create(f"{work}/{index}", content)
            inroot.make_file(root, path)
            kernel.umount_all(path)
            kernel.bind(f"{work}/{index}", path)
    finally:
        os.close(root)
        kernel.umount(work)


def _create(path: str, content: str) -> None:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        os.fchmod(fd, 0o644)
        os.write(fd, content.encode())
    finally:
        os.close(fd)


def _make_symlinks(plan: Plan) -> None:
    """Symbolic links in the container's root, while we may still make them."""
    if not plan["symlinks"]:
        return
    command = plan["command"]
    uid, gid = (command["uid"], command["gid"]) if command else (0, 0)
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for link in plan["symlinks"]:
            inroot.make_symlink(root, link["path"], link["target"], uid, gid)
    finally:
        os.close(root)


def _place_streams(plan: Plan, fds: list[int]) -> None:
    """Make the given descriptors our standard streams."""
    for number, stream in enumerate(plan["streams"]):
        if "fd" in stream:
            os.dup2(fds[stream["fd"]], number)


def _set_credentials(command: CommandPlan) -> None:
    """Working directory, user and capabilities. What is gone here doesn't come back by exec."""
    try:
        os.chdir(command["cwd"])
    except OSError as err:
        raise Refused("InvalidPath", f"Cannot chdir {command['cwd']}", err.errno or 0) from err
    _tolerate(lambda: _write("/proc/self/loginuid", str(command["loginuid"])))
    kernel.prctl(kernel.PR_SET_SECUREBITS, kernel.SECBIT_KEEP_CAPS | kernel.SECBIT_NO_SETUID_FIXUP)
    os.setgid(command["gid"])
    os.setgroups(command["groups"])
    os.setuid(command["uid"])
    kernel.prctl(kernel.PR_SET_SECUREBITS, 0)
    bounding, ambient = command["bounding"], command["ambient"]
    kernel.drop_bounding(bounding, command["last_cap"])
    # What the daemon itself isn't allowed to do, on a machine that is a container, nobody gets.
    own = kernel.permitted_capabilities()
    ambient &= own
    allowed = own & (bounding | ambient) if command["uid"] == 0 else ambient
    kernel.capset(allowed, allowed, ambient)
    kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
    for cap in range(command["last_cap"] + 1):
        if ambient >> cap & 1:
            kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_RAISE, cap)


def _execute(plan: Plan, command: CommandPlan, control: socket.socket) -> NoReturn:
    """The last steps, by the process that is to be the command."""
    try:
        os.setsid()
    except PermissionError:
        pass  # the first process of a PID namespace leads its session already
    _open_streams(plan)
    os.umask(command["umask"])
    _report(control, {"running": os.getpid()})
    if command["userns"]:
        _enter_user_namespace(control, command["userns"])
    if command["unshare_mounts"]:
        kernel.unshare(kernel.NEWNS)
    os.environ.clear()
    os.environ.update(command["env"])
    argv = command["argv"]
    if not argv:
        try:
            argv = kernel.wordexp(command["line"])
        except ValueError as err:
            raise Refused("InvalidCommand", str(err)) from None
    if not argv:
        raise Refused("InvalidCommand", "empty command")
    if not argv[0]:
        raise Refused("InvalidCommand", "cannot exec ", errno.ENOENT)
    if command["seccomp"] is not None:
        _load_seccomp(command["seccomp"])
    try:
        os.execvpe(argv[0], argv, command["env"])
    except OSError as err:
        code = "ResourceNotAvailable" if err.errno == errno.EAGAIN else "InvalidCommand"
        raise Refused(code, f"cannot exec {argv[0]}", err.errno or 0) from err
    except ValueError as err:
        raise Refused("InvalidCommand", f"cannot exec {argv[0]}: {err}") from err


def _open_streams(plan: Plan) -> None:
    """Open the paths that are meant in the container's root; a terminal becomes the controlling one."""
    for number, stream in enumerate(plan["streams"]):
        if "path" in stream:
            os.umask(0)
            try:
                fd = _open_stream(stream["path"], number)
            except OSError as err:
                raise Refused("InvalidValue", f"open {stream['path']}", err.errno or 0) from err
            os.dup2(fd, number)
            os.close(fd)
        if os.isatty(number):
            try:
                fcntl.ioctl(number, _TIOCSCTTY, 0)
            except OSError:
                pass  # it is another session's


def _open_stream(path: str, number: int) -> int:
    flags = (os.O_WRONLY | os.O_APPEND | os.O_CREAT) if number else os.O_RDONLY
    fd = os.open(path, flags | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC, 0o660)
    os.set_blocking(fd, True)
    return fd


def _enter_user_namespace(control: socket.socket, flags: int) -> None:
    kernel.unshare(flags)
    _report(control, {"map": True})
    if not control.recv(1):
        os._exit(1)


def _seccomp_library() -> ctypes.CDLL:
    return ctypes.CDLL("libseccomp.so.2")


def _load_seccomp(profile: dict[str, object]) -> None:
    class Compare(ctypes.Structure):
        _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))

    library = _seccomp_library()
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(profile["default"])))  # type: ignore[arg-type]
    if not context:
        raise Refused("Unknown", "seccomp_init failed")
    for rule in profile["rules"]:  # type: ignore[attr-defined]
        compares = (Compare * max(len(rule["args"]), 1))()
        for slot, (index, op, value) in zip(compares, rule["args"], strict=False):
            # For a masked comparison Porto gives the mask alone: the value compared with is 0.
            slot.arg, slot.op, slot.a, slot.b = index, op, value, 0
        result = library.seccomp_rule_add_array(
            context, ctypes.c_uint32(rule["action"]), rule["syscall"], len(rule["args"]), compares
        )
        if result < 0:
            raise Refused("Unknown", "seccomp_rule_add_array", -result)
    result = library.seccomp_load(context)
    if result < 0:
        raise Refused("Unknown", "seccomp_load failed", -result)


# -- what stays --------------------------------------------------------------------------------------------------------


def _become_holder(plan: Plan, control: socket.socket) -> NoReturn:
    """Hold namespaces for the containers below, and reap what is orphaned."""
    _make_symlinks(plan)
    _report(control, {"running": os.getpid()})
    control.close()
    _shed()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        signal.pause()


def _become_init(target: int, exit_file: int) -> NoReturn:
    """Reap; end as the command ends."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: os.kill(target, received))
    _shed(exit_file)
    while True:
        try:
            pid, status = os.wait()
        except InterruptedError:
            continue
        if pid == target:
            code = encode(status)
            os.write(exit_file, str(code << 8).encode())
            os._exit(code)


def encode(status: int) -> int:
    """A wait status as the exit code an init can end with."""
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    return os.WTERMSIG(status) + (EXIT_CORE_OFFSET if os.WCOREDUMP(status) else 128)


def decode(status: int) -> int:
    """What :func:`encode` was given, from the init's own wait status; as ambiguous as Porto's."""
    if os.WIFEXITED(status) and 128 < os.WEXITSTATUS(status) < 128 + 2 * 34:
        code = os.WEXITSTATUS(status)
        return code - 34 if code > EXIT_CORE_OFFSET else code - 128
    return status


def _shed(*keep: int) -> None:
    """Close what we have open and drop what we may do: whoever gets hold of us gets nothing."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else map(str, range(1024)):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                pass
    os.chdir("/")
    kernel.set_name("portoinit")
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kill = 1 << 5
    kernel.drop_bounding(kill, _last_cap())
    kernel.capset(kill, kill, 0)


def _last_cap() -> int:
    for cap in range(63, -1, -1):
        try:
            kernel.prctl(23, cap)  # PR_CAPBSET_READ
        except OSError:
            continue
        return cap
    return 0


# -- small things ------------------------------------------------------------------------------------------------------


def _report(control: socket.socket, message: dict[str, object]) -> None:
    try:
        control.send(json.dumps(message).encode())
    except OSError:
        os._exit(1)  # the keeper is gone: the daemon takes the start for one that has failed


def _write(path: str, value: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as err:
        raise OSError(err.errno, err.strerror, f"write {path}") from err


def _tolerate(step: Callable[[], object]) -> None:
    """Take a step that portod too can do without when it may not take it."""
    try:
        step()
    except OSError as err:
        if err.errno not in (errno.EPERM, errno.EACCES, errno.ENOENT, errno.EINVAL):
            raise


def _set_rlimit(name: str, number: int, soft: int, hard: int) -> None:
    if hard >= 0 and not 0 <= soft <= hard:
        raise Refused("Unknown", f"prlimit 0 {name} {soft} {hard}", errno.EINVAL)
    unlimited = resource.RLIM_INFINITY
    wanted = tuple(unlimited if value < 0 else value for value in (soft, hard))
    try:
        resource.setrlimit(number, (wanted[0], wanted[1]))
    except (ValueError, PermissionError):
        highest = resource.getrlimit(number)[1]
        lowered = [highest if value == unlimited else min(value, highest) for value in wanted]
        resource.setrlimit(number, (min(lowered), lowered[1]))


def _bring_up_loopback() -> None:
    import struct

    get_flags, set_flags, up = 0x8913, 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack_from("16sh", fcntl.ioctl(sock, get_flags, request))[1]
        fcntl.ioctl(sock, set_flags, struct.pack("16sh14x", b"lo", flags | up))
