"""Device nodes: from the CRI's devices to Porto's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument

_ACCESS = frozenset("rwm")
_MAX_NODES = 4096

# What Porto makes in every container by itself.
_PORTO_OWN = frozenset(
    {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/console", "/dev/ptmx"}
)
_NOT_NODES = frozenset({"/dev/pts", "/dev/shm", "/dev/fd", "/dev/mqueue", "/dev/hugepages"})


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """A device node of the host, as a container sees it."""

    host_path: str
    container_path: str
    access: str
    """Of ``r``, ``w``, ``m``."""


def of_container(devices: Iterable[pb.Device]) -> list[Node]:
    """The nodes that a container's devices name; a directory stands for all nodes below it.

    :raises InvalidArgument: a field that can't be honoured.
    """
    nodes = []
    for index, device in enumerate(devices):
        field = f"devices[{index}]"
        access = device.permissions or "rwm"
        if not set(access) <= _ACCESS:
            raise InvalidArgument(f"{field}.permissions: {device.permissions!r}: only r, w and m are known")
        for name in ("host_path", "container_path"):
            value = getattr(device, name)
            if not value.startswith("/") or "\0" in value or ".." in value.split("/"):
                raise InvalidArgument(f"{field}.{name}: {value!r} must be an absolute path without '..'")
        host_path = os.path.realpath(device.host_path)
        try:
            mode = os.stat(host_path).st_mode
        except OSError as err:
            raise InvalidArgument(f"{field}.host_path: {device.host_path!r}: {err.strerror}") from err
        if stat.S_ISDIR(mode):
            for path in _below(Path(host_path)):
                inside = os.path.join(device.container_path, os.path.relpath(path, host_path))
                nodes.append(Node(path, inside, access))
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            nodes.append(Node(host_path, device.container_path, access))
        else:
            raise InvalidArgument(
                f"{field}.host_path: {device.host_path!r} is neither a device nor a directory of devices"
            )
    return nodes


def of_host() -> list[Node]:
    """All nodes of the host, for a privileged container."""
    return [Node(path, path, "rwm") for path in _below(Path("/dev")) if path not in _PORTO_OWN]


def _below(directory: Path) -> Iterator[str]:
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
    """Have a Porto container see these nodes."""
    for node in nodes:
        spec.devices.device.add(device=node.host_path, access=node.access, path=node.container_path)
