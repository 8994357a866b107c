"""Mistakes: each makes a container configuration impossible; the refusal has to name the field, and have that code."""

from __future__ import annotations

from dataclasses import dataclass, replace

from google.protobuf import text_format
from hypothesis import strategies as st

from tests.e2e.cases import CDI_KIND, COMMAND, PODS, Case, Draw, Surroundings
from tests.e2e.wishes import WISHES

INVALID, NEVER, MISSING = "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND"
_SECURITY = "linux {{ security_context {{ {} }} }}"
_RESOURCES = "linux {{ resources {{ {} }} }}"
_USER = ("run_as_user", "run_as_group", "run_as_username")


@dataclass(frozen=True)
class Mistake:
    """One of them."""

    field: str
    code: str
    change: str
    """What is merged into the configuration, in protobuf's text format; ``SOURCE`` and the like are filled in."""
    instead_of: tuple[str, ...] = ()
    """Fields of the security context that it takes the place of."""
    pods: tuple[str, ...] = PODS
    """Where it is one."""
    privileged: bool = True
    """Whether it is one in a privileged container, too."""

    def apply(self, case: Case) -> None:
        if case.pod not in self.pods or (case.security.privileged and not self.privileged):
            return
        for name in self.instead_of:
            case.security.ClearField(name)
            case.joins = case.joins and name != "namespace_options"
        around = case.around
        text = self.change
        for word, value in (
            ("SOURCE", around.sources["plain"]), ("FILE", around.file), ("IMAGE", around.data_image),
            ("BROKEN", around.directory / "broken.json"), ("KIND", CDI_KIND),
        ):  # fmt: skip
            text = text.replace(word, str(value))
        text_format.Merge(text, case.config)
        case.mistakes.append((self.field, self.code))


def _command(first: str) -> str:
    """Another command; what there is goes on as its arguments."""
    return f'command: "{first}"'


def _security(field: str, code: str, change: str, *instead_of: str, pods: tuple[str, ...] = PODS) -> Mistake:
    return Mistake(f"linux.security_context.{field}", code, _SECURITY.format(change), instead_of, pods)


def _user(field: str, change: str) -> Mistake:
    return _security(field, INVALID, change, *_USER)


def _namespace(field: str, code: str, change: str, pods: tuple[str, ...] = PODS) -> Mistake:
    wanted = f"namespace_options {{ {change} }}"
    return _security(f"namespace_options.{field}", code, wanted, "namespace_options", pods=pods)


def _profile(field: str, code: str, change: str) -> Mistake:
    return _security(field, code, f"{field} {{ {change} }}", field)


def _file(reference: str) -> Mistake:
    """A seccomp profile that can't be read: nobody reads it for a privileged container."""
    made = _profile("seccomp", INVALID, f'profile_type: Localhost localhost_ref: "{reference}"')
    return replace(made, privileged=False)


def _mount(field: str, code: str, change: str) -> Mistake:
    fields = change
    if "container_path" not in fields:
        fields += ' container_path: "/mistake"'
    if "host_path" not in fields and " image {" not in f" {fields}":
        fields += ' host_path: "SOURCE"'
    return Mistake(f".{field}", code, f"mounts {{ {fields} }}")


def _device(field: str, code: str, change: str) -> Mistake:
    return Mistake(f".{field}", code, f"devices {{ {change} }}")


def _resource(field: str, code: str, change: str) -> Mistake:
    return Mistake(f"linux.resources.{field}", code, _RESOURCES.format(change))


def _unified(code: str, name: str, value: str) -> Mistake:
    return _resource("unified", code, f'unified {{ key: "{name}" value: "{value}" }}')


MISTAKES = (
    Mistake("image.image", INVALID, 'image { image: "" }'),
    Mistake("image.image", MISSING, 'image { image: "nowhere.example/x:1" }'),
    Mistake("image.runtime_handler", INVALID, 'image { runtime_handler: "kata" }'),
    Mistake("windows", NEVER, "windows { }"),
    Mistake("args", INVALID, r'args: "a\000b"'),
    Mistake("args", INVALID, f'args: "{"x" * 200_000}"'),
    Mistake("envs", INVALID, 'envs { key: "A=B" }'),
    Mistake("envs", INVALID, 'envs { value: "x" }'),
    Mistake("envs", INVALID, r'envs { key: "A" value: "a\000b" }'),
    Mistake("envs", INVALID, f'envs {{ key: "A" value: "{"x" * 200_000}" }}'),
    Mistake("working_dir", INVALID, 'working_dir: "/a/../b"'),
    Mistake("working_dir", INVALID, 'working_dir: "/proc/self/fd/7"'),
    Mistake("working_dir", INVALID, 'working_dir: "/bin/busybox/x"'),
    Mistake("working_dir", INVALID, f'working_dir: "/{"x" * 5000}"'),
    Mistake("stdin_once", INVALID, "stdin: false stdin_once: true"),
    Mistake("stop_signal", INVALID, "stop_signal: 99"),
    Mistake("log_path", INVALID, 'log_path: "../x"'),
    Mistake("log_path", INVALID, 'log_path: "/x"'),
    Mistake("log_path", INVALID, r'log_path: "a\nb"'),
    Mistake("log_path", INVALID, f'log_path: "{"x" * 256}"'),
    Mistake("metadata.name", INVALID, r'metadata { name: "a\nb" }'),
    # -- users and rights
    _user("run_as_group", "run_as_group { value: 5 }"),
    _user("run_as_user", "run_as_user { value: -1 }"),
    _user("run_as_user", "run_as_user { value: 2147483648 }"),
    _user("run_as_group", "run_as_user { value: 1 } run_as_group { value: 9223372036854775807 }"),
    _user("run_as_username", 'run_as_username: "nobody-here"'),
    _user("run_as_username", 'run_as_username: "web:100"'),
    _user("run_as_username", 'run_as_user { } run_as_username: "web"'),
    _security("supplemental_groups", INVALID, "supplemental_groups: -5"),
    _security("supplemental_groups_policy", INVALID, "supplemental_groups_policy: 5"),
    _security("capabilities.add_capabilities", INVALID, 'capabilities { add_capabilities: "FLY" }'),
    _security("capabilities.drop_capabilities", INVALID, 'capabilities { drop_capabilities: "" }'),
    _security("privileged", INVALID, "privileged: true", pods=("plain",)),
    _security("selinux_options", NEVER, 'selinux_options { level: "s0" }'),
    _profile("apparmor", NEVER, 'profile_type: Localhost localhost_ref: "x"'),
    _profile("apparmor", INVALID, "profile_type: 9"),
    _security("apparmor_profile", NEVER, 'apparmor_profile: "localhost/x"'),
    _security("apparmor_profile", INVALID, 'apparmor_profile: "x"'),
    _profile("seccomp", INVALID, 'profile_type: Unconfined localhost_ref: "/x"'),
    _profile("seccomp", INVALID, "profile_type: 7"),
    _file("/not/there"),
    _file("BROKEN"),
    _security("masked_paths", INVALID, 'masked_paths: "relative"'),
    _security("readonly_paths", INVALID, 'readonly_paths: "/a/../b"'),
    # -- namespaces
    _namespace("network", NEVER, "network: CONTAINER"),
    _namespace("ipc", NEVER, "ipc: CONTAINER"),
    _namespace("pid", INVALID, "pid: 4"),
    _namespace("target_id", INVALID, "pid: TARGET"),
    _namespace("target_id", INVALID, 'pid: CONTAINER target_id: "a"'),
    _namespace("userns_options", NEVER, "userns_options { }"),
    *(_namespace(kind, INVALID, f"{kind}: NODE", ("plain", "privileged")) for kind in ("network", "pid", "ipc")),
    # -- mounts and devices
    _mount("container_path", INVALID, 'container_path: "relative"'),
    _mount("container_path", INVALID, 'container_path: "/"'),
    _mount("container_path", INVALID, 'container_path: "/proc/self"'),
    _mount("container_path", INVALID, 'container_path: "/proc/1/root"'),
    _mount("container_path", INVALID, 'container_path: "/dev/stdin/x"'),
    _mount("container_path", INVALID, 'container_path: "/bin/busybox"'),
    _mount("container_path", INVALID, 'container_path: "/bin/busybox/x"'),
    _mount("container_path", INVALID, 'container_path: "/sys/not-there"'),
    _mount("container_path", INVALID, 'container_path: "/.portoshim"'),
    Mistake(".container_path", INVALID, 'mounts { container_path: "/2" host_path: "SOURCE" } ' * 2),
    Mistake(
        ".container_path",
        INVALID,
        'mounts { container_path: "/ro" host_path: "SOURCE" readonly: true }'
        ' mounts { container_path: "/ro/not/there" host_path: "SOURCE" }',
    ),
    _mount("host_path", INVALID, 'host_path: ""'),
    _mount("host_path", INVALID, 'host_path: "FILE/x"'),
    _mount("propagation", INVALID, "propagation: PROPAGATION_BIDIRECTIONAL"),
    _mount("propagation", INVALID, "propagation: 3"),
    _mount("recursive_read_only", INVALID, "recursive_read_only: true"),
    _mount("uidMappings", NEVER, "uidMappings { length: 1 }"),
    _mount("gidMappings", NEVER, "gidMappings { length: 1 }"),
    _mount("mount_options", NEVER, 'mount_options: "noexec" mount_options: "sync"'),
    _mount("image", MISSING, 'image { image: "nowhere.example/x:1" } readonly: true'),
    _mount("image.image", INVALID, "image { } readonly: true"),
    _mount("readonly", INVALID, 'image { image: "IMAGE" }'),
    _mount("image_sub_path", MISSING, 'image { image: "IMAGE" } readonly: true image_sub_path: "no"'),
    _mount("image_sub_path", INVALID, 'image { image: "IMAGE" } readonly: true image_sub_path: "../x"'),
    _mount("image_sub_path", INVALID, 'image_sub_path: "x"'),
    _device("host_path", INVALID, 'host_path: "/dev/none" container_path: "/dev/none"'),
    _device("host_path", NEVER, 'host_path: "FILE" container_path: "/dev/file"'),
    _device("permissions", INVALID, 'host_path: "/dev/fuse" container_path: "/dev/f" permissions: "x"'),
    _device("container_path", NEVER, 'host_path: "/dev/fuse" container_path: "/fuse"'),
    _device("container_path", INVALID, 'host_path: "/dev/fuse" container_path: "/dev/null"'),
    Mistake("CDI_devices", INVALID, 'CDI_devices { name: "x" }'),
    Mistake("CDI_devices", MISSING, 'CDI_devices { name: "KIND=none" }'),
    Mistake("CDI_devices", NEVER, 'CDI_devices { name: "KIND=bad" }'),
    Mistake("annotations", INVALID, 'annotations { key: "cdi.k8s.io/y" value: "x" }'),
    # -- resources
    _resource("memory_limit_in_bytes", INVALID, "memory_limit_in_bytes: 4096"),
    _resource("memory_swap_limit_in_bytes", NEVER, "memory_swap_limit_in_bytes: 1"),
    _resource("cpu_quota", INVALID, "cpu_quota: 5"),
    _resource("cpu_period", INVALID, "cpu_period: 10000000"),
    _resource("cpu_shares", INVALID, "cpu_shares: -2"),
    _resource("cpuset_cpus", INVALID, 'cpuset_cpus: "0-99999"'),
    _resource("cpuset_mems", INVALID, 'cpuset_mems: "x"'),
    _resource("oom_score_adj", INVALID, "oom_score_adj: -1001"),
    _resource("hugepage_limits", NEVER, 'hugepage_limits { page_size: "1GB" limit: 1 }'),
    _unified(NEVER, "io.max", "8:0 rbps=1"),
    _unified(NEVER, "memory.high", "1"),
    _unified(INVALID, "pids.max", "-1"),
    _unified(INVALID, "cpu.max", "0 100000"),
)


class WrongCommand(Mistake):
    """One that can't be run takes the place of the one that there is."""

    def apply(self, case: Case) -> None:
        del case.config.command[:]
        super().apply(case)
        case.config.args.extend(COMMAND)


COMMANDS = tuple(WrongCommand("exec: ", INVALID, _command(word)) for word in ("no-such-program", "/etc", "/not/there"))


@st.composite
def cases(draw: Draw, around: Surroundings) -> Case:
    """A configuration, more often than not without a mistake."""
    case = Case(around, draw(st.sampled_from(PODS)))
    case.config.metadata.name = "any"
    case.config.image.image = around.image
    case.config.log_path = "container.log"
    case.config.command.extend(COMMAND)
    for wish in draw(st.lists(st.sampled_from(WISHES), unique=True, max_size=9)):
        wish(draw, case)
    if draw(st.integers(0, 2)) == 0:
        for mistake in draw(st.lists(st.sampled_from((*MISTAKES, *COMMANDS)), unique=True, min_size=1, max_size=2)):
            mistake.apply(case)
    return case
