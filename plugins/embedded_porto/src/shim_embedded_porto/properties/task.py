"""Properties of what a container executes: the command, its environment, how it stands to the node, its streams."""

from __future__ import annotations

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import capabilities, credentials, limits, streams, text
from shim_embedded_porto.container import Container, Stream
from shim_embedded_porto.errors import Fault, invalid_value, permission
from shim_embedded_porto.properties.base import Computed, Context, Property, Unsupported, Value, flag
from shim_embedded_porto.properties.rights import (
    Capabilities,
    Group,
    Seccomp,
    SeccompName,
    TaskCred,
    User,
    allowed_capabilities,
)
from shim_embedded_porto.settings import devices, ulimits
from shim_embedded_porto.settings.environment import Environment, digest
from shim_embedded_porto.settings.ulimits import Ulimit


def _set_command(ct: Container, command: str, argv: tuple[str, ...]) -> None:
    if max(len(command.encode()), sum(len(word.encode()) for word in argv)) > limits.COMMAND_MAX:
        raise invalid_value(f"Command too long, max {limits.COMMAND_MAX}")
    ct.command, ct.command_argv = command, argv
    ct.assigned.add("command")
    if argv:
        ct.assigned.add("command_argv")
    else:
        ct.assigned.discard("command_argv")


class Command(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return ct.command

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        _set_command(ct, value, ())

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        _set_command(ct, spec.command, ())

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.command = ct.command

    def start(self, ct: Container, ctx: Context) -> None:
        if ct.os_mode and "command" not in ct.assigned:
            ct.command = "/sbin/init"


class CommandArgv(Property):
    """The command word by word: nothing in it is expanded."""

    @staticmethod
    def _assign(ct: Container, argv: tuple[str, ...]) -> None:
        quoted = "".join("'" + word.replace("'", "'\\''") + "' " for word in argv)
        _set_command(ct, quoted, argv)

    def get(self, ct: Container, ctx: Context) -> str:
        return text.merge(ct.command_argv, "\t")

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        if len(value.encode()) > limits.COMMAND_MAX:
            raise invalid_value(f"Command too long, max {limits.COMMAND_MAX}")
        self._assign(ct, tuple(text.split(value, "\t")))

    def save(self, ct: Container, ctx: Context) -> str:
        return "\0".join(ct.command_argv)  # words may be empty, or begin with a blank

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        self._assign(ct, tuple(value.split("\0")))

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        number = self._index(index)
        if number >= len(ct.command_argv):
            raise Fault(pb.InvalidProperty, "Invalid index")
        return ct.command_argv[number]

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        number = self._index(index)
        if number > limits.COMMAND_MAX:
            raise invalid_value(f"Command too long, max {limits.COMMAND_MAX}")
        words = list(ct.command_argv) + [""] * (number + 1 - len(ct.command_argv))
        words[number] = value
        self._assign(ct, tuple(words))

    @staticmethod
    def _index(index: str) -> int:
        try:
            return text.parse_uint(index)
        except Fault:
            raise Fault(pb.InvalidProperty, "Invalid index") from None

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self._assign(ct, tuple(spec.command_argv.argv))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        if ct.command_argv:
            out.spec.command_argv.argv.extend(ct.command_argv)


class Env(Value):
    """``env``, and ``env_secret``, whose values nobody gets to see again."""

    def __init__(self, name: str, description: str, *, secret: bool) -> None:
        super().__init__(name, description)
        self._secret = secret

    def _own(self, ct: Container) -> Environment:
        return Environment.parse(getattr(ct, self.attribute), secret=self._secret)

    def get(self, ct: Container, ctx: Context) -> str:
        return self._own(ct).format()

    def save(self, ct: Container, ctx: Context) -> str:
        return str(getattr(ct, self.attribute))

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self.assign(ct, Environment.parse(value, secret=self._secret).format(show_secrets=True))

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        env = self._own(ct) if self._secret else ct.environment(ctx.porto.hostname)
        return env.get(index)

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        env = self._own(ct)
        env.set(index, value, secret=self._secret)
        self.assign(ct, env.format(show_secrets=True))

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        message: pb.TContainerEnv = getattr(spec, self.field)
        env = self._own(ct) if message.merge else Environment()
        for var in message.var:
            if var.HasField("value"):
                env.set(var.name, var.value, secret=self._secret)
            else:
                env.unset(var.name)
        self.assign(ct, env.format(show_secrets=True))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        message: pb.TContainerEnv = getattr(out.spec, self.field)
        message.SetInParent()
        for variable in self._own(ct) if self._secret else ct.environment(ctx.porto.hostname):
            if not variable.overwritten:
                continue
            entry = message.var.add(name=variable.name)
            if not variable.set:
                entry.unset = True
            elif variable.secret:
                entry.value = "<secret>"
                entry.salt, entry.hash = digest(variable.value)
            else:
                entry.value = variable.value


class Ulimits(Property):
    def get(self, ct: Container, ctx: Context) -> str:
        return ulimits.format_all(ct.ulimits.values())

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        ct.ulimits = ulimits.parse(value)
        ct.assigned.add(self.name)

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        return ct.ulimits[index].format() if index in ct.ulimits else ""

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        ct.ulimits = {**ct.ulimits, **ulimits.parse(f"{index}:{value}")}
        ct.assigned.add(self.name)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        wanted = dict(ct.ulimits) if spec.ulimit.merge else {}
        for entry in spec.ulimit.ulimit:
            if not ulimits.known(entry.type):
                raise invalid_value(f"Invalid ulimit: {entry.type}")
            soft = entry.soft if entry.HasField("soft") else ulimits.UNLIMITED
            hard = entry.hard if entry.HasField("hard") else ulimits.UNLIMITED
            wanted[entry.type] = Ulimit(entry.type, soft, hard)
        ct.ulimits = wanted
        ct.assigned.add(self.name)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.ulimit.SetInParent()
        for limit in ct.effective_ulimits():
            entry = out.spec.ulimit.ulimit.add(type=limit.name)
            if limit.soft < ulimits.UNLIMITED:
                entry.soft = limit.soft
            else:
                entry.unlimited = True
            if limit.hard < ulimits.UNLIMITED:
                entry.hard = limit.hard
            if limit.inherited:
                entry.inherited = True


class Cwd(Value):
    def get(self, ct: Container, ctx: Context) -> str:
        return ct.working_directory()

    def save(self, ct: Container, ctx: Context) -> str:
        return ct.cwd

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.cwd = ct.working_directory()

    def start(self, ct: Container, ctx: Context) -> None:
        if ct.os_mode and "cwd" not in ct.assigned:
            ct.cwd = "/"


class Umask(Value):
    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        # The message's number reads as octal: 22 is 022.
        self.assign(ct, text.parse_octal(str(spec.umask)))

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.umask = int(f"{ct.umask:o}")


# -- modes -------------------------------------------------------------------------------------------------------------


class VirtMode(Value):
    def set(self, ct: Container, value: str, ctx: Context) -> None:
        if value not in ("app", "os", "job", "host", "docker", "fuse"):
            raise invalid_value(f"Unknown: {value}")
        if value == "fuse":
            _enable_fuse(ct, True)
        ct.virt_mode = value if value in ("os", "job", "host") else "app"
        if ct.host_mode or ct.job_mode:
            ct.isolate = False
        ct.assigned.add(self.name)
        ct.sanitize_capabilities()

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.virt_mode, ctx)


def _check_isolate(ct: Container, value: bool) -> None:
    if value and (ct.host_mode or ct.job_mode):
        raise invalid_value("isolate=true incompatible with virt_mode")


def _check_userns(ct: Container, value: bool) -> None:
    if value and (ct.host_mode or ct.job_mode):
        raise invalid_value("userns=true incompatible with virt_mode")


def _enable_fuse(ct: Container, value: bool) -> None:
    if ct.fuse == value:
        return
    fuse = devices.parse_one(["/dev/fuse", "rw"], credentials.ROOT) if value else None
    ct.fuse = value
    others = tuple(dev for dev in ct.devices if dev.path_inside != "/dev/fuse")
    ct.devices = (*others, fuse) if fuse is not None else others
    ct.assigned.add("enable_fuse")


class EnableFuse(Value):
    def assign(self, ct: Container, value: bool) -> None:
        _enable_fuse(ct, value)


class CgroupFs(Value):
    def set(self, ct: Container, value: str, ctx: Context) -> None:
        if value not in ("none", "ro", "rw"):
            raise invalid_value(f"Unknown cgroupfs value: {value}")
        self.assign(ct, value)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.cgroupfs, ctx)

    def start(self, ct: Container, ctx: Context) -> None:
        if ct.cgroupfs == "rw":
            raise permission("Cgroup namespaces disabled in portod.conf: rw access to cgroupfs denied")


class Sysctl(Value):
    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        return ct.sysctl.get(index, "")

    def set_indexed(self, ct: Container, index: str, value: str, ctx: Context) -> None:
        rest = {name: old for name, old in ct.sysctl.items() if name != index}
        self.assign(ct, {**rest, index: value} if value else rest)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        values = dict(ct.sysctl) if spec.sysctl.merge else {}
        for entry in spec.sysctl.map:
            if entry.HasField("val"):
                values[entry.key] = entry.val
            else:
                values.pop(entry.key, None)
        self.assign(ct, values)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        out.spec.sysctl.SetInParent()
        for name in sorted(ct.sysctl):
            out.spec.sysctl.map.add(key=name, val=ct.sysctl[name])


def _check_oom_score(_ct: Container, value: int) -> None:
    if not -1000 <= value <= 1000:
        raise invalid_value("out of range")


class SessionInfo(Property):
    """``<kind> <id> <user>``."""

    def get(self, ct: Container, ctx: Context) -> str:
        return ct.session_info

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        words = value.split(" ")
        if value and len(words) != 3:
            raise Fault(pb.Unknown, f"Cannot parse {value}: expected 3 arguments")
        for word in words[:2] if value else ():
            try:
                text.parse_uint(word)
            except Fault as fault:
                raise Fault(pb.Unknown, f"Cannot convert to unsigned int {word}: {fault}") from None
        ct.session_info = value
        ct.assigned.add(self.name)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, spec.session_info, ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        if ct.session_info:
            out.spec.session_info = ct.session_info


# -- streams -----------------------------------------------------------------------------------------------------------


class StreamPath(Property):
    """``stdin_path`` and its like."""

    def __init__(self, stream: str, description: str) -> None:
        super().__init__(f"{stream}_path", description, stored=True)
        self._stream = stream

    def _of(self, ct: Container) -> Stream:
        stream: Stream = getattr(ct, self._stream)
        return stream

    def get(self, ct: Container, ctx: Context) -> str:
        return self._of(ct).path

    def set(self, ct: Container, value: str, ctx: Context) -> None:
        streams.set_path(self._of(ct), value, ctx.client)
        ct.assigned.add(self.name)

    def save(self, ct: Container, ctx: Context) -> str:
        stream = self._of(ct)
        return f"{stream.inode};{stream.device};{stream.offset};{stream.path}"

    def restore(self, ct: Container, value: str, ctx: Context) -> None:
        inode, device, offset, path = value.split(";", 3)
        stream = self._of(ct)
        stream.path, stream.outside = path, False
        stream.inode, stream.device, stream.offset = int(inode), int(device), int(offset)
        ct.assigned.add(self.name)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self.set(ct, getattr(spec, self.field), ctx)

    def dump(self, ct: Container, out: pb.TContainer, ctx: Context) -> None:
        setattr(out.spec, self.field, self._of(ct).path)

    def start(self, ct: Container, ctx: Context) -> None:
        if ct.os_mode and self._stream != "stdin" and self.name not in ct.assigned:
            self._of(ct).path = "/dev/null"


class StdoutLimit(Value):
    def set(self, ct: Container, value: str, ctx: Context) -> None:
        self._limit(ct, text.parse_size(value), ctx)

    def load(self, ct: Container, spec: pb.TContainerSpec, ctx: Context) -> None:
        self._limit(ct, spec.stdout_limit, ctx)

    def _limit(self, ct: Container, value: int, ctx: Context) -> None:
        if value > limits.STDOUT_LIMIT_MAX and not ctx.client.superuser:
            raise permission(f"Maximum limit is: {limits.STDOUT_LIMIT_MAX}")
        self.assign(ct, value)


class Output(Property):
    """``stdout`` and ``stderr``: what the command has written."""

    def __init__(self, stream: str, description: str) -> None:
        super().__init__(stream, description, read_only=True, runtime_only=True)

    def get(self, ct: Container, ctx: Context) -> str:
        return streams.read(getattr(ct, self.name), ct)

    def get_indexed(self, ct: Container, index: str, ctx: Context) -> str:
        return streams.read(getattr(ct, self.name), ct, index)

    def dump_indexed(self, ct: Container, index: str, out: pb.TContainer, ctx: Context) -> None:
        try:
            setattr(out.status, self.name, self.get_indexed(ct, index, ctx))
        except Fault:
            pass


def _offset(stream: str) -> Computed:
    return Computed(
        f"{stream}_offset",
        f"Offset of stored {stream}",
        lambda ct, _: getattr(ct, stream).offset,
        runtime_only=True,
    )


def _core_dumps() -> list[Property]:
    # portod.conf switches them on, and it is off by default.
    return [
        Unsupported("core_command", "Command for receiving core dump"),
        Unsupported("coredump_filter", "Coredump filter (hex)"),
    ]


PROPERTIES: list[Property] = [
    Command("command", "Command executed upon container start", stored=True),
    CommandArgv("command_argv", "Verbatim command line, format: argv0\\targv1\\t...", stored=True),
    Env("env", "Container environment variables: <name>=<value>; ...", secret=False),
    Env("env_secret", "Container secret environment variables: <name>=<value>; ...", secret=True),
    Ulimits(
        "ulimit",
        "Process limits: as|core|data|locks|memlock|nofile|nproc|stack: [soft]|unlimited [hard];... (see man prlimit)",
        stored=True,
        dynamic=True,
    ),
    Cwd("cwd", "Container working directory"),
    Umask("umask", "Set file mode creation mask", parse=text.parse_octal, show=text.format_octal),
    TaskCred("task_cred", "Credentials: uid gid groups..."),
    User("user", "Start command with given user", stored=True),
    Group("group", "Start command with given group", stored=True),
    Capabilities(
        "capabilities",
        "Limit capabilities in container: SYS_ADMIN;NET_ADMIN;... see man capabilities",
        "cap_limit",
        parse=capabilities.parse_leniently,
        show=capabilities.format_set,
        after=Container.sanitize_capabilities,
    ),
    Capabilities(
        "capabilities_ambient",
        "Raise capabilities in container: NET_BIND_SERVICE;SYS_PTRACE;...",
        "cap_ambient",
        parse=capabilities.parse,
        show=capabilities.format_set,
        after=Container.sanitize_capabilities,
    ),
    allowed_capabilities("capabilities_allowed", "Allowed capabilities in container"),
    allowed_capabilities("capabilities_ambient_allowed", "Allowed ambient capabilities in container (deprecated)"),
    Seccomp("seccomp", "Seccomp profile rules", stored=True),
    SeccompName("seccomp_name", "Seccomp profile", stored=True),
    VirtMode("virt_mode", "Virtualization mode: os|app|job|host"),
    flag(
        "isolate",
        "New pid/ipc/utc/env namespace",
        check=_check_isolate,
        after=Container.sanitize_capabilities,
    ),
    flag("userns", "New user namespace", check=_check_userns),
    flag("unshare_on_exec", "Call unshare(CLONE_NEWNS) right before exec()"),
    EnableFuse(
        "enable_fuse",
        "Aborts fuse connections and unmounts fuse filesystems",
        "fuse",
        parse=text.parse_bool,
        show=text.format_bool,
    ),
    CgroupFs("cgroupfs", "Cgroup fs: none|ro|rw"),
    Sysctl("sysctl", "Sysctl, format: name: value;...", parse=text.parse_map, show=text.format_map),
    Value(
        "oom_score_adj",
        "OOM score adjustment: -1000..1000",
        parse=lambda value: text.parse_int(value, -(1 << 31), (1 << 31) - 1, "int"),
        check=_check_oom_score,
    ),
    SessionInfo("session_info", "Session info, format: <kind> <id> <user>", stored=True),
    StreamPath("stdin", "Container standard input path"),
    StreamPath("stdout", "Container standard output path"),
    StreamPath("stderr", "Container standard error path"),
    StdoutLimit("stdout_limit", "Limit for stored stdout and stderr size", dynamic=True),
    _offset("stdout"),
    _offset("stderr"),
    Output("stdout", "Read stdout [[offset][:length]]"),
    Output("stderr", "Read stderr [[offset][:length]])"),
    *_core_dumps(),
]
