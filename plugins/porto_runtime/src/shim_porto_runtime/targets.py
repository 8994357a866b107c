"""Where mounts go inside a container: found as the container itself would, and refused where nothing can be mounted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, Unimplemented
from shim_porto_runtime import devices, linux, rootfs
from shim_porto_runtime.mounts import Entry, Plan, is_inside
from shim_porto_runtime.process import HELPER_DIRECTORY

_PROC_FILES = frozenset(
    f"/proc/{name}" for name in ("cpuinfo", "diskstats", "loadavg", "meminfo", "slabinfo", "stat", "swaps", "uptime")
)
"""What may be mounted over in /proc: numbers that programs read. Anything else there decides what the container may."""


def settle(plan: Plan, root: str, nodes: Iterable[str], *, joins_processes: bool) -> None:
    """Find every mount's place, once the root filesystem is mounted, and make those that Porto wouldn't.

    :param root: the path of the root filesystem, which nobody else changes.
    :param nodes: device nodes that Porto makes.
    :param joins_processes: init mounts the /proc of another container in the end.
    :raises InvalidArgument, Unimplemented: nothing can be mounted there; names the mount.
    """
    for entry in plan.entries:
        before = entry.target
        try:
            entry.target = rootfs.resolve(root, before)
        except OSError as err:
            raise _refused(entry, f"{before}: {err.strerror}") from err
    plan.sort()
    _drop_doubles(plan)
    plan.entries[:] = [entry for entry in plan.entries if not _is_hidden(entry, plan)]
    made = set(nodes)
    for number, entry in enumerate(plan.entries):
        above = [other for other in plan.entries[:number] if is_inside(entry.target, other.target)]
        # Porto makes its own nodes after its mounts, so what is at their place can only come later; and so has all else
        # that is below something which comes late.
        at_nodes = entry.target == "/dev" or entry.target in made
        entry.late = entry.late or at_nodes or any(other.late for other in above)
        _check(entry, above, root)
        if joins_processes and entry.field and is_inside(entry.target, "/proc"):
            raise Unimplemented(f"{entry.field}.container_path: not over the /proc of a target container")


def check_protected(plan: Plan, root: str, security: pb.LinuxContainerSecurityContext) -> None:
    """Refuse to mask, or make read-only, what the node sees as well.

    :param plan: settled. :param root: as for :func:`settle`. :param security: with paths that are well-formed.
    :raises InvalidArgument: names the field and the path.
    """
    if security.privileged:
        return
    for name in ("masked_paths", "readonly_paths"):
        for path in getattr(security, name):
            try:
                target = rootfs.resolve(root, path)
            except OSError:
                continue  # init will say so
            above = [entry for entry in plan.entries if is_inside(target, entry.target)]
            if not above or above[-1].propagation != pb.PROPAGATION_BIDIRECTIONAL:
                continue
            if os.path.lexists(os.path.join(above[-1].source, os.path.relpath(target, above[-1].target))):
                what = f"{path[:80]!r} is in {above[-1].field}, whose propagation is BIDIRECTIONAL"
                raise InvalidArgument(f"linux.security_context.{name}: {what}: the node would have it like that, too")


def _drop_doubles(plan: Plan) -> None:
    """A mount of the config takes the place of the runtime's or the image's own."""
    by_target: dict[str, Entry] = {}
    for entry in plan.entries:
        other = by_target.get(entry.target)
        if other is not None and entry.field and other.field:
            raise _refused(entry, f"{entry.target} is where {other.field} is mounted too")
        if other is None or entry.field:
            by_target[entry.target] = entry
    plan.entries[:] = by_target.values()
    plan.sort()


def _is_hidden(entry: Entry, plan: Plan) -> bool:
    """True for a file of the pod's whose directory is a mount of the config, which doesn't have such a file."""
    if entry.field or not is_inside(entry.target, "/etc"):
        return False
    above = [other for other in plan.entries if other.field and is_inside(entry.target, other.target)]
    if not above:
        return False
    there = os.path.join(above[-1].source, os.path.relpath(entry.target, above[-1].target))
    return os.path.islink(there) or not os.path.isfile(there)


def _check(entry: Entry, above: Sequence[Entry], root: str) -> None:
    target = entry.target
    if not entry.field:
        return
    if target == "/":
        raise _refused(entry, "it leads to the root directory")
    if is_inside(target, HELPER_DIRECTORY):
        raise _refused(entry, f"{HELPER_DIRECTORY} is taken by the runtime")
    if is_inside(target, "/proc"):
        if target not in _PROC_FILES or os.path.isdir(entry.source):
            raise _refused(entry, f"{target}: nothing may be mounted over this part of /proc")
    elif above:
        _check_below(entry, above[-1])
    elif is_inside(target, "/sys") or is_inside(target, "/dev"):
        _check_system(entry)
    elif not is_inside(target, "/run"):
        # Porto gives a container a fresh /run, with the directories of the image's.
        _check_path(entry, root, target)


def _check_system(entry: Entry) -> None:
    target = entry.target
    if any(is_inside(target, link) for link in devices.LINKS):
        raise _refused(entry, f"{target} is a symbolic link in every container")
    if target in devices.DIRECTORIES and not os.path.isdir(entry.source):
        raise _refused(entry, f"{target} is a directory, {entry.source} is none")
    if target != "/sys" and is_inside(target, "/sys"):
        if not os.path.lexists(target):
            raise _refused(entry, f"{target}: there is no such thing in /sys, and it can't be made")
        _check_kind(entry, target)


def _check_below(entry: Entry, above: Entry) -> None:
    """What is at a target in another mount's source."""
    rest = os.path.relpath(entry.target, above.target)
    if not os.path.isdir(above.source):
        raise _refused(entry, f"{above.target} is no directory")
    _check_path(entry, above.source, rest)
    there = os.path.join(above.source, rest)
    if (above.readonly or "ro" in linux.mount_flags(above.source)) and not os.path.lexists(there):
        raise _refused(entry, f"{above.target} is read-only and has no {rest} to mount over")


def _check_path(entry: Entry, base: str, path: str) -> None:
    parts = path.strip("/").split("/")
    here = base
    for part in parts[:-1]:
        here = os.path.join(here, part)
        try:
            mode = os.lstat(here).st_mode
        except OSError:
            return  # made when it is mounted
        if stat.S_ISLNK(mode):
            return  # in the host's tree: it leads elsewhere inside the container
        if not stat.S_ISDIR(mode):
            raise _refused(entry, f"{entry.target} lies below what is no directory")
    _check_kind(entry, os.path.join(here, parts[-1]))


def _check_kind(entry: Entry, there: str) -> None:
    try:
        mode = os.lstat(there).st_mode
    except OSError:
        return
    if not stat.S_ISLNK(mode) and stat.S_ISDIR(mode) != os.path.isdir(entry.source):
        what = ("a directory", "none") if stat.S_ISDIR(mode) else ("no directory", "one")
        raise _refused(entry, f"{entry.target} is {what[0]}, {entry.source} is {what[1]}")


def _refused(entry: Entry, why: str) -> InvalidArgument:
    return InvalidArgument(f"{entry.field or 'mounts'}.container_path: {why}")
