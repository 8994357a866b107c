"""From the CRI's configuration to Porto's: pure functions, no I/O. What can't be honoured is refused by field."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, Unimplemented
from shim_porto_runtime import capabilities
from shim_porto_runtime.process import HELPER_DIRECTORY

KEEP_DEAD_S = 10 * 365 * 86400
"""Porto destroys dead containers after ``aging_time``, a day by default; kubelet decides when ours go."""

LABEL_ID = "CRI.id"
LABEL_SHIM = "CRI.shim"
"""Which shim made a container: one with this shim's mark and no record is an orphan."""

_CONTROLLERS = ("blkio", "cpu", "cpuacct", "devices", "freezer", "memory", "pids")
_MAX_HOSTNAME = 64


def sandbox(
    name: str, sandbox_id: str, shim_id: str, config: pb.PodSandboxConfig, netns: str | None
) -> rpc_pb2.TContainerSpec:
    """The meta container that holds a pod's namespaces and cgroups.

    :param netns: name of its network namespace below /run/netns; None: the host's.
    """
    spec = rpc_pb2.TContainerSpec(name=name, isolate=True, enable_porto="none")
    # Children can't have more than their parent: whether one is privileged is not known yet.
    spec.capabilities.cap.extend(capabilities.NAMES)
    _net(spec, ("netns", netns) if netns else ("inherited",))
    if config.hostname:
        spec.hostname = config.hostname
    spec.controllers.controller.extend(_CONTROLLERS)
    _labels(spec, sandbox_id, shim_id)
    return spec


def pause(name: str, sandbox_id: str, shim_id: str, root: str, argv: Sequence[str]) -> rpc_pb2.TContainerSpec:
    """The pause process of a pod, inside all its namespaces."""
    # Not read-only: Porto has to make /proc and its like in an image that is a single program.
    spec = rpc_pb2.TContainerSpec(name=name, isolate=False, enable_porto="none", root=root)
    spec.command_argv.argv.extend(argv)
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
    helper_directory: str,
    resolv_conf: str,
) -> rpc_pb2.TContainerSpec:
    """A container as it is created; what it runs is set when it starts.

    :param root: host path of its root volume.
    :param helper_directory: host directory with portoshim-init and its FIFOs.
    """
    security = config.linux.security_context
    spec = rpc_pb2.TContainerSpec(name=name, enable_porto="none", root=root, aging_time=KEEP_DEAD_S)
    if security.namespace_options.pid == pb.POD:
        spec.isolate = False
    else:
        # As an "os" container its command is PID 1 of the new namespace, where others have portoinit.
        spec.isolate = True
        spec.virt_mode = "os"
    _net(spec, ("inherited",))
    spec.user = spec.group = "root"
    spec.cwd = "/"
    bounding, _ = capabilities.wanted(security)
    spec.capabilities.cap.extend(sorted(bounding | capabilities.INIT_NEEDS))
    spec.root_readonly = security.readonly_rootfs
    spec.resolv_conf = resolv_conf
    spec.controllers.controller.extend(_CONTROLLERS)
    spec.bind.bind.add(source=helper_directory, target=HELPER_DIRECTORY, flag=["ro", "nosuid", "exec"])
    for index, mount in enumerate(config.mounts):
        spec.bind.bind.append(_bind(mount, f"mounts[{index}]"))
    _labels(spec, container_id, shim_id)
    _resources(spec, config.linux.resources)
    return spec


def exec_(name: str) -> rpc_pb2.TContainerSpec:
    """A further process in a container: gone with the connection that made it."""
    return rpc_pb2.TContainerSpec(name=name, weak=True, isolate=False, enable_porto="none")


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
    options = config.linux.security_context.namespace_options
    for field in ("pid", "ipc"):
        if getattr(options, field) in (pb.NODE, pb.TARGET):
            raise Unimplemented(
                f"linux.security_context.namespace_options.{field}: only POD and CONTAINER are supported"
            )
    for index, mapping in enumerate(config.port_mappings):
        for port in ("container_port", "host_port"):
            if not 0 <= getattr(mapping, port) <= 65535:
                raise InvalidArgument(f"port_mappings[{index}].{port}: {getattr(mapping, port)} is not in 0..65535")
    if config.linux.sysctls:
        raise Unimplemented("linux.sysctls: not supported yet")


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
    for field in ("selinux_options", "seccomp", "apparmor"):
        if security.HasField(field) and getattr(security, field) != pb.SecurityProfile(profile_type="Unconfined"):
            raise Unimplemented(f"linux.security_context.{field}: not supported yet")
    options = security.namespace_options
    if options.pid in (pb.NODE, pb.TARGET):
        raise Unimplemented("linux.security_context.namespace_options.pid: only POD and CONTAINER are supported")
    for field in ("masked_paths", "readonly_paths"):
        if getattr(security, field):
            raise Unimplemented(f"linux.security_context.{field}: not supported yet")
    for field in ("devices", "CDI_devices", "tty", "stdin"):
        if getattr(config, field):
            raise Unimplemented(f"{field}: not supported yet")
    path = PurePosixPath(config.log_path)
    if path.is_absolute() or ".." in path.parts or "\0" in config.log_path:
        raise InvalidArgument(f"log_path: {config.log_path!r} must be a path below the sandbox's log_directory")


def _net(spec: rpc_pb2.TContainerSpec, option: tuple[str, ...]) -> None:
    spec.net.cfg.add(opt=option[0], arg=option[1:])


def _labels(spec: rpc_pb2.TContainerSpec, record_id: str, shim_id: str) -> None:
    spec.labels.map.add(key=LABEL_ID, val=record_id)
    spec.labels.map.add(key=LABEL_SHIM, val=shim_id)


def _bind(mount: pb.Mount, field: str) -> rpc_pb2.TContainerBindMount:
    _absolute(mount.container_path, f"{field}.container_path")
    if mount.container_path.strip("/") == "":
        raise InvalidArgument(f"{field}.container_path: can't be the root directory")
    _absolute(mount.host_path, f"{field}.host_path")
    if mount.propagation == pb.PROPAGATION_BIDIRECTIONAL:
        raise Unimplemented(f"{field}.propagation: PROPAGATION_BIDIRECTIONAL is not supported yet")
    for name in ("recursive_read_only", "selinux_relabel", "uidMappings", "gidMappings", "mount_options"):
        if getattr(mount, name):
            raise Unimplemented(f"{field}.{name}: not supported yet")
    if mount.HasField("image"):
        raise Unimplemented(f"{field}.image: not supported yet")
    flags = ["rec", "ro" if mount.readonly else "rw"]
    if mount.propagation == pb.PROPAGATION_PRIVATE:
        flags.append("private")
    return rpc_pb2.TContainerBindMount(source=mount.host_path, target=mount.container_path, flag=flags)


def _resources(spec: rpc_pb2.TContainerSpec, resources: pb.LinuxContainerResources) -> None:
    """Limits. Porto's guarantees are left alone: a CRI request is a share, not a promise."""
    if resources.memory_limit_in_bytes < 0 or resources.cpu_quota < -1 or resources.cpu_period < 0:
        raise InvalidArgument("linux.resources: memory_limit_in_bytes, cpu_quota and cpu_period must not be negative")
    if resources.memory_limit_in_bytes:
        spec.memory_limit = resources.memory_limit_in_bytes
    if resources.cpu_quota > 0:
        period_us = resources.cpu_period or 100_000
        spec.cpu_limit = resources.cpu_quota / period_us
        spec.cpu_period = period_us * 1000
    if resources.cpu_shares:
        # CRI's shares and Porto's weight are both relative to 1024 and 1.
        spec.cpu_weight = min(max(resources.cpu_shares / 1024, 0.01), 100.0)
    if resources.cpuset_cpus:
        spec.cpu_set.list = resources.cpuset_cpus


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
