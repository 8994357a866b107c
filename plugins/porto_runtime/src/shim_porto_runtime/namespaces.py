"""What the containers of a pod share besides its network: IPC namespace, /dev/shm, hostname, and the files that say it.

::

    StateDir/sandboxes/<id>/ipc, uts        namespaces, pinned by bind mounts
                            shm/            the tmpfs that is /dev/shm in every container
                            hosts, hostname, resolv.conf    bound over those in /etc

Porto shares an IPC namespace only together with the PID namespace, so the pod's is made here, and portoshim-init joins
it. Namespaced sysctls are set on the way.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument
from shim_porto_runtime import linux
from shim_porto_runtime.removal import remove_tree

logger = logging.getLogger("shim.porto_runtime.namespaces")

SHM_SIZE = "64m"
_MAX_RESOLV_CONF_BYTES = 64 * 1024
_NETNS_OF_PORTO = "/run/netns"
_SYSCTL_PART = re.compile(r"[a-zA-Z0-9_.@-]+")
_HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"

# Sysctls that belong to a namespace a pod has for itself, by kind; all others are the node's. The hostname is not here:
# it is a field of its own.
_IPC_SYSCTLS = frozenset(
    {
        "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax",
        "kernel.shmmni", "kernel.shm_rmid_forced",
    }
)  # fmt: skip


def netns_name(path: str) -> str:
    """What Porto calls a network namespace: its path, seen from the one directory Porto looks in.

    A namespace pinned elsewhere is reached by a symbolic link to its directory: Porto takes no ``..``.
    """
    directory, name = os.path.split(path)
    directory = os.path.realpath(directory)
    if directory == os.path.realpath(_NETNS_OF_PORTO):
        return name
    link = f"portoshim-{hashlib.sha256(directory.encode()).hexdigest()[:16]}"
    os.makedirs(_NETNS_OF_PORTO, exist_ok=True)
    with suppress(FileExistsError):
        os.symlink(directory, f"{_NETNS_OF_PORTO}/{link}")
    return f"{link}/{name}"


def check_sysctls(config: pb.PodSandboxConfig) -> None:
    """Refuse sysctls that would reach beyond the pod.

    :raises InvalidArgument: names the sysctl and why.
    """
    options = config.linux.security_context.namespace_options
    for name, value in config.linux.sysctls.items():
        field = f"linux.sysctls[{name[:80]!r}]"
        parts = sysctl_parts(name)
        if len(parts) < 2 or not all(_SYSCTL_PART.fullmatch(part) and part.strip(".") for part in parts):
            raise InvalidArgument(f"{field}: is no name of a sysctl")
        if any(ord(character) < 32 and character != "\t" for character in value):
            raise InvalidArgument(f"{field}: the value must be one line")
        kind = _kind(name)
        if kind is None:
            raise InvalidArgument(f"{field}: not namespaced: it would change the whole node")
        if getattr(options, kind) == pb.NODE:
            raise InvalidArgument(f"{field}: the pod is in the node's {kind} namespace: it would change the whole node")


def sysctl_parts(name: str) -> list[str]:
    """The path of a sysctl below /proc/sys. As sysctl(8) has it, the first separator decides what the other one means:
    ``net.ipv4.conf.eth0/100.forwarding`` and ``net/ipv4/conf/eth0.100/forwarding`` are the same.
    """
    first = next((character for character in name if character in "./"), ".")
    parts = name.split(first)
    return parts if first == "/" else [part.replace("/", ".") for part in parts]


def _kind(name: str) -> str | None:
    parts = sysctl_parts(name)
    if parts[0] == "net":
        return "network"
    return "ipc" if ".".join(parts) in _IPC_SYSCTLS or parts[:2] == ["fs", "mqueue"] else None


def begin(directory: Path, config: pb.PodSandboxConfig) -> Callable[[], None]:
    """Begin to make the directory of a sandbox with its namespaces and files.

    The sysctls of the network come later, see :func:`set_network_sysctls`.

    :returns: waits until all is made. It raises InvalidArgument for a sysctl that this kernel doesn't have, or a value
        it doesn't take.
    """
    directory.mkdir(mode=0o711, exist_ok=True)
    hostname = config.hostname or os.uname().nodename
    _write(directory / "hostname", hostname + "\n")
    _write(directory / "resolv.conf", resolv_conf(config.dns_config, _host_resolv_conf()))
    _write(directory / "hosts", _HOSTS + (f"127.0.1.1\t{hostname}\n" if config.hostname else ""))
    options = config.linux.security_context.namespace_options
    if options.ipc != pb.NODE:
        shm = directory / "shm"
        shm.mkdir(exist_ok=True)
        flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
        linux.mount("shm", str(shm), "tmpfs", flags, f"mode=1777,size={SHM_SIZE}")
    sysctls = {name: value for name, value in config.linux.sysctls.items() if _kind(name) != "network"}
    return linux.begin_in_thread(
        lambda: _make_namespaces(directory, hostname, own_ipc=options.ipc != pb.NODE, sysctls=sysctls)
    )


def _make_namespaces(directory: Path, hostname: str, *, own_ipc: bool, sysctls: Mapping[str, str]) -> None:
    linux.unshare(linux.CLONE_NEWUTS | (linux.CLONE_NEWIPC if own_ipc else 0))
    linux.sethostname(hostname)
    _set_sysctls(sysctls)
    for name in ("ipc", "uts"):
        target = directory / name
        target.touch()
        linux.mount(f"/proc/thread-self/ns/{name}", str(target), "none", linux.MS_BIND)


def set_network_sysctls(config: pb.PodSandboxConfig, netns: str) -> None:
    """Set a pod's sysctls of the network, in the namespace that it has by now.

    :param netns: its path.   :raises InvalidArgument: as of :func:`begin`.
    """
    sysctls = {name: value for name, value in config.linux.sysctls.items() if _kind(name) == "network"}

    def enter_and_set() -> None:
        linux.setns(netns, linux.CLONE_NEWNET)
        _set_sysctls(sysctls)

    if sysctls:
        linux.in_thread(enter_and_set)


def _set_sysctls(sysctls: Mapping[str, str]) -> None:
    """In the namespaces of the calling thread."""
    for name, value in sysctls.items():
        try:
            with open("/".join(("/proc/sys", *sysctl_parts(name))), "w") as file:
                file.write(value)
        except OSError as err:
            message = f"linux.sysctls[{name[:80]!r}]: {value[:80]!r} can't be set: {err.strerror}"
            raise InvalidArgument(message) from err


def remove(directory: Path) -> None:
    """Take back what :func:`begin` made, whole or in part."""
    with ExitStack() as stack:
        stack.callback(_remove_directory, directory)
        for name in ("ipc", "uts", "shm"):
            stack.callback(linux.unmount, str(directory / name))


def _remove_directory(directory: Path) -> None:
    for what in remove_tree(directory):
        logger.warning("%s; it is left as it is", what)


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


def _words(values: Iterable[str], field: str) -> list[str]:
    words = list(values)
    for word in words:
        if not word or not word.isprintable() or any(character in " ;#" for character in word):
            raise InvalidArgument(f"dns_config.{field}: {word[:80]!r} must be one word")
    return words


def _host_resolv_conf() -> str:
    try:
        with Path("/etc/resolv.conf").open("rb") as file:
            return file.read(_MAX_RESOLV_CONF_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)
