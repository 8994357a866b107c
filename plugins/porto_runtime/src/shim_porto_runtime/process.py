"""What runs in a container, from the CRI's config and the image's.

A process starts as portoshim-init (``init/init.c``), which sets what Porto has no property for and then becomes it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument
from shim_porto_runtime import capabilities
from shim_porto_runtime.users import User

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_WORD_BYTES = 128 * 1024 - 1
"""What Linux takes for one argument or variable (execve(2))."""

HELPER_DIRECTORY = "/.portoshim"
"""Where a container sees the directory with portoshim-init and its FIFOs, read-only."""

INIT = f"{HELPER_DIRECTORY}/init"

ENVIRONMENT = "env"
"""The file in the helper directory that init takes the environment from: Porto's own property trims values."""

SECCOMP = "seccomp"
"""The file in it that holds the filter."""

_JOINS = {"ipc": "-I", "uts": "-N", "pid": "-P"}
_ENV_NAME = re.compile(r"[^=\0]+")


class ImageConfig(Protocol):
    """What this module needs of an image's configuration (OCI image spec, config)."""

    @property
    def entrypoint(self) -> Sequence[str]: ...
    @property
    def cmd(self) -> Sequence[str]: ...
    @property
    def env(self) -> Sequence[str]: ...
    @property
    def working_dir(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Process:
    """A process and its surroundings, as they are recorded for a container and used again for every exec in it."""

    argv: tuple[str, ...]
    cwd: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    bounding: int
    """Capability mask."""
    ambient: int = 0
    no_new_privs: bool = False
    tty: bool = False
    has_term: bool = False
    """The environment names a kind of terminal."""
    join: tuple[str, ...] = ()
    """Options of init by which every process of the container gets where it belongs: namespaces, the seccomp filter."""
    setup: tuple[str, ...] = ()
    """Options by which the first one prepares the container: mounts."""

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Process:
        fixed = dict(values)
        fixed["argv"] = tuple(fixed["argv"])
        for name in ("groups", "join", "setup"):
            fixed[name] = tuple(fixed[name])
        return cls(**fixed)


def build(config: pb.ContainerConfig, image: ImageConfig, user: User) -> Process:
    """The main process of a container.

    :raises InvalidArgument: a field that can't be honoured, by name.
    """
    security = config.linux.security_context
    bounding, ambient = capabilities.wanted(security)
    return Process(
        argv=_text(command(config, image), "command"),
        cwd=_directory(config.working_dir, "working_dir") or _directory(image.working_dir, "WorkingDir of the image"),
        uid=user.uid,
        gid=user.gid,
        groups=user.groups,
        bounding=capabilities.mask(bounding),
        ambient=capabilities.mask(ambient),
        no_new_privs=security.no_new_privs,
        tty=config.tty,
    )


def command(config: pb.ContainerConfig, image: ImageConfig) -> list[str]:
    """``command`` replaces ENTRYPOINT and CMD, ``args`` replaces CMD (CRI, ContainerConfig).

    :raises InvalidArgument: neither config nor image names a command.
    """
    for field in ("command", "args"):
        _text(getattr(config, field), field)
    from_image = [*image.entrypoint, *(config.args or image.cmd)]
    argv = [*config.command, *config.args] if config.command else from_image
    if not argv or not argv[0]:
        raise InvalidArgument("command: empty, and the image has neither ENTRYPOINT nor CMD; set command")
    return argv


def environment(config: pb.ContainerConfig, image: ImageConfig, user: User, hostname: str) -> dict[str, bytes]:
    """The image's variables, then the config's, a later one replacing an earlier one of the same name.

    :raises InvalidArgument: a name or value that no environment can hold.
    """
    variables = {"PATH": DEFAULT_PATH.encode(), "HOSTNAME": hostname.encode(), "HOME": user.home.encode()}
    if config.tty:
        variables["TERM"] = b"xterm"
    for item in image.env:
        name, separator, value = item.partition("=")
        # An image may hold anything; what can't be a variable has never been one in any runtime.
        if separator and name and "\0" not in item:
            variables[name] = value.encode("utf-8", "surrogateescape")
    for pair in config.envs:
        size = len(pair.key.encode()) + 1 + len(pair.value)
        if not _ENV_NAME.fullmatch(pair.key) or b"\0" in pair.value or size > MAX_WORD_BYTES:
            raise InvalidArgument(f"envs[{pair.key[:64]!r}]: no environment can hold this")
        variables[pair.key] = pair.value
    return variables


def environment_file(variables: Mapping[str, bytes]) -> bytes:
    """An environment as init reads it."""
    return b"".join(name.encode() + b"=" + value + b"\0" for name, value in variables.items())


def for_exec(process: Process, argv: Iterable[str], *, tty: bool) -> Process:
    """A further process in the same surroundings.

    :raises InvalidArgument: there is no command.
    """
    command = _text(argv, "cmd")
    if not command or not command[0]:
        raise InvalidArgument("cmd: must not be empty")
    return dataclasses.replace(process, argv=command, tty=tty, setup=())


def into_spec(process: Process, spec: rpc_pb2.TContainerSpec, fifo: str, wait: str = "") -> None:
    """Have a Porto container run a process by way of portoshim-init.

    :param fifo: name of the FIFO in the helper directory on which init reports whether the command could be run.
    :param wait: name of the FIFO on which it waits before it does anything else; empty: it doesn't.
    """
    spec.user = "root"
    spec.group = "root"
    spec.cwd = "/"
    spec.command_argv.argv.extend([INIT, *init_options(process, fifo, wait), "--", *process.argv])


def init_options(process: Process, fifo: str, wait: str = "") -> list[str]:
    """The options of portoshim-init for a process."""
    options = ["-e", f"{HELPER_DIRECTORY}/{fifo}"]
    if wait:
        options += ["-w", f"{HELPER_DIRECTORY}/{wait}"]
    options += ["-E", f"{HELPER_DIRECTORY}/{ENVIRONMENT}"]
    if process.tty and not process.has_term:
        options += ["-v", "TERM=xterm"]
    options += [*process.join, *process.setup]
    if process.cwd:
        options += ["-d", process.cwd]
    options += ["-m", "22", "-u", str(process.uid), "-g", str(process.gid)]
    options += ["-G", ",".join(str(gid) for gid in process.groups)]
    options += ["-b", f"{process.bounding:x}"]
    if process.ambient:
        options += ["-a", f"{process.ambient:x}"]
    if process.no_new_privs:
        options.append("-n")
    return options


def join_options(namespaces: Iterable[str], *, has_filter: bool, flags: int) -> tuple[str, ...]:
    """The options by which a process gets where it belongs.

    :param namespaces: files in the helper directory: ipc, uts, pid.
    :param flags: how the seccomp filter is loaded (SECCOMP_FILTER_FLAG_*).
    """
    options: list[str] = []
    for name in namespaces:
        options += [_JOINS[name], f"{HELPER_DIRECTORY}/{name}"]
    if has_filter:
        options += ["-S", f"{HELPER_DIRECTORY}/{SECCOMP}"]
        if flags:
            options += ["-f", str(flags)]
    return tuple(options)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that nobody but root reads."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def _text(argv: Iterable[str], field: str) -> tuple[str, ...]:
    words = tuple(argv)
    if any("\0" in word for word in words):
        raise InvalidArgument(f"{field}: must not contain a NUL byte")
    if any(len(word.encode()) > MAX_WORD_BYTES for word in words):
        raise InvalidArgument(f"{field}: a word has more than {MAX_WORD_BYTES} bytes, which no program can be given")
    return words


def _directory(path: str, field: str) -> str:
    """A working directory as it will be entered inside the container.

    Paths through /proc would reach what the container's init has open (CVE-2024-21626).
    """
    if not path:
        return ""
    if not path.startswith("/"):
        path = "/" + path
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in path:
        raise InvalidArgument(f"{field}: {path!r} must not contain '..' or NUL")
    if parts[:1] == ["proc"] and len(parts) > 1:
        raise InvalidArgument(f"{field}: {path!r} must not lie below /proc")
    return "/" + "/".join(parts)
