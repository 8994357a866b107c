"""From the CRI's configuration to Porto's: pure functions, no I/O. What can't be honoured is refused by field."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, Unimplemented
from shim_porto_runtime import capabilities, devices, mounts, namespaces, resources, users
from shim_porto_runtime import security as checks

KEEP_DEAD_S = 10 * 365 * 86400
"""Porto destroys dead containers after ``aging_time``, a day by default; kubelet decides when ours go."""

LABEL_ID = "CRI.id"
LABEL_SHIM = "CRI.shim"
"""Which shim made a container: one with this shim's mark and no record is an orphan."""

_CONTROLLERS = ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids")
"""Enabled from the start: Porto can't do it later, and what a container uses is told only by those of its own."""
_MAX_HOSTNAME = 64


def sandbox(
    name: str, sandbox_id: str, shim_id: str, config: pb.PodSandboxConfig, netns: str | None
) -> rpc_pb2.TContainerSpec:
    """The meta container that holds a pod's namespaces and cgroups.

    :param netns: name of its network namespace, seen from /run/netns; None: the host's.
    """
    security = config.linux.security_context
    # Without a PID namespace of its own Porto gives it none at all: what the pod shares then, init joins.
    isolate = security.namespace_options.pid != pb.NODE
    spec = rpc_pb2.TContainerSpec(name=name, isolate=isolate, enable_porto="none")
    # Children can't have more than their parent: whether one is privileged is not known yet.
    spec.capabilities.cap.extend(capabilities.NAMES)
    _net(spec, ("netns", netns) if netns else ("inherited",))
    if config.hostname and isolate:
        spec.hostname = config.hostname
    if security.privileged:
        devices.into_spec(devices.of_host(), spec)
    resources.into_spec(pod_resources(config), spec)
    spec.controllers.controller.extend(_CONTROLLERS)
    _labels(spec, sandbox_id, shim_id)
    return spec


def pod_resources(config: pb.PodSandboxConfig) -> pb.LinuxContainerResources:
    """What limits a pod as a whole: its resources and the overhead of its sandbox."""
    total = pb.LinuxContainerResources()
    total.CopyFrom(config.linux.resources)
    overhead = config.linux.overhead
    if total.memory_limit_in_bytes > 0:
        total.memory_limit_in_bytes += max(overhead.memory_limit_in_bytes, 0)
    if total.cpu_quota > 0 and overhead.cpu_quota > 0:
        period = total.cpu_period or resources.DEFAULT_PERIOD_US
        total.cpu_quota += overhead.cpu_quota * period // (overhead.cpu_period or resources.DEFAULT_PERIOD_US)
    # The node's cgroups are Porto's own: only what limits is taken over.
    total.oom_score_adj = 0
    return total


def pause(
    name: str, sandbox_id: str, shim_id: str, root: str, argv: Sequence[str], user: int = 0, group: int = 0
) -> rpc_pb2.TContainerSpec:
    """The pause process of a pod, inside all its namespaces.

    :param user: whom it runs as, by number. :param group: likewise.
    """
    # Not read-only: Porto has to make /proc and its like in an image that is a single program.
    spec = rpc_pb2.TContainerSpec(name=name, isolate=False, enable_porto="none", root=root)
    spec.command_argv.argv.extend(argv)
    spec.user, spec.group = str(user), str(group)
    spec.stdin_path = spec.stdout_path = spec.stderr_path = "/dev/null"
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
    nodes: Sequence[devices.Node],
    resolv_conf: str,
) -> rpc_pb2.TContainerSpec:
    """A container as it is created; what it runs is set when it starts.

    :param root: host path of its root volume. :param plan: its mounts. :param nodes: its devices.
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
    spec.resolv_conf = resolv_conf
    spec.controllers.controller.extend(_CONTROLLERS)
    spec.bind.bind.extend(plan.binds)
    devices.into_spec(nodes, spec)
    _labels(spec, container_id, shim_id)
    resources.into_spec(config.linux.resources, spec)
    return spec


def exec_(name: str, bounding: int) -> rpc_pb2.TContainerSpec:
    """A further process in a container: gone with the connection that made it.

    :param bounding: mask of the container's capabilities; Porto would give it others.
    """
    spec = rpc_pb2.TContainerSpec(name=name, weak=True, isolate=False, enable_porto="none")
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


def resolv_conf(dns: pb.DNSConfig, host: str) -> str:
    """The text of /etc/resolv.conf: the pod's, or the host's when the pod names no server, search or option.

    :raises InvalidArgument: a value that would add a line of its own.
    """
    lines = [f"nameserver {server}" for server in _words(dns.servers, "servers")]
    if dns.searches:
        lines.append("search " + " ".join(_words(dns.searches, "searches")))
    if dns.options:
        lines.append("options " + " ".join(_words(dns.options, "options")))
    return "\n".join([*lines, ""]) if lines else host


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
    if config.hostname and not all(c.isalnum() or c in "-._" for c in config.hostname):
        raise InvalidArgument(f"hostname: {config.hostname!r}: only letters, digits, '-', '_' and '.' are allowed")
    _absolute(config.log_directory, "log_directory", empty=True)
    if config.HasField("windows"):
        raise Unimplemented("windows: Porto runs Linux containers only")
    security = config.linux.security_context
    checks.check(security)
    for field in ("network", "pid", "ipc"):
        if getattr(security.namespace_options, field) == pb.TARGET:
            raise InvalidArgument(f"linux.security_context.namespace_options.{field}: TARGET is for containers")
    _check_userns(security.namespace_options)
    for name in ("run_as_user", "run_as_group"):
        if security.HasField(name):
            users.check_id(getattr(security, name).value, f"linux.security_context.{name}")
    for name in ("resources", "overhead"):
        resources.check(getattr(config.linux, name), f"linux.{name}")
    namespaces.check_sysctls(config)
    for index, mapping in enumerate(config.port_mappings):
        for port in ("container_port", "host_port"):
            if not 0 <= getattr(mapping, port) <= 65535:
                raise InvalidArgument(f"port_mappings[{index}].{port}: {getattr(mapping, port)} is not in 0..65535")


def check_container(config: pb.ContainerConfig) -> None:
    """Refuse what no container can have.

    :raises InvalidArgument: a field that is missing or malformed.   :raises Unimplemented: one Porto can't honour.
    """
    if not config.metadata.name:
        raise InvalidArgument("metadata.name: must not be empty")
    _printable(config.metadata.name, "metadata.name")
    if not config.image.image:
        raise InvalidArgument("image.image: must not be empty")
    if config.HasField("windows"):
        raise Unimplemented("windows: Porto runs Linux containers only")
    security = config.linux.security_context
    checks.check(security)
    if security.namespace_options.pid == pb.TARGET and not security.namespace_options.target_id:
        raise InvalidArgument("linux.security_context.namespace_options.target_id: TARGET needs a container")
    if security.namespace_options.ipc == pb.TARGET or security.namespace_options.network == pb.TARGET:
        raise InvalidArgument("linux.security_context.namespace_options: TARGET is for pid alone")
    _check_userns(security.namespace_options)
    resources.check(config.linux.resources)
    mounts.check(config.mounts)
    if config.stdin_once and not config.stdin:
        raise InvalidArgument("stdin_once: needs stdin")
    path = PurePosixPath(config.log_path)
    if path.is_absolute() or ".." in path.parts or "\0" in config.log_path:
        raise InvalidArgument(f"log_path: {config.log_path!r} must be a path below the sandbox's log_directory")


def _net(spec: rpc_pb2.TContainerSpec, option: tuple[str, ...]) -> None:
    spec.net.cfg.add(opt=option[0], arg=option[1:])


def _labels(spec: rpc_pb2.TContainerSpec, record_id: str, shim_id: str) -> None:
    spec.labels.map.add(key=LABEL_ID, val=record_id)
    spec.labels.map.add(key=LABEL_SHIM, val=shim_id)


def _check_userns(options: pb.NamespaceOption) -> None:
    userns = options.userns_options
    if options.HasField("userns_options") and userns.mode != pb.NODE:
        raise Unimplemented(
            "linux.security_context.namespace_options.userns_options: Porto can't map a pod's users to a range of the "
            "node's; leave hostUsers out"
        )


def _absolute(path: str, field: str, *, empty: bool = False) -> None:
    if not path and empty:
        return
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(f"{field}: {path!r} must be an absolute path")


def _printable(text: str, field: str) -> None:
    if any(ord(character) < 32 for character in text):
        raise InvalidArgument(f"{field}: must not contain control characters")


def _words(values: Iterable[str], field: str) -> list[str]:
    words = list(values)
    for word in words:
        if not word or any(character.isspace() or character in ";\0" for character in word):
            raise InvalidArgument(f"dns_config.{field}: {word!r} must be one word")
    return words
