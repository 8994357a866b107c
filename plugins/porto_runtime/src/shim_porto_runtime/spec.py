"""From the CRI's configuration to Porto's: pure functions, no I/O. What can't be honoured is refused by field."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, Unimplemented
from shim_porto_runtime import capabilities, devices, mounts, namespaces, pod_network, resources, users
from shim_porto_runtime import security as checks

KEEP_DEAD_S = 10 * 365 * 86400
"""Porto destroys dead containers after ``aging_time``, a day by default; kubelet decides when ours go."""

LABEL_ID = "CRI.id"
LABEL_SHIM = "CRI.shim"
"""Which shim made a container: one with this shim's mark and no record is an orphan."""

_CONTROLLERS = ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids")
"""Enabled from the start: Porto can't do it later, and what a container uses is told only by those of its own."""
_MAX_HOSTNAME = 64
_MAX_FILE_NAME_BYTES = 255
_HOSTNAME = re.compile(r"[A-Za-z0-9._-]*")

HANDLERS = frozenset({"", "porto"})
"""Runtime handlers that a pod and an image may name."""


def sandbox(
    name: str,
    sandbox_id: str,
    shim_id: str,
    config: pb.PodSandboxConfig,
    net: Sequence[str],
    nodes: Sequence[devices.Node],
    *,
    hugetlb: bool,
) -> rpc_pb2.TContainerSpec:
    """The meta container that holds a pod's namespaces and cgroups.

    :param net: whose network it is in, see :func:`pod_network.option`.
    :param nodes: devices its containers may have.
    :param hugetlb: see :func:`resources.into_spec`.
    """
    security = config.linux.security_context
    # Without a PID namespace of its own Porto gives it none at all: what the pod shares then, init joins.
    isolate = security.namespace_options.pid != pb.NODE
    spec = rpc_pb2.TContainerSpec(name=name, isolate=isolate, enable_porto="none")
    # Children can't have more than their parent: whether one is privileged is not known yet.
    spec.capabilities.cap.extend(capabilities.NAMES)
    _net(spec, net)
    if config.hostname and isolate:
        spec.hostname = config.hostname
    devices.into_spec(nodes, spec)
    resources.into_spec(resources.of_pod(config.linux.resources, config.linux.overhead), spec, hugetlb=hugetlb)
    spec.controllers.controller.extend([*_CONTROLLERS, *(["hugetlb"] if hugetlb else [])])
    _labels(spec, sandbox_id, shim_id)
    return spec


def pause(name: str, sandbox_id: str, shim_id: str, root: str, helper_directory: str) -> rpc_pb2.TContainerSpec:
    """The pause process of a pod, inside all its namespaces; what it runs is set when it starts."""
    spec = rpc_pb2.TContainerSpec(name=name, isolate=False, enable_porto="none", root=root)
    spec.stdin_path = spec.stdout_path = spec.stderr_path = "/dev/null"
    spec.capabilities.cap.extend(sorted(capabilities.INIT_NEEDS))
    spec.bind.bind.extend(mounts.Plan([mounts.helper(helper_directory)]).binds)
    devices.into_spec((), spec)
    spec.devices_explicit = True
    _net(spec, ("inherited",))
    _labels(spec, sandbox_id, shim_id)
    return spec


def container(
    name: str,
    container_id: str,
    shim_id: str,
    config: pb.ContainerConfig,
    root: str,
    plan: mounts.Plan,
    *,
    hugetlb: bool,
) -> rpc_pb2.TContainerSpec:
    """A container as it is created; what it runs is set when it starts.

    :param root: host path of its root volume. :param plan: its mounts.
    :param hugetlb: see :func:`resources.into_spec`.
    """
    security = config.linux.security_context
    spec = rpc_pb2.TContainerSpec(name=name, enable_porto="none", root=root, aging_time=KEEP_DEAD_S)
    if security.namespace_options.pid == pb.CONTAINER:
        # As an "os" container its command is PID 1 of the new namespace, where others have portoinit.
        spec.isolate = True
        spec.virt_mode = "os"
    else:
        spec.isolate = False
    _net(spec, ("inherited",))
    spec.user = spec.group = "root"
    spec.cwd = "/"
    bounding, _ = capabilities.wanted(security)
    spec.capabilities.cap.extend(sorted(bounding | capabilities.INIT_NEEDS))
    spec.resolv_conf = "keep"  # the pod's is mounted
    spec.controllers.controller.extend([*_CONTROLLERS, *(["hugetlb"] if hugetlb else [])])
    spec.bind.bind.extend(plan.binds)
    devices.into_spec((), spec)
    spec.devices_explicit = True  # otherwise it has those of the pod's other containers, too
    _labels(spec, container_id, shim_id)
    resources.into_spec(config.linux.resources, spec, hugetlb=hugetlb)
    return spec


def exec_(name: str, bounding: int, oom_score_adj: int) -> rpc_pb2.TContainerSpec:
    """A further process in a container: gone with the connection that made it.

    :param bounding: mask of the container's capabilities; Porto would give it others.
    :param oom_score_adj: the container's.
    """
    spec = rpc_pb2.TContainerSpec(name=name, weak=True, isolate=False, enable_porto="none")
    if oom_score_adj:
        spec.oom_score_adj = oom_score_adj
    spec.capabilities.cap.extend(sorted({*capabilities.names(bounding), *capabilities.INIT_NEEDS}))
    return spec


def image_volume(path: str, container_name: str, layers: Iterable[str], place: str) -> rpc_pb2.TVolumeSpec:
    """An image to be mounted into a container: as :func:`root_volume`, and read-only."""
    spec = root_volume(path, container_name, layers, place)
    spec.read_only = True
    del spec.links[:]
    spec.links.add(container=container_name)
    return spec


def root_volume(path: str, container_name: str, layers: Iterable[str], place: str) -> rpc_pb2.TVolumeSpec:
    """An overlay of an image's layers, the top one first, that lives as long as its container."""
    spec = rpc_pb2.TVolumeSpec(path=path, backend="overlay", layers=list(layers))
    if place:
        spec.place = place
    spec.links.add(container=container_name, target="/")
    return spec


def check_sandbox(config: pb.PodSandboxConfig) -> None:
    """Refuse what no sandbox can have.

    :raises InvalidArgument: a field that is missing or malformed.   :raises Unimplemented: one Porto can't honour.
    """
    for field in ("name", "namespace", "uid"):
        value = getattr(config.metadata, field)
        if not value:
            raise InvalidArgument(f"metadata.{field}: must not be empty")
        _printable(value, f"metadata.{field}")
    if len(config.hostname) > _MAX_HOSTNAME:
        raise InvalidArgument(f"hostname: longer than {_MAX_HOSTNAME} characters")
    if not _HOSTNAME.fullmatch(config.hostname):
        raise InvalidArgument(f"hostname: {config.hostname!r}: only letters, digits, '-', '_' and '.' are allowed")
    if config.log_directory:
        check_path(config.log_directory, "log_directory")
    namespaces.resolv_conf(config.dns_config, "")
    if config.HasField("windows"):
        raise Unimplemented("windows: Porto runs Linux containers only")
    security = config.linux.security_context
    checks.check(security)
    _check_namespaces(security.namespace_options)
    if pb.TARGET in (
        security.namespace_options.pid,
        security.namespace_options.network,
        security.namespace_options.ipc,
    ):
        raise InvalidArgument("linux.security_context.namespace_options: TARGET is for containers")
    users.check(security)
    checks.seccomp(security, ())
    for name in ("resources", "overhead"):
        resources.check(getattr(config.linux, name), f"linux.{name}")
    namespaces.check_sysctls(config)
    pod_network.limits(config.annotations)
    for index, mapping in enumerate(config.port_mappings):
        _check_port(mapping, f"port_mappings[{index}]")


def check_container(config: pb.ContainerConfig) -> None:
    """Refuse what no container can have.

    :raises InvalidArgument: a field that is missing or malformed.   :raises Unimplemented: one Porto can't honour.
    """
    if not config.metadata.name:
        raise InvalidArgument("metadata.name: must not be empty")
    _printable(config.metadata.name, "metadata.name")
    check_image(config.image, "image")
    if config.HasField("windows"):
        raise Unimplemented("windows: Porto runs Linux containers only")
    security = config.linux.security_context
    checks.check(security)
    _check_namespaces(security.namespace_options)
    if pb.TARGET in (security.namespace_options.network, security.namespace_options.ipc):
        raise InvalidArgument("linux.security_context.namespace_options: TARGET is for pid alone")
    users.check(security)
    resources.check(config.linux.resources)
    mounts.check(config.mounts)
    for index, mount in enumerate(config.mounts):
        if mount.HasField("image"):
            check_image(mount.image, f"mounts[{index}].image")
    if config.stdin_once and not config.stdin:
        raise InvalidArgument("stdin_once: needs stdin")
    path = PurePosixPath(config.log_path)
    too_long = any(len(part.encode()) > _MAX_FILE_NAME_BYTES for part in path.parts)
    if path.is_absolute() or ".." in path.parts or str(path) != (config.log_path or ".") or too_long:
        raise InvalidArgument(f"log_path: {config.log_path!r} must be a path below the sandbox's log_directory")
    _printable(config.log_path, "log_path")


def _net(spec: rpc_pb2.TContainerSpec, option: Sequence[str]) -> None:
    spec.net.cfg.add(opt=option[0], arg=option[1:])


def _labels(spec: rpc_pb2.TContainerSpec, record_id: str, shim_id: str) -> None:
    spec.labels.map.add(key=LABEL_ID, val=record_id)
    spec.labels.map.add(key=LABEL_SHIM, val=shim_id)


def _check_namespaces(options: pb.NamespaceOption) -> None:
    field = "linux.security_context.namespace_options"
    for name in ("network", "pid", "ipc"):
        mode = getattr(options, name)
        if mode not in pb.NamespaceMode.values():
            raise InvalidArgument(f"{field}.{name}: {mode} is none")
        if mode == pb.CONTAINER and name != "pid":
            raise Unimplemented(f"{field}.{name}: containers of a pod share this namespace; make it POD")
    if (options.pid == pb.TARGET) != bool(options.target_id):
        raise InvalidArgument(f"{field}.target_id: names the container for TARGET, and goes with it alone")
    if not options.HasField("userns_options"):
        return
    users_ = options.userns_options
    if users_.mode != pb.NODE:
        raise Unimplemented(
            f"{field}.userns_options: Porto can't map a pod's users to a range of the node's; leave hostUsers out"
        )
    if users_.uids or users_.gids:
        raise InvalidArgument(f"{field}.userns_options: NODE has no mappings")


def _check_port(mapping: pb.PortMapping, field: str) -> None:
    if mapping.protocol not in pb.Protocol.values():
        raise InvalidArgument(f"{field}.protocol: {mapping.protocol} is none")
    for name in ("container_port", "host_port"):
        if not 0 <= getattr(mapping, name) <= 65535:
            raise InvalidArgument(f"{field}.{name}: {getattr(mapping, name)} is not in 0..65535")
    if mapping.host_port and not mapping.container_port:
        raise InvalidArgument(f"{field}.container_port: host_port needs it")
    if mapping.host_ip:
        try:
            ipaddress.ip_address(mapping.host_ip)
        except ValueError as err:
            raise InvalidArgument(f"{field}.host_ip: {mapping.host_ip[:80]!r} is no IP address") from err


def check_image(image: pb.ImageSpec, field: str) -> None:
    """Refuse what names no image.

    :raises InvalidArgument: no name, or a runtime handler that there isn't.
    """
    if not image.image:
        raise InvalidArgument(f"{field}.image: must not be empty")
    check_handler(image.runtime_handler, f"{field}.runtime_handler")


def check_handler(name: str, field: str) -> None:
    """:raises InvalidArgument: there is no such runtime handler."""
    if name not in HANDLERS:
        raise InvalidArgument(f"{field}: no handler {name[:80]!r}; there is only 'porto'")


def check_path(path: str, field: str) -> None:
    """Refuse what is no path of the host's.

    :raises InvalidArgument: not absolute, or not to be written in one line.
    """
    if not path.startswith("/"):
        raise InvalidArgument(f"{field}: {path!r} must be an absolute path")
    _printable(path, field)


def _printable(text: str, field: str) -> None:
    if any(ord(character) < 32 for character in text):
        raise InvalidArgument(f"{field}: must not contain control characters")
