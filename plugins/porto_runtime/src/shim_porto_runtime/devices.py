"""Device nodes: from the CRI's devices to Porto's.

Porto restricts what a container may open only where devices are named at its creation, so they are named always, none
as well. To Porto a child can't have more than its parent: a sandbox is given what its containers ask for.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, Unimplemented

_ACCESS = frozenset("rwm")
_MAX_NODES = 4096

OWN = frozenset(
    {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/console", "/dev/ptmx"}
)
"""What Porto makes in every container by itself."""
LINKS = ("/dev/fd", "/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/ptmx")
"""Symbolic links in every container."""
DIRECTORIES = ("/dev/shm", "/dev/pts", "/dev/mqueue", "/dev/hugepages")
"""Mounts in every container."""
_NOT_NODES = frozenset({*DIRECTORIES, "/dev/fd"})


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """A device node of the host, as a container sees it."""

    host_path: str
    container_path: str
    access: str
    """Of ``r``, ``w``, ``m``; ``*`` stands for all devices of the same major number, which have no node then."""
    mode: str = ""
    """Permission bits, octal; empty: the host's."""
    user: str = ""
    """Numbers; empty: the host's. Given together with ``group``, and ``mode`` before them."""
    group: str = ""


def of_container(devices: Iterable[pb.Device]) -> list[Node]:
    """The nodes that a container's devices name; a directory stands for all nodes below it.

    :raises InvalidArgument, Unimplemented: a field that can't be honoured.
    """
    nodes: list[Node] = []
    for index, device in enumerate(devices):
        nodes += find(device.host_path, device.container_path, device.permissions or "rwm", f"devices[{index}]")
    check_doubles(nodes, "devices")
    return nodes


def find(host_path: str, container_path: str, access: str, field: str) -> list[Node]:
    """The node at a path of the host, or all below a directory.

    :raises InvalidArgument, Unimplemented: names the field.
    """
    if not set(access) <= _ACCESS:
        raise InvalidArgument(f"{field}.permissions: {access[:40]!r}: only r, w and m are known")
    for name, value in (("host_path", host_path), ("container_path", container_path)):
        if not value.startswith("/") or "\0" in value or ".." in value.split("/"):
            raise InvalidArgument(f"{field}.{name}: {value[:200]!r} must be an absolute path without '..'")
    source, target = os.path.realpath(host_path), os.path.normpath(container_path)
    try:
        status = os.stat(source)
    except OSError as err:
        raise InvalidArgument(f"{field}.host_path: {host_path[:200]!r}: {err.strerror}") from err
    _check_target(target, status, f"{field}.container_path")
    if not source.startswith("/dev/"):
        raise Unimplemented(f"{field}.host_path: {source[:200]!r}: Porto takes devices from /dev only")
    access = "".join(sorted(set(access), key="rwm".index))
    if source.startswith("/dev/pts"):
        raise InvalidArgument(f"{field}.host_path: {source!r}: a terminal belongs to who has opened it")
    if stat.S_ISDIR(status.st_mode):
        found = [Node(path, os.path.join(target, os.path.relpath(path, source)), access) for path in _below(source)]
        if not found:
            raise InvalidArgument(f"{field}.host_path: {host_path!r} is a directory without devices")
        return found
    if not stat.S_ISCHR(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise InvalidArgument(f"{field}.host_path: {host_path!r} is neither a device nor a directory of devices")
    return [Node(source, target, access)]


def _check_target(path: str, status: os.stat_result, field: str) -> None:
    if not path.startswith("/dev/"):
        raise Unimplemented(f"{field}: {path[:200]!r}: Porto makes device nodes below /dev only")
    if any(path == taken or path.startswith(taken + "/") for taken in (*LINKS, *DIRECTORIES)):
        raise InvalidArgument(f"{field}: {path[:200]!r} is the runtime's own")
    if path in OWN and not _is_the_same(path, status):
        raise InvalidArgument(f"{field}: {path!r} is another device in every container")


def _is_the_same(own: str, status: os.stat_result) -> bool:
    # Where others have a terminal, Porto has nothing.
    usual = "/dev/null" if own == "/dev/console" else own
    try:
        return stat.S_ISCHR(status.st_mode) and os.stat(usual).st_rdev == status.st_rdev
    except OSError:
        return False


def check_doubles(nodes: Iterable[Node], field: str) -> None:
    """Refuse two devices at one place.

    :raises InvalidArgument: there are.
    """
    seen: dict[str, Node] = {}
    for node in nodes:
        if seen.setdefault(node.container_path, node) != node:
            raise InvalidArgument(f"{field}: container_path {node.container_path[:200]!r} is named twice")


def of_host() -> list[Node]:
    """All nodes of the host, for what is privileged, and whatever comes to be of the same kinds."""
    nodes = [Node(path, path, "rwm") for path in _below("/dev") if path not in OWN]
    kinds: dict[str, Node] = {}
    for node in nodes:
        try:
            status = os.stat(node.host_path)
        except OSError:
            continue
        letter = "b" if stat.S_ISBLK(status.st_mode) else "c"
        name = f"/dev/any-{letter}{os.major(status.st_rdev)}"
        kinds.setdefault(name, Node(node.host_path, name, "rwm*"))
    return [*nodes, *kinds.values()]


def allowed(known: Iterable[Node], nodes: Iterable[Node]) -> list[Node]:
    """What a sandbox has to have so that its containers can have these: every device once, with all access asked for.

    :param known: what it has. What has gone from the host meanwhile is left out, since Porto refuses it.
    """
    access: dict[tuple[str, str], set[str]] = {}
    for node in (
        *known,
        *(node if "*" in node.access else replace(node, container_path=node.host_path) for node in nodes),
    ):
        access.setdefault((node.host_path, node.container_path), set()).update(node.access)
    return [
        Node(host_path, container_path, "".join(sorted(letters, key="rwm*".index)))
        for (host_path, container_path), letters in sorted(access.items())
        if os.path.exists(host_path)
    ]


def owned(nodes: Iterable[Node], of: Container[str], uid: int, gid: int) -> list[Node]:
    """The nodes, some of them with the container's user as their owner where nobody else is named.

    :param of: the paths of those in the container. :param uid: whom it runs as.
    """
    return [
        replace(node, mode=node.mode or permissions(node.host_path), user=str(uid), group=str(gid))
        if node.container_path in of and not node.user
        else node
        for node in nodes
    ]


def permissions(path: str) -> str:
    """The permission bits of a node of the host, octal."""
    return f"{os.stat(path).st_mode & 0o777:o}"


def _below(directory: str) -> Iterator[str]:
    count = 0
    for parent, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if os.path.join(parent, name) not in _NOT_NODES]
        for name in sorted(files):
            path = os.path.join(parent, name)
            try:
                mode = os.lstat(path).st_mode
            except OSError:
                continue
            if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                yield path
                count += 1
                if count == _MAX_NODES:
                    return


def into_spec(nodes: Iterable[Node], spec: rpc_pb2.TContainerSpec) -> None:
    """Have a Porto container see these nodes, and no others but Porto's own."""
    spec.devices.SetInParent()
    for node in nodes:
        device = spec.devices.device.add(device=node.host_path, access=node.access, path=node.container_path)
        if node.mode:
            device.mode = node.mode
        if node.mode and node.user:
            device.user, device.group = node.user, node.group
