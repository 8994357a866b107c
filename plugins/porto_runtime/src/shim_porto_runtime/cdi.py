"""CDI: devices that a container asks for by name, and what vendors' files say has to be done for them.

A container names them in ``CDI_devices``, or in annotations that begin with ``cdi.k8s.io/``. Environment, device nodes,
bind mounts and groups can be had; hooks, network devices and cache allocation can't, and such a device is refused.
(Container Device Interface, specification 1.1.)
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, NotFound, Unimplemented
from shim_porto_runtime import devices
from shim_porto_runtime.devices import Node
from shim_porto_runtime.late import OPTIONS
from shim_porto_runtime.users import MAX_ID

ANNOTATIONS = "cdi.k8s.io/"
MAX_FILE_BYTES = 8 * 1024 * 1024
_LATEST = (1, 1)
_NAME = re.compile(r"([A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?)=([^=]+)")
_DEVICE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"v?(\d{1,3})\.(\d{1,3})\.\d{1,3}")

_EDITS = frozenset({"env", "deviceNodes", "netDevices", "mounts", "hooks", "intelRdt", "additionalGids"})
_NODE = frozenset({"path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid"})
_MOUNT = frozenset({"hostPath", "containerPath", "options", "type"})
_IMPOSSIBLE = {
    "hooks": "Porto runs no hooks",
    "netDevices": "network devices can't be moved into a pod",
    "intelRdt": "Porto has no cache allocation",
}
_PROPAGATION = {
    "private": pb.PROPAGATION_PRIVATE,
    "slave": pb.PROPAGATION_HOST_TO_CONTAINER,
    "shared": pb.PROPAGATION_BIDIRECTIONAL,
}


@dataclass(slots=True)
class Edits:
    """What all devices of a container ask for together."""

    variables: dict[str, bytes] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    """By the path in the container."""
    mounts: dict[str, tuple[str, pb.Mount]] = field(default_factory=dict)
    """By the path in the container: what names it in errors, and the mount."""
    groups: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Spec:
    path: str
    edits: Mapping[str, Any]
    """For whoever has any of its devices."""
    devices: Mapping[str, Mapping[str, Any]]
    """By qualified name: the edits for that one."""


class _BrokenError(Exception):
    """A file that can't be used, and why."""


class Registry:
    """The devices of all files in some directories; those of a later directory go before those of an earlier one."""

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = directories
        self._lock = threading.Lock()
        self._read: dict[str, tuple[tuple[int, ...], _Spec | _BrokenError]] = {}

    def edits(self, config: pb.ContainerConfig) -> Edits:
        """What has to be done for the devices of a container.

        :raises InvalidArgument: a name or an edit is malformed.   :raises NotFound: nothing has this name.
        :raises Unimplemented: Porto can't do what a device asks for.
        """
        result = Edits()
        wanted = names(config)
        if not wanted:
            return result
        known, problems = self._load()
        done: set[str] = set()
        for qualified, named_by in wanted.items():
            found = known.get(qualified, [])
            if len(found) != 1:
                raise NotFound(f"{named_by}: {qualified!r} is {self._why(found)}{_list(problems)}")
            spec = found[0]
            if spec.path not in done:
                done.add(spec.path)
                _apply(spec.edits, result, f"{named_by}: {spec.path}: containerEdits")
            _apply(spec.devices[qualified], result, f"{named_by}: {spec.path}: devices")
        return result

    def _why(self, found: Sequence[_Spec]) -> str:
        if found:
            return "described more than once: " + ", ".join(spec.path for spec in found)
        return f"in no file of {', '.join(self._directories)}"

    def _load(self) -> tuple[dict[str, list[_Spec]], list[str]]:
        known: dict[str, list[_Spec]] = {}
        problems = []
        with self._lock:
            for directory in self._directories:
                here: dict[str, list[_Spec]] = {}
                for path in _files(directory):
                    spec = self._get(path)
                    if isinstance(spec, _BrokenError):
                        problems.append(f"{path}: {spec}")
                        continue
                    for name in spec.devices:
                        here.setdefault(name, []).append(spec)
                known.update(here)
        return known, problems

    def _get(self, path: str) -> _Spec | _BrokenError:
        """A file, read again when it has changed."""
        try:
            status = os.stat(path)
            stamp = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
            kept = self._read.get(path)
            if kept is None or kept[0] != stamp:
                self._read[path] = kept = (stamp, _parse(path))
            return kept[1]
        except _BrokenError as err:
            self._read[path] = (stamp, err)
            return err
        except OSError as err:
            return _BrokenError(err.strerror or "can't be read")


def names(config: pb.ContainerConfig) -> dict[str, str]:
    """The qualified names of a container's devices, and which field has each.

    :raises InvalidArgument: one is malformed.
    """
    found: dict[str, str] = {}
    for index, device in enumerate(config.CDI_devices):
        found.setdefault(device.name, f"CDI_devices[{index}]")
    for key, value in sorted(config.annotations.items()):
        if key.startswith(ANNOTATIONS):
            for name in value.split(","):
                found.setdefault(name, f"annotations[{key[:100]!r}]")
    for name, named_by in found.items():
        match = _NAME.fullmatch(name)
        if match is None or _DEVICE.fullmatch(match[2]) is None:
            raise InvalidArgument(f"{named_by}: {name[:100]!r} is no qualified name, such as vendor.com/class=name")
    return found


# -- files -------------------------------------------------------------------------------------------------------------


def _files(directory: str) -> list[str]:
    try:
        entries = sorted(os.listdir(directory))
    except OSError:
        return []
    return [os.path.join(directory, name) for name in entries if name.endswith((".json", ".yaml"))]


def _parse(path: str) -> _Spec:
    file = Path(path)
    if not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
        raise _BrokenError(f"no regular file of at most {MAX_FILE_BYTES} bytes")
    try:
        text = file.read_bytes()
        document = json.loads(text) if path.endswith(".json") else yaml.load(text, _YAML_LOADER)  # noqa: S506
    except (ValueError, yaml.YAMLError, RecursionError) as err:
        raise _BrokenError(" ".join(str(err).split())[:200]) from err
    top = _mapping(document, "", {"cdiVersion", "kind", "annotations", "devices", "containerEdits"})
    version = _VERSION.fullmatch(str(top.get("cdiVersion", "")))
    if version is None or (int(version[1]), int(version[2])) > _LATEST:
        raise _BrokenError(
            f"cdiVersion {top.get('cdiVersion')!r}: only versions up to {_LATEST[0]}.{_LATEST[1]} are known"
        )
    kind = top.get("kind")
    if not isinstance(kind, str) or not _NAME.fullmatch(f"{kind}=x"):
        raise _BrokenError(f"kind {kind!r}: must be of the form vendor.com/class")
    described: dict[str, Mapping[str, Any]] = {}
    for device in _sequence(top.get("devices"), "devices"):
        values = _mapping(device, "devices", {"name", "annotations", "containerEdits"})
        name = values.get("name")
        if not isinstance(name, str) or not _DEVICE.fullmatch(name) or f"{kind}={name}" in described:
            raise _BrokenError(f"devices: name {name!r}: must be there, once, of letters, digits and _.:-")
        described[f"{kind}={name}"] = _edits(values.get("containerEdits"))
    if not described:
        raise _BrokenError("devices: there are none")
    return _Spec(path, _edits(top.get("containerEdits")), described)


_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _edits(value: Any) -> Mapping[str, Any]:
    edits = _mapping(value or {}, "containerEdits", _EDITS)
    for name, kind in (("env", str), ("additionalGids", int), ("deviceNodes", dict), ("mounts", dict)):
        for item in _sequence(edits.get(name), name):
            if not isinstance(item, kind) or isinstance(item, bool):
                raise _BrokenError(f"{name}: {item!r} is of the wrong type")
    for node in edits.get("deviceNodes") or ():
        _mapping(node, "deviceNodes", _NODE)
    for mount in edits.get("mounts") or ():
        _mapping(mount, "mounts", _MOUNT)
    return edits


def _mapping(value: Any, where: str, keys: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _BrokenError(f"{where or 'the file'}: must be an object")
    if unknown := set(value) - set(keys):
        raise _BrokenError(f"{where}: unknown: {', '.join(sorted(map(str, unknown)))[:100]}")
    return value


def _sequence(value: Any, where: str) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _BrokenError(f"{where}: must be an array")
    return value


def _list(problems: Sequence[str]) -> str:
    return "".join(f"; {problem}" for problem in problems[:5])


# -- edits -------------------------------------------------------------------------------------------------------------


def _apply(edits: Mapping[str, Any], result: Edits, where: str) -> None:
    for name, why in _IMPOSSIBLE.items():
        if edits.get(name):
            raise Unimplemented(f"{where}.{name}: {why}")
    for item in edits.get("env") or ():
        name, separator, value = item.partition("=")
        if not name or not separator or "\0" in item:
            raise InvalidArgument(f"{where}.env: {item[:100]!r} must be NAME=VALUE")
        result.variables[name] = value.encode()
    for node in edits.get("deviceNodes") or ():
        for made in _nodes(node, f"{where}.deviceNodes"):
            result.nodes[made.container_path] = made
    for mount in edits.get("mounts") or ():
        made_mount = _mount(mount, f"{where}.mounts")
        result.mounts[os.path.normpath(made_mount.container_path)] = (f"{where}.mounts", made_mount)
    for gid in edits.get("additionalGids") or ():
        # 0 is ignored, says the specification.
        if gid:
            result.groups.add(_id(gid, f"{where}.additionalGids"))


def _nodes(node: Mapping[str, Any], where: str) -> list[Node]:
    path = str(node.get("path") or "")
    access = str(node.get("permissions") or "rwm")
    if access == "none":
        raise Unimplemented(f"{where}.permissions: 'none': Porto makes no node that can't be used")
    found = devices.find(str(node.get("hostPath") or path), path, access, where)
    mode, uid, gid = node.get("fileMode"), node.get("uid"), node.get("gid")
    if mode is not None and (not isinstance(mode, int) or not 0 <= mode <= 0o777):
        raise InvalidArgument(f"{where}.fileMode: {mode!r} must be permission bits")
    result = []
    for made in found:
        _check_kind(node, made.host_path, where)
        if mode is not None:
            made = replace(made, mode=f"{mode:o}")
        if uid is not None or gid is not None:
            bits = made.mode or devices.permissions(made.host_path)
            user, group = _id(uid or 0, f"{where}.uid"), _id(gid or 0, f"{where}.gid")
            made = replace(made, mode=bits, user=str(user), group=str(group))
        result.append(made)
    return result


def _check_kind(node: Mapping[str, Any], host_path: str, where: str) -> None:
    """Porto makes nodes like the host's: what the file says of them has to be so."""
    status = os.stat(host_path)
    letters = {"b": stat.S_ISBLK, "c": stat.S_ISCHR, "u": stat.S_ISCHR}
    kind = node.get("type") or ""
    numbers = (node.get("major"), node.get("minor"))
    if kind and (kind not in letters or not letters[kind](status.st_mode)):
        raise InvalidArgument(f"{where}.type: {host_path} is not of type {kind!r}")
    real = (os.major(status.st_rdev), os.minor(status.st_rdev))
    if any(number not in (None, is_) for number, is_ in zip(numbers, real, strict=True)):
        raise Unimplemented(
            f"{where}: {host_path} is {real[0]}:{real[1]}, and Porto makes no other nodes than the host's"
        )


def _mount(mount: Mapping[str, Any], where: str) -> pb.Mount:
    made = pb.Mount(host_path=str(mount.get("hostPath") or ""), container_path=str(mount.get("containerPath") or ""))
    for name in ("host_path", "container_path"):
        value = getattr(made, name)
        if not value.startswith("/") or ".." in value.split("/"):
            raise InvalidArgument(f"{where}.{name}: {value[:200]!r} must be an absolute path without '..'")
    if not os.path.exists(made.host_path):
        raise NotFound(f"{where}: {made.host_path[:200]} does not exist")
    options = [str(option) for option in mount.get("options") or ()]
    if mount.get("type") not in (None, "", "none", "bind") and not {"bind", "rbind"} & set(options):
        raise Unimplemented(f"{where}.type: {mount['type']!r}: only bind mounts can be had")
    for option in options:
        if option == "ro":
            made.readonly = True
        elif option in OPTIONS:
            made.mount_options.append(option)
        elif option.removeprefix("r") in _PROPAGATION:
            made.propagation = _PROPAGATION[option.removeprefix("r")]
        elif option not in ("rw", "bind", "rbind", "exec", "suid", "dev"):
            raise Unimplemented(f"{where}.options: {option[:40]!r}: nothing here can do this")
    return made


def _id(value: Any, where: str) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_ID:
        raise InvalidArgument(f"{where}: {value!r} is no id")
    return value
