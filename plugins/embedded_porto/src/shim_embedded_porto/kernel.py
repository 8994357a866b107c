"""System calls Python 3.11 has no names for. Each raises ``OSError`` with what was attempted.

The keeper and the processes it forks use this module: it imports little, and nothing of this package.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_PARENT, SIGCHLD = 0x00008000, 17

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 0x1, 0x2, 0x4, 0x8, 0x20, 0x1000
MS_NOATIME, MS_NODIRATIME, MS_MOVE, MS_REC, MS_RELATIME = 0x400, 0x800, 0x2000, 0x4000, 0x200000
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED, MS_STRICTATIME = 0x20000, 0x40000, 0x80000, 0x100000, 0x1000000
MNT_DETACH, UMOUNT_NOFOLLOW = 0x2, 0x8

PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_SECUREBITS, PR_SET_CHILD_SUBREAPER = 4, 15, 28, 36
PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 2, 4
SECBIT_KEEP_CAPS, SECBIT_NO_SETUID_FIXUP = 1 << 4, 1 << 2

OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC, AT_RECURSIVE, AT_EMPTY_PATH = 1, os.O_CLOEXEC, 0x8000, 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 0x1, 0x2
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 0x1, 0x2, 0x4, 0x8, 0x10
AT_FDCWD, RENAME_EXCHANGE = -100, 2
O_PATH = getattr(os, "O_PATH", 0x200000)

_X86 = os.uname().machine == "x86_64"
_SYS_CLONE = 56 if _X86 else 220
_SYS_CAPGET, _SYS_CAPSET = (125, 126) if _X86 else (90, 91)
_SYS_IOPRIO_SET = 251 if _X86 else 30
_SYS_PIVOT_ROOT = 155 if _X86 else 41
_SYS_RENAMEAT2 = 316 if _X86 else 276
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_OPENAT2, _SYS_MOUNT_SETATTR = 428, 429, 437, 442

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, flags: int = 0) -> None:
    _check(_libc.setns(fd, flags), f"setns({flags:#x})")


def fork_sibling() -> int:
    """fork(2), but the new process is a child of our parent. For processes with one thread."""
    return _check(int(_libc.syscall(_SYS_CLONE, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0)), "clone(CLONE_PARENT)")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    )
    _check(result, f"mount({source}, {target}, {kind}, {flags:#x}, {data})")


def umount(target: str, flags: int = MNT_DETACH | UMOUNT_NOFOLLOW) -> None:
    """umount2(2).

    What others have mounted below a lazily unmounted one goes along, and stays where else it is mounted: it is cut off
    from its peers first, since unmounting a bind mount of /sys would otherwise take what is below the machine's own.
    """
    if flags & MNT_DETACH:
        isolate(target)
    _check(_libc.umount2(os.fsencode(target), flags), f"umount({target})")


def umount_all(target: str) -> None:
    """Unmount all that is mounted there; fine when nothing is."""
    while True:
        try:
            umount(target)
        except OSError:
            return


def bind(source: str, target: str, flags: int = 0) -> None:
    """A bind mount with flags of its own: the kernel takes those only in a second step."""
    mount(source, target, "", MS_BIND | (flags & MS_REC))
    own = flags & ~(MS_REC | MS_PRIVATE | MS_SLAVE | MS_SHARED | MS_UNBINDABLE)
    if own:
        mount("", target, "", MS_REMOUNT | MS_BIND | own)


def propagate(target: str, flags: int) -> None:
    """Change how mounts below ``target`` spread."""
    mount("", target, "", flags)


def isolate(target: str) -> None:
    """Cut a mount, and all below it, off from its peers; nothing happens to what is no mount."""
    attributes = struct.pack("<4Q", 0, 0, MS_PRIVATE, 0)
    flags = AT_SYMLINK_NOFOLLOW | AT_RECURSIVE
    _libc.syscall(_SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), flags, attributes, len(attributes))


def open_tree(path: str) -> int:
    """A copy of a mount tree that is mounted nowhere yet, as a descriptor."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE
    return _check(int(_libc.syscall(_SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags)), f"open_tree({path})")


def open_tree_of(fd: int) -> int:
    """As :func:`open_tree`, of what a descriptor names."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE | AT_EMPTY_PATH
    return _check(int(_libc.syscall(_SYS_OPEN_TREE, fd, b"", flags)), "open_tree")


def set_mount(fd: int, *, set_flags: int = 0, clear_flags: int = 0, propagation: int = 0) -> None:
    """Change a tree of mounts, those that are mounted nowhere included (mount_setattr(2), Linux 5.12).

    :param set_flags: of MOUNT_ATTR_*; so ``clear_flags``. :param propagation: one of MS_SLAVE, MS_SHARED, ...
    """
    attributes = struct.pack("<4Q", set_flags, clear_flags, propagation, 0)
    flags = AT_RECURSIVE | AT_EMPTY_PATH
    _check(int(_libc.syscall(_SYS_MOUNT_SETATTR, fd, b"", flags, attributes, len(attributes))), "mount_setattr")


def pivot_root() -> None:
    """Make the working directory, a mount point, the root of the mount namespace; the old root is gone."""
    _check(int(_libc.syscall(_SYS_PIVOT_ROOT, b".", b".")), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount(old root)")


def move_mount(fd: int, target: str) -> None:
    """Mount what :func:`open_tree` gave."""
    result = _libc.syscall(_SYS_MOVE_MOUNT, fd, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)
    _check(int(result), f"move_mount({target})")


def move_mount_to(fd: int, target_fd: int) -> None:
    """As :func:`move_mount`, onto what a descriptor names."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    _check(int(_libc.syscall(_SYS_MOVE_MOUNT, fd, b"", target_fd, b"", flags)), "move_mount")


def open_in(root: int, path: str, flags: int, mode: int = 0, *, symlinks: bool = True) -> int:
    """Open a path whose ``/`` and ``..`` can't lead out of the directory ``root`` is open on (openat2(2))."""
    resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | (0 if symlinks else RESOLVE_NO_SYMLINKS)
    return _openat2(root, path, flags, mode, resolve)


def open_directory_below(directory: int, name: str) -> int:
    """Open a directory in another one, to be read: on the same mount, and by no symbolic link (openat2(2))."""
    resolve = RESOLVE_BENEATH | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS
    return _openat2(directory, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, 0, resolve)


def _openat2(directory: int, path: str, flags: int, mode: int, resolve: int) -> int:
    how = struct.pack("<QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return _check(int(_libc.syscall(_SYS_OPENAT2, directory, os.fsencode(path), how, len(how))), path)


def exchange(first: str, second: str) -> None:
    """Let two files change names, in one step (renameat2(2))."""
    names = os.fsencode(first), os.fsencode(second)
    result = _libc.syscall(_SYS_RENAMEAT2, AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE)
    _check(int(result), f"exchange({first}, {second})")


def unescape(path: str) -> str:
    """A path as the kernel writes it into tables, with blanks and backslashes in octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def sethostname(name: str) -> None:
    data = name.encode()
    _check(_libc.sethostname(data, len(data)), f"sethostname({name})")


def prctl(option: int, *arguments: int) -> None:
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    _check(_libc.prctl(option, *values), f"prctl({option}, {arguments})")


def set_name(name: str) -> None:
    """What ps shows."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _libc.prctl(PR_SET_NAME, buffer, 0, 0, 0)


_CAP_VERSION = 0x20080522


def permitted_capabilities() -> int:
    """What this thread may do."""
    header = struct.pack("<Ii", _CAP_VERSION, 0)
    data = ctypes.create_string_buffer(24)
    _check(int(_libc.syscall(_SYS_CAPGET, header, data)), "capget")
    words = struct.unpack("<6I", data.raw)
    return int(words[1] | words[4] << 32)


def capset(effective: int, permitted: int, inheritable: int) -> None:
    header = struct.pack("<Ii", _CAP_VERSION, 0)
    low, high = ([value >> shift & 0xFFFFFFFF for value in (effective, permitted, inheritable)] for shift in (0, 32))
    _check(int(_libc.syscall(_SYS_CAPSET, header, struct.pack("<6I", *low, *high))), "capset")


def set_io_priority(thread: int, priority: int) -> None:
    """ioprio_set(2)."""
    _check(int(_libc.syscall(_SYS_IOPRIO_SET, 1, thread, priority)), "ioprio_set")


def drop_bounding(keep: int, last: int) -> None:
    """Drop all capabilities but ``keep`` from the bounding set; CAP_SETPCAP, which that takes, last."""
    setpcap = 8
    for cap in [*(cap for cap in range(last + 1) if cap != setpcap), setpcap]:
        if not keep >> cap & 1:
            prctl(PR_CAPBSET_DROP, cap)


class _WordExp(ctypes.Structure):
    _fields_ = (("count", ctypes.c_size_t), ("words", ctypes.POINTER(ctypes.c_char_p)), ("offset", ctypes.c_size_t))


WORDEXP_ERRORS = {
    2: "wordexp(): illegal occurrence of newline or one of |, &, ;, <, >, (, ), {, }",
    3: "wordexp(): undefined shell variable was referenced",
    4: "wordexp(): command substitution is not supported",
    5: "wordexp(): syntax error",
}


def wordexp(text: str) -> list[str]:
    """Expand a command line as a shell would, without running anything (wordexp(3)).

    Variables are those of ``os.environ``.

    :raises ValueError: it can't be expanded; the text says why.
    """
    result = _WordExp()
    no_commands, undefined_fails = 4, 32
    code = _libc.wordexp(text.encode(), ctypes.byref(result), no_commands | undefined_fails)
    if code:
        raise ValueError(WORDEXP_ERRORS.get(code, f"wordexp(): error {code}"))
    return [os.fsdecode(result.words[i] or b"") for i in range(result.count)]
